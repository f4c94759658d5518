"""FSDP2 with gradients in codes, beside FSDP2's own float32 and bfloat16: bytes, seconds a step, curves of the loss.

    python benchmarks/sharded.py [--worlds 2 4 2x2] [--rates none 1000 100] [--models transformer resnet18]
        [--methods NAME ...] [--repeat 5] [--curves STEPS] [-o PNG]

The model's parameters are sharded over all ranks, which are processes of one thread. Hosts are network namespaces
joined by links of so many Mbit/s each way, with one rank each, or as many as HOSTSxRANKS says; that takes root. Without
it they share this machine's loopback, where links have no rate and the kernel counts no host's bytes.

A row is a step, forward and backward and SGD: the median of the slowest rank's seconds, and the bytes that a host puts
on its link, as a mean over hosts: all of them by the kernel's counter; those of steps whose gradients do not travel,
which are the gathers of parameters; the difference, which gradients take; and what the exchange reports of these. The
ideal is a reduce-scatter in float32 that sends each value once, as `none` does; gloo's own sends twice that.

With --curves every method trains each model on 2 ranks over loopback for so many steps, from 3 seeds: the transformer
on the characters of this repository's documents, resnet18 on scikit-learn's digits. -o draws the means over the seeds
and all that lies between their least and largest.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional

import compression
from benchmarks.exchange import mbit
from benchmarks.netlab import available
from benchmarks.ranks import kernel_bytes, over_links, over_loopback
from benchmarks.search import machine
from image_classification.models import build as build_model

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
BATCH = 16  # of a rank
LENGTH = 64  # of a text, in characters
BASELINE = "float32"


@dataclass(frozen=True)
class Method:
    """How gradients travel: FSDP2's own way, with a policy, or through a compressor."""

    compressor: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    policy: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)


METHODS = {
    BASELINE: Method(),
    "bfloat16": Method(policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)),
    "none": Method("none"),
    "none, bfloat16": Method("none", {"dense_dtype": "bfloat16"}),
    "maxmin-8": Method("maxmin", {"bits": 8}),
    "maxmin-4": Method("maxmin", {"bits": 4}),
    "eden-4": Method("eden", {"bits": 4}),
    "maxmin-4, feedback": Method("maxmin", {"bits": 4, "error_feedback": True}),
    "maxmin-4, bfloat16 parameters": Method(
        "maxmin", {"bits": 4}, MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    ),
}
CURVES = (BASELINE, "maxmin-8", "maxmin-4", "maxmin-4, feedback")


class Transformer(nn.Module):
    """Predicts the next character, 2 blocks of 256, which are units."""

    def __init__(self, width: int = 256, blocks: int = 2) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(128, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, texts: Tensor) -> Tensor:
        length = texts.shape[1]
        hidden = self.characters(texts) + self.positions(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return torch.as_tensor(self.head(self.norm(hidden)))


class Data(NamedTuple):
    """What a model trains on, and the units that it is sharded in."""

    make: Callable[[], nn.Module]
    units: Callable[[nn.Module], list[nn.Module]]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    rate: float


def texts() -> Data:
    paths = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
    characters = torch.tensor([byte for path in paths for byte in path.read_bytes() if byte < 128])

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        first = torch.randint(len(characters) - LENGTH, (BATCH, 1), generator=generator)
        windows = characters[first + torch.arange(LENGTH + 1)]
        return windows[:, :-1], windows[:, 1:].reshape(-1)

    return Data(Transformer, lambda model: list(model.get_submodule("blocks").children()), batch, 0.3)


def digits() -> Data:
    from sklearn.datasets import load_digits

    known = load_digits()
    images = functional.interpolate(torch.tensor(known.images[:, None] / 16, dtype=torch.float32), 32, mode="bilinear")
    labels = torch.tensor(known.target)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        return images[chosen].expand(-1, 3, -1, -1), labels[chosen]

    def units(model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule(f"layer{k}") for k in (1, 2, 3, 4)]

    return Data(lambda: build_model("resnet18", "classic", 10), units, batch, 0.05)


MODELS: dict[str, Callable[[], Data]] = {"transformer": texts, "resnet18": digits}


class Training:
    """A sharded model and its exchange, if its method has one: to be entered, and then stepped."""

    def __init__(self, data: Data, method: Method, seed: int) -> None:
        torch.manual_seed(seed)
        self.data, self.model = data, data.make()
        for unit in data.units(self.model):
            fully_shard(unit, mp_policy=method.policy)
        fully_shard(self.model, mp_policy=method.policy)
        self.exchange: compression.Attached | None = None
        if method.compressor is not None:
            self.exchange = compression.attach(self.model, method.compressor, seed=seed, **method.options)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=data.rate, momentum=0.9)
        self._generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        if self.exchange is not None:
            self.exchange.close()

    def step(self, gradients_travel: bool = True) -> float:
        """One step on the next batch of this rank. Returns its loss before the step."""
        inputs, labels = self.data.batch(self._generator)
        if not gradients_travel:
            assert isinstance(self.model, FSDPModule)
            self.model.set_requires_gradient_sync(False)
        outputs = self.model(inputs).float()
        loss = functional.cross_entropy(outputs.reshape(len(labels), -1), labels)
        loss.backward()
        if gradients_travel:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


