"""EDEN for GPUs: one launch for all rows of one length, the same bits as the torch definition (`codecs.eden`).

A row of a plan is a piece of a bucket that is rotated by itself, or sent as float32 (`codecs.eden.cut`). A program
keeps its rows in registers from values to records. Rows are launched by the length at which they are rotated, and rows
of floats by themselves: bytes of layers that are not encoded, and pieces too short to be.

Shapes: as in `buckets`.
"""

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import limits
from ...plans import Plan
from ..protocols import Definition
from ..reference import arithmetic, normal
from ..reference.buckets import expected_squared_error
from . import buckets
from .blocks import column, float_size, mask_of, quads, rows
from .launching import launch, mixed_keys
from .pieces import BITS, COUNT, FIRST, POSITION, STATE_AT, WIRE_AT, of_floats, to_rotate
from .records import load_words, pack, store_floats, store_scale, unpack
from .rotations import back, drawn, forward
from .sums import spread, tree_sum

__all__ = ["FAMILIES", "decode", "encode", "expected_squared_error", "recode"]

FAMILIES = frozenset({"eden"})

_LIMIT, _TINY = tl.constexpr(limits.LIMIT), tl.constexpr(limits.TINY)
_INFINITY = tl.constexpr(arithmetic.INFINITY)
_LEVELS, _CELLS = tl.constexpr(normal.LEVELS), tl.constexpr(normal.CELLS)
_CELLS_A_UNIT = tl.constexpr(normal.CELLS_A_UNIT)
_COMPARED_BITS = tl.constexpr(4)  # up to which values are compared with every threshold
_COMPARED = tl.constexpr((1 << (_COMPARED_BITS.value - 1)) - 1)  # thresholds of so many bits


@triton.jit(do_not_specialize=["pieces"], do_not_specialize_on_alignment=["wire"])
def encode_rows(
    table: tl.tensor,
    pieces: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    residual: tl.tensor,
    pending: tl.tensor,
    wire: tl.tensor,
    levels: tl.tensor,
    thresholds: tl.tensor,
    below: tl.tensor,
    FEEDBACK: tl.constexpr,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
) -> None:
    """Records of rows that are rotated at 4 Q values. `keys` are as `blocks.random_bits` wants them."""
    row, quad, four = rows(M), quads(Q), tl.arange(0, 4)[None, None, :]
    position = column(table, pieces, row, POSITION, ALIGNED) + quad + four
    state = column(table, pieces, row, STATE_AT, ALIGNED) + quad + four
    count = column(table, pieces, row, COUNT).to(tl.int32)
    bits = tl.maximum(column(table, pieces, row, BITS).to(tl.int32), 1)
    record = wire + column(table, pieces, row, WIRE_AT)
    mask = mask_of(quad, count, ALIGNED)
    vectors = tl.load(values + position, mask=mask, other=0.0)
    if FEEDBACK:
        vectors += tl.load(residual + state, mask=mask, other=0.0)

    magnitudes = vectors.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.max(magnitudes, 2, keep_dims=True), 0, keep_dims=True)
    finite = largest < _INFINITY
    power = tl.maximum((largest & _INFINITY).to(tl.float32, bitcast=True), _TINY)
    # Rounded as the quotient is: the inverse is exact. Of zeros, all codes are zero.
    fractions = tl.where(finite, vectors * tl.div_rn(1.0, power), 0.0)
    square = tree_sum(fractions * fractions)
    rotation = drawn(table, pieces, row, keys, quad)
    rotated = forward(fractions, rotation)
    norm = tl.sqrt_rn(spread(4.0 * Q * square))
    unit = tl.where(norm > 0, tl.div_rn(1.0, norm), 0.0)
    codes = _nearest(rotated * unit, bits, thresholds, below)
    length = tl.where(count > 0, 4 * Q, 0)
    pack(codes, quad < length, length, bits, record + 4)

    q = tl.load(levels + bits * _LEVELS + codes)
    dot = tree_sum(rotated * q)
    if FEEDBACK:
        scale = tl.div_rn(dot, 4.0 * Q * tree_sum(q * q))
    else:
        scale = tl.where(dot > 0, tl.div_rn(4.0 * Q * square, dot), 0.0)
    nan = tl.full(scale.shape, float("nan"), tl.float32)
    scale = tl.where(finite, tl.minimum(scale * power, _LIMIT), nan)
    store_scale(record, scale, count > 0)
    if FEEDBACK:
        decoded = _within_limit(spread(scale) * back(q * (1.0 / (4 * Q)), rotation))
        tl.store(pending + state, vectors - decoded, mask=mask)


