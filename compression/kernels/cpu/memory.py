"""Plain memory access for kernels.

Indexing in numba counts negative indices from the end, which keeps LLVM from vectorizing, and a slice costs hundreds of
instructions to compile. These read and write at an offset that the caller answers for.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic


@_intrinsic
def load(context: Any, memory: Any, at: Any) -> Any:
    """memory[at], for at >= 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments)
        return context.unpack_value(builder, memory.dtype, pointer)

    return memory.dtype(memory, types.intp), generate


@_intrinsic
def store(context: Any, memory: Any, at: Any, value: Any) -> Any:
    """memory[at] = value, for at >= 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments)
        context.pack_value(builder, memory.dtype, arguments[2], pointer)
        return context.get_dummy_value()

    return types.none(memory, types.intp, memory.dtype), generate


def _as(number: Any, kind: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(load, store) of numbers that lie at a byte offset, aligned or not, little-endian."""

    @_intrinsic
    def load_bytes(context: Any, memory: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _pointer(context, builder, signature, arguments)
            return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)

        return number(memory, types.intp), generate

    @_intrinsic
    def store_bytes(context: Any, memory: Any, at: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _pointer(context, builder, signature, arguments)
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


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]], inbounds=True)


load_word, store_word = _as(types.uint64, ir.IntType(64))
load_float, store_float = _as(types.float32, ir.FloatType())
