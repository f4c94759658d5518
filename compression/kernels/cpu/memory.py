"""Plain memory access for kernels.

Indexing in numba counts negative indices from the end, which keeps LLVM from vectorizing, and a slice costs hundreds of
instructions to compile. These read and write at an offset that the caller answers for.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from compression.kernels.families import TREE

FIVES = 16  # bytes at a time
HALVED = TREE // 4  # values at a time
LOOKED_UP = 4  # codes at a time
NARROWED = 32  # codes at a time
STREAMED = 8  # values at a time

_BYTES, _FIVES = ir.VectorType(ir.IntType(8), FIVES), ir.VectorType(ir.IntType(16), FIVES)

_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic


@_intrinsic
def load(context: Any, memory: Any, at: Any) -> Any:
    """memory[at], for at >= 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, memory, arguments[0], arguments[1])
        return context.unpack_value(builder, memory.dtype, pointer)

    return memory.dtype(memory, types.intp), generate


@_intrinsic
def store(context: Any, memory: Any, at: Any, value: Any) -> Any:
    """memory[at] = value, for at >= 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, memory, arguments[0], arguments[1])
        context.pack_value(builder, memory.dtype, arguments[2], pointer)
        return context.get_dummy_value()

    return types.none(memory, types.intp, memory.dtype), generate


def _as(number: Any, kind: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(load, store) of numbers that lie at a byte offset, aligned or not, little-endian."""

    @_intrinsic
    def load_bytes(context: Any, memory: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _pointer(context, builder, memory, arguments[0], arguments[1])
            return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)

        return number(memory, types.intp), generate

    @_intrinsic
    def store_bytes(context: Any, memory: Any, at: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _pointer(context, builder, memory, arguments[0], arguments[1])
            builder.store(arguments[2], builder.bitcast(pointer, kind.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.none(memory, types.intp, number), generate

    return load_bytes, store_bytes


@_intrinsic
def counted(context: Any, first: Any, at: Any) -> Any:
    """first + at, modulo 2**32. Numba adds in 64 bits, which takes half the lanes of a vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.add(arguments[0], builder.trunc(arguments[1], ir.IntType(32)))

    return types.uint32(types.uint32, types.intp), generate


@_intrinsic
def narrow(context: Any, words: Any, at: Any, codes: Any, to: Any) -> Any:
    """codes[to + i] = the low byte of word i from words[at] on, for i < NARROWED.

    In a loop of its own LLVM does this for eight at a time, with as many shuffles as it takes for 32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide, small = ir.VectorType(ir.IntType(32), NARROWED), ir.VectorType(ir.IntType(8), NARROWED)
        source = _pointer(context, builder, words, arguments[0], arguments[1])
        target = _pointer(context, builder, codes, arguments[2], arguments[3])
        narrowed = builder.trunc(builder.load(builder.bitcast(source, wide.as_pointer()), align=1), small)
        builder.store(narrowed, builder.bitcast(target, small.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.none(words, types.intp, codes, types.intp), generate


@_intrinsic
def pack_fives(context: Any, codes: Any, at: Any, apart: Any, wire: Any, to: Any) -> Any:
    """wire[to + i] = the sum of codes[at + k apart + i] 3**k over k < 5, for i < FIVES. Codes are below 3.

    A loop would test every time whether what it reads and writes overlaps, which took longer than the rest.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, step = arguments[1], arguments[2]
        total = _FIVES([0] * FIVES)
        for k in range(5):
            place = builder.add(start, builder.mul(step, step.type(k)))
            pointer = builder.bitcast(_pointer(context, builder, codes, arguments[0], place), _BYTES.as_pointer())
            digit = builder.zext(builder.load(pointer, align=1), _FIVES)
            total = builder.add(total, builder.mul(digit, _FIVES([3**k] * FIVES)))
        pointer = builder.bitcast(_pointer(context, builder, wire, arguments[3], arguments[4]), _BYTES.as_pointer())
        builder.store(builder.trunc(total, _BYTES), pointer, align=1)
        return context.get_dummy_value()

    return types.none(codes, types.intp, types.intp, wire, types.intp), generate


@_intrinsic
def unpack_fives(context: Any, wire: Any, at: Any, codes: Any, to: Any, apart: Any) -> Any:
    """The inverse of `pack_fives`: codes[to + k apart + i] = digit k of wire[at + i], a byte below 243."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, step = arguments[3], arguments[4]
        pointer = builder.bitcast(_pointer(context, builder, wire, arguments[0], arguments[1]), _BYTES.as_pointer())
        left = builder.zext(builder.load(pointer, align=1), _FIVES)
        for k in range(5):
            third = builder.lshr(builder.mul(left, _FIVES([171] * FIVES)), _FIVES([9] * FIVES))  # exact below 256
            digit = builder.sub(left, builder.mul(third, _FIVES([3] * FIVES)))
            place = builder.add(start, builder.mul(step, step.type(k)))
            target = builder.bitcast(_pointer(context, builder, codes, arguments[2], place), _BYTES.as_pointer())
            builder.store(builder.trunc(digit, _BYTES), target, align=1)
            left = third
        return context.get_dummy_value()

    return types.none(wire, types.intp, codes, types.intp, types.intp), generate


@_intrinsic
def look_up(context: Any, table: Any, codes: Any, at: Any, memory: Any, to: Any) -> Any:
    """memory[to + i] = table[codes[at + i]], float32 and uint8, for i < LOOKED_UP.

    In a loop of its own every value takes a load for its code and a store, and those are what limits it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, vector = ir.IntType(8 * LOOKED_UP), ir.VectorType(ir.FloatType(), LOOKED_UP)
        pointer = _pointer(context, builder, codes, arguments[1], arguments[2])
        left = builder.load(builder.bitcast(pointer, word.as_pointer()), align=1)
        found = vector(ir.Undefined)
        for i in range(LOOKED_UP):
            code = builder.zext(builder.trunc(left, ir.IntType(8)), ir.IntType(64))
            level = builder.load(_pointer(context, builder, table, arguments[0], code))
            found = builder.insert_element(found, level, ir.IntType(32)(i))
            left = builder.lshr(left, word(8))
        target = _pointer(context, builder, memory, arguments[3], arguments[4])
        builder.store(found, builder.bitcast(target, vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(table, codes, types.intp, memory, types.intp), generate


@_intrinsic
def halved(context: Any, values: Any, at: Any) -> Any:
    """The sum of values[at + i], i < HALVED: the second half is added to the first until one value is left.

    All of it in registers; in loops, each too short for many lanes, it took a seventh of encoding with feedback.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, values, arguments[0], arguments[1])
        width = HALVED
        left = builder.load(builder.bitcast(pointer, ir.VectorType(ir.FloatType(), width).as_pointer()), align=4)
        while width > 1:
            width //= 2
            halves = [
                builder.shuffle_vector(left, left, ir.Constant(ir.VectorType(ir.IntType(32), width), [*lanes]))
                for lanes in (range(width), range(width, 2 * width))
            ]
            left = builder.fadd(*halves)
        return builder.extract_element(left, ir.IntType(32)(0))

    return types.float32(values, types.intp), generate


@_intrinsic
def prefetch(context: Any, memory: Any, at: Any) -> Any:
    """Have the cache line of memory[at] read, which need not exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, address = ir.IntType(32), ir.IntType(8).as_pointer()
        pointer = _pointer(context, builder, memory, arguments[0], arguments[1], inbounds=False)
        kind = ir.FunctionType(ir.VoidType(), [address, number, number, number])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, into_every_level, data = number(0), number(3), number(1)
        builder.call(hint, [builder.bitcast(pointer, address), to_read, into_every_level, data])
        return context.get_dummy_value()

    return types.none(memory, types.intp), generate


@_intrinsic
def stream(context: Any, values: Any, at: Any, memory: Any, to: Any) -> Any:
    """memory[to + i] = values[at + i], float32, for i < STREAMED, past the caches; `unaligned(memory, to)` is 0.

    A plain store has memory read what it overwrites. Others see what was streamed after a `fence`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), STREAMED).as_pointer()
        source = _pointer(context, builder, values, arguments[0], arguments[1])
        target = _pointer(context, builder, memory, arguments[2], arguments[3])
        moved = builder.load(builder.bitcast(source, vector), align=4)
        stored = builder.store(moved, builder.bitcast(target, vector), align=4 * STREAMED)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.none(values, types.intp, memory, types.intp), generate


@_intrinsic
def unaligned(context: Any, memory: Any, at: Any) -> Any:
    """How many float32 values from memory[at] on lie before the next place that `stream` may begin to write to."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = ir.IntType(64)
        address = builder.ptrtoint(_pointer(context, builder, memory, arguments[0], arguments[1]), whole)
        return builder.lshr(builder.and_(builder.neg(address), whole(4 * STREAMED - 1)), whole(2))

    return types.intp(memory, types.intp), generate


@_intrinsic
def fence(context: Any) -> Any:
    """Whatever was stored before is there for all threads before anything that is stored after."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), generate


def _pointer(context: Any, builder: Any, memory: Any, array: Any, at: Any, inbounds: bool = True) -> Any:
    data = context.make_array(memory)(context, builder, array).data
    return builder.gep(data, [at], inbounds=inbounds)


load_word, store_word = _as(types.uint64, ir.IntType(64))
load_four, store_four = _as(types.uint32, ir.IntType(32))
load_float, store_float = _as(types.float32, ir.FloatType())
