"""The bit-width search on ResNet-50: how far differential evolution stays from the optimum, and what a search takes.

    python benchmarks/search.py [--passes 2] [--repeats 5]

The gradients are real: backward passes of a freshly initialized ResNet-50 on random images and labels, accumulated as
training does, m = 0.8 m + g. They stand for the start of a training; later gradients give other widths.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import numba
import numpy as np
import scipy
import torch
from torch import Tensor, nn

import compression
from compression.layers import layers_of
from image_classification.models import build
from search import Tables, as_text, evolve, measure, optimum, search, within_budget
from search.tables import Measure

PUBLISHED: dict[str, Any] = {"popsize": 50, "iterations": 5}
DEFAULTS: dict[str, Any] = {"popsize": 5, "iterations": 2}
BUCKET_SIZE = 512


def accumulated_gradients(model: nn.Module, passes: int) -> dict[str, Tensor]:
    """m of each parameter after some backward passes on 4 random images each."""
    parameters = dict(model.named_parameters())
    m = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for _ in range(passes):
        loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 224, 224)), torch.randint(1000, (4,)))
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for accumulated, gradient in zip(m.values(), gradients, strict=True):
            accumulated.mul_(0.8).add_(gradient)
    return m


def measure_model(m: Mapping[str, Tensor], by: Measure = "root") -> Tables:
    """The error table of the layers that training would compress with max-min, at 2 to 8 bits."""
    layers = layers_of([(name, tuple(tensor.shape)) for name, tensor in m.items()], BUCKET_SIZE)
    return measure(
        {layer.name: m[layer.name] for layer in layers if layer.compressed},
        lambda bits: compression.codec("maxmin", bits=bits, bucket_size=BUCKET_SIZE),
        range(2, 9),
        dense_bytes=sum(4 * layer.numel for layer in layers if not layer.compressed),
        values=sum(layer.numel for layer in layers),
        by=by,
    )


def seconds(repeats: int, work: Callable[[], Any]) -> float:
    """Median wall time of some runs, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times)


def machine() -> str:
    """The processor's name where the kernel tells it, and its cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--passes", type=int, default=2, help="backward passes that m accumulates")
    parser.add_argument("--repeats", type=int, default=5, help="runs that each time is the median of")
    flags = parser.parse_args()

    torch.manual_seed(0)
    m = accumulated_gradients(build("resnet50"), flags.passes)
    tables = measure_model(m)
    print(f"{machine()}, {torch.get_num_threads()} threads")
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"scipy {scipy.__version__}, numba {numba.__version__}"
    )
    print(as_text(search(tables, seed=0, **PUBLISHED), "ResNet-50, 50 members a layer and 5 iterations"))

    print(f"\nseconds, median of {flags.repeats}")
    parts = {
        "error table": lambda: measure_model(m),
        "evolution, 50 and 5": lambda: evolve(tables, 0.5, 0.5, seed=0, **PUBLISHED),
        "evolution, 5 and 2": lambda: evolve(tables, 0.5, 0.5, seed=0, **DEFAULTS),
        "optimum": lambda: optimum(tables, 0.5, 0.5),
        "budget of 4 bits": lambda: within_budget(tables, 4.0),
        "whole, 50 and 5": lambda: as_text(search(measure_model(m), seed=0, **PUBLISHED), 0),
    }
    for name, work in parts.items():
        print(f"  {name:<20}{seconds(flags.repeats, work):>8.4f}")

    print("\nevolution above the optimum, ten seeds: least, median, most")
    best = optimum(tables, 0.5, 0.5).objective
    for name, setting in (("50 and 5", PUBLISHED), ("5 and 2", DEFAULTS)):
        gaps = [evolve(tables, 0.5, 0.5, seed=seed, **setting).objective / best - 1 for seed in range(10)]
        print(f"  {name:<20}" + "".join(f"{100 * gap:>7.1f} %" for gap in (min(gaps), median(gaps), max(gaps))))


if __name__ == "__main__":
    main()
