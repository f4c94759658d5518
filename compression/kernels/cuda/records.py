"""Records: floats at any offset, and codes of a few bits, by bytes or, where they lie so, by words.

The layout is that of `arithmetic.pack` and `arithmetic.pack_ternary`. Neighboring lanes move neighboring bytes.

Shapes: M buckets, 4 Q values per bucket, both powers of two, Q at least 2; 1M1 is one number per bucket.
"""

import triton
import triton.language as tl

from ..reference import arithmetic

_TILE = tl.constexpr(arithmetic.TERNARY_TILE)
_INFINITY, _NAN = tl.constexpr(arithmetic.INFINITY), tl.constexpr(arithmetic.BFLOAT16_NAN)  # as bits


@triton.jit
def store_words(at: tl.tensor, words: tl.tensor, mask: tl.tensor) -> None:
    """Four little-endian bytes each, from the pointers `at` on. Floats are given as their bits."""
    for byte in tl.static_range(4):
        tl.store(at + byte, (words >> (8 * byte)).to(tl.uint8), mask=mask)


@triton.jit
def store_scale(at: tl.tensor, scale: tl.tensor, mask: tl.tensor) -> None:
    """A float of each bucket, as `store_words`, but at once where all lie at whole words."""
    if tl.max((at.to(tl.int64) & 3).to(tl.int32)) == 0:
        tl.store(at.to(tl.pointer_type(tl.float32)), scale, mask=mask)
    else:
        store_words(at, scale.to(tl.int32, bitcast=True), mask)


