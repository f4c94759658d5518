"""Averagers that send every value as a number of its own, or nothing at all."""

from collections.abc import Sequence

import torch

from ..gradients import Gradients
from ..layers import Layer
from ..network.collectives import Collectives
from .base import Averager, Sent, all_reduced


class Dense(Averager):
    """All-reduce as it is: 2 (W - 1) / W x bytes of N. Bit-identical to DDP without a hook."""

    lossless = True

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives

    def average_(self, gradients: Gradients, step: int) -> None:
        self._encoded_bytes += gradients.flat.nbytes
        gradients.flat.mul_(1.0 / self.collectives.world_size)  # as DDP: multiplied, and before the sum
        self.collectives.sum_(gradients.flat)

    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        return all_reduced(4 * sum(layer.numel for layer in layers), world_size)


class RoundedDense(Averager):
    """All-reduce of float32 rounded to bfloat16: 2 (W - 1) / W x 2 bytes a value.

    The network adds up bfloat16 in its own way, rounding as it goes.
    """

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives

    def average_(self, gradients: Gradients, step: int) -> None:
        rounded = gradients.flat.mul_(1.0 / self.collectives.world_size).to(torch.bfloat16)
        self._encoded_bytes += rounded.nbytes
        self.collectives.sum_(rounded)
        gradients.flat.copy_(rounded)

    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        return all_reduced(2 * sum(layer.numel for layer in layers), world_size)


class Sanity(Averager):
    """Sends nothing, and every gradient is zero.

    The negative control (training must not learn) and the upper bound of what compression can save.
    """

    def average_(self, gradients: Gradients, step: int) -> None:
        gradients.flat.zero_()

    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        return Sent()
