"""The kernels for CPUs: one fused pass per bucket in numba, the same bits as `reference.py`.

A bucket is read once into the first-level cache and leaves as a record. Every loop over values is one that LLVM
vectorizes: minima are taken over order-preserving integers, codes are packed eight at a time inside 64-bit words.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from compression.kernels.families import HUGE, LIMIT, TINY, TREE
from compression.kernels.threads import jit as _jit
from compression.kernels.threads import split
from compression.layers import DENSE, Plan

FAMILIES = {"maxmin": 0}
_MAXMIN = FAMILIES["maxmin"]

_TILE = 1024  # codes packed at a time; a multiple of TREE and of 8
_HUGE, _LIMIT, _TINY = np.float32(HUGE), np.float32(LIMIT), np.float32(TINY)
_INFINITY = np.int32(0x7F800000)
_MANTISSA = np.float32(2.0**-24)


_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic


@_intrinsic
def _load64(context: Any, memory: Any, at: Any) -> Any:
    """The eight bytes at a byte offset, aligned or not, little-endian."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments)
        return builder.load(pointer, align=1)

    return types.uint64(memory, types.int64), generate


@_intrinsic
def _store64(context: Any, memory: Any, at: Any, word: Any) -> Any:
    """Eight bytes to a byte offset, aligned or not, little-endian."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _pointer(context, builder, signature, arguments), align=1)
        return context.get_dummy_value()

    return types.none(memory, types.int64, types.uint64), generate


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    byte = builder.gep(array.data, [arguments[1]])
    return builder.bitcast(byte, ir.IntType(64).as_pointer())


@_jit
def _uniform(element: np.uint32, low: np.uint32, high: np.uint32) -> np.float32:
    bits = np.uint32(element + low)
    bits ^= bits >> np.uint32(16)
    bits = np.uint32(bits * np.uint32(0x21F0AAAD))
    bits ^= high
    bits ^= bits >> np.uint32(15)
    bits = np.uint32(bits * np.uint32(0x735A2D97))
    bits ^= bits >> np.uint32(15)
    return np.float32(np.int32(bits >> np.uint32(8))) * _MANTISSA


@_jit
def _tree(buffer: np.ndarray, at: int, count: int) -> np.float32:
    """Sum of up to 512 values by halves; overwrites them."""
    width = 1
    while width < count:
        width *= 2
    while width > 1:
        width //= 2
        if count <= width:
            continue
        low, high = buffer[at : at + count - width], buffer[at + width : at + count]
        for i in range(len(low)):
            low[i] += high[i]
        count = min(count, width)
    return buffer[at]


@_jit
def _tree_of_blocks(sums: np.ndarray, blocks: int) -> np.float32:
    """Sum of the block sums, in blocks again until one is left; overwrites them."""
    while blocks > 1:
        upper = 0
        for at in range(0, blocks, TREE):
            sums[upper] = _tree(sums, at, min(TREE, blocks - at))
            upper += 1
        blocks = upper
    return sums[0]


@_jit
def _pack(codes: np.ndarray, words: np.ndarray, count: int, bits: int, wire: np.ndarray, at: int) -> None:
    """Pack `count` codes, one per byte of `words` (`codes` is its byte view), into ceil(count bits / 8) bytes."""
    for i in range(count, -(-count // 8) * 8):
        codes[i] = 0
    groups = -(-count // 8)
    one, two, four = np.uint64(8 - bits), np.uint64(16 - 2 * bits), np.uint64(32 - 4 * bits)
    for g in range(groups):
        x = words[g]
        x = (x & np.uint64(0x00FF00FF00FF00FF)) | ((x & np.uint64(0xFF00FF00FF00FF00)) >> one)
        x = (x & np.uint64(0x0000FFFF0000FFFF)) | ((x & np.uint64(0xFFFF0000FFFF0000)) >> two)
        x = (x & np.uint64(0x00000000FFFFFFFF)) | ((x & np.uint64(0xFFFFFFFF00000000)) >> four)
        words[g] = x
    nbytes = (count * bits + 7) // 8
    whole = max(0, (nbytes - 8) // bits + 1) if nbytes >= 8 else 0  # groups whose eight bytes end in this record
    for g in range(whole):
        _store64(wire, at + g * bits, words[g])
    for g in range(whole, groups):
        for k in range(min(bits, nbytes - g * bits)):
            wire[at + g * bits + k] = np.uint8(words[g] >> np.uint64(8 * k))


@_jit
def _unpack(wire: np.ndarray, at: int, count: int, bits: int, words: np.ndarray) -> None:
    """The inverse of `_pack`: one code per byte of `words`."""
    nbytes = (count * bits + 7) // 8
    groups = -(-count // 8)
    whole = max(0, (nbytes - 8) // bits + 1) if nbytes >= 8 else 0
    for g in range(whole):
        words[g] = _load64(wire, at + g * bits)
    for g in range(whole, groups):
        x = np.uint64(0)
        for k in range(min(bits, nbytes - g * bits)):
            x |= np.uint64(wire[at + g * bits + k]) << np.uint64(8 * k)
        words[g] = x
    one, two, four = np.uint64(8 - bits), np.uint64(16 - 2 * bits), np.uint64(32 - 4 * bits)
    mask = np.uint64((1 << bits) - 1)
    mask |= mask << np.uint64(bits)
    low = mask | (mask << np.uint64(2 * bits))
    high = low << np.uint64(4 * bits)
    pair = mask | (mask << np.uint64(32))
    pairs = pair << np.uint64(2 * bits)
    single = np.uint64((1 << bits) - 1) * np.uint64(0x0001000100010001)
    singles = single << np.uint64(bits)
    for g in range(groups):
        x = words[g]
        x = (x & low) | ((x & high) << four)
        x = (x & pair) | ((x & pairs) << two)
        words[g] = (x & single) | ((x & singles) << one)


@_jit
def _ordered(bits: np.int32) -> np.int32:
    """Float bits as integers of the same order; its own inverse. NaN lies beyond the infinities."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@_jit
