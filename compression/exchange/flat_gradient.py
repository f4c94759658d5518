"""All gradients of a model as one buffer, where they are exchanged at once."""

import itertools
from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from ..gradients import Gradients
from ..layers import Layer


class FlatGradient:
    """One buffer of all layers: the compressed ones side by side in the model's order, then the others.

    Parts of several types meet in the type that holds them all.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        ordered = sorted(layers, key=lambda layer: not layer.compressed)
        sizes = [layer.numel for layer in ordered]
        self._names = tuple(layer.name for layer in ordered)
        self._offsets = tuple(itertools.accumulate(sizes[:-1], initial=0))
        self._places = dict(zip(self._names, zip(self._offsets, sizes, strict=True), strict=True))
        self._flat: Tensor | None = None

    def join(self, parts: Sequence[Gradients]) -> Gradients:
        """A copy of all parts, which hold each layer once and have one loss scale."""
        dtype = reduce(torch.promote_types, (part.flat.dtype for part in parts))
        if self._flat is None or self._flat.dtype != dtype:
            values = sum(count for _, count in self._places.values())
            self._flat = torch.empty(values, dtype=dtype, device=parts[0].flat.device)
        for here, there in self._pairs(self._flat, parts):
            here.copy_(there)
        return Gradients(self._flat, self._names, self._offsets, parts[0].loss_scale)

    def split(self, joined: Gradients, parts: Sequence[Gradients]) -> None:
        """The inverse of `join`: copy the layers back to where they came from."""
        for here, there in self._pairs(joined.flat, parts):
            there.copy_(here)

    def _pairs(self, flat: Tensor, parts: Sequence[Gradients]) -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts:
            for name, at in zip(part.names, part.offsets, strict=True):
                here, count = self._places[name]
                yield flat[here : here + count], part.flat[at : at + count]
