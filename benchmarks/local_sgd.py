"""Local SGD with 4-bit outer steps beside synchronous training: loss and bytes, at equal data.

    python benchmarks/local_sgd.py [--ranks 2 4] [--every 10 50] [--seeds 3] [--steps 150]

Runs of `examples/diloco.py`, one after the other, over this machine's loopback. Losses are those of one set of batches
after training; each is the mean over seeds, with the deviation from seed to seed.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch

from benchmarks.ranks import over_loopback
from benchmarks.search import machine

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "diloco.py"
# The package is called gradwire once installed; in a checkout it is the folder `compression`.
FROM_CHECKOUT = """
import runpy, sys
import compression
sys.modules["gradwire"] = compression
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(ranks: int, every: int, bits: int, seed: int, steps: int) -> tuple[float, float]:
    """(loss, megabytes that a rank sent) of one training."""
    options = {"every": every, "bits": bits, "seed": seed, "steps": steps}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", FROM_CHECKOUT, str(EXAMPLE), *words]
    result = json.loads(over_loopback(ranks, command)[0])
    return result["loss"], result["bytes_sent"] / 1e6


def rows(ranks: Sequence[int], every: Sequence[int], seeds: int, steps: int) -> Iterator[str]:
    """The lines of the table, in Markdown, as they become known."""
    yield "| ranks | training | loss | deviation | MB sent a rank |"
    yield "| ---: | --- | ---: | ---: | ---: |"
    for size in ranks:
        for name, interval, bits in [
            ("synchronous, float32", 1, 32),
            *((f"an outer step of 4 bits every {interval}", interval, 4) for interval in every),
        ]:
            losses, sent = zip(*(run(size, interval, bits, seed, steps) for seed in range(seeds)), strict=True)
            spread = f"{stdev(losses):.3f}" if seeds > 1 else ""
            yield f"| {size} | {name} | {fmean(losses):.3f} | {spread} | {fmean(sent):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="N", help="default: 2 4")
    parser.add_argument("--every", type=int, nargs="+", default=[10, 50], metavar="H",
                        help="inner steps to an outer one; default: 10 50")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="inner steps; default: 150")
    flags = parser.parse_args()
    print(f"{machine()}; Python {platform.python_version()}, torch {torch.__version__}; {flags.steps} steps\n")
    for line in rows(flags.ranks, flags.every, flags.seeds, flags.steps):
        print(line, flush=True)


if __name__ == "__main__":
    main()
