"""Learning-rate schedules: functions from epoch to value, after a linear warm-up.

Symbols, as in the flags: e = epoch, w = warm-up epochs, E = all epochs.
"""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]
"""Epoch, counted from 0 -> learning rate."""


def _step(e: int, w: int, E: int) -> float:
    return 0.1 ** sum(e >= milestone for milestone in (30, 60, 80))


def _linear(e: int, w: int, E: int) -> float:
    return 1 - (e - w) / (E - w)


def _cosine(e: int, w: int, E: int) -> float:
    return (1 + math.cos(math.pi * (e - w) / (E - w))) / 2


SCHEDULES: dict[str, Callable[[int, int, int], float]] = {"step": _step, "linear": _linear, "cosine": _cosine}
"""Name -> (e, w, E) -> the fraction of the full learning rate, for w <= e < E."""


def schedule(name: str, *, lr: float, epochs: int, warmup: int = 0) -> Schedule:
    """The schedule of that name: lr (e + 1)/w while e < w, then lr times the fraction in `SCHEDULES`.

    Raises ValueError for an unknown name, or a warm-up that leaves no epoch after it.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown learning-rate schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup < epochs:
        raise ValueError(f"the warm-up must be shorter than the {epochs} epochs of training, got {warmup}")
    fraction = SCHEDULES[name]
    return lambda epoch: lr * ((epoch + 1) / warmup if epoch < warmup else fraction(epoch, warmup, epochs))
