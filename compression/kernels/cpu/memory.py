"""Plain memory access for kernels.

Indexing in numba counts negative indices from the end, which keeps LLVM from vectorizing, and a slice costs hundreds of
instructions to compile. These read and write at an offset that the caller answers for, and are made by numba's public
interface for extensions.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

STREAMED = 8  # values at a time

typed_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic


@typed_intrinsic
def load(context: Any, memory: Any, at: Any) -> Any:
    """memory[at], for at >= 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = pointer_to(context, builder, memory, arguments[0], arguments[1])
        return context.unpack_value(builder, memory.dtype, pointer)

    return memory.dtype(memory, types.intp), generate


@typed_intrinsic
def store(context: Any, memory: Any, at: Any, value: Any) -> Any:
    """memory[at] = value, for at >= 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = pointer_to(context, builder, memory, arguments[0], arguments[1])
        context.pack_value(builder, memory.dtype, arguments[2], pointer)
        return context.get_dummy_value()

    return types.none(memory, types.intp, memory.dtype), generate


def _as(number: Any, kind: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(load, store) of numbers that lie at a byte offset, aligned or not, little-endian."""

    @typed_intrinsic
    def load_bytes(context: Any, memory: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.load(pointer_to(context, builder, memory, arguments[0], arguments[1], kind), align=1)

        return number(memory, types.intp), generate

    @typed_intrinsic
    def store_bytes(context: Any, memory: Any, at: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = pointer_to(context, builder, memory, arguments[0], arguments[1], kind)
            builder.store(arguments[2], pointer, align=1)
            return context.get_dummy_value()

        return types.none(memory, types.intp, number), generate

    return load_bytes, store_bytes


@typed_intrinsic
def stream(context: Any, values: Any, at: Any, memory: Any, to: Any) -> Any:
    """memory[to + i] = values[at + i], float32, for i < STREAMED, past the caches; `unaligned(memory, to)` is 0.

    A plain store has memory read what it overwrites. Others see what was streamed after a `fence`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), STREAMED)
        source = pointer_to(context, builder, values, arguments[0], arguments[1], vector)
        target = pointer_to(context, builder, memory, arguments[2], arguments[3], vector)
        stored = builder.store(builder.load(source, align=4), target, align=4 * STREAMED)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.none(values, types.intp, memory, types.intp), generate


@typed_intrinsic
def unaligned(context: Any, memory: Any, at: Any) -> Any:
    """How many float32 values from memory[at] on lie before the next place that `stream` may begin to write to."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = ir.IntType(64)
        address = builder.ptrtoint(pointer_to(context, builder, memory, arguments[0], arguments[1]), whole)
        return builder.lshr(builder.and_(builder.neg(address), whole(4 * STREAMED - 1)), whole(2))

    return types.intp(memory, types.intp), generate


@typed_intrinsic
def fence(context: Any) -> Any:
    """Whatever was stored before is there for all threads before anything that is stored after."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), generate


def pointer_to(context: Any, builder: Any, memory: Any, array: Any, at: Any, kind: Any = None) -> Any:
    """LLVM's pointer to array[at], `memory` being the type of the array. With a `kind`, to what is read as one."""
    data = context.make_array(memory)(context, builder, array).data
    pointer = builder.gep(data, [at], inbounds=True)
    return pointer if kind is None else builder.bitcast(pointer, kind.as_pointer())


load_two, store_two = _as(types.uint16, ir.IntType(16))
load_word, store_word = _as(types.uint64, ir.IntType(64))
load_four, store_four = _as(types.uint32, ir.IntType(32))
load_float, store_float = _as(types.float32, ir.FloatType())
