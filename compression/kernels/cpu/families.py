"""The families of quantizers, compiled: the torch definitions of `codecs/quantizers.py`, on one bucket or tile.

`family` is a number on which every function branches once per call, so that one kernel serves all families and is
compiled once. Values are given as an array, the place of the first one, and their count.
"""

import numpy as np

from ...limits import LIMIT, TINY
from ..reference.arithmetic import HISTOGRAM_BITS, TREE
from .compiling import compiled_once, inlined
from .memory import load, load_four, load_word, store, store_four, store_word
from .sums import START, add_sides, add_squares, blocks_of, total
from .vectors import LOOKED_UP, look_up

# From NORM_UNIFORM on, one scale and codes on both sides of zero.
FAMILIES = {"maxmin": 0, "quantile": 1, "1bit": 2, "norm_uniform": 3, "terngrad": 4, "ternary": 5, "exponential": 6}
MAXMIN, QUANTILE, ONEBIT, NORM_UNIFORM, TERNGRAD, TERNARY, EXPONENTIAL = FAMILIES.values()

BINS = 1 << HISTOGRAM_BITS
_ORIGIN, _SHIFT = BINS, BINS + 1  # where a histogram says how keys become bins
_LIMIT, _TINY = np.float32(LIMIT), np.float32(TINY)
_NAN, _ZERO, _HALF, _ONE = np.float32(np.nan), np.float32(0.0), np.float32(0.5), np.float32(1.0)
_MAGNITUDE, _SIGN = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
_INFINITY, _MINUS_INFINITY = np.int32(0x7F800000), np.uint32(0xFF800000)  # the bits of what is not finite begin here
_STEP = np.float32(2.0**-23)


@inlined
def scale_count(family: int, bits: int) -> int:
    if family == QUANTILE:
        return 1 << bits
    return 1 if family >= NORM_UNIFORM else 2


@inlined
def top_code(family: int, bits: int) -> int:
    return (1 << bits) - (2 if family >= NORM_UNIFORM else 1)


@inlined
def clamp(value: np.float32, low: np.float32, high: np.float32) -> np.float32:
    value = low if value < low else value
    return high if value > high else value


@inlined
def max_magnitude(family: int, bits: int, scales: np.ndarray) -> np.float32:
    """The largest magnitude of any scale and any level, but no denormal number."""
    first, last = scales[0], scales[scale_count(family, bits) - 1]
    farthest = _larger(abs(first), abs(last))
    if family == MAXMIN:
        farthest = _larger(farthest, abs(first + last * np.float32(top_code(family, bits))))
    return _larger(farthest, _TINY)


@inlined
def _larger(one: np.float32, other: np.float32) -> np.float32:
    return other if other > one else one


