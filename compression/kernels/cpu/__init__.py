"""The kernels for CPUs: one fused pass per bucket in numba, the same bits as `reference`.

A bucket is read once into the first-level cache and leaves as a record. Every loop over values is one that LLVM
vectorizes, or a trick. Tricks are paid for: one that buys less than 5 % goes.

| trick | file | time without it, with it = 1 | since |
| --- | --- | --- | --- |
| pointers, not numba's indexing, where negative indices wrap | memory | encode 4.6, decode 3.1, add 3.8 | 23 Nov |
| what feedback leaves goes past the caches | memory, buckets | feedback 1.05 (25 M values) to 1.29 | 28 Nov |
| decoded values go past the caches | buckets | decode 0.4 to 1.2, Zen 3: 1.9; see docs/LOG.md | 27 Nov |
| words become bytes 32 at a time | vectors | encode 1.6 to 1.7, feedback 1.2 | 27 Nov |
| ternary codes are packed 16 bytes at a time | vectors | buckets of 128: encode 1.09; of 512: 1.03 | 28 Nov |
| ternary codes are unpacked 16 bytes at a time | vectors | buckets of 128: decode 2.6; of 512: add 1.1 | 28 Nov |
| quantiles are looked up four at a time | vectors | quantile: add 1.3 to 1.4, decode 1.0 to 1.4 | 28 Nov |
| the last 128 terms of a sum stay in registers | vectors | 1bit: encode 1.2; terngrad: feedback 1.1 to 1.3 | 28 Nov |
| sums are halved twice before they are stored | sums | feedback 1.2; 1bit: encode 1.2 | 25 Nov |
| extremes are found among bits as they are | families | encode 1.07, feedback 1.09 | 27 Nov |
| quantiles' bins and positions are found in vectors | families | quantile: encode 1.7 | 28 Nov |
| LLVM is told that a shift fits 32 bits | families | quantile: encode 1.07 | 28 Nov |
| an even axis is rounded in one pass | buckets | encode 1.1 | 25 Nov |
| one bit needs no positions | buckets | 1bit: encode 1.5 | 27 Nov |
| a bucket's places are read once, outside of loops | buckets | feedback 1.3 | 28 Nov |
| decoded values are added in short tiles | buckets | quantile: add 1.3; one bucket a layer: add 1.2 | 28 Nov |
| sums over ranks are made and encoded in blocks | buckets, scratch | recode 1.06 (25 M values) to 1.6 | 25 Nov |
| eight codes are packed in a 64-bit word | packing | 3, 6 bits: encode 1.7, 1.9, decode 2.0, 2.7 | 23 Nov |
| four bits go by pairs, eight as they are | packing | encode 1.3, decode 1.3 to 1.4 | 23 Nov |
| one, two bits: a byte's codes meet in a lane | packing | encode 1.2, 1.3, decode 1.5, 1.3 | 27 Nov |
| a thread keeps its scratch, made outside of kernels | scratch | 27 in place of 8 us to encode 2,000 values | 27 Nov |
| scratch is aligned to cache lines | scratch | decode 1.3, add 1.3, recode 1.1 | 27 Nov |
| scratch is a plain tuple | scratch | 2,000 values: encode 1.07, decode 1.14 | 27 Nov |
| one table of counts for each half of the values | sparse | select 1.0; where most are zero 1.5 | 23 Nov |
| what may be among the largest is collected early | sparse | select 1.3 | 23 Nov |
| references to arrays are not counted | numba_internals | encode 1.2, feedback 1.3; buckets of 128: 1.6, 2.0 | 27 Nov |
| a kernel's parts have internal linkage | numba_internals | buckets of 128: decode 1.35; compile 0.9 | 28 Nov |
| large parts are there once | numba_internals | decode 1.1; buckets of 128: 1.3; compile 1.06 | 27 Nov |
| parts are linked only, not optimized on their own | numba_internals | compile 1.6 | 27 Nov |
| no wrappers that nobody calls | numba_internals | compile 1.15 | 23 Nov |
| no garbage collector while numba compiles | numba_internals | compile 1.06 | 27 Nov |
| constants are of numpy's types, so that no part has two | buckets, sums | compile 1.1 | 27 Nov |
| six stages of a Hadamard transform stay in registers | rotations | eden: a rotation by plain loops 14 | 29 Nov |
| thresholds are looked up by cells | eden | 8 bits, by binary search: encode 15 | 29 Nov |
| kernels are cached on disk, by all their sources | numba_internals | first calls 7.9 s in place of 0.4 | 23 Nov |

"feedback" is encoding with feedback, "recode" adding up and encoding. Where nothing else is said: max-min, 4 bits,
buckets of 512, 8.1 million values, one thread. Measured on 28 November 2026 with numba 0.68.1 on an AMD EPYC (Zen 4,
AVX-512; two cores of a shared virtual machine): by turns, most of them in one process on the same buffers, the median
of 9 turns or more, each the least CPU time of 3 calls or more. Without any change encoding differs by up to 3 %,
decoding and adding by up to 10 %. Compile times are of 2 or 3 turns.

EDEN, whose buckets are rotated, has kernels in a module of its own, `eden`.

The pool of threads of our own (`threads`) is no trick: numba's aborts when two Python threads use it at once. `memory`
and `vectors` are written in numba's public interface for extensions; its compiler's inside is `numba_internals`' alone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ...plans import Plan
from ..protocols import Definition
from . import buckets
from .families import FAMILIES
from .scratch import scratch
from .threads import split

__all__ = ["FAMILIES", "decode", "encode", "expected_squared_error", "recode"]


def encode(
    quantizer: Definition,
    plan: Plan,
    values: Tensor,
    keys: np.ndarray,
    wire: Tensor,
    residual: Tensor | None = None,
    pending: Tensor | None = None,
) -> None:
    """As `reference.encode`."""
    recode(quantizer, plan, wire.new_empty(0, 0), values, None, 1.0, keys, wire, residual, pending)


def recode(
    quantizer: Definition,
    plan: Plan,
    received: Tensor,
    values: Tensor,
    rank: int | None,
    factor: float,
    keys: np.ndarray,
    wire: Tensor,
    residual: Tensor | None = None,
    pending: Tensor | None = None,
    senders: np.ndarray | None = None,
) -> None:
    """As `reference.recode`, in blocks that never leave the cache between decoding and encoding."""
    summands = (received.numpy(), values.numpy(), -1 if rank is None else rank, np.float32(factor))
    tensors = (*summands, keys, wire.numpy(), *_remembered(residual, pending))
    _run(buckets.recode, quantizer, plan, *_columns(plan), *tensors)


def _run(kernel: Callable[..., Any], quantizer: Definition, plan: Plan, *arguments: Any) -> list[Any]:
    """What a kernel returns of each thread's buckets."""
    number = FAMILIES[str(quantizer.family)]

    def work(start: int, stop: int) -> Any:
        return kernel(number, start, stop, *arguments, scratch(plan, quantizer.family == "quantile"))

    return split(plan.count, work)


