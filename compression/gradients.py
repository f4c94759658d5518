"""Gradients: what hooks catch, averagers average, and recorders record."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gradients:
    """Gradients of some layers in one flat buffer: layer `names[i]` begins at `offsets[i]`.

    `flat` is contiguous, float32 and without the loss scale; those that lossless averagers get may have any
    floating-point type, and `loss_scale` in them.
    """

    flat: Tensor
    names: tuple[str, ...]
    offsets: tuple[int, ...]
    loss_scale: float | Tensor = 1.0
