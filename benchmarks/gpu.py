"""Quantizing on a GPU: every family and width next to copying the tensor once, and whether the host waits for it.

    python benchmarks/gpu.py [--values 25.6e6] [--repeats 20]

Times are the GPU's: medians between CUDA events, behind work that lasts until the host has launched what is timed. A
ratio is the median, over the repeats, of a time over that of a copy_ made just before it. `rate` is what encoding and
decoding together move a second, in units of what copy_ moves: both read and write every value and every byte of the
message once. `feedback` is encoding with error feedback, `add` is decoding onto what is there. The host waits where
torch's sync debug mode says so in an encoding and a decoding that have run before.
"""

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
from torch import Tensor

from compression import plans
from compression.codecs.eden import Eden
from compression.codecs.quantizer import Quantizer
from compression.codecs.quantizers import Exponential, MaxMin, NormUniform, OneBit, Quantile, TernGrad
from compression.layers import Layer
from compression.plans import Plan, Segment
from compression.randomness import stream_keys

Work = Callable[[], object]
AHEAD = 1_000_000  # cycles of the GPU, half a millisecond: more than the host takes to launch anything


def quantizers() -> list[Quantizer]:
    """Every family at every width it has."""
    variable = (MaxMin, NormUniform, Exponential, Quantile, Eden)
    return [*(family(bits) for family in variable for bits in range(family.min_bits, 9)), OneBit(), TernGrad()]


def one_message(quantizer: Quantizer, count: int) -> Plan:
    """One layer of `count` values on one rank."""
    layer = Layer(0, "layer", (count,), True)
    shards, widths = {layer.name: [(0, count)]}, {layer.name: quantizer.bits}
    rules = (quantizer.shard_bucket_size, quantizer.record_bytes)
    return quantizer.in_pieces(plans.plan([Segment(layer, 0, 0)], [0], shards, widths, *rules))


def works(quantizer: Quantizer, values: Tensor) -> dict[str, Work]:
    """The work that is measured, by its column."""
    plan = one_message(quantizer, len(values))
    keys = stream_keys(0, 0, plan.layers, 0, 0)
    wire = torch.empty(plan.wire_bytes, dtype=torch.uint8, device=values.device)
    residual, pending, out = (torch.zeros_like(values) for _ in range(3))
    return {
        "encode": lambda: quantizer.encode_plan(plan, values, keys, wire),
        "feedback": lambda: quantizer.encode_plan(plan, values, keys, wire, residual, pending),
        "decode": lambda: quantizer.decode_plan(plan, wire, out, keys=keys),
        "add": lambda: quantizer.decode_plan(plan, wire, out, 0.5, accumulate=True, keys=keys),
    }


def relative(work: Work, copy: Work, repeats: int) -> tuple[float, float]:
    """(milliseconds, times as long as the copy), medians."""
    work()
    pairs = [(milliseconds(copy), milliseconds(work)) for _ in range(repeats)]
    return median(own for _, own in pairs), median(own / base for base, own in pairs)


def milliseconds(work: Work) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(AHEAD)
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def waits(work: Work) -> bool:
    """Whether the host waits for the GPU in work that has run before."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def hardware() -> str:
    properties = torch.cuda.get_device_properties(0)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "missing"
    return (
        f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, Triton {triton}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=float, default=25.6e6, help="values to quantize (default: ResNet-50's)")
    parser.add_argument("--repeats", type=int, default=20, help="times that each is measured")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU, and torch finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    values = torch.randn(int(arguments.values), device=device)
    target = torch.empty_like(values)
    copy = relative(lambda: target.copy_(values), lambda: target.copy_(values), arguments.repeats)[0]
    print(hardware())
    print(f"{len(values):,} values, {MaxMin(4).backend(device)} kernels; one copy_ takes {copy:.3f} ms")
    columns = ("encode", "feedback", "decode", "add")
    headings = "".join(f"{column + ' ms':>13}{'x copy_':>9}" for column in columns)
    print(f"{'family':14}{'bits':>5}{headings}   rate  waits")
    for quantizer in quantizers():
        measured = works(quantizer, values)
        row = f"{quantizer.family:14}{quantizer.bits:>5}"
        ratios = {}
        for column in columns:
            time, ratios[column] = relative(measured[column], lambda: target.copy_(values), arguments.repeats)
            row += f"{time:13.3f}{ratios[column]:9.2f}"
        moved = 1 + one_message(quantizer, len(values)).wire_bytes / values.nbytes  # by both, in copies
        row += f"{moved / (ratios['encode'] + ratios['decode']):7.0%}"
        waiting = [column for column in columns if waits(measured[column])]
        print(f"{row}  {', '.join(waiting) or 'never'}", flush=True)


if __name__ == "__main__":
    main()
