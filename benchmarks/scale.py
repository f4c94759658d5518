"""Growth of the time and memory of one exchange with the ranks: measured, modeled, and extrapolated to 1,024.

    python benchmarks/scale.py [--ranks 2 4 8 16] [--values 500000 4000000] [--repeat 25]

All ranks run on this machine and talk over its loopback; where their number is even and 4 or more, also as hosts of two
ranks each, which average in two levels. The model, and what it leaves out, is `compression.costs`. Runs can tell rounds
from messages, since a ring has as many of both, two hops two rounds, and a gather one; over a loopback, where a message
needs a processor and no time on the way, rounds are found to cost next to nothing beside. Where ranks share fewer
cores, everything but the start takes that many times as long.

The check leaves out all runs of one number of ranks, in one level and two, and predicts them from the others. The last
table gives each rank a core of its own, eight ranks a host, and each host a link. It has the loopback's time of a
round, to which a real network adds its latency, and lets the host's memory serve all its ranks at one rank's speed.
"""

import argparse
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch

from benchmarks.exchange import row_of
from benchmarks.methods import TINY, Shapes, command, parse
from benchmarks.ranks import over_loopback
from benchmarks.search import machine
from compression import Layer, build
from compression.averagers import Averager
from compression.costs import Cluster, Costs, Run, bound, in_buffers, load_of
from compression.layers import layers_of
from compression.network.world import usable_cores
from image_classification.models import build as build_model

SIDE = 256  # of the square layers that make up a gradient
PAIR = 2  # ranks a host, where hosts are measured
FAR = (2, 8, 32, 128)  # numbers of hosts to extrapolate to
RANKS_PER_HOST = 8  # there
LINKS_MBIT = (10_000, 100_000)


@dataclass(frozen=True)
class Method:
    """A method as the tables call it: its name among the benchmarks', its codec's, and the compressor that promises."""

    measured: str
    codec: str | None
    compressor: str
    options: Mapping[str, Any]
    hierarchical: bool = False

    def promise(self, shapes: Shapes, cluster: Cluster) -> tuple[Averager, list[list[Layer]]]:
        """The averager, and the layers by buffer."""
        compressor = build(self.compressor, **self.options)
        layers = layers_of(shapes.items(), compressor.bucket_size)
        return bound(compressor, layers, cluster, self.hierarchical), list(in_buffers(layers))

    def run(self, shapes: Shapes, cluster: Cluster) -> Run:
        """Its exchange of a gradient."""
        return Run(cluster, load_of(*self.promise(shapes, cluster), cluster), self.codec)


METHODS = {
    "float32": Method("float32", None, "none", {}),
    "bfloat16": Method("bfloat16-hook", "bfloat16", "none", {"dense_dtype": "bfloat16"}),
    "maxmin-4": Method("maxmin-4", "maxmin-4", "maxmin", {"bits": 4}),
    "maxmin-4, two levels": Method("levels-maxmin-4", "maxmin-4", "maxmin", {"bits": 4}, hierarchical=True),
    "topk-0.01": Method("topk-0.01", "topk-0.01", "topk", {"ratio": 0.01}),
}


@dataclass(frozen=True)
class Measured:
    """One method's exchange. `memory` is in units of the gradient."""

    method: str
    values: int
    run: Run
    seconds: float
    memory: float


def square_layers(values: int) -> Shapes:
    """A gradient of about so many values."""
    return {f"layer{k}": (SIDE, SIDE) for k in range(max(1, round(values / SIDE**2)))}


