"""Values that are not encoded, in records and out of them, and values that go past the caches."""

import numpy as np

from ...layers import BFLOAT16
from ..reference.arithmetic import BFLOAT16_NAN, INFINITY
from .compiling import inlined
from .memory import STREAMED, load, load_float, load_two, store, store_float, store_two, stream, unaligned


@inlined
def write_past_caches(values: np.ndarray, count: int, memory: np.ndarray, to: int) -> None:
    """Write the first of some values to memory that nobody reads soon."""
    first = min(count, unaligned(memory, to))
    last = count - (count - first) % STREAMED
    for i in range(first):
        store(memory, to + i, load(values, i))
    for i in range(first, last, STREAMED):
        stream(values, i, memory, to + i)
    for i in range(last, count):
        store(memory, to + i, load(values, i))


@inlined
def put_floats(values: np.ndarray, at: int, count: int, bits: int, wire: np.ndarray, record: int) -> None:
    """Write a record that is not encoded."""
    if bits == BFLOAT16:
        for i in range(count):
            store_two(wire, record + 2 * i, _rounded(load(values, at + i)))
    else:
        for i in range(count):
            store_float(wire, record + 4 * i, load(values, at + i))


@inlined
def get_floats(wire: np.ndarray, at: int, count: int, bits: int, out: np.ndarray, to: int) -> None:
    """Read values of a record that is not encoded, from byte `at` on."""
    if bits == BFLOAT16:
        for i in range(count):
            store(out, to + i, _widened(load_two(wire, at + 2 * i)))
    else:
        for i in range(count):
            store(out, to + i, load_float(wire, at + 4 * i))


@inlined
def _rounded(value: np.float32) -> np.uint16:
    """The bits of the nearest bfloat16, as `arithmetic.to_bfloat16`."""
    bits = np.float32(value).view(np.uint32)
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(INFINITY):
        return np.uint16(BFLOAT16_NAN)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@inlined
def _widened(half: np.uint16) -> np.float32:
    """The number that the bits of a bfloat16 stand for."""
    return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)