@triton.jit
def load_words(at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The inverse of `store_words`, int32."""
    words = tl.load(at, mask=mask, other=0).to(tl.int32)
    for byte in tl.static_range(1, 4):
        words |= tl.load(at + byte, mask=mask, other=0).to(tl.int32) << (8 * byte)
    return words


@triton.jit
def store_floats(at: tl.tensor, words: tl.tensor, size: tl.tensor, mask: tl.tensor) -> None:
    """Floats, given as their bits, of `size` bytes each: as they are, or rounded as `arithmetic.to_bfloat16`."""
    upper = (words + 0x7FFF + ((words >> 16) & 1)) >> 16
    upper = tl.where((words & 0x7FFFFFFF) > _INFINITY, _NAN, upper)
    words = tl.where(size == 2, upper, words)
    for byte in tl.static_range(4):
        tl.store(at + byte, (words >> (8 * byte)).to(tl.uint8), mask=mask & (byte < size))


@triton.jit
def load_floats(at: tl.tensor, size: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The values that `store_floats` wrote."""
    words = tl.load(at, mask=mask, other=0).to(tl.int32)
    for byte in tl.static_range(1, 4):
        words |= tl.load(at + byte, mask=mask & (byte < size), other=0).to(tl.int32) << (8 * byte)
    return tl.where(size == 2, words << 16, words).to(tl.float32, bitcast=True)


@triton.jit
def pack(
    codes_QM4: tl.tensor, mask: tl.tensor, count_1M1: tl.tensor, bits_1M1: tl.tensor, at_1M1: tl.tensor
) -> None:
    """One bit stream per bucket, little-endian, of the `count` codes that there are: eight codes make `bits` bytes."""
    octets: tl.constexpr = codes_QM4.shape[0] // 2
    m: tl.constexpr = codes_QM4.shape[1]
    four, half = tl.arange(0, 4)[None, None, :], tl.arange(0, 2)[None, :, None, None]
    terms = codes_QM4 << (four * bits_1M1)
    if mask.shape[2] == 1:
        quads = tl.where(mask, tl.sum(terms, 2, keep_dims=True), 0)
    else:
        quads = tl.sum(tl.where(mask, terms, 0), 2, keep_dims=True)
    pairs = tl.reshape(quads, (octets, 2, m, 1)).to(tl.uint32).to(tl.uint64)
    words = tl.sum(pairs << (4 * half * bits_1M1).to(tl.uint64), 1, keep_dims=True)
    halves = (words >> (32 * half).to(tl.uint64)).to(tl.uint32)
    octet = tl.arange(0, octets)[:, None, None, None] * bits_1M1
    left = tl.minimum(bits_1M1, (count_1M1 * bits_1M1 + 7) // 8 - octet) - 4 * half
    at = at_1M1 + octet + 4 * half
    one_line = (bits_1M1 % 4 == 0) & (at_1M1.to(tl.int64) % 4 == 0) & (count_1M1 % 8 == 0)
    if tl.min(one_line.to(tl.int32)) == 1:
        tl.store(at.to(tl.pointer_type(tl.uint32)), halves, mask=left > 0)
    else:
        for byte in tl.static_range(4):
            tl.store(at + byte, (halves >> (8 * byte)).to(tl.uint8), mask=byte < left)


@triton.jit
def unpack(
    first_1M1: tl.tensor, count_1M1: tl.tensor, quad_Q11: tl.tensor, bits_1M1: tl.tensor, wire_1M1: tl.tensor
) -> tl.tensor:
    """The codes from `first_1M1` on, `count_1M1` of them, of bit streams that begin at `wire_1M1`.

    `first_1M1` is a multiple of 8; `quad_Q11` are the first codes of quads. Beyond the last code there is anything.
    A quad is read with the one or two words of memory that its codes lie in: no allocation ends within a word.
    """
    offset = quad_Q11 * bits_1M1
    address = (wire_1M1 + (first_1M1 >> 3) * bits_1M1).to(tl.int64) + (offset >> 3)
    shift = ((address & 3) * 8).to(tl.int32) + (offset & 7)
    word = (address & -4).to(tl.pointer_type(tl.uint32))
    left = count_1M1 - quad_Q11
    low = tl.load(word, mask=left > 0).to(tl.uint64)
    high = tl.load(word + 1, mask=(left > 0) & (shift + tl.minimum(left, 4) * bits_1M1 > 32)).to(tl.uint64)
    codes = ((low | (high << 32)) >> shift.to(tl.uint64)).to(tl.uint32)
    each = (tl.arange(0, 4)[None, None, :] * bits_1M1).to(tl.uint32)
    return ((codes >> each) & ((1 << bits_1M1) - 1).to(tl.uint32)).to(tl.int32)


@triton.jit
def ternary_source(byte_B11: tl.tensor, digit: tl.constexpr, count_1M1: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The code of its bucket that is a digit of a byte of the record, and whether there is one: [B, M, 1] each."""
    tile = byte_B11 // (_TILE // 5)
    fifth = _fifth(count_1M1 - tile * _TILE)
    within = byte_B11 % (_TILE // 5)
    code = tile * _TILE + digit * fifth + within
    return code, (within < fifth) & (code < count_1M1)


@triton.jit
def ternary_unpack(
    first_1M1: tl.tensor, at_Q14: tl.tensor, count_1M1: tl.tensor, wire_1M1: tl.tensor, mask: tl.tensor
) -> tl.tensor:
    """The codes `first_1M1 + at_Q14` of buckets of `count_1M1` values, whose bytes begin at `wire_1M1`.

    All of a piece lies in one tile. A byte times 2^32 / 3^(digit + 1), cut to 32 bits, is what follows the point of
    byte / 3^(digit + 1); three times that is the code, and what follows its point.
    """
    tile = first_1M1 // _TILE
    position = (first_1M1 % _TILE).to(tl.uint32) + at_Q14.to(tl.uint32)
    fifth = _fifth(count_1M1 - tile * _TILE).to(tl.uint32)
    digit = (position * ((2**21 + fifth - 1) // fifth)) >> 21  # position // fifth: exact up to 5 fifths of 512
    scale = tl.full(digit.shape, -(-(2**32) // 3), tl.uint32)
    for lower in tl.static_range(1, 5):
        scale = tl.where(digit == lower, -(-(2**32) // 3 ** (lower + 1)), scale)
    at = wire_1M1 + tile * (_TILE // 5) + (position - digit * fifth).to(tl.int64)
    byte = tl.load(at, mask=mask, other=0).to(tl.uint32)
    return tl.umulhi(byte * scale, 3).to(tl.int32)


@triton.jit
def _fifth(count: tl.tensor) -> tl.tensor:
    """Bytes of a tile that begins `count` codes before its bucket ends."""
    return (tl.minimum(tl.maximum(count, 1), _TILE).to(tl.int32) + 4) // 5
