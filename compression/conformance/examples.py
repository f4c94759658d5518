"""Examples: what a promise is tried on, and the smallest of those on which it is broken.

An example is either values, which a codec encodes or a rank that is alone averages, or a world of ranks and layers.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from .inputs import INPUTS

Measure = Callable[["E"], str | None]
"""What was measured on an example that breaks a promise, in words; None where it is kept."""


@dataclass(frozen=True)
class Finding:
    """A broken promise: what was measured, and the smallest example that breaks it."""

    measured: str
    smallest: str


class Example(Protocol):
    """Something that a promise is tried on."""

    def simpler(self) -> Iterator[Self]:
        """Examples that are simpler, the simplest first. None is as simple as this one."""


E = TypeVar("E", bound=Example)


@dataclass(frozen=True)
class Values:
    """A vector of float32 values."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Values":
        return cls(tuple(tensor.tolist()))

    @property
    def tensor(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32)

    def simpler(self) -> Iterator["Values"]:
        """With fewer values, then with simpler ones."""
        count, values = len(self.values), self.values
        size = count // 2
        while size:
            for start in range(0, count, size):
                if kept := values[:start] + values[start + size :]:
                    yield Values(kept)
            size //= 2
        for plain in _PLAIN:
            yield from self._if_simpler(tuple(plain(value) for value in values))
        for index, plain in itertools.product(range(count), _PLAIN):
            yield from self._if_simpler((*values[:index], plain(values[index]), *values[index + 1 :]))

    def _if_simpler(self, values: tuple[float, ...]) -> Iterator["Values"]:
        if sum(map(_complexity, values)) < sum(map(_complexity, self.values)):
            yield Values(values)

    def __str__(self) -> str:
        runs = [(value, len(list(run))) for value, run in itertools.groupby(self.values, repr)]
        parts, alone = [], []
        for value, length in runs:
            text = {"nan": "math.nan", "inf": "math.inf", "-inf": "-math.inf"}.get(value, value)
            if length < 4:
                alone += [text] * length
                continue
            parts += [f"[{', '.join(alone)}]"] if alone else []
            alone = []
            parts.append(f"[{text}] * {length}")
        parts += [f"[{', '.join(alone)}]"] if alone else []
        return f"torch.tensor({' + '.join(parts)})"


_PLAIN: tuple[Callable[[float], float], ...] = (
    lambda value: 0.0,
    lambda value: 1.0 if math.isfinite(value) else value,
    lambda value: math.copysign(1.0, value) if math.isfinite(value) else value,
    lambda value: float(round(value)) if math.isfinite(value) and abs(value) < 1e6 else value,
    lambda value: float(f"{value:.0e}"),
)


def _complexity(value: float) -> int:
    return {0.0: 0, 1.0: 1, -1.0: 2}.get(value, 2 + len(repr(value)))


@dataclass(frozen=True)
class World:
    """Ranks with layers, whose gradients are of one kind of `INPUTS`."""

    ranks: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    kind: str

    def simpler(self) -> Iterator["World"]:
        """With fewer ranks, fewer layers, smaller ones, and gradients of an earlier kind."""
        for ranks in range(1, self.ranks):
            yield replace(self, ranks=ranks)
        for name, shape in self.shapes:
            if len(self.shapes) > 1:
                yield replace(self, shapes=tuple(other for other in self.shapes if other[0] != name))
            for axis, length in enumerate(shape):
                for smaller in sorted({1, length // 2, length - 1} - {0, length}):
                    less = (*shape[:axis], smaller, *shape[axis + 1 :])
                    yield replace(self, shapes=tuple((name, less) if each[0] == name else each for each in self.shapes))
        for kind in itertools.takewhile(lambda kind: kind != self.kind, INPUTS):
            yield replace(self, kind=kind)

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks}, layers {dict(self.shapes)}, gradients of the kind {self.kind!r}"


def first_broken(examples: Iterable[E], measure: "Measure[E]", tries: int = 300) -> Finding | None:
    """The finding on the first example that breaks a promise, made smaller; None where all keep it.

    An exception breaks it too. `tries` bounds the number of smaller examples that are measured.
    """
    for example in examples:
        if (measured := _caught(measure, example)) is not None:
            seen = {example: measured}

            def breaks(each: E) -> bool:
                if (found := _caught(measure, each)) is not None:
                    seen[each] = found  # noqa: B023
                return found is not None

            least = smallest(example, breaks, tries)
            again = "" if _caught(measure, least) is not None else ", not every time"
            return Finding(seen[least] + again, str(least))
    return None


def smallest(example: E, breaks: Callable[[E], bool], tries: int) -> E:
    """An example that breaks a promise, and none of the next simpler ones does; found greedily."""
    simpler = example.simpler()
    for _ in range(tries):
        candidate = next(simpler, None)
        if candidate is None:
            break
        if breaks(candidate):
            example, simpler = candidate, candidate.simpler()
    return example


def _caught(measure: "Measure[E]", example: E) -> str | None:
    try:
        return measure(example)
    except Exception as error:
        return in_a_line(error)


def in_a_line(error: Exception) -> str:
    """An exception's type, and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