def _columns(plan: Plan) -> tuple[np.ndarray, ...]:
    return plan.position, plan.count, plan.bits, plan.wire_at, plan.slot, plan.element, plan.state_at


def _remembered(residual: Tensor | None, pending: Tensor | None) -> tuple[np.ndarray, np.ndarray, bool]:
    if residual is None or pending is None:
        nothing = np.empty(0, np.float32)
        return nothing, nothing, False
    return residual.numpy(), pending.numpy(), True


def decode(
    quantizer: Definition,
    plan: Plan,
    wire: Tensor,
    out: Tensor,
    factor: float = 1.0,
    accumulate: bool = False,
    keys: np.ndarray | None = None,
) -> None:
    """As `reference.decode`."""
    tensors = (wire.numpy(), out.numpy(), np.float32(factor), accumulate, not accumulate)
    _run(buckets.decode, quantizer, plan, plan.position, plan.count, plan.bits, plan.wire_at, *tensors)


def expected_squared_error(quantizer: Definition, plan: Plan, values: Tensor, projected: bool = False) -> float:
    """As `reference.expected_squared_error`; sums of 512 in float32, the rest in float64."""
    columns, projects = (plan.position, plan.count, plan.bits), projected and quantizer.projects
    return sum(_run(buckets.squared_error, quantizer, plan, *columns, values.numpy(), projects))
