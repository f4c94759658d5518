"""Random rotations of blocks of buckets: `reference.rotations`, stage by stage, to the same bits.

A stage gives every value the other one of its pair, by a sum of the bits of both of which its own are taken away. So
values stay in the threads that read them: other than by splitting and joining, which moves all of them through shared
memory, a pair meets in registers, or by a shuffle where it lies within a warp. Only the longest strides of long buckets
reach over warps.

Shapes: [Q, M, 4] values of M buckets of 4 Q each; [Q, M, 1] is one number per quad, [1, M, 1] one per row.
"""

import triton
import triton.language as tl

from ..reference import rotations
from .blocks import column, random_bits
from .pieces import ELEMENT, LONGEST, SLOT

_STAGES = tl.constexpr(LONGEST.bit_length() - 1)
_LONGEST_STRIDE = tl.constexpr(LONGEST // 2)
_WORD = tl.constexpr(rotations.WORD)
_ANGLES_AT = tl.constexpr(rotations.ANGLES_AT)
_FIRST_TURNED, _LAST_TURNED = map(tl.constexpr, rotations.TURNED)


@triton.jit
def drawn(
    table: tl.tensor, pieces: tl.tensor, row: tl.tensor, keys: tl.tensor, quad: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The rotation of each row: the words with the signs of each quad, of both rounds, and c and s of both angles.

    The lowest bit of a word is the sign of the quad's first value. Rows begin at multiples of a word's signs.
    """
    slot = column(table, pieces, row, SLOT)
    element = column(table, pieces, row, ELEMENT)
    start = (2 * (element // _WORD)).to(tl.uint32) + tl.load(keys + 2 * slot).to(tl.uint32)
    mixed = tl.load(keys + 2 * slot + 1).to(tl.uint32)
    word = start + 2 * (quad // _WORD).to(tl.uint32)
    shift = (quad % _WORD).to(tl.uint32)
    first, second = random_bits(word, mixed) >> shift, random_bits(word + 1, mixed) >> shift
    c0, s0 = _turn(random_bits(start + _ANGLES_AT, mixed))
    c1, s1 = _turn(random_bits(start + _ANGLES_AT + 1, mixed))
    return first, second, c0, s0, c1, s1


@triton.jit
def forward(vectors: tl.tensor, rotation: tl.tuple) -> tl.tensor:
    """The rotated vectors times their length: both transforms with the smallest stride first."""
    vectors = _flipped(vectors, rotation[0])
    for stage in tl.static_range(_STAGES):
        vectors = _stage(vectors, 1 << stage, True, rotation)
    vectors = _flipped(vectors, rotation[1])
    for stage in tl.static_range(_STAGES):
        vectors = _stage(vectors, 1 << stage, False, rotation)
    return vectors


@triton.jit
def back(rotated: tl.tensor, rotation: tl.tuple) -> tl.tensor:
    """The inverse rotation, times the length: both transforms with the largest stride first."""
    for stage in tl.static_range(_STAGES):
        rotated = _stage(rotated, _LONGEST_STRIDE >> stage, False, rotation)
    rotated = _flipped(rotated, rotation[1])
    for stage in tl.static_range(_STAGES):
        rotated = _stage(rotated, _LONGEST_STRIDE >> stage, True, rotation)
    return _flipped(rotated, rotation[0])


@triton.jit
def _turn(bits: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    u = (bits >> 8).to(tl.float32) * 2.0**-24
    square = u * u
    return tl.div_rn((1.0 + 2.0 * u) - square, 1.0 + square), tl.div_rn((1.0 - 2.0 * u) - square, 1.0 + square)


@triton.jit
def _flipped(vectors: tl.tensor, words: tl.tensor) -> tl.tensor:
    """Vectors with the signs that the lowest four bits of words say."""
    minus = (words >> tl.arange(0, 4)[None, None, :].to(tl.uint32)) << 31
    return (vectors.to(tl.uint32, bitcast=True) ^ minus).to(tl.float32, bitcast=True)


@triton.jit
def _stage(vectors: tl.tensor, stride: tl.constexpr, TURNS: tl.constexpr, rotation: tl.tuple) -> tl.tensor:
    """One stage of a transform, of the first one where it `TURNS`; none of rows that are no longer than `stride`."""
    if stride < 4 * vectors.shape[0]:
        index = 4 * tl.arange(0, vectors.shape[0])[:, None, None] + tl.arange(0, 4)[None, None, :]
        own = tl.where((index & stride) != 0, -vectors, vectors)
        other = _partner(vectors, stride)
        if TURNS and stride == _FIRST_TURNED:
            vectors = rotation[2] * own + rotation[3] * other
        elif TURNS and stride == _LAST_TURNED:
            vectors = rotation[4] * own + rotation[5] * other
        else:
            vectors = own + other
    return vectors


@triton.jit
def _partner(vectors: tl.tensor, stride: tl.constexpr) -> tl.tensor:
    """The values that lie `stride` apart from each, in its pair."""
    inner: tl.constexpr = stride if stride < 4 else stride // 4 * vectors.shape[1] * 4
    pairs = tl.reshape(vectors.to(tl.int32, bitcast=True), (vectors.numel // (2 * inner), 2, inner))
    others = tl.sum(pairs, 1, keep_dims=True) - pairs
    return tl.reshape(others, vectors.shape).to(tl.float32, bitcast=True)
