"""Gradients: the flat buffers that hooks catch, averagers average, and recorders record."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gradients:
    """Gradients of some layers in one flat buffer: layer `names[i]` begins at `offsets[i]`.

    `flat` is contiguous, float32 and without the loss scale; those that lossless averagers get may have any
    floating-point type, and `loss_scale` in them.

    `unused` are those that this rank's step does not use, whose values are zeros; None where all are used on all ranks.
    `absent` are those that got no gradient in this rank's step, and whose zeros travel all the same.
    """

    flat: Tensor
    names: tuple[str, ...]
    offsets: tuple[int, ...]
    loss_scale: float | Tensor = 1.0
    unused: frozenset[str] | None = None
    absent: frozenset[str] = frozenset()

    def layers(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
        """(name, values) of each layer, flat views; `sizes` are numbers of values by name."""
        for name, at in zip(self.names, self.offsets, strict=True):
            yield name, self.flat[at : at + sizes[name]]

    def unscaled(self) -> "Gradients":
        """The same in float32 and without loss scale; they share the buffer where it is both."""
        flat, scale = self.flat.to(torch.float32), self.loss_scale
        unscaled = flat if is_unit_scale(scale) else flat / scale
        return replace(self, flat=unscaled, loss_scale=1.0)

    @staticmethod
    def packed(values: Mapping[str, Tensor], loss_scale: float | Tensor = 1.0) -> "Gradients":
        """A copy of layers, flat, side by side."""
        ends = list(itertools.accumulate((each.numel() for each in values.values()), initial=0))
        return Gradients(torch.cat(list(values.values())), tuple(values), tuple(ends[:-1]), loss_scale)


def is_unit_scale(scale: float | Tensor) -> bool:
    """Whether the loss scale is known to be 1; one on the device is not looked at."""
    return isinstance(scale, float) and scale == 1.0


def not_finite(flat: Tensor, views: list[Tensor]) -> list[Tensor]:
    """Whether each view of `flat` holds a NaN or an infinity: bool scalars on the device, not waited for."""
    if flat.device.type == "cuda":
        full = [view if view.numel() else flat.new_zeros(1) for view in views]
        largest = torch.stack(torch._foreach_norm(full, float("inf")))  # a launch for each layer takes longer
        return list((~torch.isfinite(largest)).unbind())
    found = torch.zeros(1)
    if flat.dtype == torch.float32:  # the fastest look there is at all values: it multiplies them by 1
        torch._amp_foreach_non_finite_check_and_unscale_([flat], found, torch.ones(1))
    if flat.dtype == torch.float32 and not found:
        return [found[0].bool()] * len(views)
    return [~torch.isfinite(view).all() for view in views]
