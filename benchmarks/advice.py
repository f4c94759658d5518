"""Advice checked: predicted step times of compressors beside measured ones, cell by cell.

    python benchmarks/advice.py [--cells "resnet18 2x1 100" ...] [--seconds 20] [--runs FILE]

A cell is a model, hosts x ranks a host, and the links' Mbit/s each way, or none for no limit. Hosts are network
namespaces, with a rank of one thread each or several; that takes root. Without root, name cells without a limit alone
(`--cells`): they run over this machine's loopback.

In each cell the ranks are first advised (`compression.advise`): all constants come from that, and are fixed from then
on. Then every choice trains: its steps, after some to warm up, take what the table says, the median over steps of the
slowest rank. Choices that exist in two levels are measured in those that the advice predicts to be faster. The last
lines name every prediction that is off by more than 20 %, and how far the advised choice is from the best of the
methods measured, which are not all that an advice chooses from.

With `--runs FILE` every finished cell is kept there, one JSON object a line, and is not run again by the same code for
as many seconds.
"""

import argparse
import gc
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import compression
from benchmarks.accuracy import digest_of_code
from benchmarks.netlab import available
from benchmarks.ranks import over_links, over_loopback
from benchmarks.search import machine
from compression.advice.advice import Advice
from compression.advice.prediction import Forecast
from image_classification.models import build

METHODS = (
    "float32",
    "bfloat16",
    "maxmin, bits 4",
    "eden, bits 2",
    "norm_uniform, bits 4",
    "1bit",
    "topk, ratio 0.01",
    "powersgd, rank 4",
)
CELLS = (
    "resnet18 2x1 50",
    "resnet18 2x1 100",
    "resnet18 2x1 1000",
    "resnet18 2x1 none",
    "resnet18 2x2 100",
    "resnet18 2x2 none",
    "resnet18 4x1 1000",
    "transformer 2x1 50",
    "transformer 2x1 none",
    "transformer 2x2 1000",
    "transformer 4x1 100",
    "vgg16 2x1 1000",
)
WARM_UP = 3  # steps: after the first one DDP groups its buffers anew
LEAST_STEPS, MOST_STEPS = 3, 30
MISS, FAR = 0.2, 0.1  # what predictions, and the advised choice, may be off by


@dataclass(frozen=True)
class Cell:
    """One setting of the grid. Raises ValueError for a text that is none."""

    model: str
    hosts: int
    ranks_per_host: int
    mbit: float | None

    @classmethod
    def of(cls, text: str) -> "Cell":
        """The cell of a text such as "resnet18 2x1 100"."""
        try:
            model, ranks, rate = text.split()
            hosts, ranks_per_host = map(int, ranks.split("x"))
            cell = cls(model, hosts, ranks_per_host, None if rate == "none" else float(rate))
        except ValueError:
            raise ValueError(f"a cell is MODEL HOSTSxRANKS MBIT, as in 'resnet18 2x1 100', got {text!r}") from None
        if model not in MODELS:
            raise ValueError(f"a cell's model is one of {', '.join(MODELS)}, got {model!r}")
        return cell

    def __str__(self) -> str:
        return f"{self.model} {self.hosts}x{self.ranks_per_host} {'none' if self.mbit is None else f'{self.mbit:g}'}"


@dataclass(frozen=True)
class Row:
    """One choice in a cell: seconds of a step, predicted and measured."""

    choice: str
    predicted: float
    measured: float
    advised: bool

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


# What a rank does


