"""The cost of encoding and decoding: every quantizer at several widths, in units of copying the tensor once.

    python benchmarks/codecs.py [--bits 1 2 3 4 8] [--types maxmin terngrad ...] [--bucket-size 512] [--repeats 9]
        [--arch resnet50] [--torch] [--beside maxmin]

The tensor has the layers of a gradient, of ResNet-50's 25.6 million values, and is encoded as one message, as a rank
does in the first hop; `add` decodes onto what is there, as the owner of a shard does. A ratio is the median, over the
repeats, of a time over that of a copy_ into a touched tensor made just before it, so that a busy machine slows both.

With `--beside TYPE` the unit is what that type takes for the same at the same width, by turns.

With `--torch` the quantizers' definitions in torch run in place of their kernels, as those of a quantizer without any.
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's threads go on spinning after a copy, where ours run

import numba
import torch
from torch import Tensor

from benchmarks.search import machine
from benchmarks.topk import relative
from compression import COMPRESSORS, codec, plans
from compression.codecs.quantizer import Quantizer
from compression.layers import DENSE, Layer, layers_of
from compression.plans import Plan, Segment
from compression.randomness import stream_keys
from image_classification.allocator import keep_freed_memory
from image_classification.models import build

QUANTIZERS = {name: row for name, row in COMPRESSORS.items() if row.quantizer is not None}
WITH_BITS = [name for name, row in QUANTIZERS.items() if row.has_bits]


def one_message(layers: tuple[Layer, ...], quantizer: Quantizer) -> Plan:
    """All layers, one after the other, for one owner."""
    segments, at = [], 0
    for layer in layers:
        segments.append(Segment(layer, at, at))
        at += layer.numel
    shards = {layer.name: [(0, layer.numel)] for layer in layers}
    widths = {layer.name: quantizer.bits if layer.compressed else DENSE for layer in layers}
    return quantizer.in_pieces(
        plans.plan(segments, [0], shards, widths, quantizer.shard_bucket_size, quantizer.record_bytes)
    )


def works(quantizer: Quantizer, layers: tuple[Layer, ...], values: Tensor) -> dict[str, Callable[[], None]]:
    """The work that is measured, by name."""
    plan = one_message(layers, quantizer)
    keys = stream_keys(0, 0, plan.layers, 1, 0)
    wire = torch.empty(plan.wire_bytes, dtype=torch.uint8)
    out, residual, pending = torch.zeros_like(values), torch.zeros_like(values), torch.zeros_like(values)
    return {
        "encode": lambda: quantizer.encode_plan(plan, values, keys, wire),
        "decode": lambda: quantizer.decode_plan(plan, wire, out, keys=keys),
        "add": lambda: quantizer.decode_plan(plan, wire, out, 0.5, accumulate=True, keys=keys),
        "encode with feedback": lambda: quantizer.encode_plan(plan, values, keys, wire, residual, pending),
    }


def without_kernels(quantizer: Quantizer) -> Quantizer:
    """The same quantizer by its torch definition alone: a subclass belongs to no family of kernels."""
    kind: Any = type(quantizer)
    options = {field.name: getattr(quantizer, field.name) for field in fields(kind) if field.init}
    made: Quantizer = type(kind.__name__, (kind,), {})(**options)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    parser.add_argument("--types", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS))
    parser.add_argument("--bucket-size", type=int, default=512, help="values that share scales, -1: a layer's")
    parser.add_argument("--repeats", type=int, default=9, help="times that each is measured")
    parser.add_argument("--arch", default="resnet50", help="whose gradient it is (default: %(default)s)")
    parser.add_argument("--torch", action="store_true", help="the definitions in torch, in place of the kernels")
    parser.add_argument("--beside", choices=WITH_BITS, metavar="TYPE", help="the type whose times are the unit")
    asked = parser.parse_args()
    keep_freed_memory()  # as the trainer does: torch's definitions allocate much
    network = build(asked.arch, "classic", 1000)
    layers = layers_of([(name, tuple(p.shape)) for name, p in network.named_parameters()], asked.bucket_size)
    values = torch.randn(sum(layer.numel for layer in layers), generator=torch.Generator().manual_seed(0))
    target = torch.zeros_like(values)
    print(
        f"{len(values):,} values in {len(layers)} layers, buckets of {asked.bucket_size}; {machine()}, "
        f"{torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}, "
        f"numba {numba.__version__}\n"
    )
    columns: list[str] = []
    for name in asked.types:
        row = QUANTIZERS[name]
        for bits in [bits for bits in asked.bits if bits >= row.min_bits] if row.has_bits else [None]:
            quantizer = codec(name, bucket_size=asked.bucket_size, **({} if bits is None else {"bits": bits}))
            quantizer = without_kernels(quantizer) if asked.torch else quantizer
            units: dict[str, Callable[[], object]] = {}
            if asked.beside:
                units |= works(codec(asked.beside, bits=bits or 4, bucket_size=asked.bucket_size), layers, values)
            found = {
                what: relative(work, units.get(what, lambda: target.copy_(values)), asked.repeats)
                for what, work in works(quantizer, layers, values).items()
            }
            if not columns:
                columns = list(found)
                unit = asked.beside or "copy_"
                print("| type | bits |", " | ".join(f"{what}, ms | x {unit}" for what in columns), "|", flush=True)
                print("| --- | --- |" + " ---: | ---: |" * len(columns))
            cells = " | ".join(f"{milliseconds:.1f} | {ratio:.2f}" for milliseconds, ratio in found.values())
            print(f"| {name} | {bits or ''} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
