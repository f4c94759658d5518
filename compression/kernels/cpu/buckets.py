"""The compiled kernels: ranges of buckets, encoded, decoded or measured.

A bucket goes through in tiles that stay in the first-level cache. Every loop over values is one that LLVM vectorizes.
"""

import numpy as np

from ...layers import BFLOAT16
from ...limits import HUGE
from ..reference.arithmetic import FRACTION_BITS, TREE
from .compiling import inlined, jit
from .families import (
    MAXMIN,
    ONEBIT,
    axis,
    clamp,
    fit,
    is_even,
    is_ternary,
    levels,
    max_magnitude,
    positions,
    scale_count,
    top_code,
)
from .floats import get_floats, put_floats, write_past_caches
from .hashing import random_word
from .memory import fence, load, load_float, store, store_float
from .packing import pack, pack_ternary, unpack, unpack_ternary
from .scratch import TILE
from .sums import START, add_products, blocks_of, total
from .vectors import NARROWED, narrow

_TREE = np.int64(TREE)  # a numpy integer, as `sums.START` is
_LEAST_UNIT = np.float32(2.0**-100)  # in fixed point it is no denormal number yet
_NO, _YES = np.bool_(False), np.bool_(True)  # numpy bools, likewise
_HUGE, _ZERO, _ONE = np.float32(HUGE), np.float32(0.0), np.float32(1.0)
_HALF_WAY = np.uint32(1 << 31)  # in place of a random word
_FIXED, _FRACTION, _UNUSED = np.float32(2.0**FRACTION_BITS), np.uint32(FRACTION_BITS), np.uint32(32 - FRACTION_BITS)

Arrays = tuple[np.ndarray, ...]  # the fields of a `scratch.Scratch`


@inlined
def _code(place: np.float32, top: np.float32, word: np.uint32) -> np.uint32:
    """As `reference.round_at_random`, after clamping. `place` and `top` are in units of 2**-FRACTION_BITS."""
    return np.uint32(np.uint32(np.int32(clamp(place, _ZERO, top))) + (word >> _UNUSED)) >> _FRACTION


@inlined
def _round(
    places: np.ndarray, count: int, top: np.float32, first: np.uint32, high: np.uint32, words: np.ndarray
) -> None:
    """The codes of positions, a word each. `first` and `high` are what `random_word` takes for the first of them."""
    for i in range(count):
        place = load(places, i) * _FIXED
        store(words, i, _code(place, top * _FIXED, random_word(np.uint32(first + np.uint32(i)), high)))


@inlined
def _signs(values: np.ndarray, at: int, count: int, words: np.ndarray) -> None:
    """The codes of one bit, a word each: no value lies between two of them."""
    for i in range(count):
        store(words, i, np.uint32(1) if load(values, at + i) < 0 else np.uint32(0))


@inlined
def _round_evenly(
    values: np.ndarray,
    at: int,
    count: int,
    low: np.float32,
    unit: np.float32,
    middle: np.float32,
    top: np.float32,
    first: np.uint32,
    high: np.uint32,
    words: np.ndarray,
) -> None:
    """The codes of values on an even axis (`families.axis`), in one pass: it hashes while it waits for the quotient."""
    unit, middle, top = unit / _FIXED, middle * _FIXED, top * _FIXED
    for i in range(count):
        place = (load(values, at + i) - low) / unit + middle
        store(words, i, _code(place, top, random_word(np.uint32(first + np.uint32(i)), high)))


