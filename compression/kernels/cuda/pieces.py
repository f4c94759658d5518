"""Tables that tell the kernels of a plan: made once per plan and device, kept there as long as the plan lives."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ...layers import DENSE
from ...plans import Plan, select
from ..reference import rotations

# Columns of a table, as in a plan. BUCKET: the piece's bucket, LENGTH: that one's values, FIRST: the index in it of the
# piece's first value.
POSITION, COUNT, BITS, WIRE_AT, FIRST, LENGTH, SLOT, ELEMENT, STATE_AT, BUCKET = map(tl.constexpr, range(10))
COLUMNS = tl.constexpr(10)

LONGEST = 16384  # values of a bucket that one program encodes
SHORTEST = 8  # values that a row of a program has room for
WARP = 512  # values that a warp works on, and a program where one row does not hold more
PIECE = 512  # values of a bucket that are decoded together, or sent as floats: a tile of ternary codes is five of them
_STATELESS = -(1 << 40)  # below zero by more than a bucket is long, and a multiple of four


@dataclass(frozen=True)
class Pieces:
    """P pieces of buckets, of at most `width` values, a power of two. `table`: int64 [P, 10], on the device.

    `aligned`: all positions and counts are multiples of four. Buckets that no program can encode are the plan `longer`.
    """

    table: Tensor
    width: int
    aligned: bool
    longer: Plan | None = None

    @property
    def count(self) -> int:
        return self.table.shape[0]

    @property
    def rows(self) -> int:
        """Pieces that a program works on."""
        return max(1, WARP // self.width)

    @property
    def programs(self) -> int:
        return -(-self.count // self.rows)

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return self.rows * self.width // WARP


def to_encode(plan: Plan, device: torch.device) -> Pieces:
    """Whole buckets, in pieces only where they are dense."""
    return _kept(plan, device, _to_encode)


def to_decode(plan: Plan, device: torch.device) -> Pieces:
    """Buckets in pieces."""
    return _kept(plan, device, _to_decode)


def to_rotate(plan: Plan, device: torch.device) -> tuple[Pieces, ...]:
    """Rows that are rotated, those of one length together, which is their `width`."""
    return _kept(plan, device, _to_rotate)


def of_floats(plan: Plan, device: torch.device) -> Pieces:
    """The other rows of such a plan, in pieces, all of them as if dense. Only those with a state have one from 0 up."""
    return _kept(plan, device, _of_floats)


Made = TypeVar("Made")
_made: dict[tuple[int, torch.device, Callable[..., Any]], Any] = {}  # by id: plans hold arrays, which have no hash


def _kept(plan: Plan, device: torch.device, make: Callable[[Plan, torch.device], Made]) -> Made:
    key = (id(plan), device, make)
    if key not in _made:
        _made[key] = make(plan, device)
        weakref.finalize(plan, _made.pop, key, None)
    made: Made = _made[key]
    return made


def _to_encode(plan: Plan, device: torch.device) -> Pieces:
    kept = plan.dense | (plan.count <= LONGEST)
    uncut = kept & ~plan.dense
    pieces = _in_pieces(plan, _width(np.where(uncut, plan.count, np.minimum(plan.count, PIECE))), kept, device)
    return pieces if kept.all() else replace(pieces, longer=select(plan, ~kept))


def _to_decode(plan: Plan, device: torch.device) -> Pieces:
    return _in_pieces(plan, _width(np.minimum(plan.count, PIECE)), np.ones(len(plan.count), np.bool_), device)


def _to_rotate(plan: Plan, device: torch.device) -> tuple[Pieces, ...]:
    counts, which = np.unique(plan.count, return_inverse=True)
    lengths = np.array([rotations.padded_length(int(count)) for count in counts], np.int64)[which]
    lengths[plan.dense | _exact(plan)] = 0
    return tuple(_in_pieces(plan, int(length), lengths == length, device) for length in np.unique(lengths[lengths > 0]))


def _of_floats(plan: Plan, device: torch.device) -> Pieces:
    exact = _exact(plan)
    floats = replace(plan, bits=np.where(exact, DENSE, plan.bits), state_at=np.where(exact, plan.state_at, _STATELESS))
    chosen = plan.dense | exact
    width = _width(np.minimum(plan.count[chosen], PIECE))
    return _in_pieces(floats, width, chosen, device)


def _exact(plan: Plan) -> NDArray[np.bool_]:
    """The pieces that are sent as float32, as `codecs.eden.is_exact`."""
    fit: NDArray[np.bool_] = 4 * plan.count <= 4 + rotations.SHORTEST * plan.bits // 8
    return ~plan.dense & (plan.count < rotations.SHORTEST) & fit


def _in_pieces(plan: Plan, width: int, kept: NDArray[np.bool_], device: torch.device) -> Pieces:
    """The buckets that are `kept`, in pieces of `width`."""
    cuts = -(-plan.count // width) * kept
    bucket = np.repeat(np.arange(len(cuts)), cuts)
    first = (np.arange(len(bucket)) - np.repeat(np.cumsum(cuts) - cuts, cuts)) * width
    rows = (
        plan.position[bucket] + first,
        np.minimum(plan.count[bucket] - first, width),
        plan.bits[bucket],
        plan.wire_at[bucket],
        first,
        plan.count[bucket],
        plan.slot[bucket],
        plan.element[bucket] + first,
        plan.state_at[bucket] + first,
        bucket,
    )
    table = np.stack(rows, axis=1)
    aligned = not (table[:, [POSITION.value, COUNT.value, STATE_AT.value]] % 4).any()
    return Pieces(torch.from_numpy(table).to(device), width, aligned)


def _width(counts: NDArray[np.int64]) -> int:
    """The power of two that holds the longest of some counts."""
    return 1 << (int(counts.max(initial=SHORTEST)) - 1).bit_length()
