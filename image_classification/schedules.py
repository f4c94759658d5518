"""Learning-rate schedules: functions from epoch to value, after a linear warmup."""

from __future__ import annotations

from collections.abc import Callable

Schedule = Callable[[int], float]


def schedule(name: str, *, lr: float, epochs: int, warmup: int = 0) -> Schedule:
    """The schedule of that name: SCHEDULES lists them."""
    raise NotImplementedError
