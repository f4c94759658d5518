"""Sums in the one order that all kernels share: that of `arithmetic.tree_sum`.

Shapes: M buckets, K = 4 Q values per bucket, both powers of two; 1M1 is one number per bucket.
"""

import triton
import triton.language as tl

from ..reference import arithmetic

_BLOCK = tl.constexpr(arithmetic.TREE // 4)  # quads that one tree sums


@triton.jit
def tree_sum(terms_QM4: tl.tensor) -> tl.tensor:
    """Sums of the terms of each bucket, at most 512 blocks of 512: [1, M, 1]. Terms are 0 beyond the last."""
    quads: tl.constexpr = terms_QM4.shape[0]
    m: tl.constexpr = terms_QM4.shape[1]
    block: tl.constexpr = _BLOCK if quads > _BLOCK else quads
    quad_sums = _fold(tl.reshape(terms_QM4, (quads // block, block, m * 4)))
    pairs = tl.sum(tl.reshape(quad_sums, (quads // block, m, 2, 2)), 2)
    sums = tl.sum(pairs, 2)
    return tl.reshape(_fold(tl.reshape(sums, (1, quads // block, m))), (1, m, 1)) + 0.0


@triton.jit
def spread(numbers_1M1: tl.tensor) -> tl.tensor:
    """The same numbers, by way of scalars, for use with the values of their buckets.

    Where they come of sums, the compiler would take the layout of those for the values, too, and have every thread hold
    whole buckets (Triton 3.7).
    """
    index = tl.arange(0, numbers_1M1.shape[1])[None, :, None]
    bits = numbers_1M1.to(tl.int32, bitcast=True)
    found = tl.zeros(numbers_1M1.shape, tl.int32)
    for each in tl.static_range(numbers_1M1.shape[1]):
        found = tl.where(index == each, tl.sum(tl.where(index == each, bits, 0)), found)
    return found.to(tl.float32, bitcast=True)


@triton.jit
def _fold(terms: tl.tensor) -> tl.tensor:
    """Sums over the second axis by halves, the second half onto the first: [B, N, W] -> [B, 1, W], N at most 512."""
    for _ in tl.static_range(9):
        if terms.shape[1] > 1:
            terms = tl.sum(tl.reshape(terms, (terms.shape[0], 2, terms.shape[1] // 2, terms.shape[2])), 1)
    return terms
