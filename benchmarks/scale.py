"""Growth of the time and memory of one exchange with the ranks: measured, modeled, and extrapolated to 1,024.

    python benchmarks/scale.py [--ranks 2 4 8 16] [--values 500000 4000000] [--repeat 25]

All ranks run on this machine and talk over its loopback. The model adds up what one rank does:

    seconds = start + messages x latency + bytes / bandwidth + values x codec

Start: until all ranks are awake and have begun, once for an exchange. Messages: 2 (W - 1) for each bucket of gradients,
whether a ring passes them on or two hops exchange and gather them. Bytes: those counted, 2 (W - 1) / W x those that
stand for the gradient. Values, where there is a codec: 3 - 1 / W times through it, to encode the others' shards, to
decode and add one shard from the others, to encode its mean and to decode all. Where W ranks share fewer cores,
everything but the start takes W / cores times as long.

Start, latency and bandwidth are common to all methods, and each codec has its own speed: fitted by least squares of
relative errors, none negative. The check leaves out all runs of one number of ranks and predicts them from the others.
The last table gives each rank a machine of its own, and its link at most the bandwidth that was fitted. Nothing
overlaps in it, and its latency is the loopback's: a real network adds its own, twice to two hops, and to a ring at
every message.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.exchange import row_of
from benchmarks.methods import TINY, Shapes, bucketed, command, parse
from benchmarks.ranks import over_loopback
from benchmarks.search import machine
from image_classification.models import build

METHODS = ("float32", "maxmin-4", "maxmin-4-feedback")
CODECS = METHODS[1:]
SIDE = 256  # of the square layers that make up a gradient
FAR = (2, 8, 32, 128, 512, 1024)  # numbers of ranks to extrapolate to
LINKS_MBIT = (1_000, 10_000)


@dataclass(frozen=True)
class Run:
    """One method's exchange at one number of ranks. `sharing`: ranks to a core, at least 1."""

    method: str
    ranks: int
    values: int
    buckets: int
    nbytes: float
    sharing: float = 1.0

    @property
    def terms(self) -> list[float]:
        """The factors of the model's coefficients: 1, messages, bytes, and values through each codec."""
        messages = 2 * (self.ranks - 1) * self.buckets
        coded = [(3 - 1 / self.ranks) * self.values * (self.method == codec) for codec in CODECS]
        return [1.0, *(self.sharing * term for term in (messages, self.nbytes, *coded))]


@dataclass(frozen=True)
class Model:
    """Seconds to start, of a message, of a byte, and of a value of each codec."""

    start: float
    message: float
    byte: float
    codecs: tuple[float, ...]

    @classmethod
    def fit(cls, seconds: Mapping[Run, float]) -> "Model":
        """The least squares of relative errors, with no coefficient below 0."""
        terms = np.array([run.terms for run in seconds]) / np.array([*seconds.values()])[:, None]
        start, message, byte, *codecs = nnls(terms, np.ones(len(terms)))[0].tolist()
        return cls(start, message, byte, tuple(codecs))

    def seconds(self, run: Run, link_mbit: float = float("inf")) -> float:
        """Seconds that the model predicts for a run, where no link carries more than `link_mbit`."""
        byte = max(self.byte, 8e-6 / link_mbit)
        return float(np.dot(run.terms, (self.start, self.message, byte, *self.codecs)))


def square_layers(values: int) -> Shapes:
    """A gradient of about so many values."""
    return {f"layer{k}": (SIDE, SIDE) for k in range(max(1, round(values / SIDE**2)))}


