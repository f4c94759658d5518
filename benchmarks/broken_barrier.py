"""Does a broken barrier pay? Step time against the fraction R of the gradient that a step waits for, over slow links.

    python benchmarks/broken_barrier.py [--rates 1000 100] [--shares 1 0.9 0.5 0.1] [--late-steps 1] [-o PNG]

Trains resnet18 at 32 pixels with DDP on hosts of a lab (`netlab.py`: it takes root), whose links carry so many Mbit/s
each way, one thread a rank. All settings take turns within one session per rate; a number is the median over the turns
of the slowest rank's time per step, over some steps in a row. Before them come enough steps for late averages to be
due, after them all that is late is applied, so that no setting sends what another one left. Gains are over the first R.

Beside it stands the bound that no order of sending can beat, the larger of two times: of compute, which is a step with
`sanity`, and of communication, which is one average of the whole gradient, codec included, and nothing else. Every byte
still travels: far above compute, R gains nothing but what compute can hide.

What it costs in accuracy, after 5 epochs each:

    python benchmarks/accuracy.py cifar10.tar.xz --epochs 5 --seeds 3 -- "none" \\
        "none --bb-ratio 0.9 --bb-num-parallel-steps 1" "none --bb-ratio 0.5 --bb-num-parallel-steps 1" \\
        "none --bb-ratio 0.1 --bb-num-parallel-steps 1" "maxmin --error-feedback" \\
        "maxmin --error-feedback --bb-ratio 0.9 --bb-num-parallel-steps 1" \\
        "maxmin --error-feedback --bb-ratio 0.5 --bb-num-parallel-steps 1" \\
        "maxmin --error-feedback --bb-ratio 0.1 --bb-num-parallel-steps 1"
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import compression
from benchmarks.netlab import available, lab
from benchmarks.search import machine
from compression.gradients import Gradients
from image_classification.models import build
from image_classification.optim import parameter_groups, sgd

SETTINGS: dict[str, dict[str, object]] = {"none": {}, "maxmin": {"bits": 4, "error_feedback": True}}
COMPUTE = "sanity"
PATIENCE_SECONDS = 3600.0


@dataclass(frozen=True)
class Plan:
    """The measurement of every rank: seconds of steps per turn, and the settings of a step."""

    fractions: Sequence[float]
    late_steps: int
    steps: int
    turns: int
    batch_size: int
    arch: str


class Training:
    """A model in training on one batch, whose gradients go through one exchange."""

    def __init__(self, name: str, fraction: float, plan: Plan) -> None:
        torch.manual_seed(0)
        self.model = DistributedDataParallel(build(plan.arch, "classic", 10))
        compressor = compression.build(name, **SETTINGS.get(name, {}))
        self.exchange = compression.attach(
            self.model, compressor, barrier_fraction=fraction, late_steps=plan.late_steps
        )
        self.optimizer = sgd(parameter_groups(self.model.module, weight_decay=1e-4), lr=1e-3)
        self.images = torch.randn(plan.batch_size, 3, 32, 32)
        self.labels = torch.randint(10, (plan.batch_size,))

    def step(self) -> None:
        self.exchange.begin_step()
        nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        self._apply(self.exchange.finish())

    def flush(self) -> None:
        while (finite := self.exchange.flush()) is not None:
            self._apply(finite)

    def _apply(self, finite: torch.Tensor) -> None:
        self.optimizer.step()
        self.exchange.settle(finite)
        self.optimizer.zero_grad()

    def average(self) -> None:
        """Average a gradient of the whole model, with nothing to hide it behind."""
        offsets, total = [], 0
        for layer in self.exchange.layers:
            offsets.append(total)
            total += layer.numel
        gradients = Gradients(torch.randn(total), tuple(layer.name for layer in self.exchange.layers), tuple(offsets))
        dist.barrier()
        self.exchange.averager.average_(gradients, 0)


def seconds_of(work: Callable[[], None], times: int) -> float:
    """Per call, of some calls in a row that all ranks begin together."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def rank_main(plan: Plan) -> None:
    """On every rank: print the seconds of each turn, by setting and fraction, and the fraction of values waited for."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    trainings = {(name, fraction): Training(name, fraction, plan) for name in SETTINGS for fraction in plan.fractions}
    trainings[COMPUTE, 1.0] = Training(COMPUTE, 1.0, plan)
    alone = {name: Training(name, 1.0, plan) for name in SETTINGS}
    seconds: dict[str, list[float]] = {}
    for _ in range(plan.turns):
        for (name, fraction), training in trainings.items():
            for _ in range(plan.late_steps + 2):
                training.step()
            seconds.setdefault(f"{name} {fraction}", []).append(seconds_of(training.step, plan.steps))
            training.flush()
        for name, training in alone.items():
            training.average()  # which compiles, the first time
            seconds.setdefault(f"{name} alone", []).append(seconds_of(training.average, 1))
    for training in (*trainings.values(), *alone.values()):
        training.exchange.close()
    waited_for = {f"{name} {fraction}": values_waited_for(training) for (name, fraction), training in trainings.items()}
    json.dump({"seconds": seconds, "waited_for": waited_for}, sys.stdout)
    dist.destroy_process_group()


def values_waited_for(training: Training) -> float:
    """The fraction of the model's values that the last step waited for."""
    exchange = training.exchange
    if not isinstance(exchange, compression.BrokenBarrier):
        return 1.0
    sizes = {layer.name: layer.numel for layer in exchange.layers}
    return sum(sizes[name] for name in exchange.prefix) / sum(sizes.values())


