"""Warm-up: the first steps uncompressed, while gradients are large and change fast."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..gradients import Gradients
from ..layers import Layer
from ..streams import run_all
from .base import Averager, Averaging, Sent


class WarmUp(Averager):
    """The first steps by an averager that encodes nothing, then by another.

    What it promises before its first step is the other's; `overlaps` is then that of the averager whose turn it is.
    """

    def __init__(self, inner: Averager, dense: Averager, steps: int) -> None:
        self.inner, self.dense, self.steps = inner, dense, steps
        self.widths, self.without_momentum = inner.widths, inner.without_momentum
        self.overlaps = inner.overlaps
        self.states = inner.states
        self._compressed = False

    @property
    def encoded_bytes(self) -> int:
        return self.inner.encoded_bytes + self.dense.encoded_bytes

    def set_widths(self, widths: Mapping[str, int]) -> None:
        self.inner.set_widths(widths)

    def average_(self, gradients: Gradients, step: int) -> None:
        run_all(self.post(gradients, step)(gradients))

    def post(self, gradients: Gradients, step: int) -> Averaging:
        self._compressed = step >= self.steps
        averager = self.inner if self._compressed else self.dense
        self.overlaps = averager.overlaps
        return averager.post(gradients, step)

    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        return self.inner.sent(layers, world_size)

    def encoded_bytes_at(self, layers: Sequence[Layer], bits: int, world_size: int) -> list[int]:
        return self.inner.encoded_bytes_at(layers, bits, world_size)

    def settle(self, applied: Tensor | bool, layers: Collection[str] | None = None) -> None:
        if self._compressed:
            self.inner.settle(applied, layers)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)