@inlined
def fit(
    family: int,
    values: np.ndarray,
    at: int,
    count: int,
    bits: int,
    scales: np.ndarray,
    terms: np.ndarray,
    sums: np.ndarray,
    bins: np.ndarray,
) -> bool:
    """Write the scales of a bucket, all NaN where a value is not finite; returns whether all are.

    `terms` and `sums` are scratch; `bins` is filled with what `positions` needs of a quantile's histogram.
    """
    smallest, largest, farthest = np.int32(0x7FFFFFFF), np.int32(-0x80000000), np.uint32(0)
    for i in range(at, at + count):
        pattern = np.float32(load(values, i)).view(np.int32)
        smallest = pattern if pattern < smallest else smallest
        largest = pattern if pattern > largest else largest
        unsigned = np.uint32(pattern)
        farthest = unsigned if unsigned > farthest else farthest
    if largest >= _INFINITY or farthest >= _MINUS_INFINITY:
        for k in range(scale_count(family, bits)):
            scales[k] = _NAN
        return False
    # Of two floats the bits of the larger one are larger, but of two below zero, and those have the sign in front.
    low, high = _float(np.int32(farthest) if smallest < 0 else smallest), _float(largest if largest >= 0 else smallest)
    low, high = low + _ZERO, high + _ZERO  # no negative zero
    norm = -low if -low > high else high
    if family == MAXMIN:
        low, high = clamp(low, -_LIMIT, _LIMIT), clamp(high, -_LIMIT, _LIMIT)
        scales[0], scales[1] = low, clamp(high - low, _ZERO, _LIMIT) / np.float32(top_code(family, bits))
    elif family == QUANTILE:
        _quantiles(values, at, count, low, high, top_code(family, bits), scales, terms, bins)
    elif family == ONEBIT:
        negatives = add_sides(values, at, count, _ONE / _power(norm), terms, sums)
        for side in range(2):
            members = np.float32(negatives if side == 1 else count - negatives)
            side_sum = total(sums, side * (len(sums) // 2), blocks_of(count))
            scales[side] = clamp(side_sum / (members if members > 0 else _ONE) * _power(norm), -_LIMIT, _LIMIT)
    else:
        scales[0] = clamp(norm, _ZERO, _LIMIT)
        if family == TERNGRAD:
            add_squares(values, at, count, _ONE / _power(norm), terms, sums)
            mean = total(sums, START, blocks_of(count)) / np.float32(count)
            scales[0] = clamp(np.float32(2.5) * (np.sqrt(mean) * _power(norm)), _ZERO, scales[0])
    return True


@inlined
def is_even(family: int) -> bool:
    """Whether all codes of the family are equally far apart."""
    return family in (MAXMIN, NORM_UNIFORM, TERNGRAD, TERNARY)


@inlined
def is_ternary(family: int) -> bool:
    """Whether five codes of the family make a byte."""
    return family in (TERNGRAD, TERNARY)


@inlined
def axis(family: int, bits: int, scales: np.ndarray) -> tuple[np.float32, np.float32, np.float32]:
    """(low, unit, middle): if the family is even, a value lies at (value - low) / unit + middle where unit > 0."""
    middle = np.float32(top_code(family, bits) // 2)
    if family == MAXMIN:
        return scales[0], scales[1], _ZERO
    return _ZERO, scales[0] / middle if is_even(family) else scales[0], middle


@inlined
def positions(
    family: int,
    values: np.ndarray,
    at: int,
    count: int,
    bits: int,
    scales: np.ndarray,
    finite: bool,
    bins: np.ndarray,
    terms: np.ndarray,
    out: np.ndarray,
) -> None:
    """Where the values lie on the axis of codes: 0 to the top code, after clamping. `terms` is scratch."""
    low, unit, middle = axis(family, bits, scales)
    if family == ONEBIT:
        for i in range(count):
            store(out, i, _ONE if load(values, at + i) < 0 else _ZERO)
    elif family == QUANTILE and finite:
        _quantile_positions(values, at, count, scales, top_code(family, bits), bins, terms, out)
    elif family == QUANTILE or not unit > 0:
        for i in range(count):
            store(out, i, _ZERO if family == QUANTILE else middle)
    elif family == EXPONENTIAL:
        _exponential_positions(values, at, count, unit, top_code(family, bits) // 2, out)
    else:
        for i in range(count):
            store(out, i, (load(values, at + i) - low) / unit + middle)


@compiled_once
def levels(
    family: int, codes: np.ndarray, count: int, bits: int, scales: np.ndarray, out: np.ndarray, place: int
) -> None:
    """What the codes stand for, written from `place` on."""
    first, second = scales[0], scales[1]
    zero, below = np.float32(top_code(family, bits) // 2), np.int32(127 - top_code(family, bits) // 2)
    if family == MAXMIN:
        for i in range(count):
            store(out, place + i, first + second * np.float32(load(codes, i)))
    elif family == ONEBIT:
        for i in range(count):
            store(out, place + i, second if load(codes, i) > 0 else first)
    elif family == QUANTILE:
        whole = count - count % LOOKED_UP
        for i in range(0, whole, LOOKED_UP):
            look_up(scales, codes, i, out, place + i)
        for i in range(whole, count):
            store(out, place + i, load(scales, load(codes, i)))
    elif family == EXPONENTIAL:
        for i in range(count):
            steps = np.float32(load(codes, i)) - zero
            power = _float(np.int32(np.int32(abs(steps)) + below) << np.int32(23))
            power = power if steps != 0 else _ZERO
            store(out, place + i, (-power if steps < 0 else power) * first)
    else:
        unit = first / zero
        for i in range(count):
            store(out, place + i, (np.float32(load(codes, i)) - zero) * unit)


@inlined
def _float(bits: np.int32) -> np.float32:
    return np.int32(bits).view(np.float32)


@inlined
def _ordered(bits: np.int32) -> np.int32:
    """Float bits as integers of the same order; its own inverse. NaN lies beyond the infinities."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & _MAGNITUDE))


@inlined
def _power(norm: np.float32) -> np.float32:
    """The largest power of two that is no larger than a norm."""
    return clamp(_float(np.float32(norm).view(np.int32) & _INFINITY), _TINY, _LIMIT)


@inlined
def _key(value: np.float32) -> np.int64:
    """The place of a number in the order of floats, both zeros alike."""
    return np.int64(_ordered(np.float32(value + _ZERO).view(np.int32)))


@inlined
def _quantiles(
    values: np.ndarray,
    at: int,
    count: int,
    low: np.float32,
    high: np.float32,
    top: int,
    scales: np.ndarray,
    terms: np.ndarray,
    bins: np.ndarray,
) -> None:
    """Count keys in bins, take the levels from the counts, then replace the counts by the code at or below the bin."""
    origin, shift = _key(low), 0
    while (_key(high) - origin) >> shift >= BINS:
        shift += 1
    used = ((_key(high) - origin) >> shift) + 1
    for b in range(used):
        store(bins, b, 0)
    for first in range(0, count, TREE):
        length = min(TREE, count - first)
        _find_bins(values, at + first, length, np.uint32(origin), np.uint32(shift), terms, START)
        for i in range(length):
            b = load_four(terms, i)
            store(bins, b, load(bins, b) + 1)
    scales[0], scales[top] = low, high
    k, seen, rank = 0, 0, -1
    for b in range(used):
        seen += load(bins, b)
        while rank < seen:  # the next quantile lies in this bin
            if k > 0:
                scales[k] = _float(_ordered(np.int32(origin + (b << shift)))) + _ZERO
            k += 1
            rank = k * (count - 1) // top if k < top else count
        store(bins, b, k - 1)
    bins[_ORIGIN], bins[_SHIFT] = origin, shift


@inlined
def _find_bins(
    values: np.ndarray, at: int, count: int, origin: np.uint32, shift: np.uint32, out: np.ndarray, place: int
) -> None:
    """The bins that values are counted in, as the bits of what is written from `place` on."""
    shift &= np.uint32(31)  # as it is; this tells LLVM that 32 bits are enough
    for i in range(count):
        key = np.uint32(_ordered(np.float32(load(values, at + i) + _ZERO).view(np.int32)))
        store_four(out, place + i, np.uint32(key - origin) >> shift)


@inlined
def _quantile_positions(
    values: np.ndarray,
    at: int,
    count: int,
    scales: np.ndarray,
    top: int,
    bins: np.ndarray,
    terms: np.ndarray,
    out: np.ndarray,
) -> None:
    """Look codes and the levels around the values up one by one, and do the rest in vectors."""
    origin, shift = np.uint32(bins[_ORIGIN]), np.uint32(bins[_SHIFT])
    half = _ONE if scales[top] - scales[0] <= _LIMIT else _HALF  # no difference of two levels overflows
    for first in range(0, count, TREE):
        start, length = at + first, min(TREE, count - first)
        _find_bins(values, start, length, origin, shift, out, first)
        for i in range(length):
            code = load(bins, load_four(out, first + i))
            store_four(out, first + i, code)
            store_word(terms, 2 * i, load_word(scales, code))  # the level at or below the value, and the next
        for i in range(length):
            low = load(terms, 2 * i) * half
            gap = load(terms, 2 * i + 1) * half - low
            fraction = (load(values, start + i) * half - low) / gap if gap > 0 else _ZERO
            store(out, first + i, np.float32(np.int32(load_four(out, first + i))) + fraction)


@inlined
def _exponential_positions(
    values: np.ndarray, at: int, count: int, norm: np.float32, zero: int, out: np.ndarray
) -> None:
    offset, middle = np.int32((127 - zero) << 23), np.float32(zero)
    least, inverse = _float((128 - zero) << 23), _float((126 + zero) << 23)
    for i in range(count):
        value = load(values, at + i)
        fraction = abs(value) / norm
        steps = np.float32(np.int32(np.float32(fraction).view(np.int32) - offset)) * _STEP
        steps = fraction * inverse if fraction < least else steps
        store(out, i, middle + (-steps if value < 0 else steps))
