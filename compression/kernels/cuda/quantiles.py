"""Encoding with quantiles: buckets of any length, whose tables come of histograms.

Four launches: the smallest and the largest value of every bucket, the histogram between them, the levels, the codes.
The levels are taken from the histogram in torch. Every value is read three times.

Shapes: S buckets; [Q, M, 4] values of a program, [1, M, 1] one number per row.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import limits
from ...plans import Plan
from ...streams import on_device
from ..reference import arithmetic
from ..reference.arithmetic import HISTOGRAM_BITS
from .blocks import column, copy_dense, float_size, mask_of, quads, round_at_random, rows, streams
from .pieces import BITS, BUCKET, COUNT, FIRST, POSITION, WIRE_AT
from .records import pack, store_words

MOST = 256  # buckets whose histograms are held at once, in 64 MB

_LIMIT = tl.constexpr(limits.LIMIT)
_CODE = tl.constexpr(2.0**arithmetic.FRACTION_BITS)
_BINS, _LEVELS = tl.constexpr(1 << HISTOGRAM_BITS), tl.constexpr(256)  # room for a histogram and for a table
_LARGEST, _SMALLEST = tl.constexpr(0x7FFFFFFF), tl.constexpr(-0x80000000)


@triton.jit(do_not_specialize=["pieces"])
def extremes(
    table: tl.tensor,
    pieces: tl.tensor,
    values: tl.tensor,
    ends: tl.tensor,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
) -> None:
    """Widen `ends`, int32 [S, 2], by the smallest and the largest of each piece, ordered as `arithmetic.ordered`."""
    row = rows(M)
    keys, mask = _keys(table, pieces, row, values, ALIGNED, Q)
    low = tl.min(tl.min(tl.where(mask, keys, _LARGEST), 2, keep_dims=True), 0, keep_dims=True)
    high = tl.max(tl.max(tl.where(mask, keys, _SMALLEST), 2, keep_dims=True), 0, keep_dims=True)
    at = ends + 2 * column(table, pieces, row, BUCKET)
    some = _count(table, pieces, row) > 0
    tl.atomic_min(at, low, mask=some, sem="relaxed")
    tl.atomic_max(at + 1, high, mask=some, sem="relaxed")


@triton.jit(do_not_specialize=["pieces"])
def histogram(
    table: tl.tensor,
    pieces: tl.tensor,
    values: tl.tensor,
    ends: tl.tensor,
    shifts: tl.tensor,
    counts: tl.tensor,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
) -> None:
    """Count the values of each bucket, int32 [S, 2^16], in bins that are 2^shift wide and begin at the smallest."""
    row = rows(M)
    keys, mask = _keys(table, pieces, row, values, ALIGNED, Q)
    bucket = column(table, pieces, row, BUCKET)
    above = keys.to(tl.uint32, bitcast=True) - tl.load(ends + 2 * bucket).to(tl.uint32, bitcast=True)
    bins = (above >> tl.load(shifts + bucket).to(tl.uint32)).to(tl.int64)
    tl.atomic_add(counts + bucket * _BINS + bins, tl.full(keys.shape, 1, tl.int32), mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["pieces"], do_not_specialize_on_alignment=["wire"])
def codes(
    table: tl.tensor,
    pieces: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    wire: tl.tensor,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
) -> None:
    """The codes of buckets whose levels are `tables`, float32 [S, 256], and the bytes of dense pieces."""
    row, quad, four = rows(M), quads(Q), tl.arange(0, 4)[None, None, :]
    position = column(table, pieces, row, POSITION, ALIGNED) + quad + four
    bits = column(table, pieces, row, BITS).to(tl.int32)
    record = wire + column(table, pieces, row, WIRE_AT)
    first = column(table, pieces, row, FIRST)
    size = float_size(bits)
    copy_dense(table, pieces, row, size, values + position, record, quad + four)

    count = _count(table, pieces, row)
    bits = tl.where(size > 0, 8, bits)
    mask = mask_of(quad, count, ALIGNED)
    vectors = tl.load(values + position, mask=mask, other=0.0)
    levels = tables + column(table, pieces, row, BUCKET) * _LEVELS
    start, mixed = streams(table, pieces, row, keys)
    hashed = start + quad.to(tl.uint32) + four.to(tl.uint32)
    rounded = round_at_random(_scaled_positions(vectors, levels, bits), hashed, mixed)
    pack(rounded, mask, count, bits, record + (4 << bits) + (first >> 3) * bits)


@triton.jit(do_not_specialize=["pieces"], do_not_specialize_on_alignment=["wire"])
def level_tables(
    table: tl.tensor,
    pieces: tl.tensor,
    tables: tl.tensor,
    wire: tl.tensor,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
) -> None:
    """The levels of buckets, float32 [S, 256], into their records."""
    level = tl.arange(0, _LEVELS)
    for each in range(M):
        row = tl.program_id(0) * M + each
        bits = column(table, pieces, row, BITS).to(tl.int32)
        if (row < pieces) & (float_size(bits) == 0) & (column(table, pieces, row, FIRST) == 0):
            words = tl.load(tables + column(table, pieces, row, BUCKET) * _LEVELS + level).to(tl.int32, bitcast=True)
            store_words(wire + column(table, pieces, row, WIRE_AT) + 4 * level, words, level < (1 << bits))


@triton.jit
def _count(table: tl.tensor, pieces: tl.tensor, row: tl.tensor) -> tl.tensor:
    """Values of each piece that have codes."""
    size = float_size(column(table, pieces, row, BITS).to(tl.int32))
    return tl.where(size > 0, 0, column(table, pieces, row, COUNT).to(tl.int32))


@triton.jit
def _keys(
    table: tl.tensor,
    pieces: tl.tensor,
    row: tl.tensor,
    values: tl.tensor,
    ALIGNED: tl.constexpr,
    Q: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Values as integers of the same order, as `arithmetic.ordered`, and which there are."""
    quad, four = quads(Q), tl.arange(0, 4)[None, None, :]
    mask = mask_of(quad, _count(table, pieces, row), ALIGNED)
    vectors = tl.load(values + column(table, pieces, row, POSITION, ALIGNED) + quad + four, mask=mask, other=0.0)
    bits = (vectors + 0.0).to(tl.int32, bitcast=True)  # + 0.0: one zero
    return bits ^ ((bits >> 31) & _LARGEST), mask


