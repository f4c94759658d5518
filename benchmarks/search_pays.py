"""Does the search pay? The same training with uniform and with searched bit widths, by the bytes that they take.

    python benchmarks/search_pays.py cifar10.tar.xz --runs runs/accuracy.jsonl [--cases resnet18 vgg16] [-o PNG]

Each case is a network with a compressor. Searches by each measure have the bytes of uniform 2 bits, scales included,
and widths from 1 bit on; all train with 2 bits until the first search, after the first epoch. Differential evolution
alone searches as published, for powers of error and bytes, and so chooses its bytes. Trainings and what is kept of them
are those of `accuracy.py`.

Rows give the mean over the seeds of the validation loss and of top-1 after the last epoch, and how much they differ
from float32's and from those of uniform 2 bits, paired by seed, with the standard error of that. A difference that is
not several standard errors large separates nothing. Bytes are those of the last epoch.
"""

import argparse
import math
import platform
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch

import compression
from benchmarks.accuracy import RANKS, Runs, folder_of, paired, paired_difference, recipe_for
from benchmarks.search import BUCKET_SIZE, PUBLISHED, machine
from compression import Solo
from compression.layers import layers_of
from image_classification.models import build
from search.tables import MEASURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNIFORM = 2  # bits, whose bytes the searches have
NUM_CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A network with a compressor. `training`: flags that the network needs beside the recipe's."""

    arch: str
    compressor: str
    error_feedback: bool = True
    training: str = ""

    @property
    def title(self) -> str:
        """The case in words."""
        return f"{self.arch}, {self.compressor} {'with' if self.error_feedback else 'without'} error feedback"


CASES = {
    "resnet18": Case("resnet18", "maxmin"),
    "vgg16": Case("vgg16", "maxmin", training="--lr 0.01"),  # without batch norms: a lower rate
    "eden": Case("resnet18", "eden"),
    "no-feedback": Case("resnet18", "maxmin", error_feedback=False),
}
PUBLISHED_FLAGS = f"--popsize {PUBLISHED['popsize']} --search-iterations {PUBLISHED['iterations']}"
# Okabe and Ito's colors, and a shape for each, so that no color is needed to read the picture.
MARKS = {
    "float32": ("#000000", "o"),
    "bfloat16": ("#999999", "v"),
    "uniform 3": ("#E69F00", "D"),
    "uniform 2": ("#D55E00", "s"),
    "root": ("#56B4E9", "^"),
    "square": ("#0072B2", "P"),
    "loss": ("#009E73", "X"),
    "evolution": ("#CC79A7", "*"),
}
EQUAL, APART = 0.02, 1.06  # how much bytes may differ to be drawn as equal ones, and the factor between such

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""The metrics of every seed's run, by the setting's name; float32 and uniform 2 bits are among them."""


def bits_of_uniform(case: Case, width: int) -> float:
    """Bits a value of the compressed layers at a uniform width, scales included, rounded up to a millionth."""
    with torch.device("meta"):
        model = build(case.arch, num_classes=NUM_CLASSES)
    trained = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    layers = layers_of(trained, BUCKET_SIZE)
    encoded = [layer for layer in layers if layer.compressed]
    averager = compression.build(case.compressor, bits=width, bucket_size=BUCKET_SIZE).averager(layers, Solo(), 0)
    nbytes = sum(averager.encoded_bytes_at(encoded, width, RANKS))
    return math.ceil(8e6 * nbytes / sum(layer.numel for layer in encoded)) / 1e6


def settings_of(case: Case) -> dict[str, list[str]]:
    """The flags of every setting of a case, by its name."""
    feedback = "--error-feedback " if case.error_feedback else ""
    widths = f"--compression-type {case.compressor} {feedback}--bucket-size {BUCKET_SIZE} --quantization-bits"
    budget = f"--search-min-bits 1 --search-method exact --search-target-bits {bits_of_uniform(case, UNIFORM)}"
    lines: dict[str, str] = {
        "float32": "--compression-type none",
        "bfloat16": "--compression-type none --dense-dtype bfloat16",
        **{f"uniform {bits}": f"{widths} {bits}" for bits in (UNIFORM + 1, UNIFORM)},
        **{by: f"{widths} {UNIFORM} --search {budget} --search-measure {by}" for by in MEASURES},
        "evolution": f"{widths} {UNIFORM} --search --search-method de {PUBLISHED_FLAGS}",
    }
    return {name: line.split() for name, line in lines.items()}


def table(results: Results) -> Iterator[str]:
    """The lines of a case's table, in Markdown."""
    beside = f"- float32 | - uniform {UNIFORM}"
    yield f"| setting | MB a step | of float32 | loss | {beside} | top-1, % | {beside} |"
    yield f"| --- {'| ---: ' * 8}|"
    for name, runs in results.items():
        cells = [name, f"{_mean(runs, 'comm.bytes_sent') / 1e6:.3f}", f"{_mean(runs, 'comm.ratio'):.4f}"]
        for metric, digits in (("val.loss", 3), ("val.top1", 1)):
            cells.append(f"{_mean(runs, metric):.{digits}f}")
            cells += [paired(runs, results[other], metric, digits) for other in ("float32", f"uniform {UNIFORM}")]
        yield f"| {' | '.join(cells)} |"


