"""Averaging of the messages of any codec."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..codecs.base import FLOAT32, Codec, Floats, decoded
from ..gradients import Gradients
from ..layer_state import LayerState
from ..layers import Layer
from ..network.collectives import Collectives
from ..randomness import stream_key
from .base import Averager, Sent, gathered

_HOP = 1  # of the streams of random numbers


class OneHop(Averager):
    """Everyone's encoded gradients in one gather, at (W - 1) x encoded bytes a rank.

    It takes any codec, one per layer, and asks nothing of its messages but their length. Each rank decodes all
    messages and adds them up in rank order, so that all end with the same bits. Layers that are not compressed travel
    in the same message, as float32 or as `dense` has it.

    With error feedback (Karimireddy et al. 2019, arXiv:1901.09847) an encoding's error is added to the next gradient.
    Residuals stay bounded only where the codec is a contraction: |v - decoded| < |v|.
    """

    def __init__(
        self,
        codec_of: Callable[[Layer], Codec],
        layers: Sequence[Layer],
        collectives: Collectives,
        seed: int,
        error_feedback: bool = False,
        dense: Floats = FLOAT32,
    ) -> None:
        self.collectives, self.seed = collectives, seed
        self.layers = {layer.name: layer for layer in layers}
        self.codecs: dict[str, Codec] = {
            layer.name: codec_of(layer) if layer.compressed else dense for layer in layers
        }
        self._sizes = {layer.name: layer.numel for layer in layers}
        self._residual = LayerState({layer.name: layer.numel for layer in layers if layer.compressed})
        self.states = {"residual": self._residual} if error_feedback else {}

    def average_(self, gradients: Gradients, step: int) -> None:
        network = self.collectives
        message = torch.cat([self._encode(name, values, step) for name, values in gradients.layers(self._sizes)])
        self._encoded_bytes += message.nbytes
        received = network.gather(message, [len(message)] * network.world_size)
        inverse_world_size = 1.0 / network.world_size
        for rank, sent in enumerate(received.view(network.world_size, -1)):
            at = 0
            for name, values in gradients.layers(self._sizes):
                nbytes = self.codecs[name].wire_bytes(len(values))
                own = sent[at : at + nbytes].clone()  # where it lies, its floats may not be aligned
                seed = self._seed(name, step, rank)
                part = decoded(self.codecs[name], own[None], len(values), seed)[0] * inverse_world_size
                values.copy_(part) if rank == 0 else values.add_(part)
                at += nbytes

    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        message = sum(self.codecs[layer.name].wire_bytes(layer.numel) for layer in layers)
        return gathered(message, world_size)

    def _seed(self, name: str, step: int, rank: int) -> int:
        return stream_key(self.seed, step, self.layers[name].index, _HOP, rank)

    def _encode(self, name: str, values: Tensor, step: int) -> Tensor:
        """This rank's message of one layer, uint8 [wire_bytes]; its error becomes the pending residual."""
        codec, layer = self.codecs[name], self.layers[name]
        seed = self._seed(name, step, self.collectives.rank)
        if not self.states or not layer.compressed:
            return codec.encode(values[None], seed)[0]
        residual, pending = self._residual.allocate(values.device, [name])
        span = self._residual.span(name)
        compensated = values + residual[span]
        wire = codec.encode(compensated[None], seed)  # which may be the same memory, as float32's is
        torch.sub(compensated, decoded(codec, wire, len(values), seed)[0], out=pending[span])
        return wire[0]
