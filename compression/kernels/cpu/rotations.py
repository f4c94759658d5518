"""Hadamard transforms of buckets, in vectors: `reference.rotations`, stage by stage, to the same bits.

Blocks of 64 values stay in registers for six stages, as eight vectors of eight: three of them within vectors, by
shuffles, three between them. The stages between blocks follow, up to three in one pass.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from ..reference.rotations import TURNED, WORD
from .compiling import inlined
from .memory import pointer_to, typed_intrinsic

BLOCK = 64  # values that stay in registers
_LANES = 8
_RADIX = 8  # vectors, and blocks that are worked on together

_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(ir.IntType(32), _LANES)


def _splat(builder: Any, scalar: Any, kind: Any) -> Any:
    first = builder.insert_element(kind(ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(first, kind(ir.Undefined), _WORDS([0] * _LANES))


def _within(builder: Any, vectors: list[Any], stride: int) -> list[Any]:
    """A stage within vectors: a lane and the one that lies `stride` apart."""
    lanes = range(_LANES)
    minus = _WORDS([0x80000000 if lane & stride else 0 for lane in lanes])
    done = []
    for vector in vectors:
        swapped = builder.shuffle_vector(vector, vector, _WORDS([lane ^ stride for lane in lanes]))
        signed = builder.bitcast(builder.xor(builder.bitcast(vector, _WORDS), minus), _FLOATS)
        done.append(builder.fadd(swapped, signed))
    return done


def _between(builder: Any, vectors: list[Any], apart: int, turn: tuple[Any, Any] | None) -> list[Any]:
    """A stage between vectors that lie `apart`; with a `turn`, (c, s)."""
    done = list(vectors)
    for k in range(len(vectors)):
        if k & apart:
            continue
        a, b = vectors[k], vectors[k + apart]
        if turn is None:
            done[k], done[k + apart] = builder.fadd(a, b), builder.fsub(a, b)
        else:
            c, s = turn
            done[k] = builder.fadd(builder.fmul(c, a), builder.fmul(s, b))
            done[k + apart] = builder.fsub(builder.fmul(s, a), builder.fmul(c, b))
    return done


def _flipped(builder: Any, vectors: list[Any], words: list[Any]) -> list[Any]:
    """Vectors with the signs that two words say: bit i of a word is a minus of value i of its half."""
    done = []
    for k, vector in enumerate(vectors):
        first = _LANES * k % WORD
        left = _WORDS([31 - first - lane for lane in range(_LANES)])
        word = _splat(builder, words[_LANES * k // WORD], _WORDS)
        minus = builder.and_(builder.shl(word, left), _WORDS([0x80000000] * _LANES))
        done.append(builder.bitcast(builder.xor(builder.bitcast(vector, _WORDS), minus), _FLOATS))
    return done


def _block(ascending: bool, turns: bool) -> Callable[..., Any]:
    """All stages of strides below 64, of 64 values, from values[at] to out[to].

    Ascending, the signs go before them and what is read is multiplied by `unit`; descending, the signs follow. `turns`:
    the stages of TURNED turn, by c and s of each.
    """

    @typed_intrinsic
    def transform(
        context: Any, values: Any, at: Any, unit: Any, first: Any, second: Any, c0: Any, s0: Any, c1: Any, s1: Any,
        out: Any, to: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, start, scale, word, other, *angles, target, goal = arguments
            turn = {
                stride: tuple(_splat(builder, each, _FLOATS) for each in angles[2 * k : 2 * k + 2])
                for k, stride in enumerate(TURNED)
            }
            vectors = []
            for k in range(_RADIX):
                place = builder.add(start, start.type(_LANES * k))
                vectors.append(builder.load(pointer_to(context, builder, values, source, place, _FLOATS), align=4))
            if ascending:
                factor = _splat(builder, scale, _FLOATS)
                vectors = _flipped(builder, [builder.fmul(each, factor) for each in vectors], [word, other])
            strides = [1, 2, 4, 8, 16, 32]
            for stride in strides if ascending else reversed(strides):
                if stride < _LANES:
                    vectors = _within(builder, vectors, stride)
                else:
                    angle = turn[stride] if turns and stride in TURNED else None
                    vectors = _between(builder, vectors, stride // _LANES, angle)
            if not ascending:
                vectors = _flipped(builder, vectors, [word, other])
            for k, vector in enumerate(vectors):
                place = builder.add(goal, goal.type(_LANES * k))
                builder.store(vector, pointer_to(context, builder, out, target, place, _FLOATS), align=4)
            return context.get_dummy_value()

        number, word = types.float32, types.uint32
        return types.none(
            values, types.intp, number, word, word, number, number, number, number, out, types.intp
        ), generate

    return transform


def _butterfly(radix: int, ascending: bool) -> Callable[..., Any]:
    """The stages between `radix` vectors of values that lie `apart`, in place, from values[at] on."""

    @typed_intrinsic
    def transform(context: Any, values: Any, at: Any, apart: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array, start, step = arguments
            places = [builder.add(start, builder.mul(step, step.type(k))) for k in range(radix)]
            pointers = [pointer_to(context, builder, values, array, place, _FLOATS) for place in places]
            vectors = [builder.load(pointer, align=4) for pointer in pointers]
            strides = [1 << k for k in range(radix.bit_length() - 1)]
            for stride in strides if ascending else reversed(strides):
                vectors = _between(builder, vectors, stride, None)
            for vector, pointer in zip(vectors, pointers, strict=True):
                builder.store(vector, pointer, align=4)
            return context.get_dummy_value()

        return types.none(values, types.intp, types.intp), generate

    return transform


forward_block, forward_turning_block = _block(True, False), _block(True, True)
back_block, back_turning_block = _block(False, False), _block(False, True)
_two_up, _four_up, _eight_up = (_butterfly(radix, True) for radix in (2, 4, 8))
_two_down, _four_down, _eight_down = (_butterfly(radix, False) for radix in (2, 4, 8))


@inlined
def blocks_up(values: np.ndarray, length: int) -> None:
    """The stages between blocks, the smallest stride first."""
    stride = BLOCK
    while stride < length:
        radix = min(_RADIX, length // stride)
        for base in range(0, length, stride * radix):
            for i in range(base, base + stride, _LANES):
                if radix == 8:
                    _eight_up(values, i, stride)
                elif radix == 4:
                    _four_up(values, i, stride)
                else:
                    _two_up(values, i, stride)
        stride *= radix


@inlined
def blocks_down(values: np.ndarray, length: int) -> None:
    """The stages between blocks, the largest stride first."""
    top = length
    while top > BLOCK:
        radix = min(_RADIX, top // BLOCK)
        stride = top // radix
        for base in range(0, length, top):
            for i in range(base, base + stride, _LANES):
                if radix == 8:
                    _eight_down(values, i, stride)
                elif radix == 4:
                    _four_down(values, i, stride)
                else:
                    _two_down(values, i, stride)
        top = stride