@triton.jit(do_not_specialize=["pieces", "own", "stride", "slots"], do_not_specialize_on_alignment=["wire"])
def decode_rows(
    table: tl.tensor,
    pieces: tl.tensor,
    keys: tl.tensor,
    wire: tl.tensor,
    out: tl.tensor,
    factor: tl.tensor,
    ranks: tl.tensor,
    own: tl.tensor,
    stride: tl.tensor,
    slots: tl.tensor,
    levels: tl.tensor,
    ACCUMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
) -> None:
    """Set rows to the sum of `factor` x decoded over all ranks, or add that to them, as `buckets.decode`.

    The keys of a message are `slots` pairs after those of the one before.
    """
    row, quad, four = rows(M), quads(Q), tl.arange(0, 4)[None, None, :]
    target = out + column(table, pieces, row, POSITION, ALIGNED) + quad + four
    count = column(table, pieces, row, COUNT).to(tl.int32)
    bits = tl.maximum(column(table, pieces, row, BITS).to(tl.int32), 1)
    record = wire + column(table, pieces, row, WIRE_AT)
    first = column(table, pieces, row, FIRST)
    mask, length = mask_of(quad, count, ALIGNED), tl.where(count > 0, 4 * Q, 0)
    total = tl.zeros((Q, M, 4), tl.float32)
    if ACCUMULATE:
        total = tl.load(target, mask=mask, other=0.0)
    for rank in range(ranks):
        if rank == own:
            summand = factor * tl.load(target, mask=mask, other=0.0)
        else:
            codes = unpack(first, length, quad, bits, record + 4)
            q = tl.load(levels + bits * _LEVELS + codes)
            scale = load_words(record, count > 0).to(tl.float32, bitcast=True)
            rotation = drawn(table, pieces, row, keys, quad)
            summand = factor * _within_limit(scale * back(q * (1.0 / (4 * Q)), rotation))
            record += stride
            keys += 2 * slots
        added = total + summand
        total = added if ACCUMULATE else tl.where(rank == 0, summand, added)
    tl.store(target, total, mask=mask)


@triton.jit(do_not_specialize=["pieces"], do_not_specialize_on_alignment=["wire"])
def encode_floats(
    table: tl.tensor,
    pieces: tl.tensor,
    values: tl.tensor,
    residual: tl.tensor,
    pending: tl.tensor,
    wire: tl.tensor,
    FEEDBACK: tl.constexpr,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
) -> None:
    """The bytes of rows of floats. Those that have a state go with what was owed to them, and owe nothing then."""
    row, quad, four = rows(M), quads(Q), tl.arange(0, 4)[None, None, :]
    mask = mask_of(quad, column(table, pieces, row, COUNT).to(tl.int32), ALIGNED)
    vectors = tl.load(values + column(table, pieces, row, POSITION, ALIGNED) + quad + four, mask=mask, other=0.0)
    if FEEDBACK:
        at = column(table, pieces, row, STATE_AT, ALIGNED)
        kept = mask & (at >= 0)
        owed = tl.load(residual + at + quad + four, mask=kept, other=0.0)
        vectors = tl.where(kept, vectors + owed, vectors)
        tl.store(pending + at + quad + four, vectors - vectors, mask=kept)
    size = float_size(column(table, pieces, row, BITS).to(tl.int32))
    at = size * (column(table, pieces, row, FIRST) + quad + four)
    words = vectors.to(tl.int32, bitcast=True)
    store_floats(wire + column(table, pieces, row, WIRE_AT) + at, words, size, mask)


