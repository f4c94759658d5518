"""One exchange of ResNet-50's gradient over links of a chosen rate: our compressors beside gloo's and torch's own.

    python benchmarks/exchange.py [--ranks 2 4] [--ranks-per-host 1] [--rates none 1000 100] [--methods NAME ...]
        [--repeat 5] [-o PNG]

Hosts are network namespaces joined by links of so many Mbit/s each way, with one rank each or several, of one thread
each; that takes root. Without it they share this machine's loopback, where links have no rate and the kernel counts no
host's bytes. Where hosts have several ranks there are methods of two levels too.

161 tensors, 25.6 million values, in the buckets of 25 MB in which DDP sends them. All methods take turns within one
session per rate. A row holds the median of the slowest rank's seconds, bytes sent as a mean over ranks, those that a
host puts on its link as a mean over hosts, by our count and by the kernel's, and the most memory that a rank held
beside its gradients, in units of the gradients: what a host's ranks share counts once. What each method is:
`methods.py`.

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

from benchmarks.methods import METHODS, METHODS_IN_LEVELS, OF_LEVELS, TINY, Measured, command, parse
from benchmarks.netlab import available
from benchmarks.ranks import over_links, over_loopback
from benchmarks.search import machine
from image_classification.models import build


class Row(NamedTuple):
    """One method over all ranks, in bytes: `counted` of a rank, `crossing` and `kernel` of a host, on its link."""

    seconds: float
    counted: float | None
    crossing: float | None
    kernel: float | None
    memory: float


Rates = Mapping[str, Mapping[str, Row]]  # by the title of the rate and the name of the method


def row_of(ranks: Sequence[Measured], ranks_per_host: int = 1) -> Row:
    seconds = median(max(rank.seconds for rank in turn) for turn in zip(*(rank.turns for rank in ranks), strict=True))
    last = [rank.turns[-1] for rank in ranks]
    sent, crossing, kernel = (_mean(getattr(turn, field) for turn in last) for field in ("sent", "crossing", "kernel"))
    on_link = None if crossing is None else ranks_per_host * crossing
    return Row(seconds, sent, on_link, kernel, max(rank.peak for rank in ranks))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def table(rates: Rates, nbytes: int) -> Iterator[str]:
    """The lines of the table for one number of ranks and gradients of `nbytes`, in Markdown."""
    first = next(iter(rates.values()))
    titles = ["method", "MB sent", "MB on a host's link", "by the kernel", "memory"]
    yield f"| {' | '.join([*titles, *(f'{title}, s | x float32' for title in rates)])} |"
    yield f"| --- {'| ---: ' * (4 + 2 * len(rates))}|"
    for name, row in first.items():
        sent = (row.counted, row.crossing, row.kernel)
        cells = [name, *("" if nbytes_sent is None else f"{nbytes_sent / 1e6:.2f}" for nbytes_sent in sent)]
        cells.append(f"{row.memory / nbytes:.2f}")
        for rows in rates.values():
            cells += [f"{rows[name].seconds:.3f}"]
            cells += [f"{rows['float32'].seconds / rows[name].seconds:.2f}" if "float32" in rows else ""]
        yield f"| {' | '.join(cells)} |"


def draw(results: Mapping[str, Rates], path: Path) -> None:
    """Write a PNG: seconds of each method by rate, a panel for each world of ranks. Agg draws: no display needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 7), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False).flat
    for axes, (world, rates) in zip(panels, results.items(), strict=True):
        thickness = 0.8 / len(rates)
        for place, (title, rows) in enumerate(rates.items()):
            middles = [k + thickness * (place - (len(rates) - 1) / 2) for k in range(len(rows))]
            axes.barh(middles, [row.seconds for row in rows.values()], thickness, label=title)
            axes.set_yticks(range(len(rows)), rows)
        axes.set(title=world, xlabel="seconds", xscale="log")
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
    parser.add_argument("--ranks-per-host", type=int, nargs="+", default=[1], metavar="R", help="default: 1")
    parser.add_argument("--methods", nargs="+", choices=METHODS | METHODS_IN_LEVELS, metavar="NAME",
                        help="default: all; those of two levels where hosts have several ranks: "
                        f"{' '.join(METHODS | METHODS_IN_LEVELS)}")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=5, metavar="TURNS", help="that a median is of; default: 5")
    parser.add_argument("--arch", default="resnet50", help="whose gradient it is; default: resnet50")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="draw the seconds too")
    flags = parser.parse_args()
    worlds = [(ranks, each) for ranks in flags.ranks for each in flags.ranks_per_host]
    for ranks, each in worlds:
        if each < 1 or ranks % each or (each > 1 and ranks == each):
            parser.error(f"--ranks {ranks} fill no two hosts or more of --ranks-per-host {each}; choose a multiple")
    methods: list[str] = flags.methods or [*METHODS, *METHODS_IN_LEVELS]
    one_level = [name for name in methods if name in METHODS]
    if not one_level and 1 in flags.ranks_per_host:
        parser.error("--methods of two levels need --ranks-per-host of 2 or more")

    shapes = {name: tuple(parameter.shape) for name, parameter in build(flags.arch).named_parameters()}
    nbytes = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    print(f"{flags.arch}: {len(shapes)} tensors, {nbytes / 1e6:.1f} MB, median of {flags.repeat} turns")
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}")
    if why_not := available():
        print(f"no links of a chosen rate here ({why_not}): over loopback, without limits")
        flags.rates = [None]
    # Compiles, which else all ranks would do at once.
    over_loopback(1, command([TINY], sorted({name.removeprefix(OF_LEVELS) for name in methods}), 0))
    results: dict[str, dict[str, dict[str, Row]]] = {}
    for ranks, each in worlds:
        world = f"{ranks} ranks" if each == 1 else f"{ranks // each} hosts x {each} ranks"
        results[world] = {}
        usable = one_level if each == 1 else methods
        start = command([shapes], usable, flags.repeat)
        for rate in flags.rates:
            outputs = over_loopback(ranks, start, each) if why_not else over_links(ranks, rate, start, each)
            [measured] = parse(outputs)
            title = "no limit" if rate is None else f"{rate:,g} Mbit/s"
            results[world][title] = {name: row_of(measured[name], each) for name in usable}
        print(f"\n{world}\n")
        print("\n".join(table(results[world], nbytes)), flush=True)
    if flags.output:
        draw(results, flags.output)


if __name__ == "__main__":
    main()
