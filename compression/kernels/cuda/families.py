"""The families of quantizers in Triton: the functions of `kernels/families.py`, on a block of buckets.

`FAMILY` is a name known when a kernel is compiled; bits are data, so that one kernel serves all widths. A bucket has
two scales, or one that stands for both. Tables of quantiles are not made here, only read (`records.py`).

Shapes: M buckets, K values per bucket, both powers of two; M1 is one number per bucket. float32, codes int32.
"""

import triton
import triton.language as tl

from compression.kernels import families
from compression.kernels.cuda.sums import tree_sum

_LIMIT = tl.constexpr(families.LIMIT)
_HUGE = tl.constexpr(families.HUGE)
_TINY = tl.constexpr(families.TINY)
_INFINITY, _NAN = tl.constexpr(0x7F800000), tl.constexpr(0x7FC00000)  # as bits


@triton.jit
def scale_count(bits_M1: tl.tensor, FAMILY: tl.constexpr) -> tl.tensor:
    """How many float32 scales a record has."""
    if FAMILY == "quantile":
        scales = 1 << bits_M1
    elif FAMILY == "maxmin" or FAMILY == "1bit":
        scales = 2
    else:
        scales = 1
    return scales


@triton.jit
def top_code(bits_M1: tl.tensor, FAMILY: tl.constexpr) -> tl.tensor:
    """The largest code."""
    unused: tl.constexpr = 1 if FAMILY == "maxmin" or FAMILY == "1bit" else 2
    return (1 << bits_M1) - unused


