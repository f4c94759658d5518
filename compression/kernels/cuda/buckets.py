"""The kernels: blocks of buckets, encoded and decoded.

A program works on M rows of the table of pieces (`pieces.py`) at once, up to K values of each. Widths are data: the
rows of a program may differ in them, and dense rows may lie among them.
"""

import triton
import triton.language as tl

from compression import layers
from compression.kernels.cuda.families import fit, levels, positions, project, scale_count
from compression.kernels.cuda.pieces import BITS, COUNT, ELEMENT, FIRST, MEMORY_AT, POSITION, SLOT, WHOLE, WIRE_AT
from compression.kernels.cuda.records import load_words, pack, store_words, ternary_source, ternary_unpack, unpack
from compression.kernels.families import FRACTION_BITS

_DENSE = tl.constexpr(layers.DENSE)
_FRACTION = tl.constexpr(FRACTION_BITS)
_UNUSED = tl.constexpr(32 - FRACTION_BITS)
_FIXED = tl.constexpr(2.0**FRACTION_BITS)


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
    M: tl.constexpr,
    K: tl.constexpr,
) -> None:
    """Records of whole buckets, and the bytes of dense pieces."""
    row, at = _rows(M), tl.arange(0, K)[None, :]
    position = _column(table, pieces, row, POSITION)
    count = _column(table, pieces, row, COUNT).to(tl.int32)
    bits = _column(table, pieces, row, BITS).to(tl.int32)
    record = wire + _column(table, pieces, row, WIRE_AT)
    dense = bits == _DENSE
    if tl.max(dense.to(tl.int32)) > 0:
        copied = dense & (at < count)
        words = tl.load(values + position + at, mask=copied, other=0.0).to(tl.int32, bitcast=True)
        store_words(record + 4 * (_column(table, pieces, row, FIRST) + at), words, copied)

    count = tl.where(dense, 0, count)
    bits = tl.where(dense, 8, bits)
    element = _column(table, pieces, row, ELEMENT).to(tl.uint32)
    memory = _column(table, pieces, row, MEMORY_AT)
    slot = _column(table, pieces, row, SLOT)
    low, high = tl.load(keys + 2 * slot).to(tl.uint32), tl.load(keys + 2 * slot + 1).to(tl.uint32)
    here = at < count
    vectors = _vectors(values + position + at, residual + memory + at, here, FEEDBACK)
    first, second = fit(vectors, here, count, bits, FAMILY)
    codes = tl.where(here, _round(vectors, first, second, bits, element + at.to(tl.uint32), low, high, FAMILY), 0)
    payload = record + 4 * scale_count(bits, FAMILY)
    if FAMILY == "terngrad":
        byte = tl.arange(0, K // 4)[None, :]
        packed = tl.zeros((M, K // 4), tl.int32)
        for digit in tl.static_range(5):
            source, there = ternary_source(byte, digit, count)
            again = _vectors(values + position + source, residual + memory + source, there, FEEDBACK)
            code = _round(again, first, second, bits, element + source.to(tl.uint32), low, high, FAMILY)
            packed += tl.where(there, code, 0) * 3**digit
        tl.store(payload + byte, packed.to(tl.uint8), mask=byte < (count + 4) // 5)
    else:
        pack(codes, count, bits, payload)
    if FEEDBACK:
        if FAMILY != "1bit":  # is a projection already
            first, second = project(vectors, codes, count, first, second, bits, FAMILY)
        tl.store(pending + memory + at, vectors - levels(codes, first, second, bits, FAMILY), mask=here)
    store_words(record, first.to(tl.int32, bitcast=True), count > 0)
    if FAMILY == "maxmin" or FAMILY == "1bit":
        store_words(record + 4, second.to(tl.int32, bitcast=True), count > 0)


@triton.jit(do_not_specialize=["pieces", "ranks", "own", "stride"], do_not_specialize_on_alignment=["wire"])
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
    M: tl.constexpr,
    K: tl.constexpr,
) -> None:
    """Set pieces of buckets of any length to the sum of `factor` x decoded over all ranks, or add that to them.

    Each rank has a message, `stride` bytes after the one before; but rank `own` has what the pieces hold.
    """
    row, at = _rows(M), tl.arange(0, K)[None, :]
    target = out + _column(table, pieces, row, POSITION) + at
    count = _column(table, pieces, row, COUNT).to(tl.int32)
    bits = _column(table, pieces, row, BITS).to(tl.int32)
    record = wire + _column(table, pieces, row, WIRE_AT)
    first = _column(table, pieces, row, FIRST)
    whole = _column(table, pieces, row, WHOLE)
    here, dense = at < count, bits == _DENSE
    bits = tl.where(dense, 8, bits)
    total = tl.zeros((M, K), tl.float32)
    if ACCUMULATE:
        total = tl.load(target, mask=here, other=0.0)
    for rank in range(ranks):
        if rank == own:
            summand = factor * tl.load(target, mask=here, other=0.0)
        else:
            summand = factor * _decoded(record, first, at, whole, count, bits, here, dense, FAMILY)
            record += stride
        added = total + summand
        total = added if ACCUMULATE else tl.where(rank == 0, summand, added)
    tl.store(target, total, mask=here)


@triton.jit
def _decoded(
    record: tl.tensor,
    first: tl.tensor,
    at: tl.tensor,
    whole: tl.tensor,
    count: tl.tensor,
    bits: tl.tensor,
    here: tl.tensor,
    dense: tl.tensor,
    FAMILY: tl.constexpr,
) -> tl.tensor:
    """What one message's records say of the pieces' values."""
    coded = here & (dense == 0)
    payload = record + 4 * scale_count(bits, FAMILY)
    if FAMILY == "terngrad":
        codes = ternary_unpack(first, at, whole, payload, coded)
    else:
        codes = unpack(first, at, bits, payload, coded)
    if FAMILY == "quantile":
        decoded = load_words(record + 4 * codes, coded).to(tl.float32, bitcast=True)
    else:
        scale = load_words(record, count > 0).to(tl.float32, bitcast=True)
        second = scale
        if FAMILY == "maxmin" or FAMILY == "1bit":
            second = load_words(record + 4, count > 0).to(tl.float32, bitcast=True)
        decoded = levels(codes, scale, second, bits, FAMILY)
    if tl.max(dense.to(tl.int32)) > 0:
        words = load_words(record + 4 * (first + at), here & dense)
        decoded = tl.where(dense, words.to(tl.float32, bitcast=True), decoded)
    return decoded


@triton.jit
def _rows(M: tl.constexpr) -> tl.tensor:
    return tl.program_id(0) * M + tl.arange(0, M)[:, None]


@triton.jit
def _column(table: tl.tensor, pieces: tl.tensor, row: tl.tensor, index: tl.constexpr) -> tl.tensor:
    """One number of each piece, 0 beyond the last."""
    return tl.load(table + pieces.to(tl.int64) * index + row, mask=row < pieces, other=0)


@triton.jit
def _vectors(values: tl.tensor, residual: tl.tensor, here: tl.tensor, FEEDBACK: tl.constexpr) -> tl.tensor:
    """What is encoded, 0 where there is nothing."""
    vectors = tl.load(values, mask=here, other=0.0)
    if FEEDBACK:
        vectors += tl.load(residual, mask=here, other=0.0)
    return vectors


@triton.jit
def _round(
    vectors: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    bits: tl.tensor,
    element: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    FAMILY: tl.constexpr,
) -> tl.tensor:
    """As `reference.round_at_random`."""
    places = positions(vectors, first, second, bits, FAMILY)
    fixed = (places * _FIXED).to(tl.int32).to(tl.uint32)
    return ((fixed + (_word(element, low, high) >> _UNUSED)) >> _FRACTION).to(tl.int32)


@triton.jit
def _word(element: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """As `randomness.words`; all uint32."""
    hashed = element + low
    hashed ^= hashed >> 16
    hashed *= 0x21F0AAAD
    hashed ^= high
    hashed ^= hashed >> 15
    hashed *= 0x735A2D97
    return hashed ^ (hashed >> 15)
