"""All gradients of a model in one buffer, for compressors that need the full gradient."""

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
        self._spans = dict(zip(self._names, zip(self._offsets, sizes, strict=True), strict=True))
        self._flat: Tensor | None = None

    def join(self, parts: Sequence[Gradients]) -> Gradients:
        """A copy of all parts, which hold each layer once and have one loss scale."""
        dtype = reduce(torch.promote_types, (part.flat.dtype for part in parts))
        if self._flat is None or self._flat.dtype != dtype:
            values = sum(count for _, count in self._spans.values())
            self._flat = torch.empty(values, dtype=dtype, device=parts[0].flat.device)
        for joined, own in self._pairs(self._flat, parts):
            joined.copy_(own)
        absent = frozenset().union(*(part.absent for part in parts))
        return Gradients(self._flat, self._names, self._offsets, parts[0].loss_scale, absent=absent)

    def split(self, joined: Gradients, parts: Sequence[Gradients]) -> None:
        """The inverse of `join`: copy the layers back into their parts."""
        for averaged, own in self._pairs(joined.flat, parts):
            own.copy_(averaged)

    def _pairs(self, flat: Tensor, parts: Sequence[Gradients]) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of each layer: in the joined buffer, and in the part's own."""
        for part in parts:
            for name, own_at in zip(part.names, part.offsets, strict=True):
                at, count = self._spans[name]
                yield flat[at : at + count], part.flat[own_at : own_at + count]
