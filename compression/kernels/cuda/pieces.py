"""Tables that tell the kernels of a plan: made once per plan and device, kept there as long as the plan lives."""

import weakref
from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ...plans import Plan, select

# Columns of a table, as in a plan. BUCKET: the piece's bucket, LENGTH: that one's values, FIRST: the index in it of the
# piece's first value.
POSITION, COUNT, BITS, WIRE_AT, FIRST, LENGTH, SLOT, ELEMENT, STATE_AT, BUCKET = map(tl.constexpr, range(10))
COLUMNS = tl.constexpr(10)

LONGEST = 16384  # values of a bucket that one program encodes
SHORTEST = 8  # values that a row of a program has room for
WARP = 512  # values that a warp works on, and a program where one row does not hold more
PIECE = 512  # values of a bucket that are decoded together, or sent as floats: a tile of ternary codes is five of them


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
    return _kept(plan, device, True)


def to_decode(plan: Plan, device: torch.device) -> Pieces:
    """Buckets in pieces."""
    return _kept(plan, device, False)


_made: dict[tuple[int, torch.device, bool], Pieces] = {}  # by id: plans hold arrays, which have no hash


def _kept(plan: Plan, device: torch.device, whole: bool) -> Pieces:
    key = (id(plan), device, whole)
    if key not in _made:
        _made[key] = _make(plan, device, whole)
        weakref.finalize(plan, _made.pop, key, None)
    return _made[key]


def _make(plan: Plan, device: torch.device, whole: bool) -> Pieces:
    kept = plan.dense | (plan.count <= LONGEST) | (not whole)
    uncut = kept & ~plan.dense & whole
    width = _power_of_two(int(np.where(uncut, plan.count, np.minimum(plan.count, PIECE)).max(initial=SHORTEST)))
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
    return Pieces(torch.from_numpy(table).to(device), width, aligned, None if kept.all() else select(plan, ~kept))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
