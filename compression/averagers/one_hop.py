"""Averaging of what any codec makes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codecs.base import Codec, Float32
from ..gradients import Gradients
from ..layer_state import LayerState
from ..layers import Layer
from ..network.collectives import Collectives
from ..randomness import stream_key
from .base import Plain

_HOP = 1  # of the streams of random numbers


class OneHop(Plain):
    """Everyone's encoded gradients in one gather, at (W - 1) x encoded bytes a rank.

    It takes any codec, one per layer, and asks nothing of its messages but their length. Each rank decodes all
    messages and adds them up in rank order, so that all end with the same bits. Layers that are not compressed travel
    as float32 in the same message.

    With error feedback (Karimireddy et al. 2019, arXiv:1901.09847) what an encoding lost is added to the next gradient.
    Residuals stay bounded only where the codec is a contraction: |v - decoded| < |v|.
    """

    lossless = False

    def __init__(
        self,
        codec_of: Callable[[Layer], Codec],
        layers: Sequence[Layer],
        collectives: Collectives,
        seed: int,
        error_feedback: bool = False,
    ) -> None:
        self.collectives, self.seed = collectives, seed
        self.encoded_bytes = 0
        self.layers = {layer.name: layer for layer in layers}
        self.codecs: dict[str, Codec] = {
            layer.name: codec_of(layer) if layer.compressed else Float32() for layer in layers
        }
        remembered = [layer for layer in layers if layer.compressed and error_feedback]
        self._residual = LayerState({layer.name: layer.numel for layer in remembered})

    def average_(self, gradients: Gradients, step: int) -> None:
        network = self.collectives
        message = torch.cat([self._encode(name, values, step) for name, values in self._parts(gradients)])
        self.encoded_bytes += message.nbytes
        received = network.gather(message, [len(message)] * network.world_size)
        inverse_world_size = 1.0 / network.world_size
        for rank, sent in enumerate(received.view(network.world_size, -1)):
            at = 0
            for name, values in self._parts(gradients):
                nbytes = self.codecs[name].wire_bytes(len(values))
                own = sent[at : at + nbytes].clone()  # where it lies, its floats may not be aligned
                part = self.codecs[name].decode(own[None], len(values))[0] * inverse_world_size
                values.copy_(part) if rank == 0 else values.add_(part)
                at += nbytes

    def settle(self, applied: Tensor | bool) -> None:
        self._residual.settle(applied)

    def state_dict(self) -> dict[str, Any]:
        return {"residual": self._residual.state_dict()} if self._residual.spans else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state and not self._residual.spans:
            raise ValueError("the checkpoint holds residuals, and `error_feedback` is off")
        self._residual.load_state_dict(state.get("residual", {}))

    def _parts(self, gradients: Gradients) -> list[tuple[str, Tensor]]:
        """Each layer's gradient, flat."""
        return [
            (name, gradients.flat[at : at + self.layers[name].numel])
            for name, at in zip(gradients.names, gradients.offsets, strict=True)
        ]

    def _encode(self, name: str, values: Tensor, step: int) -> Tensor:
        """This rank's message of one layer, and what it leaves to be remembered. uint8 [wire_bytes]."""
        codec, layer = self.codecs[name], self.layers[name]
        seed = stream_key(self.seed, step, layer.index, _HOP, self.collectives.rank)
        if name not in self._residual.spans:
            return codec.encode(values[None], seed)[0]
        residual, pending = self._residual.allocate(values.device, [name])
        here = self._residual.span(name)
        compensated = torch.add(values, residual[here], out=pending[here])
        wire = codec.encode(compensated[None], seed)
        compensated -= codec.decode(wire, len(values))[0]
        return wire[0]
