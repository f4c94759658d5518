"""Does compression pay? Seconds per epoch, and until a fixed top-1, over links of chosen rates.

    python benchmarks/time_to_accuracy.py cifar10.tar.xz [--ranks 2 4] [--rates 100 300 1000 none] [-o PNG]

main.py trains resnet18 in full over loopback, once for each method, number of ranks and seed: no bit of what it learns
depends on a link's rate. What a step takes is measured apart, by the same program on hosts of a lab (`netlab.py`: it
takes root), one thread a rank: the median over some steps, after the first ones. Seconds per epoch are those of its
steps, without validation, which is the same for all. Top-1 is validated after each epoch; between two of them it is
taken to rise in a straight line. All ranks together have the recipe's two batches, so that steps, and what they could
learn at best, are the same at every number of ranks.

`searched` finds widths after every epoch within 3 bits a value, scales included, and is timed with the last ones.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch

from benchmarks.accuracy import RANKS, Runs, command_of, flags_of, folder_of, logged, recipe_for
from benchmarks.exchange import mbit
from benchmarks.netlab import Lab, available, lab
from benchmarks.search import machine

METHODS = {
    "float32": "none",
    "bfloat16": "none --dense-dtype bfloat16",
    "4 bits": "maxmin --error-feedback",
    "searched": "maxmin --error-feedback --search --search-target-bits 3",
    "top-k 1 %": "topk --error-feedback",
    "PowerSGD 4": "--powersgd-rank 4",
}
WARM_STEPS = 3  # before steps are timed: DDP rebuilds its buckets, kernels come from their cache
PATIENCE_SECONDS = 1800.0

Seconds = Mapping[str, Mapping[str, float]]  # per step, by the title of the rate and the name of the method


@dataclass(frozen=True)
class Learned:
    """One method at one number of ranks. `top1`: in percent after each epoch, means over seeds."""

    top1: Sequence[float]
    bytes_sent: float
    scheme: dict[str, list[str]] | None

    def epochs_to(self, target: float) -> float:
        """Epochs until top-1 first reaches the target; infinite where it never does. It starts at 0."""
        before = 0.0
        for epoch, now in enumerate(self.top1):
            if now >= target:
                return epoch + (target - before) / (now - before)
            before = now
        return math.inf


def recipe(dataset: str, ranks: int, epochs: int) -> list[str]:
    """The training flags, with as many images a step at every number of ranks."""
    words = recipe_for(dataset).split()
    batch = words.index("-b") + 1
    words[batch] = str(int(words[batch]) * RANKS // ranks)
    return [*words, "--epochs", str(epochs)]


def learn(runs: Runs, folder: str, flags: list[str], method: str, seeds: int, ranks: int) -> Learned:
    results = []
    for seed in range(seeds):
        results.append(runs.get(folder, flags + flags_of(METHODS[method]), seed, ranks))
        print(f"{ranks} ranks, seed {seed}, {method}: {results[-1]['top1']}", file=sys.stderr, flush=True)
    top1 = [fmean(each) for each in zip(*(result["top1"] for result in results), strict=True)]
    return Learned(top1, results[0]["comm.bytes_sent"], results[0]["scheme"])


def seconds_per_step(hosts: Lab, folder: str, flags: list[str], method: str, learned: Learned, steps: int) -> float:
    """Seconds of rank 0, over the links of a lab; the ranks wait for one another in every step."""
    words = flags_of(METHODS[method])
    with tempfile.TemporaryDirectory() as workspace:
        if learned.scheme is not None:
            scheme = Path(workspace) / "scheme.json"
            scheme.write_text(json.dumps(learned.scheme))
            words = [*words[: words.index("--search")], "--compression-scheme", str(scheme)]
        short = ["--prof", str(WARM_STEPS + steps), "--run-epochs", "1", "--training-only", "--print-freq", "1"]
        short += ["--threads", "1"]
        command = [sys.executable, *command_of(folder, [*flags, *words, *short], 0, workspace)]
        hosts.run(command, timeout_s=PATIENCE_SECONDS)
        steps_of = [record["data"] for record in logged(workspace) if len(record["step"]) == 2]
    return median(step["train.data_time"] + step["train.compute_time"] for step in steps_of[WARM_STEPS:])


def table(learned: Mapping[str, Learned], seconds: Seconds, steps: int, target: float) -> Iterator[str]:
    """The lines of the table for one number of ranks, in Markdown; an epoch has so many steps."""
    rates = " | ".join(f"{title}: s/epoch | s to {target:g} % | x float32" for title in seconds)
    yield f"| method | MB a step | top-1 | epochs to {target:g} % | {rates} |"
    yield f"| --- {'| ---: ' * (3 + 3 * len(seconds))}|"
    for method, found in learned.items():
        epochs = found.epochs_to(target)
        cells = [method, f"{found.bytes_sent / 1e6:.2f}", f"{found.top1[-1]:.1f}", _number(epochs, 2)]
        for each in seconds.values():
            epoch, base = steps * each[method], steps * each["float32"] * learned["float32"].epochs_to(target)
            cells += [_number(epoch, 1), _number(epoch * epochs, 0), _number(base / (epoch * epochs), 2)]
        yield f"| {' | '.join(cells)} |"


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if 0 < value < math.inf else "never"


def draw(results: Mapping[int, tuple[Mapping[str, Learned], Seconds]], steps: int, target: float, path: Path) -> None:
    """Write a PNG: seconds to the target by rate, a panel for each number of ranks. Agg draws: no display needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 5), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True).flat
    for axes, (ranks, (learned, seconds)) in zip(panels, results.items(), strict=True):
        for number, (method, found) in enumerate(learned.items()):
            epochs = found.epochs_to(target)
            if epochs < math.inf:
                taken = [steps * each[method] * epochs for each in seconds.values()]
                axes.plot(list(seconds), taken, "o-", color=f"C{number}", label=method)  # alike in all panels
        axes.set(title=f"{ranks} ranks", xlabel="rate of each link", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel(f"seconds of training to {target:g} % top-1")
    figure.axes[0].legend()
    figure.savefig(path, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="an ImageFolder, or a tar file of one")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="N", help="default: 2 4")
    parser.add_argument("--rates", type=mbit, nargs="+", default=[100.0, 300.0, 1000.0, None], metavar="MBIT",
                        help="of a link each way in Mbit/s, or none; default: 100 300 1000 none")  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME",
                        help=f"beside float32; default: {', '.join(METHODS)}".replace("%", "%%"))  # fmt: skip
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--target", type=float, default=40.0, metavar="PERCENT", help="top-1 to reach (default: 40)")
    parser.add_argument("--steps", type=int, default=7, help="that a median is of (default: 7)")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="keep finished trainings here")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="draw the seconds too")
    asked = parser.parse_args()
    if why_not := available():
        sys.exit(f"time_to_accuracy.py: error: no links of a chosen rate here: {why_not}")
    methods = list(dict.fromkeys(["float32", *asked.methods]))
    runs = Runs(asked.runs)
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(folder_of(asked.dataset))
        results: dict[int, tuple[dict[str, Learned], dict[str, dict[str, float]]]] = {}
        for ranks in asked.ranks:
            flags = recipe(asked.dataset, ranks, asked.epochs)
            learned = {method: learn(runs, folder, flags, method, asked.seeds, ranks) for method in methods}
            seconds: dict[str, dict[str, float]] = {}
            for rate in asked.rates:
                title = "no limit" if rate is None else f"{rate:,g} Mbit/s"
                with lab(ranks, None if rate is None else f"{rate:g}mbit") as hosts:
                    seconds[title] = {
                        method: seconds_per_step(hosts, folder, flags, method, learned[method], asked.steps)
                        for method in methods
                    }
            results[ranks] = learned, seconds
            images = sum(1 for _ in Path(folder, "train").glob("*/*"))
            steps = images // (int(flags[flags.index("-b") + 1]) * ranks)
            print(f"\n{ranks} ranks, {' '.join(flags)}, seeds 0 to {asked.seeds - 1}, {steps} steps an epoch\n")
            print("\n".join(table(learned, seconds, steps, asked.target)), flush=True)
    if asked.output:
        draw(results, steps, asked.target, asked.output)


if __name__ == "__main__":
    main()