def _put_scale(scratch: np.ndarray, value: np.float32, wire: np.ndarray, at: int) -> None:
    scratch[0] = value
    word = scratch.view(np.uint32)[0]
    for k in range(4):
        wire[at + k] = np.uint8(word >> np.uint32(8 * k))


@_jit
def _get_scale(scratch: np.ndarray, wire: np.ndarray, at: int) -> np.float32:
    word = np.uint32(0)
    for k in range(4):
        word |= np.uint32(wire[at + k]) << np.uint32(8 * k)
    scratch.view(np.uint32)[0] = word
    return scratch[0]


@_jit
def _maxmin_scales(values: np.ndarray, at: int, count: int, bits: int, scratch: np.ndarray) -> tuple:
    """(min, u) of a bucket; both NaN where a value is not finite."""
    integers = values[at : at + count].view(np.int32)
    smallest, largest = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(count):
        key = _ordered(integers[i])
        smallest = min(smallest, key)
        largest = max(largest, key)
    if largest >= _INFINITY or smallest <= _ordered(np.int32(-0x800000)):  # bits of minus infinity
        return np.float32(np.nan), np.float32(np.nan)
    pair = scratch.view(np.int32)
    pair[0], pair[1] = _ordered(smallest), _ordered(largest)
    low, high = max(scratch[0], -_LIMIT) + np.float32(0.0), min(scratch[1], _LIMIT)
    return low, min(high - low, _LIMIT) / np.float32((1 << bits) - 1)


@_jit
def _maxmin_codes(
    values: np.ndarray,
    at: int,
    count: int,
    bits: int,
    low: np.float32,
    unit: np.float32,
    element: int,
    key: np.ndarray,
    codes: np.ndarray,
) -> None:
    top = np.float32((1 << bits) - 1)
    if not unit > 0:
        codes[:count] = 0
        return
    key_low, key_high = key[0], key[1]
    first = np.uint32(element)
    vector = values[at : at + count]
    for i in range(count):
        position = (vector[i] - low) / unit
        floor = np.floor(position)
        draw = _uniform(np.uint32(first + np.uint32(i)), key_low, key_high)
        code = floor + np.float32(1.0 if draw < position - floor else 0.0)
        codes[i] = np.uint8(np.int32(min(max(code, np.float32(0.0)), top)))