@inlined
def _put_codes(
    family: int, codes: np.ndarray, count: int, bits: int, tile: int, words: np.ndarray, wire: np.ndarray, at: int
) -> None:
    """Pack a tile of a record whose codes begin at byte `at`."""
    if is_ternary(family):
        pack_ternary(codes, count, wire, at + tile // 5)
    else:
        pack(codes, count, bits, words, wire, at + tile * bits // 8)


@inlined
def _get_codes(family: int, wire: np.ndarray, at: int, tile: int, count: int, bits: int, codes: np.ndarray) -> None:
    if is_ternary(family):
        unpack_ternary(wire, at + tile // 5, count, codes)
    else:
        unpack(wire, at + tile * bits // 8, count, bits, codes)


@inlined
def _project(family: int, bits: int, dot: np.float32, square: np.float32, scales: np.ndarray) -> None:
    """Scales times <v, Q> / |Q|^2, as `reference.project`."""
    if square > 0:
        fraction = dot / square
        if max_magnitude(family, bits, scales) > _HUGE:
            fraction = clamp(fraction, -_ONE, _ONE)
        for k in range(scale_count(family, bits)):
            scales[k] *= fraction


@inlined
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
    target: np.ndarray,
    target_at: np.ndarray,
    decodes: bool,
    scratch: Arrays,
) -> None:
    """As `reference.encode`, for buckets from `start` to below `stop`.

    What bucket m decodes to goes to target[target_at[m]] and behind, if `decodes`; `values` are scratch then, to which
    residuals may be added.
    """
    codes, words, places, scales, bins, terms, sums, block, _ = scratch
    room = len(sums) // 2
    for m in range(start, stop):
        n, b, record = count[m], bits[m], wire_at[m]
        source, at = values, position[m]
        kept, goal = memory_at[m], target_at[m]  # read once: within loops that store, LLVM could not rely on them
        if b >= BFLOAT16:
            put_floats(values, at, n, b, wire, record)
            if decodes:
                get_floats(wire, record, n, b, target, goal)
            continue
        if feedback and decodes:  # in place: the block and `values` overlap, and LLVM has no vectors for what does
            for i in range(n):
                store(values, at + i, load(values, at + i) + load(residual, kept + i))
        elif feedback:
            for i in range(n):
                store(block, i, load(values, at + i) + load(residual, kept + i))
            source, at = block, 0
        finite = fit(family, source, at, n, b, scales, terms, sums, bins)
        head = record + 4 * scale_count(family, b)
        inverse, top = _ONE / max_magnitude(family, b, scales), np.float32(top_code(family, b))
        low, unit, middle = axis(family, b, scales)
        even = finite and is_even(family) and unit > _LEAST_UNIT
        projects = feedback and finite and family != ONEBIT
        for tile in range(0, n, TILE):
            length = min(TILE, n - tile)
            first, high = np.uint32(keys[slot[m], 0] + element[m] + tile), keys[slot[m], 1]
            if even:
                _round_evenly(source, at + tile, length, low, unit, middle, top, first, high, words)
            elif family == ONEBIT:
                _signs(source, at + tile, length, words)
            else:
                positions(family, source, at + tile, length, b, scales, finite, bins, terms, places)
                _round(places, length, top, first, high, words)
            for i in range(0, length, NARROWED):
                narrow(words, i, codes, i)
            if decodes and not feedback:
                levels(family, codes, length, b, scales, target, goal + tile)
            _put_codes(family, codes, length, b, tile, words, wire, head)
            if projects:
                levels(family, codes, length, b, scales, places, START)
                add_products(source, at + tile, inverse, places, inverse, length, terms, sums, tile // TREE)
        if projects:
            _project(family, b, total(sums, START, blocks_of(n)), total(sums, room, blocks_of(n)), scales)
        for k in range(scale_count(family, b)):
            store_float(wire, record + 4 * k, scales[k])
        if feedback:
            for tile in range(0, n, TILE):
                length = min(TILE, n - tile)
                if n > TILE:
                    _get_codes(family, wire, head, tile, length, b, codes)
                levels(family, codes, length, b, scales, places, START)
                if decodes:
                    for i in range(length):
                        store(target, goal + tile + i, load(places, i))
                for i in range(length):
                    store(places, i, load(source, at + tile + i) - load(places, i))
                write_past_caches(places, length, pending, kept + tile)
    if feedback:
        fence()


@inlined
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
    streams: bool,
    scratch: Arrays,
) -> None:
    """As `reference.decode`, for buckets from `start` to below `stop`.

    With `streams`, what does not accumulate is written past the caches: for an `out` that is not read soon.
    """
    codes, _, decoded, scales, _, _, _, _, _ = scratch
    # Between short tiles the processor goes on reading what they are added to.
    step = TREE if accumulate and not is_ternary(family) else TILE
    for m in range(start, stop):
        n, b, head = count[m], bits[m], wire_at[m]
        if b < BFLOAT16:
            head += 4 * scale_count(family, b)
            for k in range(scale_count(family, b)):
                scales[k] = load_float(wire, wire_at[m] + 4 * k)
        for tile in range(0, n, step):
            length, at = min(step, n - tile), position[m] + tile
            if b >= BFLOAT16:
                get_floats(wire, head + b // 8 * tile, length, b, decoded, START)
            else:
                _get_codes(family, wire, head, tile, length, b, codes)
                levels(family, codes, length, b, scales, decoded, START)
            if accumulate:
                for i in range(length):
                    store(out, at + i, load(out, at + i) + factor * load(decoded, i))
            elif streams:
                for i in range(length):
                    store(decoded, i, factor * load(decoded, i))
                write_past_caches(decoded, length, out, at)
            else:
                for i in range(length):
                    store(out, at + i, factor * load(decoded, i))
    if streams:
        fence()


@jit
def decode(
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
    streams: bool,
    scratch: Arrays,
) -> None:
    """As `_decode`."""
    _decode(family, start, stop, position, count, bits, wire_at, wire, out, factor, accumulate, streams, scratch)


@inlined
def _add(
    values: np.ndarray,
    start: int,
    stop: int,
    position: np.ndarray,
    count: np.ndarray,
    factor: np.float32,
    accumulate: bool,
    sums: np.ndarray,
) -> None:
    """Set `sums` to factor x the values of some buckets, one bucket after the other, or add that to it."""
    filled = 0
    for m in range(start, stop):
        n, at = count[m], position[m]
        if accumulate:
            for i in range(n):
                store(sums, filled + i, load(sums, filled + i) + factor * load(values, at + i))
        else:
            for i in range(n):
                store(sums, filled + i, factor * load(values, at + i))
        filled += n


@jit
def recode(
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
    received: np.ndarray,
    values: np.ndarray,
    own: int,
    factor: np.float32,
    keys: np.ndarray,
    wire: np.ndarray,
    residual: np.ndarray,
    pending: np.ndarray,
    feedback: bool,
    scratch: Arrays,
) -> None:
    """Encode the sums of what was received and of a rank's own values; if there is neither, encode the values.

    One kernel for both, since it takes seconds to compile.
    """
    if len(received) == 0 and own < 0:
        _encode(
            family, start, stop, position, count, bits, wire_at, slot, element, memory_at,
            values, keys, wire, residual, pending, feedback, values, position, _NO, scratch,
        )  # fmt: skip
        return
    _, _, _, _, _, _, _, sums, starts = scratch
    first = start
    while first < stop:
        last, filled = first, 0
        while last < stop and filled + count[last] <= len(sums):
            starts[last] = filled
            filled += count[last]
            last += 1
        message = 0
        for turn in range(len(received) + (own >= 0)):
            if turn == own:
                _add(values, first, last, position, count, factor, turn > 0, sums)
            else:
                _decode(
                    family, first, last, starts, count, bits, wire_at,
                    received[message], sums, factor, turn > 0, _NO, scratch,
                )  # fmt: skip
                message += 1
        _encode(
            family, first, last, starts, count, bits, wire_at, slot, element, memory_at,
            sums, keys, wire, residual, pending, feedback, values, position, _YES, scratch,
        )  # fmt: skip
        first = last


@jit
def encode_nearest(
    start: int,
    stop: int,
    position: np.ndarray,
    count: np.ndarray,
    bits: np.ndarray,
    wire_at: np.ndarray,
    values: np.ndarray,
    wire: np.ndarray,
    scratch: Arrays,
) -> None:
    """As `_encode`, for records of max-min whose codes are the nearest: a pass without hashes, and no feedback."""
    codes, words, _, scales, bins, terms, sums, _, _ = scratch
    for m in range(start, stop):
        n, b, record, at = count[m], bits[m], wire_at[m], position[m]
        if b >= BFLOAT16:
            put_floats(values, at, n, b, wire, record)
            continue
        finite = fit(MAXMIN, values, at, n, b, scales, terms, sums, bins)
        low, unit, _ = axis(MAXMIN, b, scales)
        spread, top = finite and unit > 0, np.float32(top_code(MAXMIN, b))
        for tile in range(0, n, TILE):
            length = min(TILE, n - tile)
            if spread:
                for i in range(length):
                    place = (load(values, at + tile + i) - low) / unit
                    store(words, i, _code(place * _FIXED, top * _FIXED, _HALF_WAY))
            else:
                for i in range(length):
                    store(words, i, np.uint32(0))
            for i in range(0, length, NARROWED):
                narrow(words, i, codes, i)
            pack(codes, length, b, words, wire, record + 8 + tile * b // 8)
        store_float(wire, record, scales[0])
        store_float(wire, record + 4, scales[1])


@jit
def squared_error(
    family: int,
    start: int,
    stop: int,
    position: np.ndarray,
    count: np.ndarray,
    bits: np.ndarray,
    values: np.ndarray,
    projects: bool,
    scratch: Arrays,
) -> float:
    """As `reference.expected_squared_error`, for buckets from `start` to below `stop`.

    Squares are of values in units of the largest magnitude: those of values themselves may leave float32.
    """
    codes, _, places, scales, bins, terms, sums, around, _ = scratch
    half = len(sums) // 2
    error = 0.0
    for m in range(start, stop):
        n, b, at = count[m], bits[m], position[m]
        lost, square = 0.0, 0.0  # of this bucket
        finite = fit(family, values, at, n, b, scales, terms, sums, bins)
        top, unit = top_code(family, b), _ONE / max_magnitude(family, b, scales)
        for tile in range(0, n, TREE):
            length = min(TREE, n - tile)
            positions(family, values, at + tile, length, b, scales, finite, bins, terms, places)
            for i in range(length):
                place = clamp(load(places, i), _ZERO, np.float32(top))
                floor = np.floor(place)
                store(places, i, place - floor)
                store(codes, i, np.int32(floor))
            levels(family, codes, length, b, scales, around, _TREE)
            for i in range(length):
                store(codes, i, min(np.int32(load(codes, i)) + 1, top))
            levels(family, codes, length, b, scales, around, START)
            for i in range(length):
                gap = (load(around, i) - load(around, TREE + i)) * unit
                store(around, TREE + i, gap * load(places, i))
                store(around, i, gap * (_ONE - load(places, i)))
            add_products(around, _TREE, _ONE, around, _ONE, length, terms, sums, START)
            lost += np.float64(sums[0])
            if projects:
                for i in range(length):
                    store(around, i, load(values, at + tile + i))
                add_products(around, START, unit, around, unit, length, terms, sums, START)
                square += np.float64(sums[half])
        if projects and lost > 0:
            lost *= square / (lost + square)
        error += lost / np.float64(unit) ** 2
    return error