class Speed(NamedTuple):
    """One method on one rank: seconds of each step, and bytes a step of its host, or None where nobody counts."""

    seconds: list[float]
    on_link: float | None
    gathers: float | None
    reported: float | None
    ideal: float


def speed(data: Data, method: Method, repeat: int) -> Speed:
    with Training(data, method, 0) as training:
        training.step()  # makes what later steps find made
        values = sum(parameter.numel() for parameter in training.model.parameters())
        exchange = training.exchange
        if exchange is not None:
            exchange.report()
        seconds: list[float] = []

        def steps() -> None:
            for _ in range(repeat):
                dist.barrier()
                start = time.perf_counter()
                training.step()
                seconds.append(time.perf_counter() - start)

        def local_steps() -> None:
            for _ in range(repeat):
                dist.barrier()
                training.step(gradients_travel=False)

        on_link = bytes_of(steps)
        reported = exchange.report().host_bytes / repeat if exchange is not None else None
        gathers = bytes_of(local_steps)
        per_step = [None if each is None else each / repeat for each in (on_link, gathers)]
    ranks, on_host = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    hosts = ranks // on_host
    return Speed(seconds, per_step[0], per_step[1], reported, 4 * values * (hosts - 1) / hosts)


def bytes_of(work: Callable[[], None]) -> int | None:
    """What this rank's host puts on its link meanwhile."""
    dist.barrier()
    before = kernel_bytes()
    work()
    dist.barrier()
    after = kernel_bytes()
    return None if before is None or after is None else after - before


def curve(data: Data, method: Method, seed: int, steps: int) -> list[float]:
    """The loss of every step, the mean over ranks."""
    with Training(data, method, seed) as training:
        losses = torch.tensor([training.step() for _ in range(steps)])
    dist.all_reduce(losses)
    return (losses / dist.get_world_size()).tolist()


