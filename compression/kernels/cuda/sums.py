"""Sums in the one order that all kernels share: that of `families.tree_sum`.

Shapes: M buckets, K = 4 Q values per bucket, both powers of two; 1M1 is one number per bucket.
"""

import triton
import triton.language as tl

from compression.kernels import families

_TREE = tl.constexpr(families.TREE)


@triton.jit
def tree_sum(terms_QM4: tl.tensor) -> tl.tensor:
    """Sums of the terms of each bucket, at most 512 blocks of 512: [1, M, 1]. Terms are 0 beyond the last."""
    m: tl.constexpr = terms_QM4.shape[1]
    k: tl.constexpr = terms_QM4.shape[0] * 4
    block: tl.constexpr = _TREE if k > _TREE else k
    blocks = tl.reshape(tl.permute(terms_QM4, (1, 0, 2)), (m * k // block, block))
    sums = _fold(tl.reshape(_fold(blocks), (m, k // block)))
    return tl.reshape(sums, (1, m, 1)) + 0.0


@triton.jit
def _fold(terms: tl.tensor) -> tl.tensor:
    """Sums of rows by halves, the second half onto the first: [R, W] -> [R, 1], W at most 512."""
    for _ in tl.static_range(9):
        if terms.shape[1] > 1:
            terms = tl.sum(tl.reshape(terms, (terms.shape[0], 2, terms.shape[1] // 2)), 1)
    return terms
