"""Warm-up: the first steps uncompressed, while gradients are large and change fast."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..gradients import Gradients
from ..streams import run_all
from .base import Averager, Begin
from .dense import Dense


class WarmUp:
    """The first steps in float32, then another averager."""

    def __init__(self, inner: Averager, dense: Dense, steps: int) -> None:
        self.inner, self.dense, self.steps = inner, dense, steps
        self.lossless = False
        self._compressed = False

    @property
    def encoded_bytes(self) -> int:
        return self.inner.encoded_bytes + self.dense.encoded_bytes

    @property
    def widths(self) -> Mapping[str, int]:
        return self.inner.widths

    def set_widths(self, widths: Mapping[str, int]) -> None:
        self.inner.set_widths(widths)

    @property
    def without_momentum(self) -> frozenset[str]:
        return self.inner.without_momentum

    def average_(self, gradients: Gradients, step: int) -> None:
        run_all(self.expect(gradients, step)(gradients))

    def expect(self, gradients: Gradients, step: int) -> Begin:
        self._compressed = step >= self.steps
        return (self.inner if self._compressed else self.dense).expect(gradients, step)

    def settle(self, applied: Tensor | bool) -> None:
        if self._compressed:
            self.inner.settle(applied)

    def commit(self, finite: Mapping[str, Tensor]) -> None:
        if self._compressed:
            self.inner.commit(finite)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)