def as_rank(work: Mapping[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: list[Any] = []
    for model in work["models"]:
        data = MODELS[model]()
        for name in work["methods"]:
            if work["curves"]:
                results.append([curve(data, METHODS[name], seed, work["curves"]) for seed in SEEDS])
            else:
                results.append(speed(data, METHODS[name], work["repeat"]))
    json.dump(results, sys.stdout)
    dist.destroy_process_group()


def command(models: Sequence[str], methods: Sequence[str], repeat: int = 0, curves: int = 0) -> list[str]:
    """The command that starts a rank; it prints a list of what it found, by model and method."""
    work = {"models": models, "methods": methods, "repeat": repeat, "curves": curves}
    return [sys.executable, __file__, "--as-rank", json.dumps(work)]


def table(methods: Sequence[str], rates: Mapping[str, Sequence[Sequence[Speed]]]) -> Iterator[str]:
    """The lines of the table for one model and world, in Markdown: `rates` hold every method's ranks, by title."""
    seconds_of = {title: [_seconds(ranks) for ranks in found] for title, found in rates.items()}
    titles = ["method", "MB on a host's link", "gathers", "gradients", "reported", "x ideal"]
    yield f"| {' | '.join([*titles, *(f'{title}, s | x {BASELINE}' for title in rates)])} |"
    yield f"| --- {'| ---: ' * (5 + 2 * len(rates))}|"
    first = next(iter(rates.values()))
    for row, (name, ranks) in enumerate(zip(methods, first, strict=True)):
        on_link, gathers, reported = (_mean(ranks, each) for each in ("on_link", "gathers", "reported"))
        gradients = None if on_link is None or gathers is None else on_link - gathers
        cells = [name, *(_megabytes(each) for each in (on_link, gathers, gradients, reported))]
        known = gradients if gradients is not None else reported
        cells.append("" if known is None else f"{known / ranks[0].ideal:.3f}")
        for seconds in seconds_of.values():
            against = f"{seconds[methods.index(BASELINE)] / seconds[row]:.2f}" if BASELINE in methods else ""
            cells += [f"{seconds[row]:.3f}", against]
        yield f"| {' | '.join(cells)} |"


def _seconds(ranks: Sequence[Speed]) -> float:
    return median(max(step) for step in zip(*(rank.seconds for rank in ranks), strict=True))


def _mean(ranks: Sequence[Speed], name: str) -> float | None:
    """The mean over ranks of what is a host's: hosts have as many ranks each."""
    known = [getattr(rank, name) for rank in ranks]
    return None if None in known else fmean(known)


def _megabytes(nbytes: float | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.3f}"


Curves = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
"""The loss of every step and seed, by model and method."""


def draw(curves: Curves, path: Path) -> None:
    """Write a PNG: a panel for each model, each loss averaged over a twentieth of the steps. Agg draws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(curves), 4.5), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False).flat
    for axes, (model, methods) in zip(panels, curves.items(), strict=True):
        for name, seeds in methods.items():
            window = max(1, len(seeds[0]) // 20)
            smooth = torch.tensor(seeds).unfold(1, window, 1).mean(2)
            steps = range(window - 1, window - 1 + smooth.shape[1])
            [line] = axes.plot(steps, smooth.mean(0), label=name, linewidth=1.2)
            axes.fill_between(steps, smooth.amin(0), smooth.amax(0), color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(title=model, xlabel="step", ylabel=f"loss, mean of {window} steps")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, format="png", dpi=120)


def last_losses(curves: Curves) -> Iterator[str]:
    """The lines of a table of each method's loss in its last tenth of steps, over the seeds."""
    yield f"| model | method | loss of the last tenth, seeds {', '.join(map(str, SEEDS))} | mean |"
    yield "| --- | --- | --- | ---: |"
    for model, methods in curves.items():
        for name, seeds in methods.items():
            last = [fmean(losses[-max(1, len(losses) // 10) :]) for losses in seeds]
            yield f"| {model} | {name} | {', '.join(f'{each:.4f}' for each in last)} | {fmean(last):.4f} |"


def world_of(word: str) -> tuple[int, int]:
    """(ranks, ranks a host), from "4" or "2x2", which is hosts x ranks."""
    hosts, _, on_host = word.partition("x")
    if hosts.isdigit() and (on_host.isdigit() or word == hosts) and int(hosts) > 1 and int(on_host or 1) > 0:
        return int(hosts) * int(on_host or 1), int(on_host or 1)
    raise argparse.ArgumentTypeError(f"expected a number of ranks, or hosts x ranks as 2x2, got '{word}'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=world_of, nargs="+", default=[(2, 1), (4, 1), (4, 2)], metavar="N or HxR",
                        help="ranks, or hosts x ranks; default: 2 4 2x2")  # fmt: skip
    parser.add_argument("--rates", type=mbit, nargs="+", default=[None, 1000.0, 100.0], metavar="MBIT",
                        help="of a link each way in Mbit/s, or none; default: none 1000 100")  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME",
                        help=f"default: all, for curves some: {' | '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=5, metavar="STEPS", help="that a median is of; default: 5")
    parser.add_argument("--curves", type=int, default=0, metavar="STEPS", help="train, and measure no time")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="draw the curves")
    parser.add_argument("--as-rank", metavar="JSON", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.as_rank:
        as_rank(json.loads(flags.as_rank))
        return
    if flags.output and not flags.curves:
        parser.error("-o draws curves; give the steps of each: --curves 300")
    methods: list[str] = flags.methods or (list(CURVES) if flags.curves else list(METHODS))
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}")
    if flags.curves:
        [found, *_] = [json.loads(each) for each in over_loopback(2, command(flags.models, methods, 0, flags.curves))]
        of_model = iter(found)
        curves = {model: {name: next(of_model) for name in methods} for model in flags.models}
        print("\n".join(last_losses(curves)))
        if flags.output:
            draw(curves, flags.output)
        return
    if why_not := available():
        print(f"no links of a chosen rate here ({why_not}): over loopback, without limits")
        flags.rates = [None]
    over_loopback(2, command(flags.models[:1], methods, 1))  # compiles, which else all ranks would do at once
    for ranks, on_host in flags.worlds:
        rates: dict[str, list[list[list[Speed]]]] = {}
        for rate in flags.rates:
            start = command(flags.models, methods, flags.repeat)
            outputs = over_loopback(ranks, start, on_host) if why_not else over_links(ranks, rate, start, on_host)
            found = [[Speed(*each) for each in json.loads(output)] for output in outputs]
            by_method = list(zip(*found, strict=True))
            count = len(methods)
            title = "no limit" if rate is None else f"{rate:,g} Mbit/s"
            rates[title] = [[list(r) for r in by_method[k * count : (k + 1) * count]] for k in range(len(flags.models))]
        for number, model in enumerate(flags.models):
            title = f"{ranks} ranks" if on_host == 1 else f"{ranks // on_host} hosts x {on_host} ranks"
            print(f"\n{model}, {title}\n")
            print("\n".join(table(methods, {name: of_rate[number] for name, of_rate in rates.items()})), flush=True)


if __name__ == "__main__":
    main()