@triton.jit
def fit(
    vectors_MK: tl.tensor, here_MK: tl.tensor, count_M1: tl.tensor, bits_M1: tl.tensor, FAMILY: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The two scales of each bucket; both NaN where a value is not finite. Values are 0 where they are not `here`."""
    largest = tl.max(tl.abs(vectors_MK).to(tl.int32, bitcast=True), 1, keep_dims=True)  # in the order of floats
    norm = tl.minimum(_float(largest), _LIMIT)
    if FAMILY == "maxmin":
        low = tl.min(tl.where(here_MK, vectors_MK, float("inf")), 1, keep_dims=True)
        high = tl.max(tl.where(here_MK, vectors_MK, -float("inf")), 1, keep_dims=True)
        first = tl.minimum(tl.maximum(low, -_LIMIT), _LIMIT) + 0.0  # + 0.0: no negative zero
        span = tl.minimum(tl.minimum(tl.maximum(high, -_LIMIT), _LIMIT) + 0.0 - first, _LIMIT)
        second = tl.div_rn(span, top_code(bits_M1, FAMILY).to(tl.float32))
    elif FAMILY == "1bit" or FAMILY == "terngrad":
        power = tl.maximum(_float(largest & _INFINITY), _TINY)
        shares = vectors_MK * tl.div_rn(1.0, power)  # rounded as the quotient is: the inverse is exact
        if FAMILY == "terngrad":
            mean = tl.div_rn(tree_sum(shares * shares, count_M1), count_M1.to(tl.float32))
            first = tl.minimum(norm, 2.5 * (tl.sqrt_rn(mean) * power))
            second = first
        else:
            first = _mean(shares, here_MK & (vectors_MK >= 0), count_M1, power)
            second = _mean(shares, here_MK & (vectors_MK < 0), count_M1, power)
    else:
        first = norm
        second = norm
    finite = largest < _INFINITY
    nan = _float(tl.full(largest.shape, _NAN, tl.int32))
    return tl.where(finite, first, nan), tl.where(finite, second, nan)


@triton.jit
def _mean(shares_MK: tl.tensor, members_MK: tl.tensor, count_M1: tl.tensor, power_M1: tl.tensor) -> tl.tensor:
    """The mean of some values of each bucket, within +-LIMIT; `shares_MK` are the values in units of `power_M1`."""
    size = tl.maximum(tl.sum(members_MK.to(tl.int32), 1, keep_dims=True), 1)
    total = tree_sum(shares_MK * members_MK.to(tl.float32), count_M1)
    return tl.minimum(tl.maximum(tl.div_rn(total, size.to(tl.float32)) * power_M1, -_LIMIT), _LIMIT)


@triton.jit
def positions(
    vectors_MK: tl.tensor, first_M1: tl.tensor, second_M1: tl.tensor, bits_M1: tl.tensor, FAMILY: tl.constexpr
) -> tl.tensor:
    """Where the values lie on the axis of codes, from 0 to the top code."""
    top = top_code(bits_M1, FAMILY)
    zero = top // 2
    if FAMILY == "maxmin":
        places = tl.where(second_M1 > 0, tl.div_rn(vectors_MK - first_M1, second_M1), 0.0)
    elif FAMILY == "1bit":
        places = (vectors_MK < 0).to(tl.float32)
    elif FAMILY == "exponential":
        share = tl.where(first_M1 > 0, tl.div_rn(tl.abs(vectors_MK), first_M1), 0.0)
        steps = (share.to(tl.int32, bitcast=True) - ((127 - zero) << 23)).to(tl.float32) * 2.0**-23
        steps = tl.where(share < _float((128 - zero) << 23), share * _float((126 + zero) << 23), steps)
        places = zero.to(tl.float32) + tl.where(vectors_MK < 0, -steps, steps)
    else:
        unit = tl.div_rn(first_M1, zero.to(tl.float32))
        places = tl.where(unit > 0, tl.div_rn(vectors_MK, unit), 0.0) + zero.to(tl.float32)
    return tl.minimum(tl.maximum(places, 0.0), top.to(tl.float32))


@triton.jit
def levels(
    codes_MK: tl.tensor, first_M1: tl.tensor, second_M1: tl.tensor, bits_M1: tl.tensor, FAMILY: tl.constexpr
) -> tl.tensor:
    """What the codes stand for."""
    zero = top_code(bits_M1, FAMILY) // 2
    if FAMILY == "maxmin":
        found = first_M1 + second_M1 * codes_MK.to(tl.float32)
    elif FAMILY == "1bit":
        found = tl.where(codes_MK > 0, second_M1, first_M1)
    elif FAMILY == "exponential":
        steps = codes_MK - zero
        power = tl.where(steps == 0, 0.0, _float((tl.abs(steps) + 127 - zero) << 23))
        found = tl.where(steps < 0, -power, power) * first_M1
    else:
        found = (codes_MK - zero).to(tl.float32) * tl.div_rn(first_M1, zero.to(tl.float32))
    return found


@triton.jit
def project(
    vectors_MK: tl.tensor,
    codes_MK: tl.tensor,
    count_M1: tl.tensor,
    first_M1: tl.tensor,
    second_M1: tl.tensor,
    bits_M1: tl.tensor,
    FAMILY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The scales of the projection, as `reference.project`."""
    reach = tl.maximum(tl.abs(first_M1), tl.abs(second_M1))
    if FAMILY == "maxmin":
        highest = first_M1 + second_M1 * top_code(bits_M1, FAMILY).to(tl.float32)
        reach = tl.maximum(reach, tl.abs(highest))
    reach = tl.maximum(reach, _TINY)
    unit = tl.div_rn(1.0, reach)
    q = levels(codes_MK, first_M1, second_M1, bits_M1, FAMILY) * unit
    length = tree_sum(q * q, count_M1)
    share = tl.div_rn(tree_sum((vectors_MK * unit) * q, count_M1), length)
    share = tl.where(reach > _HUGE, tl.minimum(tl.maximum(share, -1.0), 1.0), share)
    first = tl.where(length > 0, first_M1 * share, first_M1)
    return first, tl.where(length > 0, second_M1 * share, second_M1)


@triton.jit
def _float(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.float32, bitcast=True)