@triton.jit
def _scaled_positions(vectors: tl.tensor, levels: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """Positions of values among the levels of their buckets, as `Quantile`, in units of 1 / `_CODE`."""
    top = (1 << bits) - 1
    below = tl.zeros(vectors.shape, tl.int32)
    for halving in tl.static_range(8):
        step = (1 << bits) >> (halving + 1)
        probe = below + step
        fits = (step > 0) & (probe < top)
        below = tl.where(fits & (tl.load(levels + probe, mask=fits, other=0.0) <= vectors), probe, below)
    span = tl.load(levels + top) - tl.load(levels)
    half = tl.where(span <= _LIMIT, 1.0, 0.5)  # no difference of two levels overflows
    low = tl.load(levels + below) * half
    gap = tl.load(levels + below + 1) * half - low
    found = below.to(tl.float32) + tl.where(gap > 0, tl.div_rn(vectors * half - low, gap), 0.0)
    return tl.minimum(tl.maximum(found, 0.0), top.to(tl.float32)) * _CODE


def shifts_of(ends: Tensor) -> Tensor:
    """Bits that a bin is wide beyond one, for each bucket: int32 [S, 2] -> int32 [S]."""
    span = (ends[:, 1].to(torch.int64) - ends[:, 0]).to(torch.float64)
    return (torch.frexp(span).exponent - HISTOGRAM_BITS).clamp_min(0).to(torch.int32)


def tables_of(plan: Plan, ends: Tensor, shifts: Tensor, counts: Tensor) -> Tensor:
    """The levels of each bucket, float32 [S, 256], as `Quantile` takes them from `counts`, int32 [S, 2^16]."""
    top = (1 << np.where(plan.dense, 1, plan.bits))[:, None] - 1
    level = np.arange(_LEVELS.value)
    ranks = np.minimum(level, top) * (plan.count[:, None] - 1) // top
    bins = torch.searchsorted(counts.cumsum(1), on_device(ranks + 1, counts.device))
    first, last = ends[:, :1].to(torch.int64), ends[:, 1:].to(torch.int64)
    keys = first + (bins << shifts[:, None])
    keys = torch.where(on_device(level >= top, counts.device), last, keys)
    keys = torch.where(on_device(level, counts.device) == 0, first, keys)
    finite = (last < arithmetic.INFINITY) & (first >= -arithmetic.INFINITY)
    levels = arithmetic.ordered(keys.to(torch.int32)).view(torch.float32) + 0.0
    return torch.where(finite, levels, torch.nan)
