"""Bytes of an FSDP2 step by how gradients and parameters travel, and what is learned then.

    python benchmarks/sharded_bytes.py [--worlds 2 4 2x2] [--models transformer resnet18] [--repeat 5]
        [--curves STEPS]

A row is a step, forward and backward and SGD, in bytes that a host puts on its link, as a mean over hosts: by the
kernel's counter; what the exchange reports of gradients and of codes of parameters; and the ideal's, which sends each
value that another host needs to it once, in the row's own formats without scales: a reduce-scatter of gradients, and an
all-gather of each module's parameters in forward, and in backward unless they are kept. Worlds, models and links are
those of `sharded.py`. Without links the kernel counts nothing.

With --curves each of the choices that compute differently trains a transformer of a quarter of the width on 2 ranks
over loopback for so many steps, from 3 seeds.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional

import compression
from benchmarks.netlab import available
from benchmarks.ranks import over_links, over_loopback
from benchmarks.search import machine
from benchmarks.sharded import MODELS, SEEDS, Data, Transformer, bytes_of, texts, world_of


@dataclass(frozen=True)
class Choice:
    """How gradients and parameters travel; gradients in FSDP2's own way where there is no compressor.

    Parameters of 16 bits are bfloat16 by the policy. Those that are kept are gathered once a step.
    """

    compressor: str | None
    gradient_bits: int = 32
    gather_bits: int = 32
    kept: bool = False

    def __str__(self) -> str:
        gradients = {None: "float32, gloo's", "none": "float32"}.get(self.compressor, f"{self.gradient_bits} bits")
        parameters = {32: "float32", 16: "bfloat16"}.get(self.gather_bits, f"{self.gather_bits} bits")
        return f"{gradients} | {parameters}{', kept' if self.kept else ''}"


WIDTH = 64  # of the transformer that is trained
GRADIENTS = (("none", 32), ("maxmin", 4))
CHOICES = [Choice(None), Choice(None, gather_bits=16), Choice(None, kept=True)]
CHOICES += [Choice(*each, bits, kept) for each in GRADIENTS for kept in (False, True) for bits in (32, 16, 8)]
CURVES = [Choice(*each, bits) for bits in (32, 8, 16, 4) for each in GRADIENTS]


class Training:
    """A sharded model, its exchange if there is one, and its optimizer."""

    def __init__(self, data: Data, choice: Choice, seed: int) -> None:
        torch.manual_seed(seed)
        self.data, self.model = data, data.make()
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        how: dict[str, Any] = {"mp_policy": half if choice.gather_bits == 16 else MixedPrecisionPolicy()}
        how |= {"reshard_after_forward": False} if choice.kept else {}
        for unit in data.units(self.model):
            fully_shard(unit, **how)
        fully_shard(self.model, **how)
        self.exchange: compression.Attached | None = None
        if choice.compressor is not None:
            options: dict[str, Any] = {} if choice.compressor == "none" else {"bits": choice.gradient_bits}
            if choice.gather_bits < 16:
                options["gather_bits"] = choice.gather_bits
            self.exchange = compression.attach(self.model, choice.compressor, seed=seed, **options)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=data.rate, momentum=0.9)
        self._generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())

    def step(self) -> float:
        """One step on the next batch of this rank. Returns its loss before the step."""
        inputs, labels = self.data.batch(self._generator)
        loss = functional.cross_entropy(self.model(inputs).float().reshape(len(labels), -1), labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def close(self) -> None:
        if self.exchange is not None:
            self.exchange.close()


class Bytes(NamedTuple):
    """Bytes a step of a rank's host; None where nobody counts."""

    kernel: float | None
    gradients: float | None
    parameters: float | None
    ideal_gradients: float
    ideal_parameters: float


def bytes_by(data: Data, choice: Choice, repeat: int) -> Bytes:
    training = Training(data, choice, 0)
    training.step()  # makes what later steps find made
    on_host = int(os.environ["LOCAL_WORLD_SIZE"])
    hosts = dist.get_world_size() // on_host
    if training.exchange is not None:
        training.exchange.report()

    def steps() -> None:
        for _ in range(repeat):
            training.step()

    kernel = min((found for found in (bytes_of(steps) for _ in range(3)) if found is not None), default=None)
    gradients = parameters = None
    if training.exchange is not None:
        report = training.exchange.report()
        gradients, parameters = report.host_bytes / report.steps, report.host_gathered_bytes / report.steps
    to_others = (hosts - 1) / hosts
    ideal = to_others * choice.gradient_bits / 8 * sum(each.numel() for each in training.model.parameters())
    gathered = to_others * choice.gather_bits / 8 * _values_gathered(training.model, choice.kept)
    training.close()
    return Bytes(None if kernel is None else kernel / repeat, gradients, parameters, ideal, gathered)


