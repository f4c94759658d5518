"""EDEN for CPUs: one pass per bucket in numba, the same bits as the torch definition (`codecs.eden`).

A row of a plan is a piece of a bucket that is rotated by itself, or sent as float32 (`codecs.eden.cut`). It stays in
the first-level cache from its values to its record. Codes of up to four bits are compared with every threshold, and
made levels again by selection, both in vectors; wider ones are looked up.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...layers import BFLOAT16
from ...limits import LIMIT, TINY
from ...plans import Plan
from ..protocols import Definition
from ..reference.arithmetic import INFINITY, TREE
from ..reference.buckets import expected_squared_error
from ..reference.normal import CELLS, CELLS_A_UNIT, LEVELS, tables
from ..reference.rotations import ANGLES_AT, SHORTEST, WORD
from .compiling import compiled_once, inlined, jit
from .floats import get_floats, put_floats, write_past_caches
from .hashing import random_word
from .memory import fence, load, load_float, store, store_float
from .packing import pack, unpack
from .rotations import (
    BLOCK,
    back_block,
    back_turning_block,
    blocks_down,
    blocks_up,
    forward_block,
    forward_turning_block,
)
from .sums import START, add_products, add_squares, blocks_of, total
from .threads import split
from .vectors import LOOKED_UP, NARROWED, look_up, narrow

__all__ = ["FAMILIES", "decode", "encode", "expected_squared_error", "recode"]

FAMILIES = frozenset({"eden"})

_TILE = 2048  # codes that are packed together
_LONGEST = 8192
_CELLS_A_UNIT, _FARTHEST = np.float32(CELLS_A_UNIT), np.float32(CELLS / CELLS_A_UNIT)
_SHORTEST, _BLOCK, _ONE_MORE, _TWO_MORE = np.int64(SHORTEST), np.int64(BLOCK), np.uint32(1), np.uint32(2)
_LIMIT, _TINY, _NAN = np.float32(LIMIT), np.float32(TINY), np.float32(np.nan)
_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)
_MAGNITUDE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(INFINITY)
_ANGLES_AT, _UNIT = np.uint32(ANGLES_AT), np.float32(2.0**-24)

Arrays = tuple[np.ndarray, ...]
# Fields of the scratch: codes, words, float32 terms and sums of trees, the vector, what it is rotated to, its levels,
# and the levels of its width over its length.


# Rotations


@inlined
def _length(count: int) -> np.int64:
    """The length at which so many values are rotated."""
    length = _SHORTEST
    while length < count:
        length *= 2
    return length


@inlined
def _turn(bits: np.uint32) -> tuple[np.float32, np.float32]:
    u = np.float32(bits >> np.uint32(8)) * _UNIT
    square = u * u
    return ((_ONE + _TWO * u) - square) / (_ONE + square), ((_ONE - _TWO * u) - square) / (_ONE + square)


@inlined
def _angles(start: np.uint32, high: np.uint32) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """c and s of both stages that turn. `start` is the index of the vector's first word of signs."""
    c0, s0 = _turn(random_word(np.uint32(start + _ANGLES_AT), high))
    c1, s1 = _turn(random_word(np.uint32(start + _ANGLES_AT + _ONE_MORE), high))
    return c0, s0, c1, s1


