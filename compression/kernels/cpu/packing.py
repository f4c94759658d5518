"""Codes of a few bits, to bytes and back: up to a tile of codes at a time, one per byte while they are worked on."""

import numpy as np

from .compiling import compiled_once, inlined
from .memory import load, load_four, load_word, store, store_four, store_word
from .vectors import FIVES, NARROWED, narrow, pack_fives, unpack_fives


@compiled_once
def pack(codes: np.ndarray, count: int, bits: int, words: np.ndarray, wire: np.ndarray, at: int) -> None:
    """Codes as one little-endian bit stream of ceil(count bits / 8) bytes; may overwrite up to 7 codes behind them.

    `words` is scratch, uint32, for as many words as there may be codes.
    """
    groups, nbytes = (count + 7) // 8, (count * bits + 7) // 8
    for i in range(count, 8 * groups):
        store(codes, i, 0)
    if bits <= 2:
        _pack_few(codes, groups, bits, words, nbytes, wire, at)
        return
    if bits == 8:
        for i in range(nbytes):
            store(wire, at + i, load(codes, i))
        return
    if bits == 4:
        for i in range(nbytes):
            store(wire, at + i, load(codes, 2 * i) | (load(codes, 2 * i + 1) << np.uint8(4)))
        return
    one, two, four = np.uint64(8 - bits), np.uint64(16 - 2 * bits), np.uint64(32 - 4 * bits)
    whole = _whole_groups(nbytes, bits)
    for g in range(whole):
        store_word(wire, at + g * bits, _squeeze(load_word(codes, 8 * g), one, two, four))
    for g in range(whole, groups):
        x = _squeeze(load_word(codes, 8 * g), one, two, four)
        for k in range(g * bits, nbytes if nbytes < (g + 1) * bits else (g + 1) * bits):
            store(wire, at + k, x & np.uint64(0xFF))
            x >>= np.uint64(8)


@inlined
def _pack_few(
    codes: np.ndarray, groups: int, bits: int, words: np.ndarray, nbytes: int, wire: np.ndarray, at: int
) -> None:
    """Groups of eight codes of one or two bits: a byte's codes go into the lowest byte of a word, side by side."""
    if bits == 2:
        for i in range(2 * groups):
            quad = load_four(codes, 4 * i)
            store(words, i, (quad | (quad >> np.uint32(6))) | ((quad >> np.uint32(12)) | (quad >> np.uint32(18))))
    else:
        for i in range(groups):
            octet = load_word(codes, 8 * i)
            octet |= octet >> np.uint64(7)
            octet |= octet >> np.uint64(14)
            store(words, i, octet | (octet >> np.uint64(28)))
    whole = nbytes - nbytes % NARROWED
    for i in range(0, whole, NARROWED):
        narrow(words, i, wire, at + i)
    for i in range(whole, nbytes):
        store(wire, at + i, load(words, i))