@dataclass(frozen=True)
class Measured:
    """At one rate: seconds per step, or of an average alone, and the fraction of values waited for."""

    seconds: Mapping[str, float]
    waited_for: Mapping[str, float]

    def bound(self, name: str) -> float:
        return max(self.seconds[f"{COMPUTE} 1.0"], self.seconds[f"{name} alone"])


def measure(plan: Plan, ranks: int, rate: float) -> Measured:
    command = [sys.executable, __file__, "--plan", json.dumps(asdict(plan))]
    with lab(ranks, f"{rate:g}mbit") as hosts:
        told = [json.loads(output) for output in hosts.run(command, timeout_s=PATIENCE_SECONDS)]
    seconds = {
        key: median(max(turn) for turn in zip(*(rank["seconds"][key] for rank in told), strict=True))
        for key in told[0]["seconds"]
    }
    return Measured(seconds, told[0]["waited_for"])


def table(measured: Mapping[float, Measured], fractions: Sequence[float]) -> Iterator[str]:
    """The lines of the table, in Markdown."""
    yield "| Mbit/s | setting | R | values waited for | ms per step | gain | bound, ms | compute | communication |"
    yield f"| --- | --- {'| ---: ' * 7}|"
    for rate, at in measured.items():
        for name in SETTINGS:
            for fraction in fractions:
                key = f"{name} {fraction}"
                row = [f"{rate:g}", name, f"{fraction:g}", f"{100 * at.waited_for[key]:.1f} %"]
                row += [f"{1e3 * at.seconds[key]:.0f}"]
                row += [f"{at.seconds[f'{name} {fractions[0]}'] / at.seconds[key]:.2f} x"]
                bounds = (at.bound(name), at.seconds[f"{COMPUTE} 1.0"], at.seconds[f"{name} alone"])
                row += [f"{1e3 * each:.0f}" for each in bounds]
                yield f"| {' | '.join(row)} |"


def draw(measured: Mapping[float, Measured], fractions: Sequence[float], path: Path) -> None:
    """Write a PNG: time per step by R, a panel for each rate, bounds dashed. Drawn by Agg: no display needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(measured), 5), layout="constrained")
    panels = figure.subplots(1, len(measured), squeeze=False).flat
    for axes, (rate, at) in zip(panels, measured.items(), strict=True):
        for number, name in enumerate(SETTINGS):
            color = f"C{number}"
            milliseconds = [1e3 * at.seconds[f"{name} {fraction}"] for fraction in fractions]
            axes.plot(fractions, milliseconds, "o-", color=color, label=name)
            axes.axhline(1e3 * at.bound(name), linestyle="--", color=color, label=f"{name}, bound")
        axes.set(title=f"{rate:g} Mbit/s", xlabel="fraction R of the squared norm that a step waits for")
        axes.set(ylabel="ms per step", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", help=argparse.SUPPRESS)  # of a rank
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[1000.0, 100.0], metavar="MBIT")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.9, 0.5, 0.1], metavar="R")
    parser.add_argument("--late-steps", type=int, default=1, help="by which late averages are late (default: 1)")
    parser.add_argument("--steps", type=int, default=8, help="of each setting in each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="images per rank")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="draw the table too")
    flags = parser.parse_args()
    if flags.plan:
        rank_main(Plan(**json.loads(flags.plan)))
        return
    if why_not := available():
        sys.exit(f"broken_barrier.py: error: no links of a chosen rate here: {why_not}")
    plan = Plan(flags.shares, flags.late_steps, flags.steps, flags.turns, flags.batch_size, flags.arch)
    print(f"{plan.arch}, {flags.ranks} ranks of {plan.batch_size} images of 32 pixels, late by {plan.late_steps};")
    print(f"median of {plan.turns} turns of {plan.steps} steps")
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}")
    print()
    measured = {rate: measure(plan, flags.ranks, rate) for rate in flags.rates}
    print("\n".join(table(measured, plan.fractions)))
    if flags.output:
        draw(measured, plan.fractions, flags.output)


if __name__ == "__main__":
    main()
