"""Statistics of gradients: the distribution of their values, layer by layer, and sinks that write it.

Nothing here knows ranks or models. A sink is anything that takes a step, a layer's name and its statistics.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

PROBABILITIES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
BINS = 64


@dataclass(frozen=True)
class Statistics:
    """The distribution of one tensor's values.

    All but `count` and `nonfinite` are of finite values, NaN where there are none. `zeros` is a fraction; `variance` is
    the mean squared distance from the mean, `skewness` and `kurtosis` are the third and the fourth such moment over its
    powers 3/2 and 2 (a normal distribution has 0 and 3; NaN where it is 0). `quantiles` belong to `probabilities`. Bin
    i of the histogram holds `counts[i]` values from `edges[i]` to below `edges[i + 1]`, the last also those equal to
    the maximum.
    """

    count: int
    nonfinite: int
    zeros: float
    minimum: float
    maximum: float
    mean: float
    variance: float
    skewness: float
    kurtosis: float
    probabilities: tuple[float, ...]
    quantiles: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]


Sink = Callable[[int, str, Statistics], None]


def measure(values: Tensor) -> Statistics:
    """The statistics of a tensor, exact: it is sorted. Quantiles lie between neighbors linearly."""
    ordered = np.sort(values.detach().float().cpu().numpy(), axis=None)  # minus infinity first, NaN last
    first = np.searchsorted(ordered, np.float32(-np.inf), side="right")
    finite = ordered[first : np.searchsorted(ordered, np.float32(np.inf), side="left")]
    count, nonfinite = len(ordered), len(ordered) - len(finite)
    if not len(finite):
        nothing = (math.nan,) * len(PROBABILITIES)
        return Statistics(count, nonfinite, *(math.nan,) * 7, PROBABILITIES, nothing, (), ())
    below = np.searchsorted(finite, np.float32(0), side="left")
    up_to = np.searchsorted(finite, np.float32(0), side="right")
    edges = np.linspace(float(finite[0]), float(finite[-1]), BINS + 1).astype(np.float32)
    inner = np.searchsorted(finite, edges[1:-1], side="left")
    return Statistics(
        count,
        nonfinite,
        float(up_to - below) / len(finite),
        float(finite[0]),
        float(finite[-1]),
        *_moments(finite),
        PROBABILITIES,
        tuple(_quantile(finite, probability) for probability in PROBABILITIES),
        tuple(edges.tolist()),
        tuple(np.diff(inner, prepend=0, append=len(finite)).tolist()),
    )


def _moments(values: np.ndarray) -> tuple[float, float, float, float]:
    """(mean, variance, skewness, kurtosis), in float64."""
    mean = float(values.mean(dtype=np.float64))
    powers = np.zeros(3)
    for part in np.array_split(values, -(-len(values) // 2**16)):
        distance = part.astype(np.float64) - mean
        square = distance * distance
        powers += (square.sum(), (square * distance).sum(), (square * square).sum())
    second, third, fourth = (powers / len(values)).tolist()
    if second == 0:
        return mean, 0.0, math.nan, math.nan
    return mean, second, third / second**1.5, fourth / second**2


def _quantile(ordered: np.ndarray, probability: float) -> float:
    position = probability * (len(ordered) - 1)
    lower = int(position)
    low, high = float(ordered[lower]), float(ordered[min(lower + 1, len(ordered) - 1)])
    return low + (position - lower) * (high - low)


class JsonLines:
    """A sink: a file of one JSON object a line, with `step`, `layer` and the fields of `Statistics`; NaN is null."""

    def __init__(self, path: Path, first_step: int = 0) -> None:
        """Open the file for a run that begins at `first_step`: lines of earlier steps are kept. Later ones go,
        and so do a truncated line and all behind it.

        Raises OSError where the file cannot be written, as every call does.
        """
        self.path = path
        with self._writing(), path.open("ab+") as file:
            file.seek(0)
            kept = 0
            for line in file:  # in the order of steps
                if not line.endswith(b"\n") or _step_of(line) >= first_step:
                    break
                kept += len(line)
            file.truncate(kept)  # in one piece: a kill leaves the old end or the new one
            file.flush()
            os.fsync(file.fileno())

    def __call__(self, step: int, layer: str, statistics: Statistics) -> None:
        fields = {name: _without_nan(value) for name, value in asdict(statistics).items()}
        line = json.dumps({"step": step, "layer": layer, **fields}, allow_nan=False)
        with self._writing(), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}; make room or choose another folder") from error


class TensorBoard:
    """A sink: a histogram of each layer's gradient, and curves of its moments and quantiles."""

    def __init__(self, writer: Any) -> None:
        """`writer`: a SummaryWriter, or anything with its `add_histogram_raw` and `add_scalar`."""
        self.writer = writer

    def __call__(self, step: int, layer: str, statistics: Statistics) -> None:
        curves = {name: getattr(statistics, name) for name in ("mean", "variance", "skewness", "kurtosis", "zeros")}
        for probability, quantile in zip(statistics.probabilities, statistics.quantiles, strict=True):
            curves[f"quantile_{probability}"] = quantile
        for name, value in {**curves, "nonfinite": statistics.nonfinite}.items():
            if not math.isnan(value):
                self.writer.add_scalar(f"gradient_{name}/{layer}", value, step)
        if number := statistics.count - statistics.nonfinite:
            self.writer.add_histogram_raw(
                f"gradient/{layer}",
                statistics.minimum,
                statistics.maximum,
                number,
                statistics.mean * number,
                (statistics.variance + statistics.mean**2) * number,
                statistics.edges[1:],
                statistics.counts,
                step,
            )


def to_all(sinks: Sequence[Sink]) -> Sink:
    """A sink that passes everything on to several."""

    def sink(step: int, layer: str, statistics: Statistics) -> None:
        for each in sinks:
            each(step, layer, statistics)

    return sink


def _step_of(line: bytes) -> float:
    """The step that a line of `JsonLines` is of; infinity where a kill truncated it."""
    try:
        step: int = json.loads(line)["step"]
    except ValueError:
        return math.inf
    return step


def _without_nan(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
