"""The families of quantizers in Triton: the torch definitions of `codecs/quantizers.py`, on a block of buckets.

`FAMILY` is a name known when a kernel is compiled; bits are data, so that one kernel serves all widths. A bucket has
two scales, or one that stands for both. Tables of quantiles are made in `quantiles.py`.

Shapes: M buckets, 4 Q values per bucket, both powers of two; 1M1 is one number per bucket. float32, codes int32.
`mask` is of the values that there are, by quads or one by one: [Q, M, 1] or [Q, M, 4].
"""

import triton
import triton.language as tl

from ... import limits
from ..reference import arithmetic
from .sums import tree_sum

_LIMIT = tl.constexpr(limits.LIMIT)
_HUGE = tl.constexpr(limits.HUGE)
_TINY = tl.constexpr(limits.TINY)
_CODE = tl.constexpr(2.0**arithmetic.FRACTION_BITS)
_INFINITY, _NAN = tl.constexpr(arithmetic.INFINITY), tl.constexpr(0x7FC00000)  # as bits
_ONES = tl.constexpr(0xFFFFFFFF)


@triton.jit
def scale_count(bits_1M1: tl.tensor, FAMILY: tl.constexpr) -> tl.tensor:
    """Float32 scales of a record."""
    if FAMILY == "quantile":
        scales = 1 << bits_1M1
    elif FAMILY == "maxmin" or FAMILY == "1bit":
        scales = 2
    else:
        scales = 1
    return scales


@triton.jit
def top_code(bits_1M1: tl.tensor, FAMILY: tl.constexpr) -> tl.tensor:
    """The largest code."""
    unused: tl.constexpr = 1 if FAMILY == "maxmin" or FAMILY == "1bit" else 2
    return (1 << bits_1M1) - unused