@compiled_once
def unpack(wire: np.ndarray, at: int, count: int, bits: int, codes: np.ndarray) -> None:
    """The inverse of `pack`; may write up to 7 codes more than `count`."""
    groups, nbytes = (count + 7) // 8, (count * bits + 7) // 8
    if bits == 8:
        for i in range(nbytes):
            store(codes, i, load(wire, at + i))
        return
    if bits == 4:
        for i in range(nbytes):
            both = load(wire, at + i)
            store(codes, 2 * i, both & np.uint8(15))
            store(codes, 2 * i + 1, both >> np.uint8(4))
        return
    if bits == 2:
        for i in range(nbytes):
            quad = np.uint32(load(wire, at + i))
            quad |= (quad << np.uint32(6)) | (quad << np.uint32(12)) | (quad << np.uint32(18))
            store_four(codes, 4 * i, quad & np.uint32(0x03030303))
        return
    if bits == 1:
        for i in range(nbytes):
            octet = np.uint64(load(wire, at + i))
            octet = (octet | (octet << np.uint64(28))) & np.uint64(0x0000000F0000000F)
            octet = (octet | (octet << np.uint64(14))) & np.uint64(0x0003000300030003)
            store_word(codes, 8 * i, (octet | (octet << np.uint64(7))) & np.uint64(0x0101010101010101))
        return
    whole = _whole_groups(nbytes, bits)
    for g in range(whole):
        store_word(codes, 8 * g, load_word(wire, at + g * bits))
    for g in range(whole, groups):
        x = np.uint64(0)
        for k in range(g * bits, nbytes if nbytes < (g + 1) * bits else (g + 1) * bits):
            x |= np.uint64(load(wire, at + k)) << np.uint64(8 * (k - g * bits))
        store_word(codes, 8 * g, x)
    one, two, four = np.uint64(8 - bits), np.uint64(16 - 2 * bits), np.uint64(32 - 4 * bits)
    mask = np.uint64((1 << bits) - 1)
    mask |= mask << np.uint64(bits)
    low = mask | (mask << np.uint64(2 * bits))
    high = low << np.uint64(4 * bits)
    pair = mask | (mask << np.uint64(32))
    pairs = pair << np.uint64(2 * bits)
    single = np.uint64((1 << bits) - 1) * np.uint64(0x0001000100010001)
    singles = single << np.uint64(bits)
    for g in range(groups):
        x = load_word(codes, 8 * g)
        x = (x & low) | ((x & high) << four)
        x = (x & pair) | ((x & pairs) << two)
        store_word(codes, 8 * g, (x & single) | ((x & singles) << one))


@inlined
def _whole_groups(nbytes: int, bits: int) -> int:
    """Groups of eight codes that may be moved as eight bytes without touching what lies behind the stream."""
    return (nbytes - 8) // bits + 1 if nbytes >= 8 else 0


@inlined
def _squeeze(x: np.uint64, one: np.uint64, two: np.uint64, four: np.uint64) -> np.uint64:
    """Eight codes, one per byte, moved together by pairs, fours and eights."""
    x = (x & np.uint64(0x00FF00FF00FF00FF)) | ((x & np.uint64(0xFF00FF00FF00FF00)) >> one)
    x = (x & np.uint64(0x0000FFFF0000FFFF)) | ((x & np.uint64(0xFFFF0000FFFF0000)) >> two)
    return (x & np.uint64(0x00000000FFFFFFFF)) | ((x & np.uint64(0xFFFFFFFF00000000)) >> four)


@inlined
def pack_ternary(codes: np.ndarray, count: int, wire: np.ndarray, at: int) -> None:
    """Codes below 3, five to a byte, as ceil(count / 5) bytes; may overwrite up to 4 codes behind them.

    Byte i holds code i of every fifth of the tile, the first fifth in the lowest digit.
    """
    n = (count + 4) // 5
    for i in range(count, 5 * n):
        store(codes, i, 0)
    if n >= FIVES:
        for i in range(0, n, FIVES):
            first = min(i, n - FIVES)  # the last ones overlap those before
            pack_fives(codes, first, n, wire, at + first)
    else:
        for i in range(n):
            low = load(codes, i) + 3 * load(codes, n + i) + 9 * load(codes, 2 * n + i)
            store(wire, at + i, low + 27 * load(codes, 3 * n + i) + 81 * load(codes, 4 * n + i))


@inlined
def unpack_ternary(wire: np.ndarray, at: int, count: int, codes: np.ndarray) -> None:
    """The inverse of `pack_ternary`; may write up to 4 codes more than `count`."""
    n = (count + 4) // 5
    if n >= FIVES:
        for i in range(0, n, FIVES):
            first = min(i, n - FIVES)  # the last ones overlap those before
            unpack_fives(wire, at + first, codes, first, n)
    else:
        for i in range(n):
            left = np.uint32(load(wire, at + i))
            for k in range(5):
                store(codes, k * n + i, left % np.uint32(3))
                left //= np.uint32(3)
