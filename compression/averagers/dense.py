"""Averagers that send float32 as it is, or nothing at all."""

from ..gradients import Gradients
from ..network.collectives import Collectives
from .base import Stateless


class Dense(Stateless):
    """All-reduce as it is: 2 (W - 1) / W x bytes of N. Bit-identical to DDP without a hook."""

    lossless = True

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self.encoded_bytes = 0

    def average_(self, gradients: Gradients, step: int) -> None:
        self.encoded_bytes += gradients.flat.nbytes
        gradients.flat.mul_(1.0 / self.collectives.world_size)  # as DDP: multiplied, and before the sum
        self.collectives.sum_(gradients.flat)


class Sanity(Stateless):
    """Sends nothing, and every gradient is zero.

    The negative control (training must not learn) and the upper bound of what compression can save.
    """

    lossless = False
    encoded_bytes = 0

    def average_(self, gradients: Gradients, step: int) -> None:
        gradients.flat.zero_()