def numel(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def measure(ranks: int, sizes: Sequence[int], repeat: int) -> tuple[dict[Run, float], dict[Run, float]]:
    """(seconds, memory in units of the gradient) of every method and size."""
    gradients = [square_layers(values) for values in sizes]
    outputs = over_loopback(ranks, command(gradients, METHODS, repeat))
    sharing = max(1.0, ranks / len(os.sched_getaffinity(0)))
    seconds, memory = {}, {}
    for shapes, measured in zip(gradients, parse(outputs), strict=True):
        for method in METHODS:
            row = row_of(measured[method])
            assert row.counted is not None
            run = Run(method, ranks, numel(shapes), len(list(bucketed(shapes))), row.counted, sharing)
            seconds[run], memory[run] = row.seconds, row.memory / (4 * run.values)
    return seconds, memory


def predicted(seconds: Mapping[Run, float]) -> dict[Run, float]:
    """Every run, by the model that is fitted to the runs of all other numbers of ranks."""
    models = {ranks: Model.fit({run: s for run, s in seconds.items() if run.ranks != ranks})
              for ranks in {run.ranks for run in seconds}}  # fmt: skip
    return {run: models[run.ranks].seconds(run) for run in seconds}


def measured_table(
    seconds: Mapping[Run, float], memory: Mapping[Run, float], prediction: Mapping[Run, float]
) -> Iterator[str]:
    yield "| ranks | method | million values | memory, gradients | seconds | predicted unseen | predicted / measured |"
    yield "| ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    for run, took in seconds.items():
        cells = [f"{run.ranks} | {run.method} | {run.values / 1e6:.2f} | {memory[run]:.2f}"]
        cells += [f"{took:.4f} | {prediction[run]:.4f} | {prediction[run] / took:.2f}"]
        yield f"| {' | '.join(cells)} |"


def extrapolated_table(model: Model, shapes: Shapes, bytes_per_value: Mapping[str, float]) -> Iterator[str]:
    """Seconds of the gradient's exchange at many ranks. `bytes_per_value`: what stands for a value, once."""
    columns = [(method, mbit) for mbit in LINKS_MBIT for method in METHODS]
    yield f"| ranks | {' | '.join(f'{method}, {mbit // 1000} Gbit/s' for method, mbit in columns)} |"
    yield f"|{' ---: |' * (1 + len(columns))}"
    values, buckets = numel(shapes), len(list(bucketed(shapes)))
    for ranks in FAR:
        cells = [str(ranks)]
        for method, mbit in columns:
            nbytes = 2 * (ranks - 1) / ranks * bytes_per_value[method] * values
            cells.append(f"{model.seconds(Run(method, ranks, values, buckets, nbytes), mbit):.3f}")
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16], metavar="N", help="default: 2 4 8 16")
    parser.add_argument("--values", type=int, nargs="+", default=[500_000, 4_000_000], metavar="N",
                        help="in a gradient; default: 500000 4000000")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=25, metavar="TURNS", help="that a median is of; default: 25")
    flags = parser.parse_args()
    if len(flags.ranks) < 2:
        parser.error("the model is fitted to some numbers of ranks and checked at another: give at least two --ranks")

    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}; "
          f"median of {flags.repeat} turns\n")  # fmt: skip
    over_loopback(1, command([TINY], METHODS, 0))  # compiles, which else all ranks would do at once
    seconds: dict[Run, float] = {}
    memory: dict[Run, float] = {}
    for ranks in flags.ranks:
        took, held = measure(ranks, flags.values, flags.repeat)
        seconds |= took
        memory |= held
    print("\n".join(measured_table(seconds, memory, predicted(seconds))))

    model = Model.fit(seconds)
    speeds = ", ".join(f"{name} {1e9 * each:.2f} ns a value" for name, each in zip(CODECS, model.codecs, strict=True))
    common = f"{1e3 * model.start:.1f} ms to start, {1e6 * model.message:.0f} us a message"
    print(f"\nfitted: {common}, {1e9 * model.byte:.3f} ns a byte; {speeds}")
    largest = {run.method: run for run in seconds if run.ranks == max(flags.ranks)}
    per_value = {
        method: run.nbytes * run.ranks / (2 * (run.ranks - 1)) / run.values for method, run in largest.items()
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in build("resnet50").named_parameters()}
    print("\nseconds for ResNet-50's gradient, a machine for each rank, extrapolated\n")
    print("\n".join(extrapolated_table(model, shapes, per_value)))


if __name__ == "__main__":
    main()
