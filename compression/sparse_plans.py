"""Sparse records: a few values of a layer, and their indices. Arithmetic on sizes; no value is touched.

A record of k out of n values is three parts, each padded to a whole byte:

1. the values as float32, in the order of their indices;
2. the low l bits of each index as one little-endian bit stream: where the value lies in its block of 2^l values;
3. the blocks in unary: bit b + i is set where the i-th index lies in block b.

That is the code of Elias (1974) and Fano (1971). With l = floor(log2(n / k)) an index costs less than l + 3 bits:
8.6 at 1 % kept. The size follows from n and k alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .layers import Ints


@dataclass(frozen=True)
class SparsePlan:
    """L layers of which some values are kept, and where their records lie in a message. int64 [L] each."""

    count: Ints  # n: of values
    kept: Ints  # k: of values in the record, 1 to n
    low_bits: Ints  # l: of an index within its block
    first: Ints  # of the layer's indices, among the indices of all layers
    wire_at: Ints  # byte offset of the record
    wire_bytes: int  # length of the message


def plan(counts: Sequence[int], kept: Sequence[int]) -> SparsePlan:
    """The message that holds `kept[l]` of `counts[l]` values of each layer, one record after the other."""
    nbytes = np.array([record_bytes(n, k) for n, k in zip(counts, kept, strict=True)], np.int64)
    widths = np.array([low_bits(n, k) for n, k in zip(counts, kept, strict=True)], np.int64)
    k = np.array(kept, np.int64)
    return SparsePlan(
        np.array(counts, np.int64), k, widths, np.cumsum(k) - k, np.cumsum(nbytes) - nbytes, int(nbytes.sum())
    )


def low_bits(count: int, kept: int) -> int:
    """l: the width of an index within its block."""
    return (count // kept).bit_length() - 1


def record_bytes(count: int, kept: int) -> int:
    """Exact length of the record of `kept` out of `count` values."""
    width = low_bits(count, kept)
    blocks = kept + ((count - 1) >> width)
    return 4 * kept + (kept * width + 7) // 8 + (blocks + 7) // 8
