"""One exchange of ResNet-50's gradient over links of a chosen rate: our compressors beside gloo's and torch's own.

    python benchmarks/exchange.py [--ranks 2 4] [--rates none 1000 100] [--methods NAME ...] [--repeat 5] [-o PNG]

Ranks are network namespaces joined by links of so many Mbit/s each way, with one thread each; that takes root. Without
it they share this machine's loopback, where links have no rate and the kernel counts no rank's bytes.

161 tensors, 25.6 million values, in the buckets of 25 MB in which DDP sends them. All methods take turns within one
session per rate. A row holds the median of the slowest rank's seconds, bytes sent as a mean over ranks, and the most
memory that a rank held beside its gradients, in units of the gradients. What each method is: `methods.py`.

Other peers are missing for want of a package: none on the package index averages over gloo on CPUs (GRACE is not
there, `powersgd` 0.0.2 is an empty wheel, `bagua` needs GPUs).
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch

from benchmarks.methods import METHODS, TINY, Measured, command, parse
from benchmarks.netlab import available
from benchmarks.ranks import over_links, over_loopback
from benchmarks.search import machine
from image_classification.models import build


class Row(NamedTuple):
    """One method over all ranks. `memory` is in bytes."""

    seconds: float
    counted: float | None
    kernel: float | None
    memory: float


FLAT = [name for name in METHODS if name != "maxmin-4-levels"]  # each rank has a host of its own here
Rates = Mapping[str, Mapping[str, Row]]  # by the title of the rate and the name of the method


def row_of(ranks: Sequence[Measured]) -> Row:
    seconds = median(max(rank.seconds for rank in turn) for turn in zip(*(rank.turns for rank in ranks), strict=True))
    counted, kernel = (_mean(getattr(rank.turns[-1], field) for rank in ranks) for field in ("counted", "kernel"))
    return Row(seconds, counted, kernel, max(rank.peak for rank in ranks))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def table(rates: Rates, nbytes: int) -> Iterator[str]:
    """The lines of the table for one number of ranks and gradients of `nbytes`, in Markdown."""
    first = next(iter(rates.values()))
    yield f"| method | MB sent | by the kernel | memory | {' | '.join(f'{title}, s | x float32' for title in rates)} |"
    yield f"| --- {'| ---: ' * (3 + 2 * len(rates))}|"
    for name, row in first.items():
        cells = [name, *("" if sent is None else f"{sent / 1e6:.2f}" for sent in (row.counted, row.kernel))]
        cells.append(f"{row.memory / nbytes:.2f}")
        for rows in rates.values():
            cells += [f"{rows[name].seconds:.3f}"]
            cells += [f"{rows['float32'].seconds / rows[name].seconds:.2f}" if "float32" in rows else ""]
        yield f"| {' | '.join(cells)} |"


def draw(results: Mapping[int, Rates], path: Path) -> None:
    """Write a PNG: seconds of each method by rate, a panel for each number of ranks. Agg draws: no display needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 7), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False).flat
    for axes, (ranks, rates) in zip(panels, results.items(), strict=True):
        thickness = 0.8 / len(rates)
        for place, (title, rows) in enumerate(rates.items()):
            middles = [k + thickness * (place - (len(rates) - 1) / 2) for k in range(len(rows))]
            axes.barh(middles, [row.seconds for row in rows.values()], thickness, label=title)
            axes.set_yticks(range(len(rows)), rows)
        axes.set(title=f"{ranks} ranks", xlabel="seconds", xscale="log")
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, format="png", dpi=120)


def mbit(word: str) -> float | None:
    """A rate as the command line has it."""
    if word == "none":
        return None
    with suppress(ValueError):
        if 0 < float(word) < float("inf"):
            return float(word)
    raise argparse.ArgumentTypeError(f"expected a rate above 0 in Mbit/s, or none, got '{word}'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="N", help="default: 2 4")
    parser.add_argument("--rates", type=mbit, nargs="+", default=[None, 1000.0, 100.0], metavar="MBIT",
                        help="of a link each way in Mbit/s, or none; default: none 1000 100")  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=FLAT, choices=FLAT, metavar="NAME",
                        help=f"default: {' '.join(FLAT)}")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=5, metavar="TURNS", help="that a median is of; default: 5")
    parser.add_argument("--arch", default="resnet50", help="whose gradient it is; default: resnet50")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="draw the seconds too")
    flags = parser.parse_args()

    shapes = {name: tuple(parameter.shape) for name, parameter in build(flags.arch).named_parameters()}
    nbytes = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    print(f"{flags.arch}: {len(shapes)} tensors, {nbytes / 1e6:.1f} MB, median of {flags.repeat} turns")
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}")
    if why_not := available():
        print(f"no links of a chosen rate here ({why_not}): over loopback, without limits")
        flags.rates = [None]
    over_loopback(1, command([TINY], flags.methods, 0))  # compiles, which else all ranks would do at once
    start = command([shapes], flags.methods, flags.repeat)
    results: dict[int, dict[str, dict[str, Row]]] = {}
    for ranks in flags.ranks:
        results[ranks] = {}
        for rate in flags.rates:
            [measured] = parse(over_loopback(ranks, start) if why_not else over_links(ranks, rate, start))
            title = "no limit" if rate is None else f"{rate:,g} Mbit/s"
            results[ranks][title] = {name: row_of(measured[name]) for name in flags.methods}
        print(f"\n{ranks} ranks\n")
        print("\n".join(table(results[ranks], nbytes)), flush=True)
    if flags.output:
        draw(results, flags.output)


if __name__ == "__main__":
    main()