@inlined
def _signs(start: np.uint32, at: int, number: int, high: np.uint32) -> tuple[np.uint32, np.uint32]:
    """The two words of signs of a block's values, from value `at` of the vector on, in a round."""
    first = np.uint32(start + np.uint32(2 * at // WORD + number))
    return random_word(first, high), random_word(np.uint32(first + _TWO_MORE), high)


@inlined
def _forward(
    values: np.ndarray, at: int, length: int, unit: np.float32, start: np.uint32, high: np.uint32, out: np.ndarray
) -> None:
    """The rotated vector times its length, of `length` values times `unit`."""
    c0, s0, c1, s1 = _angles(start, high)
    for i in range(0, length, _BLOCK):
        one, two = _signs(start, i, 0, high)
        forward_turning_block(values, at + i, unit, one, two, c0, s0, c1, s1, out, i)
    blocks_up(out, length)
    for i in range(0, length, _BLOCK):
        one, two = _signs(start, i, 1, high)
        forward_block(out, i, _ONE, one, two, c0, s0, c1, s1, out, i)
    blocks_up(out, length)


@inlined
def _back(values: np.ndarray, length: int, start: np.uint32, high: np.uint32) -> None:
    """The inverse rotation, times its length, in place."""
    c0, s0, c1, s1 = _angles(start, high)
    blocks_down(values, length)
    for i in range(0, length, _BLOCK):
        one, two = _signs(start, i, 1, high)
        back_block(values, i, _ONE, one, two, c0, s0, c1, s1, values, i)
    blocks_down(values, length)
    for i in range(0, length, _BLOCK):
        one, two = _signs(start, i, 0, high)
        back_turning_block(values, i, _ONE, one, two, c0, s0, c1, s1, values, i)


# Codes: the number of thresholds at or below a magnitude, and above it the sign


@compiled_once
def _nearest(
    rotated: np.ndarray, at: int, count: int, unit: np.float32, bits: int, levels: np.ndarray, thresholds: np.ndarray,
    below: np.ndarray, words: np.ndarray, q: np.ndarray,
) -> None:  # fmt: skip
    """The codes of values times `unit`, a word each, and their levels."""
    row, half = bits * LEVELS, np.int32(1 << (bits - 1))
    if bits == 1:
        y0 = levels[row]
        for i in range(count):
            x = load(rotated, at + i) * unit
            store(words, i, np.uint32(1) if x < 0 else np.uint32(0))
            store(q, at + i, -y0 if x < 0 else y0)
    elif bits == 2:
        y0, y1 = levels[row], levels[row + 1]
        t0 = thresholds[row]
        for i in range(count):
            x = load(rotated, at + i) * unit
            above = abs(x) >= t0
            y = y1 if above else y0
            code = np.uint32(1) if above else np.uint32(0)
            store(words, i, code | (np.uint32(2) if x < 0 else np.uint32(0)))
            store(q, at + i, -y if x < 0 else y)
    elif bits == 3:
        y0, y1, y2, y3 = levels[row], levels[row + 1], levels[row + 2], levels[row + 3]
        t0, t1, t2 = thresholds[row], thresholds[row + 1], thresholds[row + 2]
        for i in range(count):
            x = load(rotated, at + i) * unit
            a = abs(x)
            y = y1 if a >= t0 else y0
            y = y2 if a >= t1 else y
            y = y3 if a >= t2 else y
            code = (np.uint32(1) if a >= t0 else np.uint32(0)) + (np.uint32(1) if a >= t1 else np.uint32(0))
            code += np.uint32(1) if a >= t2 else np.uint32(0)
            store(words, i, code | (np.uint32(4) if x < 0 else np.uint32(0)))
            store(q, at + i, -y if x < 0 else y)
    elif bits == 4:
        y0, y1, y2, y3 = levels[row], levels[row + 1], levels[row + 2], levels[row + 3]
        y4, y5, y6, y7 = levels[row + 4], levels[row + 5], levels[row + 6], levels[row + 7]
        t0, t1, t2, t3 = thresholds[row], thresholds[row + 1], thresholds[row + 2], thresholds[row + 3]
        t4, t5, t6 = thresholds[row + 4], thresholds[row + 5], thresholds[row + 6]
        for i in range(count):
            x = load(rotated, at + i) * unit
            a = abs(x)
            y = y1 if a >= t0 else y0
            y = y2 if a >= t1 else y
            y = y3 if a >= t2 else y
            y = y4 if a >= t3 else y
            y = y5 if a >= t4 else y
            y = y6 if a >= t5 else y
            y = y7 if a >= t6 else y
            code = (np.uint32(1) if a >= t0 else np.uint32(0)) + (np.uint32(1) if a >= t1 else np.uint32(0))
            code += (np.uint32(1) if a >= t2 else np.uint32(0)) + (np.uint32(1) if a >= t3 else np.uint32(0))
            code += (np.uint32(1) if a >= t4 else np.uint32(0)) + (np.uint32(1) if a >= t5 else np.uint32(0))
            code += np.uint32(1) if a >= t6 else np.uint32(0)
            store(words, i, code | (np.uint32(8) if x < 0 else np.uint32(0)))
            store(q, at + i, -y if x < 0 else y)
    else:
        for i in range(count):
            x = load(rotated, at + i) * unit
            a = abs(x)
            cell = np.int32(a * _CELLS_A_UNIT) if a < _FARTHEST else np.int32(CELLS - 1)
            code = load(below, bits * CELLS + cell)
            code += np.int32(1) if a >= load(thresholds, row + code) else np.int32(0)
            y = load(levels, row + code)
            store(words, i, np.uint32(code + half if x < 0 else code))
            store(q, at + i, -y if x < 0 else y)


@compiled_once
def _levels(codes: np.ndarray, count: int, bits: int, table: np.ndarray, out: np.ndarray, to: int) -> None:
    """The levels of codes; `table` holds those of all codes of the width."""
    if bits == 1:
        y0, y1 = table[0], table[1]
        for i in range(count):
            store(out, to + i, y1 if load(codes, i) != 0 else y0)
    elif bits == 2:
        y0, y1 = table[0], table[1]
        for i in range(count):
            code = load(codes, i)
            y = y1 if code & np.uint8(1) else y0
            store(out, to + i, -y if code & np.uint8(2) else y)
    elif bits == 3:
        y0, y1, y2, y3 = table[0], table[1], table[2], table[3]
        for i in range(count):
            code = load(codes, i)
            low = y1 if code & np.uint8(1) else y0
            high = y3 if code & np.uint8(1) else y2
            y = high if code & np.uint8(2) else low
            store(out, to + i, -y if code & np.uint8(4) else y)
    elif bits == 4:
        y0, y1, y2, y3 = table[0], table[1], table[2], table[3]
        y4, y5, y6, y7 = table[4], table[5], table[6], table[7]
        for i in range(count):
            code = load(codes, i)
            a = y1 if code & np.uint8(1) else y0
            b = y3 if code & np.uint8(1) else y2
            c = y5 if code & np.uint8(1) else y4
            d = y7 if code & np.uint8(1) else y6
            low = b if code & np.uint8(2) else a
            high = d if code & np.uint8(2) else c
            y = high if code & np.uint8(4) else low
            store(out, to + i, -y if code & np.uint8(8) else y)
    else:
        for i in range(0, count, LOOKED_UP):
            look_up(table, codes, i, out, to + i)


@inlined
def _fill_table(bits: int, length: int, levels: np.ndarray, table: np.ndarray) -> None:
    """The levels of all codes of a width over a length."""
    half, inverse = 1 << (bits - 1), _ONE / np.float32(length)
    for k in range(half):
        level = levels[bits * LEVELS + k] * inverse
        table[k], table[half + k] = level, -level


# Records


@inlined
def _exact(count: int, bits: int) -> bool:
    """Whether a piece is sent as float32, as `codecs.eden.is_exact`."""
    return bool(count < _SHORTEST and 4 * count <= 4 + _SHORTEST * bits // 8)


@inlined
def _larger(one: np.float32, other: np.float32) -> np.float32:
    return other if other > one else one


@inlined
def _within_limit(value: np.float32) -> np.float32:
    value = -_LIMIT if value < -_LIMIT else value
    return _LIMIT if value > _LIMIT else value


@inlined
def _scale_of(
    dot: np.float32, square: np.float32, of_levels: np.float32, length: int, power: np.float32, projects: bool
) -> np.float32:
    """The scale of a record whose values are finite."""
    size = np.float32(length)
    scale = (size * square) / dot if dot > 0 else _ZERO
    if projects:
        scale = dot / (size * of_levels)
    scale *= power
    return _LIMIT if scale > _LIMIT else scale


@inlined
def _encode_row(
    source: np.ndarray, at: int, count: int, bits: int, start: np.uint32, high: np.uint32,
    wire: np.ndarray, record: int, projects: bool, levels: np.ndarray, thresholds: np.ndarray, below: np.ndarray,
    scratch: Arrays,
) -> np.float32:  # fmt: skip
    """Write the record of `count` values, zeros behind them up to the length; leave its levels; return its scale."""
    codes, words, terms, sums, _, rotated, q, _ = scratch
    length = _length(count)
    farthest = np.uint32(0)
    for i in range(at, at + count):
        pattern = np.float32(load(source, i)).view(np.uint32) & _MAGNITUDE
        farthest = pattern if pattern > farthest else farthest
    finite = farthest < _INFINITY
    power = _larger(np.uint32(farthest & _INFINITY).view(np.float32), _TINY)
    if finite:
        add_squares(source, at, count, _ONE / power, terms, sums)
        square = total(sums, START, blocks_of(count))
        _forward(source, at, length, _ONE / power, start, high, rotated)
        norm = np.sqrt(np.float32(length) * square)
        unit = _ONE / norm if norm > 0 else _ZERO
    for tile in range(0, length, _TILE):
        size = min(_TILE, length - tile)
        if finite:
            _nearest(rotated, tile, size, unit, bits, levels, thresholds, below, words, q)
        else:
            for i in range(size):
                store(words, i, np.uint32(0))
                store(q, tile + i, levels[bits * LEVELS])
        for i in range(0, size, NARROWED):
            narrow(words, i, codes, i)
        pack(codes, size, bits, words, wire, record + 4 + tile * bits // 8)
    scale = _NAN
    if finite:
        add_products(rotated, START, _ONE, q, _ONE, length, terms, sums, START)
        dot, of_levels = total(sums, START, blocks_of(length)), total(sums, len(sums) // 2, blocks_of(length))
        scale = _scale_of(dot, square, of_levels, length, power, projects)
    store_float(wire, record, scale)
    return scale


@inlined
def _decode_row(
    wire: np.ndarray, record: int, count: int, bits: int, start: np.uint32, high: np.uint32, factor: np.float32,
    scratch: Arrays,
) -> None:  # fmt: skip
    """The values of a record times `factor`, in place of what the vector was rotated to; the table is of its width and
    length."""
    codes, _, _, _, _, rotated, _, table = scratch
    length = _length(count)
    for tile in range(0, length, _TILE):
        size = min(_TILE, length - tile)
        unpack(wire, record + 4 + tile * bits // 8, size, bits, codes)
        _levels(codes, size, bits, table, rotated, tile)
    _back(rotated, length, start, high)
    scale = load_float(wire, record)
    for i in range(count):
        store(rotated, i, factor * _within_limit(scale * load(rotated, i)))


@inlined
def _get_floats(
    wire: np.ndarray, at: int, count: int, bits: int, factor: np.float32, out: np.ndarray
) -> None:
    """Values that are not rotated, times `factor`."""
    get_floats(wire, at, count, bits, out, START)
    for i in range(count):
        store(out, i, factor * load(out, i))


@jit
def _encode(
    start: int, stop: int, position: np.ndarray, count: np.ndarray, bits: np.ndarray, wire_at: np.ndarray,
    slot: np.ndarray, element: np.ndarray, state_at: np.ndarray,
    received: np.ndarray, senders: np.ndarray, values: np.ndarray, own: int, factor: np.float32, keys: np.ndarray,
    wire: np.ndarray, residual: np.ndarray, pending: np.ndarray, feedback: bool,
    levels: np.ndarray, thresholds: np.ndarray, below: np.ndarray, scratch: Arrays,
) -> None:  # fmt: skip
    """Rows of a plan: encode the values, or where anything is received or own, the sums, and leave those decoded."""
    _, _, _, _, vector, rotated, q, table = scratch
    adds = len(received) > 0 or own >= 0
    filled_bits, filled_length = 0, 0
    for m in range(start, stop):
        n, b, at, record = count[m], bits[m], position[m], wire_at[m]
        dense = b >= BFLOAT16
        exact = not dense and _exact(n, b)
        length = _length(n)
        if not dense and (b != filled_bits or length != filled_length):
            _fill_table(b, length, levels, table)
            filled_bits, filled_length = b, length
        source, first = values, at
        if adds:
            message = 0
            for turn in range(len(received) + (own >= 0)):
                if turn == own:
                    for i in range(n):
                        store(rotated, i, factor * load(values, at + i))
                elif dense or exact:
                    _get_floats(received[message], record, n, b, factor, rotated)
                else:
                    low, high = senders[message, slot[m], 0], senders[message, slot[m], 1]
                    word = np.uint32(np.uint32(2 * (element[m] // WORD)) + low)
                    _decode_row(received[message], record, n, b, word, high, factor, scratch)
                message += turn != own
                if turn > 0:
                    for i in range(n):
                        store(vector, i, load(vector, i) + load(rotated, i))
                else:
                    for i in range(n):
                        store(vector, i, load(rotated, i))
            source, first = vector, 0
        if dense:
            put_floats(source, first, n, b, wire, record)
            if adds:
                get_floats(wire, record, n, b, values, at)
            continue
        if feedback:
            for i in range(n):
                store(vector, i, load(source, first + i) + load(residual, state_at[m] + i))
            source, first = vector, 0
        elif n < length and not adds:
            for i in range(n):
                store(vector, i, load(values, at + i))
            source, first = vector, 0
        if exact:
            put_floats(source, first, n, b, wire, record)
            if adds:
                get_floats(wire, record, n, b, values, at)
            if feedback:
                for i in range(n):
                    store(pending, state_at[m] + i, load(source, first + i) - load(source, first + i))
            continue
        if n < length:
            for i in range(n, length):
                store(vector, i, _ZERO)
        word = np.uint32(np.uint32(2 * (element[m] // WORD)) + keys[slot[m], 0])
        scale = _encode_row(
            source, first, n, b, word, keys[slot[m], 1], wire, record, feedback, levels, thresholds, below, scratch
        )
        if not (adds or feedback):
            continue
        inverse = _ONE / np.float32(length)
        for i in range(length):
            store(q, i, load(q, i) * inverse)
        _back(q, length, word, keys[slot[m], 1])
        for i in range(n):
            store(q, i, _within_limit(scale * load(q, i)))
        if adds:
            for i in range(n):
                store(values, at + i, load(q, i))
        if feedback:
            for i in range(n):
                store(q, i, load(source, first + i) - load(q, i))
            write_past_caches(q, n, pending, state_at[m])
    if feedback:
        fence()


@jit
def _decode(
    start: int, stop: int, position: np.ndarray, count: np.ndarray, bits: np.ndarray, wire_at: np.ndarray,
    slot: np.ndarray, element: np.ndarray, wire: np.ndarray, out: np.ndarray, factor: np.float32, accumulate: bool,
    keys: np.ndarray, levels: np.ndarray, scratch: Arrays,
) -> None:  # fmt: skip
    """Rows of a plan: set `out` to factor x decoded, or add that to it."""
    _, _, _, _, _, rotated, _, table = scratch
    filled_bits, filled_length = 0, 0
    for m in range(start, stop):
        n, b, at, record = count[m], bits[m], position[m], wire_at[m]
        step = n if b < BFLOAT16 else TREE
        for tile in range(0, n, step):
            size = min(step, n - tile)
            if b >= BFLOAT16:
                _get_floats(wire, record + b // 8 * tile, size, b, factor, rotated)
            elif _exact(n, b):
                _get_floats(wire, record, size, b, factor, rotated)
            else:
                if b != filled_bits or _length(n) != filled_length:
                    filled_bits, filled_length = b, _length(n)
                    _fill_table(filled_bits, filled_length, levels, table)
                word = np.uint32(np.uint32(2 * (element[m] // WORD)) + keys[slot[m], 0])
                _decode_row(wire, record, n, b, word, keys[slot[m], 1], factor, scratch)
            if accumulate:
                for i in range(size):
                    store(out, at + tile + i, load(out, at + tile + i) + load(rotated, i))
            else:
                write_past_caches(rotated, size, out, at + tile)
    if not accumulate:
        fence()


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
    recode(quantizer, plan, wire.new_empty(0, 0), values, None, 1.0, keys, wire, residual, pending)


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
    columns = (plan.position, plan.count, plan.bits, plan.wire_at, plan.slot, plan.element)
    _run(_decode, plan, *columns, wire.numpy(), out.numpy(), np.float32(factor), accumulate, keys, _tables()[0])


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
    """As `Kernels.recode`."""
    columns = (plan.position, plan.count, plan.bits, plan.wire_at, plan.slot, plan.element, plan.state_at)
    nothing = np.empty(0, np.float32)
    state = (nothing, nothing, False) if residual is None or pending is None else (
        residual.numpy(), pending.numpy(), True
    )  # fmt: skip
    senders = np.empty((0, 0, 2), np.uint32) if senders is None else np.ascontiguousarray(senders)
    own = -1 if rank is None else rank
    tensors = (received.numpy(), senders, values.numpy(), own, np.float32(factor), np.ascontiguousarray(keys))
    _run(_encode, plan, *columns, *tensors, wire.numpy(), *state, *_tables())


def _run(kernel: Callable[..., Any], plan: Plan, *arguments: Any) -> None:
    split(plan.count, lambda start, stop: kernel(start, stop, *arguments, _scratch(plan)))


@functools.cache
def _tables() -> tuple[np.ndarray, ...]:
    """Those of `normal.tables`, flat."""
    return tuple(table.reshape(-1) for table in tables())


_kept = threading.local()


def _scratch(plan: Plan) -> Arrays:
    """Scratch of a thread, kept from call to call. Long rows are of values that are not encoded."""
    longest = max(plan.longest, _LONGEST)
    made: Arrays | None = getattr(_kept, "scratch", None)
    if made is None or len(made[4]) < longest:
        lengths = (
            (_TILE + 8, torch.uint8), (_TILE, torch.int32), (2 * TREE, torch.float32), (2 * TREE, torch.float32),
            (longest, torch.float32), (longest, torch.float32), (longest, torch.float32), (LEVELS, torch.float32),
        )  # fmt: skip
        codes, words, *others = (torch.empty(length, dtype=kind).numpy() for length, kind in lengths)
        made = (codes, words.view(np.uint32), *others)
        if longest == _LONGEST:
            _kept.scratch = made
    return made
