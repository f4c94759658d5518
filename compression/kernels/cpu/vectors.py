"""Vectors that LLVM does not find by itself, or not as good ones: so many values, codes or bytes at a time."""

from typing import Any

from llvmlite import ir
from numba.core import types

from ..reference.arithmetic import TREE
from .memory import pointer_to, typed_intrinsic

FIVES = 16  # bytes at a time
HALVED = TREE // 4  # values at a time: what two halvings leave of a block
LOOKED_UP = 4  # codes at a time
NARROWED = 32  # codes at a time

_BYTES, _FIVES = ir.VectorType(ir.IntType(8), FIVES), ir.VectorType(ir.IntType(16), FIVES)


@typed_intrinsic
def narrow(context: Any, words: Any, at: Any, codes: Any, to: Any) -> Any:
    """codes[to + i] = the low byte of word i from words[at] on, for i < NARROWED.

    In a loop of its own LLVM does this for eight at a time, with as many shuffles as it takes for 32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide, small = ir.VectorType(ir.IntType(32), NARROWED), ir.VectorType(ir.IntType(8), NARROWED)
        source = pointer_to(context, builder, words, arguments[0], arguments[1], wide)
        target = pointer_to(context, builder, codes, arguments[2], arguments[3], small)
        builder.store(builder.trunc(builder.load(source, align=1), small), target, align=1)
        return context.get_dummy_value()

    return types.none(words, types.intp, codes, types.intp), generate


@typed_intrinsic
def pack_fives(context: Any, codes: Any, at: Any, apart: Any, wire: Any, to: Any) -> Any:
    """wire[to + i] = the sum of codes[at + k apart + i] 3**k over k < 5, for i < FIVES. Codes are below 3.

    A loop would test every time whether what it reads and writes overlaps, which took longer than the rest.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, step = arguments[1], arguments[2]
        total = _FIVES([0] * FIVES)
        for k in range(5):
            place = builder.add(start, builder.mul(step, step.type(k)))
            source = pointer_to(context, builder, codes, arguments[0], place, _BYTES)
            digit = builder.zext(builder.load(source, align=1), _FIVES)
            total = builder.add(total, builder.mul(digit, _FIVES([3**k] * FIVES)))
        target = pointer_to(context, builder, wire, arguments[3], arguments[4], _BYTES)
        builder.store(builder.trunc(total, _BYTES), target, align=1)
        return context.get_dummy_value()

    return types.none(codes, types.intp, types.intp, wire, types.intp), generate


@typed_intrinsic
def unpack_fives(context: Any, wire: Any, at: Any, codes: Any, to: Any, apart: Any) -> Any:
    """The inverse of `pack_fives`: codes[to + k apart + i] = digit k of wire[at + i], a byte below 243."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, step = arguments[3], arguments[4]
        source = pointer_to(context, builder, wire, arguments[0], arguments[1], _BYTES)
        left = builder.zext(builder.load(source, align=1), _FIVES)
        for k in range(5):
            third = builder.lshr(builder.mul(left, _FIVES([171] * FIVES)), _FIVES([9] * FIVES))  # exact below 256
            digit = builder.sub(left, builder.mul(third, _FIVES([3] * FIVES)))
            place = builder.add(start, builder.mul(step, step.type(k)))
            target = pointer_to(context, builder, codes, arguments[2], place, _BYTES)
            builder.store(builder.trunc(digit, _BYTES), target, align=1)
            left = third
        return context.get_dummy_value()

    return types.none(wire, types.intp, codes, types.intp, types.intp), generate


@typed_intrinsic
def look_up(context: Any, table: Any, codes: Any, at: Any, memory: Any, to: Any) -> Any:
    """memory[to + i] = table[codes[at + i]], float32 and uint8, for i < LOOKED_UP.

    In a loop of its own every value takes a load for its code and a store, and those are what limits it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, vector = ir.IntType(8 * LOOKED_UP), ir.VectorType(ir.FloatType(), LOOKED_UP)
        left = builder.load(pointer_to(context, builder, codes, arguments[1], arguments[2], word), align=1)
        found = vector(ir.Undefined)
        for i in range(LOOKED_UP):
            code = builder.zext(builder.trunc(left, ir.IntType(8)), ir.IntType(64))
            level = builder.load(pointer_to(context, builder, table, arguments[0], code))
            found = builder.insert_element(found, level, ir.IntType(32)(i))
            left = builder.lshr(left, word(8))
        builder.store(found, pointer_to(context, builder, memory, arguments[3], arguments[4], vector), align=4)
        return context.get_dummy_value()

    return types.none(table, codes, types.intp, memory, types.intp), generate


@typed_intrinsic
def halved(context: Any, values: Any, at: Any) -> Any:
    """The sum of values[at + i], i < HALVED: the second half is added to the first until one value is left.

    All of it in registers; in loops, each too short for many lanes, it took a seventh of encoding with feedback.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        width, vector = HALVED, ir.VectorType(ir.FloatType(), HALVED)
        left = builder.load(pointer_to(context, builder, values, arguments[0], arguments[1], vector), align=4)
        while width > 1:
            width //= 2
            halves = [
                builder.shuffle_vector(left, left, ir.Constant(ir.VectorType(ir.IntType(32), width), [*lanes]))
                for lanes in (range(width), range(width, 2 * width))
            ]
            left = builder.fadd(*halves)
        return builder.extract_element(left, ir.IntType(32)(0))

    return types.float32(values, types.intp), generate
