"""Averaging of a random fraction of all values."""

from collections.abc import Sequence

import numpy as np
import torch

from ..codecs.sparsifiers import RandomK
from ..gradients import Gradients
from ..layers import Layer
from ..network.collectives import Collectives
from ..randomness import stream_keys
from .base import Averager, Sent, all_reduced

_HOP = 3  # of the stream of positions; quantized averaging draws from 1 and 2


class RandomKAverager(Averager):
    """The mean over ranks at random positions, unscaled, and zero elsewhere: one all-reduce of float32.

    The positions are those of `RandomK` in every layer, new in each step and the same on all ranks: their stream names
    rank 0 whoever draws. So the values are all that travels, and the network can add them.
    """

    def __init__(self, codec: RandomK, layers: Sequence[Layer], collectives: Collectives, seed: int) -> None:
        self.codec, self.collectives, self.seed = codec, collectives, seed
        self.layers = {layer.name: layer for layer in layers}

    def average_(self, gradients: Gradients, step: int) -> None:
        if not gradients.names:
            return
        flat = gradients.flat
        layers = [self.layers[name] for name in gradients.names]
        keys = stream_keys(self.seed, step, np.array([layer.index for layer in layers]), _HOP, rank=0)
        streams = zip(layers, gradients.offsets, keys.tolist(), strict=True)
        positions = torch.cat([at + self.codec.positions(layer.numel, key, flat.device) for layer, at, key in streams])
        sample = flat[positions] * (1.0 / self.collectives.world_size)
        self._encoded_bytes += sample.nbytes
        self.collectives.sum_(sample)
        for layer, at in zip(layers, gradients.offsets, strict=True):
            flat[at : at + layer.numel].zero_()
        flat[positions] = sample

    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        if not layers:
            return Sent()
        return all_reduced(4 * sum(self.codec.kept(layer.numel) for layer in layers), world_size)
