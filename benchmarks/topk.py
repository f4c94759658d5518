"""Selecting the largest values: this program's kernel next to torch.topk, in units of copying the tensor once.

    python benchmarks/topk.py [--values 25.6e6] [--repeats 7]

A ratio is the median, over the repeats, of a time over that of a copy_ made just before it, so that a busy machine
slows both. torch.topk finds the same values, but not in the order of their indices, and ties as it likes.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's threads go on spinning after a copy, where ours run

import numba
import numpy as np
import torch
from torch import Tensor

from compression.codecs.sparsifiers import TopK
from compression.kernels.cpu import sparse as sparse_cpu

RATIOS = (0.001, 0.01, 0.1)


def gradients(values: int) -> dict[str, Tensor]:
    """The values to select from: one scale, as within a layer; many scales, as over a model; no difference at all."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(values, generator=generator)
    return {
        "normal": normal,
        "heavy tail": normal * torch.randn(values, generator=generator).mul_(2).exp_(),
        "constant": torch.full((values,), 1e-3),
    }


def relative(work: Callable[[], object], copy: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(milliseconds, times as long as the copy), medians."""
    pairs = [(seconds(copy), seconds(work)) for _ in range(repeats)]
    return 1e3 * median(own for _, own in pairs), median(own / base for base, own in pairs)


def seconds(work: Callable[[], object]) -> float:
    """Time of the second of two runs in a row: writing back what lies in the caches is then its own part."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=float, default=25.6e6, help="values to select from (default: ResNet-50's)")
    parser.add_argument("--repeats", type=int, default=7, help="times that each is measured")
    arguments = parser.parse_args()
    count, at = int(arguments.values), np.zeros(1, np.int64)
    print(
        f"{count:,} values, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, numba {numba.__version__}"
    )
    print(f"{'values':12} {'kept':>6} {'what':>12} {'ms':>8} {'x copy_':>8}")
    target = torch.empty(count)
    for name, values in gradients(count).items():
        for ratio in RATIOS:
            plan = TopK(ratio).plan([count])
            kept = int(plan.kept[0])
            wire = torch.empty(plan.wire_bytes, dtype=torch.uint8)
            indices = sparse_cpu.select(plan, values, at)
            sparse_cpu.encode(plan, values, at, indices, wire)
            target.copy_(values)
            works: dict[str, tuple[Callable[[], object], int]] = {
                "select": (lambda: sparse_cpu.select(plan, values, at), arguments.repeats),  # noqa: B023
                "encode": (lambda: sparse_cpu.encode(plan, values, at, indices, wire), arguments.repeats),  # noqa: B023
                "decode": (lambda: sparse_cpu.decode(plan, wire, target, at), arguments.repeats),  # noqa: B023
                "torch.topk": (lambda: values.abs().topk(kept, sorted=False), 1),  # noqa: B023
            }
            for what, (work, repeats) in works.items():
                milliseconds, ratio_to_copy = relative(work, lambda: target.copy_(values), repeats)  # noqa: B023
                print(f"{name:12} {ratio:6.1%} {what:>12} {milliseconds:8.1f} {ratio_to_copy:8.2f}")


if __name__ == "__main__":
    main()
