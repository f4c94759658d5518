"""Records, byte by byte: floats at any offset, and codes of a few bits.

The layout is that of `families.pack` and `TernGrad.pack`. Neighboring lanes move neighboring bytes.

Shapes: M buckets, K values per bucket, a power of two and at least 8; M1 is one number per bucket.
"""

import triton
import triton.language as tl

from compression.kernels import families

_TILE = tl.constexpr(families.TERNARY_TILE)


@triton.jit
def store_words(at: tl.tensor, words: tl.tensor, here: tl.tensor) -> None:
    """Four little-endian bytes each, from the pointers `at` on. Floats are given as their bits."""
    for byte in tl.static_range(4):
        tl.store(at + byte, (words >> (8 * byte)).to(tl.uint8), mask=here)


@triton.jit
def load_words(at: tl.tensor, here: tl.tensor) -> tl.tensor:
    """The inverse of `store_words`, int32."""
    words = tl.load(at, mask=here, other=0).to(tl.int32)
    for byte in tl.static_range(1, 4):
        words |= tl.load(at + byte, mask=here, other=0).to(tl.int32) << (8 * byte)
    return words


@triton.jit
def pack(codes_MK: tl.tensor, count_M1: tl.tensor, bits_M1: tl.tensor, at_M1: tl.tensor) -> None:
    """One bit stream per bucket, little-endian: eight codes at a time make `bits` bytes. Codes are 0 beyond `count`."""
    m: tl.constexpr = codes_MK.shape[0]
    groups: tl.constexpr = codes_MK.shape[1] // 8
    bits_M11 = bits_M1[:, :, None]
    eight = tl.arange(0, 8)[None, None, :]
    spread = tl.reshape(codes_MK, (m, groups, 8)).to(tl.uint64) << (eight * bits_M11).to(tl.uint64)
    words = tl.sum(spread, 2, keep_dims=True)
    at = tl.arange(0, groups)[None, :, None] * bits_M11 + eight
    inside = (eight < bits_M11) & (at < (count_M1[:, :, None] * bits_M11 + 7) // 8)
    tl.store(at_M1[:, :, None] + at, (words >> (8 * eight).to(tl.uint64)).to(tl.uint8), mask=inside)


@triton.jit
def unpack(
    first_M1: tl.tensor, at_K: tl.tensor, bits_M1: tl.tensor, wire_M1: tl.tensor, here_MK: tl.tensor
) -> tl.tensor:
    """The codes `first_M1 + at_K` of bit streams that begin at `wire_M1`. `first_M1` is a multiple of 8."""
    offset = at_K * bits_M1
    at = wire_M1 + first_M1 // 8 * bits_M1 + offset // 8
    shift = offset % 8
    low = tl.load(at, mask=here_MK, other=0).to(tl.int32)
    high = tl.load(at + 1, mask=here_MK & (shift + bits_M1 > 8), other=0).to(tl.int32)
    return ((low | (high << 8)) >> shift) & ((1 << bits_M1) - 1)


@triton.jit
def ternary_source(byte_K: tl.tensor, digit: tl.constexpr, count_M1: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Which code of its bucket is a digit of a byte of the record, and whether there is one: [M, K] each."""
    tile = byte_K // (_TILE // 5)
    fifth = (tl.minimum(count_M1 - tile * _TILE, _TILE) + 4) // 5
    within = byte_K % (_TILE // 5)
    code = tile * _TILE + digit * fifth + within
    return code, (within < fifth) & (code < count_M1)


@triton.jit
def ternary_unpack(
    first_M1: tl.tensor, at_K: tl.tensor, count_M1: tl.tensor, wire_M1: tl.tensor, here_MK: tl.tensor
) -> tl.tensor:
    """The codes `first_M1 + at_K` of buckets of `count_M1` values, whose bytes begin at `wire_M1`."""
    place = (first_M1 % _TILE).to(tl.int32) + at_K
    tile = first_M1 // _TILE + place // _TILE
    place = place % _TILE
    fifth = tl.maximum((tl.minimum(count_M1 - tile * _TILE, _TILE).to(tl.int32) + 4) // 5, 1)
    digit = place // fifth
    code = tl.load(wire_M1 + tile * (_TILE // 5) + place % fifth, mask=here_MK, other=0).to(tl.int32)
    for lower in tl.static_range(4):
        code = tl.where(digit > lower, code // 3, code)
    return code % 3