@triton.jit
def _nearest(normal_QM4: tl.tensor, bits: tl.tensor, thresholds: tl.tensor, below: tl.tensor) -> tl.tensor:
    """Codes: the number of thresholds at or below a magnitude, and above it the sign."""
    magnitudes = tl.abs(normal_QM4)
    codes = tl.zeros(normal_QM4.shape, tl.int32)
    if tl.max(bits) <= _COMPARED_BITS:
        for index in tl.static_range(_COMPARED):
            codes += (magnitudes >= tl.load(thresholds + bits * _LEVELS + index)).to(tl.int32)
    else:
        cell = tl.minimum(magnitudes * _CELLS_A_UNIT, _CELLS - 1.0).to(tl.int32)
        codes = tl.load(below + bits * _CELLS + cell)
        codes += (magnitudes >= tl.load(thresholds + bits * _LEVELS + codes)).to(tl.int32)
    return codes + tl.where(normal_QM4 < 0, 1 << (bits - 1), 0)


@triton.jit
def _within_limit(values: tl.tensor) -> tl.tensor:
    """Values from -LIMIT to LIMIT, NaN as it is."""
    values = tl.where(values > _LIMIT, _LIMIT, values)
    return tl.where(values < -_LIMIT, -_LIMIT, values)


def encode(
    quantizer: Definition,
    plan: Plan,
    values: Tensor,
    keys: np.ndarray,
    wire: Tensor,
    residual: Tensor | None = None,
    pending: Tensor | None = None,
) -> None:
    """As `Kernels.encode`."""
    device = wire.device
    feedback = residual is not None and pending is not None
    states = (residual, pending) if feedback else (values, values)
    mixed, tables = mixed_keys(keys, device), _tables(device)
    for pieces in to_rotate(plan, device):
        launch(encode_rows, pieces, mixed, values, *states, wire, *tables, feedback)
    launch(encode_floats, of_floats(plan, device), values, *states, wire, feedback)


def decode(
    quantizer: Definition,
    plan: Plan,
    wire: Tensor,
    out: Tensor,
    factor: float = 1.0,
    accumulate: bool = False,
    keys: np.ndarray | None = None,
) -> None:
    """As `Kernels.decode`."""
    assert keys is not None, "decode_plan asks what is keyed for its keys"
    _decode(plan, wire, out, factor, 1, -1, 0, accumulate, keys[None])


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
    """As `Kernels.recode`: launches to add up any number of ranks, those of `encode`, those of `decode`."""
    own, ranks = (-1, len(received)) if rank is None else (rank, len(received) + 1)
    assert senders is not None or not len(received), "recode_plan asks what is keyed for the keys of messages"
    theirs = keys[None] if senders is None else senders
    _decode(plan, received, values, factor, ranks, own, received.stride(0), False, theirs)
    encode(quantizer, plan, values, keys, wire, residual, pending)
    decode(quantizer, plan, wire, values, keys=keys)


def _decode(
    plan: Plan,
    wire: Tensor,
    out: Tensor,
    factor: float,
    ranks: int,
    own: int,
    stride: int,
    accumulate: bool,
    senders_RS2: np.ndarray,
) -> None:
    """Decode the messages of ranks as `decode_rows` does, and as `buckets.decode` where they are floats."""
    mixed, levels = mixed_keys(senders_RS2.reshape(-1, 2), wire.device), _tables(wire.device)[0]
    sums = (wire, out, factor, ranks, own, stride)
    for pieces in to_rotate(plan, wire.device):
        launch(decode_rows, pieces, mixed, *sums, senders_RS2.shape[1], levels, accumulate)
    launch(buckets.decode, of_floats(plan, wire.device), *sums, "maxmin", accumulate)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, ...]:
    """Those of `normal.tables`, on a device."""
    return tuple(torch.from_numpy(table).to(device) for table in normal.tables())
