"""The work of every kernel on a block of pieces: M rows of the table (`pieces.py`), up to 4 Q values of each.

Shapes: [Q, M, 4]; [1, M, 1] is one number per row.
"""

import triton
import triton.language as tl

from ... import layers
from ..reference.arithmetic import FRACTION_BITS
from .pieces import COLUMNS, COUNT, ELEMENT, FIRST, SLOT
from .records import store_floats

_BFLOAT16 = tl.constexpr(layers.BFLOAT16)
_FRACTION = tl.constexpr(FRACTION_BITS)
_UNUSED = tl.constexpr(32 - FRACTION_BITS)


@triton.jit
def rows(M: tl.constexpr) -> tl.tensor:
    """The rows of the table that a program works on."""
    return tl.program_id(0) * M + tl.arange(0, M)[None, :, None]


@triton.jit
def quads(Q: tl.constexpr) -> tl.tensor:
    """Offsets of the quads of a row."""
    return 4 * tl.arange(0, Q)[:, None, None]


@triton.jit
def column(
    table: tl.tensor, pieces: tl.tensor, row: tl.tensor, index: tl.constexpr, ALIGNED: tl.constexpr = False
) -> tl.tensor:
    """One number of each piece, or of one; 0 beyond the last. `ALIGNED` says that it is a multiple of four."""
    at = table + row.to(tl.int64) * COLUMNS + index
    number = tl.load(at, mask=row < pieces, other=0)
    if ALIGNED:
        number = tl.multiple_of(number, [4, 4, 4])
    return number


@triton.jit
def mask_of(quad: tl.tensor, count: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """The mask of values that there are: of whole quads, [Q, M, 1], where all is aligned, else [Q, M, 4]."""
    return quad < count if ALIGNED else quad + tl.arange(0, 4)[None, None, :] < count


@triton.jit
def copy_dense(
    table: tl.tensor,
    pieces: tl.tensor,
    row: tl.tensor,
    size: tl.tensor,
    values: tl.tensor,
    record: tl.tensor,
    at: tl.tensor,
) -> None:
    """The bytes of the rows that are not encoded: `size` a value, 0 in other rows.

    Their values begin at the pointers `values`, one for each `at`.
    """
    if tl.max(size) > 0:
        copied = (size > 0) & (at < column(table, pieces, row, COUNT).to(tl.int32))
        words = tl.load(values, mask=copied, other=0.0).to(tl.int32, bitcast=True)
        store_floats(record + size * (column(table, pieces, row, FIRST) + at), words, size, copied)


@triton.jit
def float_size(bits: tl.tensor) -> tl.tensor:
    """Bytes a value of rows that are not encoded, 0 of others."""
    return tl.where(bits >= _BFLOAT16, bits >> 3, 0)


@triton.jit
def streams(table: tl.tensor, pieces: tl.tensor, row: tl.tensor, keys: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Arguments of `round_at_random`: `hashed` for the first value of each row, and `mixed`; uint32."""
    slot = column(table, pieces, row, SLOT)
    start = column(table, pieces, row, ELEMENT).to(tl.uint32) + tl.load(keys + 2 * slot).to(tl.uint32)
    return start, tl.load(keys + 2 * slot + 1).to(tl.uint32)


@triton.jit
def round_at_random(scaled_positions: tl.tensor, hashed: tl.tensor, mixed: tl.tensor) -> tl.tensor:
    """Round as the reference does, positions in units of 2^-FRACTION_BITS; the others as in `random_bits`."""
    fixed = scaled_positions.to(tl.int32).to(tl.uint32)
    return ((fixed + (random_bits(hashed, mixed) >> _UNUSED)) >> _FRACTION).to(tl.int32)


@triton.jit
def random_bits(hashed: tl.tensor, mixed: tl.tensor) -> tl.tensor:
    """The bits of `randomness.random_bits`, of element + low and of high ^ (high >> 15), which is `mixed`; all uint32.

    Made here, the compiler would take it apart again, for one more operation a value.
    """
    hashed ^= hashed >> 15
    hashed *= 0x7FEB352D
    hashed ^= (hashed >> 15) ^ mixed
    hashed *= 0x735A2D97
    return hashed ^ (hashed >> 15)