def picture(by_case: Mapping[str, Results]) -> "Figure":
    """Loss above float32's by bytes, a panel for each case, by its title. Agg draws: no display needed.

    Points of equal bytes stand side by side, for their bars would hide one another.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(6 * len(by_case), 5.5), layout="constrained")
    panels = figure.subplots(1, len(by_case), squeeze=False).flat
    for axes, (title, results) in zip(panels, by_case.items(), strict=True):
        placed: list[float] = []
        for name, runs in results.items():
            color, marker = MARKS[name]
            nbytes = _mean(runs, "comm.bytes_sent") / 1e6
            beside = sum(math.isclose(nbytes, other, rel_tol=EQUAL) for other in placed)
            placed.append(nbytes)
            above, error = paired_difference(runs, results["float32"], "val.loss")
            at = nbytes * APART**beside
            axes.errorbar(at, above, error, fmt=marker, color=color, markersize=8, capsize=4, label=name)
        axes.axhline(0, color="0.5", linewidth=1, zorder=0)
        axes.set(title=title, xscale="log", xlabel="MB that a rank sends in a step; equal ones stand side by side")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss above float32's, with its standard error")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _mean(runs: Sequence[Mapping[str, Any]], metric: str) -> float:
    return statistics.mean(run[metric] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="digits, an ImageFolder, or a tar file of one")
    parser.add_argument("--runs", type=Path, metavar="FILE", required=True, help="keep finished runs here")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["resnet18", "vgg16", "eden"],
                        help="networks with compressors (default: resnet18 vgg16 eden)")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--prof", type=int, metavar="N", help="train with the first N steps of each epoch only")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="draw the loss by the bytes too")
    asked = parser.parse_args()
    recipe = [*recipe_for(asked.dataset).split(), "--epochs", str(asked.epochs)]
    if asked.prof is not None:
        recipe += ["--prof", str(asked.prof)]
    print(f"{machine()}; Python {platform.python_version()}, torch {torch.__version__}")
    finished = Runs(asked.runs)
    by_case: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with folder_of(asked.dataset) as folder:
        for case in (CASES[name] for name in asked.cases):
            flags = [*recipe, "-a", case.arch, *case.training.split()]
            settings = settings_of(case)
            results = by_case[case.title] = {name: [] for name in settings}
            for seed in range(asked.seeds):
                for name, words in settings.items():
                    results[name].append(finished.get(folder, flags + words, seed))
                    told = f"loss {results[name][-1]['val.loss']:.4f}, {results[name][-1]['val.top1']:.2f} %"
                    print(f"{case.title}, seed {seed}, {name}: {told}", file=sys.stderr, flush=True)
            print(f"\n{case.title}: {RANKS} ranks, {' '.join(flags)}, seeds 0 to {asked.seeds - 1}\n")
            print("\n".join(table(results)), flush=True)
    if asked.output:
        picture(by_case).savefig(asked.output, format="png", dpi=120)


if __name__ == "__main__":
    main()