def numel(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def measure(cluster: Cluster, sizes: Sequence[int], repeat: int) -> Iterator[Measured]:
    """Every method and size: in two levels where hosts have several ranks, else flat.

    Raises ValueError where bytes that are counted are not those that are promised.
    """
    hierarchical = cluster.ranks_per_host > 1
    methods = {name: method for name, method in METHODS.items() if method.hierarchical == hierarchical}
    gradients = [square_layers(values) for values in sizes]
    start = command(gradients, [method.measured for method in methods.values()], repeat)
    outputs = over_loopback(cluster.ranks, start, cluster.ranks_per_host)
    for shapes, measured in zip(gradients, parse(outputs), strict=True):
        for name, method in methods.items():
            row = row_of(measured[method.measured])
            averager, buffers = method.promise(shapes, cluster)
            promised = sum(averager.bytes_sent(buffer, cluster.ranks) for buffer in buffers)
            if row.counted is None or not math.isclose(row.counted, promised):
                raise ValueError(f"{name} promises {promised} bytes a rank on {cluster}, and sent {row.counted}")
            run, values = method.run(shapes, cluster), numel(shapes)
            yield Measured(name, values, run, row.seconds, row.memory / (4 * values))


def clusters(ranks: int) -> Iterator[Cluster]:
    """The arrangements of so many ranks on this machine."""
    sharing = max(1.0, ranks / usable_cores())
    yield Cluster(ranks, ranks_per_core=sharing)
    if ranks % PAIR == 0 and ranks > PAIR:
        yield Cluster(ranks // PAIR, PAIR, ranks_per_core=sharing)


def predicted(seconds: Mapping[Run, float]) -> dict[Run, float]:
    """Every run, by costs that are fitted to the runs of all other numbers of ranks."""
    costs = {ranks: Costs.fit({run: s for run, s in seconds.items() if run.cluster.ranks != ranks})
             for ranks in {run.cluster.ranks for run in seconds}}  # fmt: skip
    return {run: costs[run.cluster.ranks].seconds(run) for run in seconds}


def measured_table(found: Sequence[Measured], prediction: Mapping[Run, float]) -> Iterator[str]:
    yield "| hosts x ranks | method | million values | memory, gradients | seconds | predicted unseen | x measured |"
    yield "| ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    for each in found:
        cluster, said = each.run.cluster, prediction[each.run]
        cells = [f"{cluster.hosts} x {cluster.ranks_per_host} | {each.method} | {each.values / 1e6:.2f}"]
        cells += [f"{each.memory:.2f} | {each.seconds:.4f} | {said:.4f} | {said / each.seconds:.2f}"]
        yield f"| {' | '.join(cells)} |"


def extrapolated_table(costs: Costs, shapes: Shapes) -> Iterator[str]:
    """Every method's exchange of a gradient on many hosts."""
    links = "".join(f" s at {mbit // 1000} Gbit/s |" for mbit in LINKS_MBIT)
    yield f"| ranks | method | MB on a host's link |{links} messages | s for rounds and messages |"
    yield f"| ---: | --- | ---: |{' ---: |' * len(LINKS_MBIT)} ---: | ---: |"
    for hosts in FAR:
        for name, method in METHODS.items():
            run = method.run(shapes, Cluster(hosts, RANKS_PER_HOST))
            cells = [f"{run.cluster.ranks} | {name} | {run.load.link / 1e6:.1f}"]
            for mbit in LINKS_MBIT:
                linked = replace(run, cluster=replace(run.cluster, link_mbit=mbit))
                cells.append(f"{costs.seconds(linked):.3f}")
            cells.append(f"{run.load.messages:,.0f} | {costs.seconds_of_messages(run):.3f}")
            yield f"| {' | '.join(cells)} |"


def in_words(costs: Costs) -> Iterator[str]:
    """The costs that were fitted."""
    yield f"{1e3 * costs.start:.1f} ms to start, {1e6 * costs.per_round:.0f} us a round, "
    yield f"{1e6 * costs.per_message:.0f} us a message, {1e9 * costs.per_byte:.3f} ns a byte sent, "
    yield f"{1e9 * costs.per_copied_byte:.3f} ns a byte copied inside a host"
    for name, codec in costs.codecs.items():
        yield f"; {name}: {1e9 * codec.per_value:.2f} ns a value encoded, {1e9 * codec.per_byte:.2f} a byte decoded"


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
    flat = [method.measured for method in METHODS.values() if not method.hierarchical]
    over_loopback(1, command([TINY], flat, 0))  # compiles, which else all ranks would do at once
    arrangements = [cluster for ranks in flags.ranks for cluster in clusters(ranks)]
    found = [each for cluster in arrangements for each in measure(cluster, flags.values, flags.repeat)]
    seconds = {each.run: each.seconds for each in found}
    print("\n".join(measured_table(found, predicted(seconds))))

    costs = Costs.fit(seconds)
    print(f"\nfitted: {''.join(in_words(costs))}")
    for mbit in LINKS_MBIT:
        print(f"a message takes as long as {costs.per_message * mbit * 125:.0f} KB at {mbit // 1000} Gbit/s")
    shapes = {name: tuple(parameter.shape) for name, parameter in build_model("resnet50").named_parameters()}
    print(f"\nResNet-50's gradient, {RANKS_PER_HOST} ranks a host, a core for each, extrapolated\n")
    print("\n".join(extrapolated_table(costs, shapes)))


if __name__ == "__main__":
    main()
