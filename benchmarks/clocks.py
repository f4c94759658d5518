"""The cost of knowing where the time goes: a step's clock readings and counts, as a fraction of the step.

    python benchmarks/clocks.py [--arch resnet18] [--image-size 32] [--batch-size 16] [--steps 20]

A short step, so that the fraction is large: one process, 4-bit max-min, a line logged after every tenth step. The
fraction is an upper bound: every reading of the clock in a step, times what one takes, and every message counted, times
what that adds to passing it on, although its two readings are among the former; and a tenth of a report.
"""

import argparse
import os
import platform
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
from torch import nn

import compression
from benchmarks.search import machine
from compression import Metered, Solo
from image_classification.allocator import keep_freed_memory
from image_classification.models import build

LINE_EVERY_STEPS = 10
CALLS = 20_000


def seconds_a_call(work: Callable[[], object], calls: int = CALLS) -> float:
    return median(timeit.repeat(work, number=calls, repeat=5)) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    flags = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(0)
    network = build(flags.arch, num_classes=10)
    exchange = compression.attach(network, compression.build("maxmin"))
    images = torch.randn(flags.batch_size, 3, flags.image_size, flags.image_size)
    labels = torch.randint(10, (flags.batch_size,))

    def step() -> None:
        exchange.begin_step()
        nn.functional.cross_entropy(network(images), labels).backward()
        exchange.settle(exchange.finish())

    step()  # compiles
    with patch("time.perf_counter", wraps=time.perf_counter) as clock, patch.object(
        Metered, "count", autospec=True, side_effect=Metered.count
    ) as count:
        step()
    seconds = median(timeit.repeat(step, number=1, repeat=flags.steps))
    value = torch.zeros(1)
    metered = Metered(Solo())
    reading = seconds_a_call(time.perf_counter)
    counting = seconds_a_call(lambda: metered.sum_(value)) - seconds_a_call(lambda: metered.inner.sum_(value))
    reporting = seconds_a_call(exchange.report, 1000) / LINE_EVERY_STEPS
    exchange.close()
    cost = clock.call_count * reading + count.call_count * counting + reporting
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}")
    print(f"a step takes {1e3 * seconds:.1f} ms, reads the clock {clock.call_count} times at {1e9 * reading:.0f} ns")
    print(f"and counts {count.call_count} messages at {1e9 * counting:.0f} ns; reports take {1e6 * reporting:.1f} us")
    print(f"in all at most {1e6 * cost:.1f} us a step: {cost / seconds:.4%}")


if __name__ == "__main__":
    main()