class LanguageModel(nn.Module):
    """A transformer over characters, of 3.3 million values."""

    CONTEXT, WIDTH = 64, 256

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(256, self.WIDTH), nn.Embedding(self.CONTEXT, self.WIDTH)
        block = nn.TransformerEncoderLayer(self.WIDTH, 4, 4 * self.WIDTH, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        self.head = nn.Linear(self.WIDTH, 256)

    def forward(self, text: Tensor) -> Tensor:
        """[rows, characters] -> [rows, scores, characters]"""
        scores: Tensor = self.head(self.blocks(self.characters(text) + self.places.weight))
        return scores.mT


def images(count: int, side: int, classes: int) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    return torch.randn(count, 3, side, side), torch.randint(classes, (count,))


def characters(count: int) -> tuple[Tensor, Tensor]:
    """Random rows of text, and what is to be predicted of them."""
    text = torch.randint(256, (count, LanguageModel.CONTEXT))
    return text, text.roll(-1, 1)


def tiny() -> nn.Module:
    """A model for tests."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 10))


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "resnet18": (lambda: build("resnet18", num_classes=10), lambda: images(32, 32, 10)),
    "transformer": (LanguageModel, lambda: characters(16)),
    "vgg16": (lambda: build("vgg16"), lambda: images(8, 32, 1000)),
    "tiny": (tiny, lambda: images(8, 8, 10)),
}


def rank(model: str, methods: Sequence[str], seconds: float) -> None:
    """Be advised, train with every method, and print the rows of the cell as rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    make, batch = MODELS[model]
    torch.manual_seed(1 + dist.get_rank())
    inputs, targets = batch()

    def replica() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
        torch.manual_seed(0)
        replicated = DistributedDataParallel(make())
        optimizer = torch.optim.SGD(replicated.parameters(), lr=0.0, momentum=0.9)

        def step() -> None:
            nn.functional.cross_entropy(replicated(inputs), targets).backward()

        return replicated, optimizer, step

    replicated, optimizer, step = replica()
    advice = compression.advise(replicated, step, update=optimizer.step)
    del replicated, optimizer, step
    rows = []
    for forecast in chosen(advice, methods):
        gc.collect()  # DDP and its hooks make circles, which hold several times a model's memory
        replicated, optimizer, step = replica()
        choice = forecast.choice
        exchange = compression.attach(replicated, choice.compressor, hierarchical=choice.hierarchical)
        measured = trained(step, optimizer, seconds)
        exchange.close()
        del replicated, optimizer, step, exchange
        rows.append(Row(str(choice), forecast.step.seconds, measured, choice == advice.best.choice))
    if dist.get_rank() == 0:
        print(json.dumps({"measured": advice.measured.to_json(), "rows": [asdict(row) for row in rows]}))
    dist.destroy_process_group()


def chosen(advice: Advice, methods: Sequence[str]) -> list[Forecast]:
    """The forecast of each method, in the levels that are faster, and that of the advised choice.

    Raises ValueError for a method that the advice knows nothing of.
    """
    found = []
    for method in methods:
        of_method = [each for each in advice.choices if each.choice.codec == method]
        if not of_method:
            known = sorted({each.choice.codec for each in advice.choices})
            raise ValueError(f"a method is one of {'; '.join(known)}, got {method!r}")
        found.append(min(of_method, key=lambda each: each.step.seconds))
    return found if advice.best in found else [*found, advice.best]


def trained(step: Callable[[], None], optimizer: torch.optim.Optimizer, seconds: float) -> float:
    """The median of some steps' seconds, each the slowest rank's, of as many as fit into about so many seconds."""

    def once() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        step()
        optimizer.step()
        return time.perf_counter() - start

    warm = [once() for _ in range(WARM_UP)]
    took = torch.tensor(min(warm))
    dist.all_reduce(took, dist.ReduceOp.MAX)
    steps = min(MOST_STEPS, max(LEAST_STEPS, math.floor(seconds / float(took))))
    dist.barrier()
    own = [once() for _ in range(steps)]
    ranks: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return median(map(max, zip(*ranks, strict=True)))


# What the caller does


class Cells:
    """Finished cells by (cell, methods, seconds, code), kept in a file where one is named."""

    KEY = ("cell", "methods", "seconds", "code")

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        runs = list(map(json.loads, lines))
        self.known = {
            (run["cell"], tuple(run["methods"]), run.get("seconds"), run["code"]): run["rows"] for run in runs
        }  # of earlier files, whose seconds nobody knows, none is taken

    def get(self, cell: Cell, methods: Sequence[str]) -> list[Row]:
        """The rows of a cell, run now where it was not before."""
        key = (str(cell), tuple(methods), self.seconds, digest_of_code())
        if key not in self.known:
            result = run(cell, methods, self.seconds)
            self.known[key] = result["rows"]
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps(dict(zip(self.KEY, key, strict=True)) | result) + "\n")
        return [Row(**row) for row in self.known[key]]


def run(cell: Cell, methods: Sequence[str], seconds: float) -> dict[str, Any]:
    """What the advice measured in a cell, and its rows."""
    command = [sys.executable, str(Path(__file__).resolve()), "--rank", cell.model, "--seconds", f"{seconds:g}"]
    command += ["--methods", *methods]
    ranks = cell.hosts * cell.ranks_per_host
    if cell.mbit is None and available() is not None:
        outputs = over_loopback(ranks, command, cell.ranks_per_host)
    else:
        outputs = over_links(ranks, cell.mbit, command, cell.ranks_per_host)
    result: dict[str, Any] = json.loads(outputs[0])
    return result


def table(cells: Mapping[Cell, Sequence[Row]]) -> Iterator[str]:
    """Predicted and measured steps in Markdown, and what is off."""
    yield "| cell | choice | predicted, ms | measured, ms | predicted / measured |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for cell, rows in cells.items():
        for row in sorted(rows, key=lambda each: each.measured):
            name = f"**{row.choice}**" if row.advised else row.choice
            yield f"| {cell} | {name} | {row.predicted * 1e3:.1f} | {row.measured * 1e3:.1f} | {row.ratio:.2f} |"
    every = [(cell, row) for cell, rows in cells.items() for row in rows]
    misses = [(cell, row) for cell, row in every if abs(row.ratio - 1) > MISS]
    yield ""
    yield f"Advised choices are bold. {len(misses)} of {len(every)} predictions are off by more than {MISS:.0%}:"
    yield from (f"* {cell}, {row.choice}: {row.ratio:.2f}" for cell, row in misses)
    yield "The advised choice, beside the best of the methods measured:"
    for cell, rows in cells.items():
        best = min(rows, key=lambda each: each.measured)
        advised = next(row for row in rows if row.advised)
        behind = advised.measured / best.measured - 1
        miss = f", more than {FAR:.0%}" if behind > FAR else ""
        yield f"* {cell}: {advised.choice} takes {behind:.1%} longer than {best.choice}{miss}"


def main() -> None:
    """Run or recall the cells, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=CELLS, metavar="CELL", help="default: twelve of them")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="CHOICE", help="as an advice calls them")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of each choice's steps; default: 20")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="keep finished cells here, and take them from here")
    parser.add_argument("--rank", choices=MODELS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.rank:
        rank(flags.rank, flags.methods, flags.seconds)
        return
    try:
        cells = [Cell.of(text) for text in flags.cells]
    except ValueError as error:
        parser.error(str(error))
    if any(cell.mbit is not None for cell in cells) and (why := available()) is not None:
        parser.error(f"links of a rate need network namespaces: {why}; leave those cells out")
    finished = Cells(flags.runs, flags.seconds)
    rows = {}
    for cell in cells:
        rows[cell] = finished.get(cell, flags.methods)
        print(f"{cell}: done", file=sys.stderr, flush=True)
    print(f"{machine()}; Python {platform.python_version()}, torch {torch.__version__}; one thread a rank\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
