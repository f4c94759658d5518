"""Sums in the one order that all kernels share: that of `families.tree_sum`.

Shapes: M buckets, K values per bucket, both powers of two; M1 is one number per bucket.
"""

import triton
import triton.language as tl

from compression.kernels import families

_TREE = tl.constexpr(families.TREE)
_MINUS_ZERO = tl.constexpr(-0x80000000)  # as bits: Triton makes +0.0 of the literal -0.0


@triton.jit
def tree_sum(terms_MK: tl.tensor, count_M1: tl.tensor) -> tl.tensor:
    """Sums of the first `count` terms of each bucket, at most 512 blocks of 512: [M, 1].

    A sum is -0.0 where all of its terms are, the zeros that pad a tree to a power of two included. That is decided
    apart: `tl.sum` does not say whether it begins with +0.0.
    """
    m: tl.constexpr = terms_MK.shape[0]
    k: tl.constexpr = terms_MK.shape[1]
    block: tl.constexpr = _TREE if k > _TREE else k
    at = tl.arange(0, k)[None, :]
    terms = tl.where(at < count_M1, terms_MK, 0.0)
    sums = _fold(tl.reshape(_fold(tl.reshape(terms, (m * k // block, block))), (m, k // block)))
    beyond = tl.where(at < _power_of_two(count_M1), 0, _MINUS_ZERO)
    signs = tl.where(at < count_M1, terms_MK.to(tl.int32, bitcast=True), beyond)
    largest = tl.max(signs, 1, keep_dims=True)
    return tl.where(largest == _MINUS_ZERO, largest.to(tl.float32, bitcast=True), sums)


@triton.jit
def _fold(terms: tl.tensor) -> tl.tensor:
    """Sums of rows by halves, the second half onto the first: [R, W] -> [R, 1], W at most 512."""
    for _ in tl.static_range(9):
        if terms.shape[1] > 1:
            terms = tl.sum(tl.reshape(terms, (terms.shape[0], 2, terms.shape[1] // 2)), 1)
    return terms


@triton.jit
def _power_of_two(count: tl.tensor) -> tl.tensor:
    """The smallest power of two that is no less than a count."""
    ones = count - 1
    for doubling in tl.static_range(5):
        ones |= ones >> (1 << doubling)
    return ones + 1