@_jit
def _decode_record(
    family: int,
    wire: np.ndarray,
    at: int,
    count: int,
    bits: int,
    out: np.ndarray,
    to: int,
    factor: np.float32,
    accumulate: bool,
    words: np.ndarray,
    scratch: np.ndarray,
) -> None:
    low, unit = _get_scale(scratch, wire, at), _get_scale(scratch, wire, at + 4)
    codes = words.view(np.uint8)
    for tile in range(0, count, _TILE):
        length = min(_TILE, count - tile)
        _unpack(wire, at + 8 + tile * bits // 8, length, bits, words)
        target = out[to + tile : to + tile + length]
        if accumulate:
            for i in range(length):
                target[i] += factor * (low + unit * np.float32(codes[i]))
        else:
            for i in range(length):
                target[i] = factor * (low + unit * np.float32(codes[i]))


@_jit
def _project(
    values: np.ndarray,
    at: int,
    tile: int,
    length: int,
    low: np.float32,
    unit: np.float32,
    norm: np.float32,
    codes: np.ndarray,
    products: np.ndarray,
    squares: np.ndarray,
    dots: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Add a tile's part of <v, Q> and |Q|^2, in units of 1 / norm, to the block sums."""
    vector = values[at + tile : at + tile + length]
    for i in range(length):
        q = (low + unit * np.float32(codes[i])) * norm
        products[i] = (vector[i] * norm) * q
        squares[i] = q * q
    for block in range(0, length, TREE):
        dots[(tile + block) // TREE] = _tree(products, block, min(TREE, length - block))
        lengths[(tile + block) // TREE] = _tree(squares, block, min(TREE, length - block))


@_jit
def _add(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(out)):
        out[i] = a[i] + b[i]


@_jit
def _encode(
    family: int,
    start: int,
    stop: int,
    position: np.ndarray,
    count: np.ndarray,
    bits: np.ndarray,
    wire_at: np.ndarray,
    slot: np.ndarray,
    element: np.ndarray,
    memory_at: np.ndarray,
    values: np.ndarray,
    keys: np.ndarray,
    wire: np.ndarray,
    residual: np.ndarray,
    pending: np.ndarray,
    feedback: bool,
) -> None:
    words = np.empty(_TILE // 8, np.uint64)
    codes = words.view(np.uint8)
    scratch = np.empty(2, np.float32)
    products, squares = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    blocks = 1
    for m in range(start, stop):
        blocks = max(blocks, -(-count[m] // TREE))
    dots, lengths = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    raw = values.view(np.uint8)
    for m in range(start, stop):
        n, b, at, record = count[m], bits[m], position[m], wire_at[m]
        if b == DENSE:
            wire[record : record + 4 * n] = raw[4 * at : 4 * (at + n)]
            continue
        source, source_at = values, at
        if feedback:
            source, source_at = pending, memory_at[m]
            _add(values[at : at + n], residual[source_at : source_at + n], pending[source_at : source_at + n])
        low, unit = _maxmin_scales(source, source_at, n, b, scratch)
        reach = max(max(abs(low), abs(low + unit * np.float32((1 << b) - 1))), _TINY)
        norm = np.float32(1.0) / reach
        for tile in range(0, n, _TILE):
            length = min(_TILE, n - tile)
            first = element[m] + tile
            _maxmin_codes(source, source_at + tile, length, b, low, unit, first, keys[slot[m]], codes)
            if feedback:
                _project(
                    source, source_at, tile, length, low, unit, norm, codes, products, squares, dots, lengths
                )
            _pack(codes, words, length, b, wire, record + 8 + tile * b // 8)
        if feedback:
            dot, length2 = _tree_of_blocks(dots, -(-n // TREE)), _tree_of_blocks(lengths, -(-n // TREE))
            share = dot / length2 if length2 > 0 else np.float32(1.0)
            if reach > _HUGE:
                share = min(max(share, np.float32(-1.0)), np.float32(1.0))
            low, unit = low * share, unit * share
        _put_scale(scratch, low, wire, record)
        _put_scale(scratch, unit, wire, record + 4)
        if feedback:
            _decode_record(
                family, wire, record, n, b, pending, source_at, np.float32(-1.0), True, words, scratch
            )


@_jit
def _decode(
    family: int,
    start: int,
    stop: int,
    position: np.ndarray,
    count: np.ndarray,
    bits: np.ndarray,
    wire_at: np.ndarray,
    wire: np.ndarray,
    out: np.ndarray,
    factor: np.float32,
    accumulate: bool,
) -> None:
    words = np.empty(_TILE // 8, np.uint64)
    scratch = np.empty(2, np.float32)
    dense = np.empty(_TILE, np.float32)
    raw = dense.view(np.uint8)
    for m in range(start, stop):
        n, b, at, record = count[m], bits[m], position[m], wire_at[m]
        if b != DENSE:
            _decode_record(family, wire, record, n, b, out, at, factor, accumulate, words, scratch)
            continue
        for tile in range(0, n, _TILE):
            length = min(_TILE, n - tile)
            raw[: 4 * length] = wire[record + 4 * tile : record + 4 * (tile + length)]
            target = out[at + tile : at + tile + length]
            for i in range(length):
                value = factor * dense[i]
                target[i] = target[i] + value if accumulate else value


@_jit
def _squared_error(
    family: int, start: int, stop: int, position: np.ndarray, count: np.ndarray, bits: np.ndarray, values: np.ndarray
) -> float:
    scratch = np.empty(2, np.float32)
    chances = np.empty(TREE, np.float32)
    total = 0.0
    for m in range(start, stop):
        n, at = count[m], position[m]
        low, unit = _maxmin_scales(values, at, n, bits[m], scratch)
        if unit == 0:
            continue
        for tile in range(0, n, TREE):
            length = min(TREE, n - tile)
            vector = values[at + tile : at + tile + length]
            for i in range(length):
                place = (vector[i] - low) / unit
                fraction = place - np.floor(place)
                chances[i] = fraction * (np.float32(1.0) - fraction)
            total += float(unit) * float(unit) * float(_tree(chances, 0, length))
    return total


def encode(
    family: str,
    plan: Plan,
    values: Tensor,
    keys: np.ndarray,
    wire: Tensor,
    residual: Tensor | None = None,
    pending: Tensor | None = None,
) -> None:
    """As `reference.encode`."""
    feedback = residual is not None and pending is not None
    nothing = np.empty(0, np.float32)
    old = residual.numpy() if residual is not None else nothing
    new = pending.numpy() if pending is not None else nothing
    columns = (plan.position, plan.count, plan.bits, plan.wire_at, plan.slot, plan.element, plan.memory_at)
    tensors = (values.numpy(), keys, wire.numpy(), old, new, feedback)
    split(plan.count, lambda start, stop: _encode(FAMILIES[family], start, stop, *columns, *tensors))


def decode(
    family: str, plan: Plan, wire: Tensor, out: Tensor, factor: float = 1.0, accumulate: bool = False
) -> None:
    """As `reference.decode`."""
    columns = (plan.position, plan.count, plan.bits, plan.wire_at)
    tensors = (wire.numpy(), out.numpy(), np.float32(factor), accumulate)
    split(plan.count, lambda start, stop: _decode(FAMILIES[family], start, stop, *columns, *tensors))


def expected_squared_error(family: str, plan: Plan, values: Tensor) -> float:
    """As `reference.expected_squared_error`; sums of 512 in float32, the rest in float64."""
    columns = (plan.position, plan.count, plan.bits)
    return sum(
        split(plan.count, lambda start, stop: _squared_error(FAMILIES[family], start, stop, *columns, values.numpy()))
    )
