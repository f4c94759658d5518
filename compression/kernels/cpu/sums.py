"""Sums in the one order that all kernels share: that of `arithmetic.tree_sum`."""

import numpy as np

from ..reference.arithmetic import TREE
from .compiling import inlined
from .memory import load, store
from .vectors import HALVED, halved

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
START = np.int64(0)  # a numpy integer: numba compiles a function once more for every plain number it is called with


@inlined
def blocks_of(count: int) -> int:
    return (count + TREE - 1) // TREE


@inlined
def _halved_twice(a: np.float32, b: np.float32, c: np.float32, d: np.float32) -> np.float32:
    """Two steps of the tree: the sum of four terms, one from each quarter of a block."""
    return (a + c) + (b + d)


@inlined
def _fold(terms: np.ndarray, at: int, count: int) -> np.float32:
    """Sum of `count` terms from `at` on, at most TREE. Overwrites them, and pads them: zeros change no sum."""
    for i in range(at + count, at + (TREE if count > HALVED else HALVED)):
        store(terms, i, 0)
    if count > HALVED:
        for i in range(at, at + HALVED):
            first, second = load(terms, i), load(terms, i + HALVED)
            store(terms, i, _halved_twice(first, second, load(terms, i + 2 * HALVED), load(terms, i + 3 * HALVED)))
    return halved(terms, at)


@inlined
def total(sums: np.ndarray, at: int, count: int) -> np.float32:
    """Sum of the sums of `count` blocks, in blocks again until one is left; overwrites them, padding included.

    Never -0.0.
    """
    while count > 1:
        blocks = blocks_of(count)
        for block in range(blocks):
            first = block * TREE
            store(sums, at + block, _fold(sums, at + first, min(TREE, count - first)))
        count = blocks
    return load(sums, at) + _ZERO


@inlined
def add_products(
    a: np.ndarray,
    a_at: int,
    unit_a: np.float32,
    b: np.ndarray,
    unit_b: np.float32,
    count: int,
    terms: np.ndarray,
    sums: np.ndarray,
    block: int,
) -> None:
    """The sums of a b and of b b over each block of 512 of `count` values, the factors in their units. `b` begins at 0.

    Those of a b go to the first half of `sums` from `block` on, those of b b to the second. `terms`
    is scratch for two blocks.
    """
    half = len(sums) // 2
    for first in range(0, count, TREE):
        length = min(TREE, count - first)
        if length == TREE:  # the first two halvings, before anything is stored
            length = HALVED
            for i in range(HALVED):
                b0, a0 = load(b, first + i) * unit_b, load(a, a_at + first + i) * unit_a
                b1, a1 = load(b, first + HALVED + i) * unit_b, load(a, a_at + first + HALVED + i) * unit_a
                b2, a2 = load(b, first + 2 * HALVED + i) * unit_b, load(a, a_at + first + 2 * HALVED + i) * unit_a
                b3, a3 = load(b, first + 3 * HALVED + i) * unit_b, load(a, a_at + first + 3 * HALVED + i) * unit_a
                store(terms, i, _halved_twice(a0 * b0, a1 * b1, a2 * b2, a3 * b3))
                store(terms, TREE + i, _halved_twice(b0 * b0, b1 * b1, b2 * b2, b3 * b3))
        else:
            for i in range(length):
                factor = load(b, first + i) * unit_b
                store(terms, i, (load(a, a_at + first + i) * unit_a) * factor)
                store(terms, TREE + i, factor * factor)
        for part in range(2):
            store(sums, part * half + block, _fold(terms, part * TREE, length))
        block += 1


@inlined
def add_sides(
    values: np.ndarray, at: int, count: int, unit: np.float32, terms: np.ndarray, sums: np.ndarray
) -> np.int32:
    """The sums of v, values in their unit, over all blocks: of those not below zero, and of those below.

    They go to the halves of `sums`; those of the other side count as v x 0, sign included. Returns how many are below.
    """
    half, negatives = len(sums) // 2, np.int32(0)
    for first in range(0, count, TREE):
        start, length = at + first, min(TREE, count - first)
        if length == TREE:  # the first two halvings, before anything is stored
            length = HALVED
            for i in range(HALVED):
                v0, v1 = load(values, start + i), load(values, start + HALVED + i)
                v2, v3 = load(values, start + 2 * HALVED + i), load(values, start + 3 * HALVED + i)
                b0, b1, b2, b3 = _below(v0), _below(v1), _below(v2), _below(v3)
                negatives += np.int32((b0 + b1) + (b2 + b3))
                v0, v1, v2, v3 = v0 * unit, v1 * unit, v2 * unit, v3 * unit
                store(terms, TREE + i, _halved_twice(v0 * b0, v1 * b1, v2 * b2, v3 * b3))
                b0, b1, b2, b3 = _ONE - b0, _ONE - b1, _ONE - b2, _ONE - b3
                store(terms, i, _halved_twice(v0 * b0, v1 * b1, v2 * b2, v3 * b3))
        else:
            for i in range(length):
                value = load(values, start + i)
                below = _below(value)
                negatives += np.int32(below)
                store(terms, i, (value * unit) * (_ONE - below))
                store(terms, TREE + i, (value * unit) * below)
        for part in range(2):
            store(sums, part * half + first // TREE, _fold(terms, part * TREE, length))
    return negatives


@inlined
def _below(value: np.float32) -> np.float32:
    """1 if the value is below zero, else 0."""
    return _ONE if value < 0 else _ZERO


@inlined
def add_squares(
    values: np.ndarray, at: int, count: int, unit: np.float32, terms: np.ndarray, sums: np.ndarray
) -> None:
    """The sums of v v, values in their unit, over all blocks."""
    for first in range(0, count, TREE):
        start, length = at + first, min(TREE, count - first)
        if length == TREE:
            length = HALVED
            for i in range(HALVED):
                v0, v1 = load(values, start + i) * unit, load(values, start + HALVED + i) * unit
                v2, v3 = load(values, start + 2 * HALVED + i) * unit, load(values, start + 3 * HALVED + i) * unit
                store(terms, i, _halved_twice(v0 * v0, v1 * v1, v2 * v2, v3 * v3))
        else:
            for i in range(length):
                value = load(values, start + i) * unit
                store(terms, i, value * value)
        store(sums, first // TREE, _fold(terms, START, length))