@triton.jit
def fit(
    vectors_QM4: tl.tensor, mask: tl.tensor, count_1M1: tl.tensor, bits_1M1: tl.tensor, FAMILY: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The two scales of each bucket; both NaN where a value is not finite. Values are 0 where there are none.

    Read as signed integers, floats have the largest at the top, and read as unsigned ones the most negative; where
    there are none of a sign, the end of the other nearest to zero is the smallest unsigned one.
    """
    unsigned = vectors_QM4.to(tl.uint32, bitcast=True)
    above, below = _max(unsigned.to(tl.int32, bitcast=True), mask, -0x80000000), _max(unsigned, mask, 0)
    largest = tl.maximum(above, (below & 0x7FFFFFFF).to(tl.int32))
    norm = tl.minimum(_float(largest), _LIMIT)
    if FAMILY == "maxmin":
        least = _max(unsigned ^ _ONES, mask, 0) ^ _ONES
        low = tl.where(below > 0x7FFFFFFF, below, least).to(tl.float32, bitcast=True)
        high = _float(tl.where(above >= 0, above, least.to(tl.int32, bitcast=True)))
        first = tl.minimum(tl.maximum(low, -_LIMIT), _LIMIT) + 0.0  # + 0.0: no negative zero
        span = tl.minimum(tl.minimum(tl.maximum(high, -_LIMIT), _LIMIT) + 0.0 - first, _LIMIT)
        second = tl.div_rn(span, top_code(bits_1M1, FAMILY).to(tl.float32))
    elif FAMILY == "1bit" or FAMILY == "terngrad":
        power = tl.maximum(_float(largest & _INFINITY), _TINY)
        fractions = vectors_QM4 * tl.div_rn(1.0, power)  # rounded as the quotient is: the inverse is exact
        if FAMILY == "terngrad":
            mean = tl.div_rn(tree_sum(fractions * fractions), count_1M1.to(tl.float32))
            first = tl.minimum(norm, 2.5 * (tl.sqrt_rn(mean) * power))
            second = first
        else:
            negative = vectors_QM4 < 0
            negatives = tl.sum(tl.sum(negative.to(tl.int32), 2, keep_dims=True), 0, keep_dims=True)
            first = _mean(tl.where(negative, 0.0, fractions), count_1M1 - negatives, power)
            second = _mean(tl.where(negative, fractions, 0.0), negatives, power)
    else:
        first = norm
        second = norm
    finite = largest < _INFINITY
    nan = _float(tl.full(largest.shape, _NAN, tl.int32))
    return tl.where(finite, first, nan), tl.where(finite, second, nan)


@triton.jit
def _mean(fractions_QM4: tl.tensor, count_1M1: tl.tensor, power_1M1: tl.tensor) -> tl.tensor:
    """The mean of `count` values of each bucket, in units of `power`; the others are 0. Within +-LIMIT."""
    mean = tl.div_rn(tree_sum(fractions_QM4), tl.maximum(count_1M1, 1).to(tl.float32))
    return tl.minimum(tl.maximum(mean * power_1M1, -_LIMIT), _LIMIT)


@triton.jit
def _max(values_QM4: tl.tensor, mask: tl.tensor, least: tl.constexpr) -> tl.tensor:
    """The largest of the values that there are of each bucket, none of them below `least`."""
    if mask.shape[2] == 1:
        quads = tl.where(mask, tl.max(values_QM4, 2, keep_dims=True), least)
    else:
        quads = tl.max(tl.where(mask, values_QM4, least), 2, keep_dims=True)
    return tl.max(quads, 0, keep_dims=True)


@triton.jit
def divisor(
    first_1M1: tl.tensor, second_1M1: tl.tensor, bits_1M1: tl.tensor, FAMILY: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The divisor of `scaled_positions`, the step from one code to the next, made ready for `_quotient`.

    That is a power of two that brings the step near 1, the inverse of the product in two parts, and the product. The
    power is 0 where the step is zero or NaN.
    """
    zero = top_code(bits_1M1, FAMILY) // 2
    step = second_1M1 if FAMILY == "maxmin" else tl.div_rn(first_1M1, zero.to(tl.float32))
    exponent = tl.minimum((step.to(tl.int32, bitcast=True) & _INFINITY) >> 23, 253)
    power = tl.where(step > 0, _float((254 - exponent) << 23), 0.0)
    near = tl.where(step > 0, step * power, 1.0)
    inverse = tl.div_rn(1.0, near)
    rest = tl.fma(-near, inverse, 1.0) * inverse
    return power, inverse * _CODE, rest * _CODE, near * (1.0 / _CODE)


@triton.jit
def _quotient(scaled_QM4: tl.tensor, over: tl.tuple) -> tl.tensor:
    """`scaled` (values x the divisor's power) / the divisor, correctly rounded, times `_CODE`.

    Markstein 1990: the inverse being correctly rounded, and the first quotient off by less than a unit in the last
    place, which the inverse's second part ensures, one step of Newton rounds correctly. Where that is wrong, by
    underflow, the quotient is below 2^-100, and nothing remains of it in a code.
    """
    guess = tl.fma(scaled_QM4, over[1], scaled_QM4 * over[2])
    return tl.fma(tl.fma(-over[3], guess, scaled_QM4), over[1], guess)


@triton.jit
def scaled_positions(
    vectors_QM4: tl.tensor, first_1M1: tl.tensor, over: tl.tuple, bits_1M1: tl.tensor, FAMILY: tl.constexpr
) -> tl.tensor:
    """Positions of the values on the axis of codes, from 0 to the top code, in units of 1 / `_CODE`. Not of 1bit.

    All values of a bucket lie in one place where they are all the same, or one of them is not finite: the bounds meet
    there, and a NaN comes to lie on a bound.
    """
    top = top_code(bits_1M1, FAMILY)
    zero = (top // 2).to(tl.float32) * _CODE
    low, high = 0.0, top.to(tl.float32) * _CODE
    known = over[0] > 0
    if FAMILY == "maxmin":
        found = _quotient(tl.fma(vectors_QM4, over[0], -first_1M1 * over[0]), over)
        high = tl.where(known, high, 0.0)
    elif FAMILY == "exponential":  # whose fractions count where they are denormal, too
        fraction = tl.where(first_1M1 > 0, tl.div_rn(tl.abs(vectors_QM4), first_1M1), 0.0)
        steps = (fraction.to(tl.int32, bitcast=True) - ((127 - top // 2) << 23)).to(tl.float32)
        linear = fraction * _float((126 + top // 2) << 23) * _CODE
        steps = tl.where(fraction < _float((128 - top // 2) << 23), linear, steps)
        found = zero + tl.where(vectors_QM4 < 0, -steps, steps)
    else:
        found = _quotient(vectors_QM4 * over[0], over) + zero
        low, high = tl.where(known, low, zero), tl.where(known, high, zero)
    return tl.minimum(tl.maximum(found, low), high)


@triton.jit
def levels(
    codes_QM4: tl.tensor, first_1M1: tl.tensor, second_1M1: tl.tensor, bits_1M1: tl.tensor, FAMILY: tl.constexpr
) -> tl.tensor:
    """The values that codes stand for."""
    zero = top_code(bits_1M1, FAMILY) // 2
    if FAMILY == "maxmin":
        found = first_1M1 + second_1M1 * codes_QM4.to(tl.float32)
    elif FAMILY == "1bit":
        found = tl.where(codes_QM4 > 0, second_1M1, first_1M1)
    elif FAMILY == "exponential":
        steps = codes_QM4 - zero
        power = tl.where(steps == 0, 0.0, _float((tl.abs(steps) + 127 - zero) << 23))
        found = tl.where(steps < 0, -power, power) * first_1M1
    else:
        found = (codes_QM4 - zero).to(tl.float32) * tl.div_rn(first_1M1, zero.to(tl.float32))
    return found


@triton.jit
def project(
    vectors_QM4: tl.tensor,
    codes_QM4: tl.tensor,
    mask: tl.tensor,
    first_1M1: tl.tensor,
    second_1M1: tl.tensor,
    bits_1M1: tl.tensor,
    FAMILY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The scales of the projection, as `reference.project`."""
    max_magnitude = tl.maximum(tl.abs(first_1M1), tl.abs(second_1M1))
    if FAMILY == "maxmin":
        highest = first_1M1 + second_1M1 * top_code(bits_1M1, FAMILY).to(tl.float32)
        max_magnitude = tl.maximum(max_magnitude, tl.abs(highest))
    max_magnitude = tl.maximum(max_magnitude, _TINY)
    unit = tl.div_rn(1.0, max_magnitude)
    q = tl.where(mask, levels(codes_QM4, first_1M1, second_1M1, bits_1M1, FAMILY) * unit, 0.0)
    length = tree_sum(q * q)
    fraction = tl.div_rn(tree_sum((vectors_QM4 * unit) * q), length)
    fraction = tl.where(max_magnitude > _HUGE, tl.minimum(tl.maximum(fraction, -1.0), 1.0), fraction)
    first = tl.where(length > 0, first_1M1 * fraction, first_1M1)
    return first, tl.where(length > 0, second_1M1 * fraction, second_1M1)


@triton.jit
def _float(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.float32, bitcast=True)