def _values_gathered(model: nn.Module, kept: bool) -> int:
    """Values of all all-gathers of a step: the root module's are kept from forward to backward by default."""
    inner = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
    values = sum(parameter.numel() for module in inner for parameter in module.parameters())
    return sum(parameter.numel() for parameter in model.parameters()) + (0 if kept else values)


def curve(choice: Choice, seed: int, steps: int) -> list[float]:
    """The loss of every step, the mean over ranks."""
    training = Training(texts()._replace(make=lambda: Transformer(WIDTH)), choice, seed)
    losses = torch.tensor([training.step() for _ in range(steps)])
    training.close()
    dist.all_reduce(losses)
    return (losses / dist.get_world_size()).tolist()


def as_rank(models: Sequence[str], repeat: int, curves: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: list[Any] = []
    if curves:
        for choice in CURVES:
            results.append([curve(choice, seed, curves) for seed in SEEDS])
            if dist.get_rank() == 0:
                print(*losses({choice: results[-1]}), sep="\n", file=sys.stderr, flush=True)
    for model in () if curves else models:
        data = MODELS[model]()
        results += [bytes_by(data, choice, repeat) for choice in CHOICES]
    json.dump(results, sys.stdout)
    dist.destroy_process_group()


def table(rows: Mapping[Choice, Sequence[Bytes]]) -> Iterator[str]:
    """The lines of the table for one model and world, in Markdown, with a mean over ranks in each row, in MB."""
    yield "| gradients | parameters | kernel | reported: gradients | parameters | ideal: gradients | parameters | sum |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for choice, ranks in rows.items():
        means = [None if None in each else fmean(each) for each in zip(*ranks, strict=True)]
        *_, gradients, parameters = means
        assert gradients is not None
        assert parameters is not None
        cells = ["" if not each else f"{each / 1e6:.3f}" for each in (*means, gradients + parameters)]
        yield f"| {choice} | {' | '.join(cells)} |"


def losses(curves: Mapping[Choice, Sequence[Sequence[float]]]) -> Iterator[str]:
    """The lines of a table of each choice's loss in its last fifth of steps, over the seeds."""
    yield f"| gradients | parameters | loss of the last fifth, seeds {', '.join(map(str, SEEDS))} | mean |"
    yield "| --- | --- | --- | ---: |"
    for choice, seeds in curves.items():
        last = [fmean(each[-max(1, len(each) // 5) :]) for each in seeds]
        yield f"| {choice} | {', '.join(f'{each:.4f}' for each in last)} | {fmean(last):.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=world_of, nargs="+", default=[(2, 1), (4, 1), (4, 2)], metavar="N or HxR",
                        help="ranks, or hosts x ranks; default: 2 4 2x2")  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    parser.add_argument("--repeat", type=int, default=5, metavar="STEPS", help="that a mean is of; default: 5")
    parser.add_argument("--curves", type=int, default=0, metavar="STEPS", help="train, and count no bytes")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.as_rank:
        as_rank(flags.models, flags.repeat, flags.curves)
        return
    command = [sys.executable, __file__, "--as-rank", "--repeat", str(flags.repeat), "--curves", str(flags.curves)]
    command += ["--models", *flags.models]
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}")
    if flags.curves:
        found = json.loads(over_loopback(2, command)[0])
        print("\n".join(losses(dict(zip(CURVES, found, strict=True)))))
        return
    if why_not := available():
        print(f"no links here ({why_not}): over loopback, where the kernel counts no host's bytes")
    for ranks, on_host in flags.worlds:
        outputs = (
            over_loopback(ranks, command, on_host) if why_not else over_links(ranks, None, command, on_host)
        )
        of_ranks = zip(*([Bytes(*each) for each in json.loads(output)] for output in outputs), strict=True)
        for model in flags.models:
            print(f"\n{model}, {ranks // on_host} hosts x {on_host}\n")
            print("\n".join(table({choice: next(of_ranks) for choice in CHOICES})), flush=True)


if __name__ == "__main__":
    main()
