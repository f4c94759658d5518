"""The kernels: blocks of buckets, encoded and decoded.

A program works on M rows of the table of pieces (`pieces.py`) at once, up to 4 Q values of each, as [Q, M, 4]. Widths
are data: the rows of a program may differ in them, and dense rows may lie among them. A thread has quads, four values
in a row, as many as memory moves at once where all positions are multiples of four (`ALIGNED`). The rows come before
the quads so that the threads of a warp are shared among as many rows as there are, and what is done once a row in each
of its threads is done in few of them.
"""

import triton
import triton.language as tl

from .blocks import column, copy_dense, float_size, mask_of, quads, round_at_random, rows, streams
from .families import divisor, fit, levels, project, scale_count, scaled_positions
from .pieces import BITS, COUNT, FIRST, LENGTH, POSITION, STATE_AT, WIRE_AT
from .records import load_floats, load_words, pack, store_scale, ternary_source, ternary_unpack, unpack


@triton.jit(do_not_specialize=["pieces"], do_not_specialize_on_alignment=["wire"])
def encode(
    table: tl.tensor,
    pieces: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    residual: tl.tensor,
    pending: tl.tensor,
    wire: tl.tensor,
    FAMILY: tl.constexpr,
    FEEDBACK: tl.constexpr,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
) -> None:
    """Records of whole buckets, and the bytes of dense pieces. `keys` are as `blocks.random_bits` wants them."""
    row, quad, four = rows(M), quads(Q), tl.arange(0, 4)[None, None, :]
    position = column(table, pieces, row, POSITION, ALIGNED) + quad + four
    state = column(table, pieces, row, STATE_AT, ALIGNED) + quad + four
    count = column(table, pieces, row, COUNT).to(tl.int32)
    bits = column(table, pieces, row, BITS).to(tl.int32)
    record = wire + column(table, pieces, row, WIRE_AT)
    size = float_size(bits)
    copy_dense(table, pieces, row, size, values + position, record, quad + four)

    count = tl.where(size > 0, 0, count)
    bits = tl.where(size > 0, 8, bits)
    start, mixed = streams(table, pieces, row, keys)
    mask = mask_of(quad, count, ALIGNED)
    AGAIN: tl.constexpr = FAMILY == "terngrad" or FAMILY == "ternary"  # whether values are read again
    POLICY: tl.constexpr = "" if AGAIN else "evict_first"
    vectors = _vectors(values + position, residual + state, mask, FEEDBACK, POLICY)
    first, second = fit(vectors, mask, count, bits, FAMILY)
    over = divisor(first, second, bits, FAMILY)
    payload = record + 4 * scale_count(bits, FAMILY)
    hashed = start + quad.to(tl.uint32) + four.to(tl.uint32)
    codes = _codes(vectors, first, over, bits, hashed, mixed, FAMILY)
    if FAMILY == "terngrad" or FAMILY == "ternary":
        bucket = values + column(table, pieces, row, POSITION)
        residuals = residual + column(table, pieces, row, STATE_AT)
        byte = tl.arange(0, Q)[:, None, None]
        packed = tl.zeros((Q, M, 1), tl.int32)
        for digit in tl.static_range(5):
            source, exists = ternary_source(byte, digit, count)
            again = _vectors(bucket + source, residuals + source, exists, FEEDBACK, POLICY)
            code = _codes(again, first, over, bits, start + source.to(tl.uint32), mixed, FAMILY)
            packed += tl.where(exists, code, 0) * 3**digit
        tl.store(payload + byte, packed.to(tl.uint8), mask=byte < (count + 4) // 5)
    else:
        pack(codes, mask, count, bits, payload)
    if FEEDBACK and FAMILY != "1bit":  # which is a projection already
        first, second = project(vectors, codes, mask, first, second, bits, FAMILY)
    store_scale(record, first, count > 0)
    if FAMILY == "maxmin" or FAMILY == "1bit":
        store_scale(record + 4, second, count > 0)
    if FEEDBACK:
        # Read back: scales that sums over buckets lead to would have every thread hold whole buckets (Triton 3.6).
        tl.debug_barrier()
        first, second = _scales(record, count > 0, FAMILY)
        tl.store(pending + state, vectors - levels(codes, first, second, bits, FAMILY), mask=mask)


@triton.jit(do_not_specialize=["pieces", "own", "stride"], do_not_specialize_on_alignment=["wire"])
def decode(
    table: tl.tensor,
    pieces: tl.tensor,
    wire: tl.tensor,
    out: tl.tensor,
    factor: tl.tensor,
    ranks: tl.tensor,
    own: tl.tensor,
    stride: tl.tensor,
    FAMILY: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
) -> None:
    """Set pieces of buckets of any length to the sum of `factor` x decoded over all ranks, or add that to them.

    Each rank has a message, `stride` bytes after the one before; but rank `own` has the values of the pieces.
    """
    row, quad, four = rows(M), quads(Q), tl.arange(0, 4)[None, None, :]
    target = out + column(table, pieces, row, POSITION, ALIGNED) + quad + four
    count = column(table, pieces, row, COUNT).to(tl.int32)
    bits = column(table, pieces, row, BITS).to(tl.int32)
    record = wire + column(table, pieces, row, WIRE_AT)
    first = column(table, pieces, row, FIRST)
    length = column(table, pieces, row, LENGTH)
    mask, size = mask_of(quad, count, ALIGNED), float_size(bits)
    bits = tl.where(size > 0, 8, bits)
    total = tl.zeros((Q, M, 4), tl.float32)
    if ACCUMULATE:
        total = tl.load(target, mask=mask, other=0.0)
    for rank in range(ranks):
        if rank == own:
            summand = factor * tl.load(target, mask=mask, other=0.0)
        else:
            summand = factor * _decoded(record, first, quad, length, count, bits, mask, size, FAMILY)
            record += stride
        added = total + summand
        total = added if ACCUMULATE else tl.where(rank == 0, summand, added)
    tl.store(target, total, mask=mask)


@triton.jit
def _decoded(
    record: tl.tensor,
    first: tl.tensor,
    quad: tl.tensor,
    length: tl.tensor,
    count: tl.tensor,
    bits: tl.tensor,
    mask: tl.tensor,
    size: tl.tensor,
    FAMILY: tl.constexpr,
) -> tl.tensor:
    """The pieces' values from the records of one message."""
    coded, four = mask & (size == 0), tl.arange(0, 4)[None, None, :]
    payload = record + 4 * scale_count(bits, FAMILY)
    if FAMILY == "terngrad" or FAMILY == "ternary":
        codes = ternary_unpack(first, quad + four, length, payload, coded)
    else:
        codes = unpack(first, tl.where(size > 0, 0, count), quad, bits, payload)
    if FAMILY == "quantile":
        decoded = load_words(record + 4 * codes, coded).to(tl.float32, bitcast=True)
    else:
        scale, second = _scales(record, count > 0, FAMILY)
        decoded = levels(codes, scale, second, bits, FAMILY)
    if tl.max(size) > 0:
        floats = load_floats(record + size * (first + quad + four), size, mask & (size > 0))
        decoded = tl.where(size > 0, floats, decoded)
    return decoded


@triton.jit
def _scales(record: tl.tensor, mask: tl.tensor, FAMILY: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The two scales of records, or one that stands for both."""
    first = load_words(record, mask).to(tl.float32, bitcast=True)
    second = first
    if FAMILY == "maxmin" or FAMILY == "1bit":
        second = load_words(record + 4, mask).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def _vectors(
    values: tl.tensor, residual: tl.tensor, mask: tl.tensor, FEEDBACK: tl.constexpr, POLICY: tl.constexpr
) -> tl.tensor:
    """The values to encode, 0 beyond the last."""
    vectors = tl.load(values, mask=mask, other=0.0, eviction_policy=POLICY)
    if FEEDBACK:
        vectors += tl.load(residual, mask=mask, other=0.0, eviction_policy=POLICY)
    return vectors


@triton.jit
def _codes(
    vectors: tl.tensor,
    first: tl.tensor,
    over: tl.tuple,
    bits: tl.tensor,
    hashed: tl.tensor,
    mixed: tl.tensor,
    FAMILY: tl.constexpr,
) -> tl.tensor:
    """The codes of values; signs are codes that need no rounding."""
    if FAMILY == "1bit":
        return (vectors < 0).to(tl.int32)
    return round_at_random(scaled_positions(vectors, first, over, bits, FAMILY), hashed, mixed)
