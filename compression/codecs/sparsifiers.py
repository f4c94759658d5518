"""Sparsifiers: a few values of a layer as they are, and nothing of the others.

Top-k sends values and indices, see `compression/sparse_plans.py` for the record. Random-k sends values only, because
every rank draws the same positions.

Shapes: R messages, N values per message, B = wire_bytes(N).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from .. import kernels, randomness, sparse_plans
from ..layers import Ints
from ..sparse_plans import SparsePlan
from ..streams import on_device
from .base import prepared


def part_of(fraction: float, count: int) -> int:
    """ceil(fraction count) of the number as it is written: 7 of 100 at 0.07, which times 100 is above 7 in floats."""
    return math.ceil(Fraction(str(float(fraction))) * count)


@dataclass(frozen=True)
class TopK:
    """The k = ceil(ratio N) largest values by magnitude, exactly; the others decode to zero.

    Of equal magnitudes the lower index goes first; a NaN is larger than everything, so that it reaches every rank.
    A contraction: |v - decoded|^2 <= (1 - k / N) |v|^2 (Stich et al. 2018, arXiv:1809.07599, lemma A.1). Biased, so
    that training needs error feedback, or what stands in for it.
    """

    ratio: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"TopK keeps a fraction of the values above 0 and at most 1, got ratio={self.ratio}")

    def kept(self, count: int) -> int:
        """k of `count` values."""
        return part_of(self.ratio, count)

    # Messages of many layers in one call: see `kernels.SparseKernels` for shapes

    def plan(self, counts: Sequence[int]) -> SparsePlan:
        """The message of layers of `counts` values, k chosen in each."""
        return sparse_plans.plan(counts, [self.kept(count) for count in counts])

    def select(self, plan: SparsePlan, scores: Tensor, at: Ints) -> Tensor:
        """Indices of the k largest magnitudes of every layer, ascending, each within its layer: int64 [sum of k]."""
        return kernels.sparse_for_device(scores.device).select(plan, scores, at)

    def encode_plan(self, plan: SparsePlan, values: Tensor, at: Ints, indices: Tensor, wire: Tensor) -> None:
        """Write the records of all layers, of the values at the indices that `select` returned."""
        kernels.sparse_for_device(values.device).encode(plan, values, at, indices, wire)

    def decode_plan(self, plan: SparsePlan, wire: Tensor, out: Tensor, at: Ints, factor: float = 1.0) -> None:
        """Add factor x value to `out` where the records of all layers say."""
        kernels.sparse_for_device(out.device).decode(plan, wire, out, at, factor)

    # Messages of one layer

    def wire_bytes(self, count: int) -> int:
        """Exact length of a message of `count` values, known without seeing them."""
        return sparse_plans.record_bytes(count, self.kept(count)) if count else 0

    def encode(self, values_RN: Tensor, seed: int = 0, out: Tensor | None = None) -> Tensor:
        """float32 [R, N] -> uint8 [R, B], into `out` where it is given, contiguous and of that shape.

        Nothing is drawn at random: `seed` is there because all codecs take one.
        """
        values_RN = values_RN.to(torch.float32).contiguous()
        rows, count = values_RN.shape
        plan, at = self._rows(rows, count)
        wire = prepared(out, (rows, self.wire_bytes(count)), torch.uint8, values_RN.device)
        values = values_RN.view(-1)
        self.encode_plan(plan, values, at, self.select(plan, values, at), wire.view(-1))
        return wire

    def decode(self, wire_RB: Tensor, count: int, out: Tensor | None = None) -> Tensor:
        """uint8 [R, B] -> float32 [R, count], into `out` where it is given, contiguous and of that shape.

        Raises ValueError for a message of another length, or a damaged one.
        """
        rows = wire_RB.shape[0]
        if wire_RB.shape[1] != self.wire_bytes(count):
            raise ValueError(
                f"{count} values make a message of {self.wire_bytes(count)} bytes, got {wire_RB.shape[1]}"
            )
        values = prepared(out, (rows, count), torch.float32, wire_RB.device).zero_()
        plan, at = self._rows(rows, count)
        self.decode_plan(plan, wire_RB.reshape(-1), values.view(-1), at)
        return values

    def _rows(self, rows: int, count: int) -> tuple[SparsePlan, Ints]:
        return self.plan([count] * rows if count else []), np.arange(rows, dtype=np.int64) * count


@dataclass(frozen=True)
class RandomK:
    """ceil(fraction N) values at random positions that every holder of the key draws alike; no indices travel.

    The layer, turned by a random angle, is cut into as many strata as values are kept, equal in size but for one
    value, and one position is drawn in each. So the number is exact, no position comes twice, and each comes with the
    same probability ceil(fraction N) / N. The values are not scaled by its inverse: this is no unbiased estimate, it
    is meant to go with a top-k.
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"RandomK sends a fraction of the values above 0 and at most 1, got fraction={self.fraction}"
            )

    def kept(self, count: int) -> int:
        """The number of positions drawn of `count`."""
        return part_of(self.fraction, count)

    def positions(self, count: int, key: tuple[int, int], device: torch.device) -> Tensor:
        """Different indices below `count`: int64 [kept(count)]. `key`: the low and the high half of a stream's key."""
        kept = self.kept(count)
        stratum = torch.arange(kept + 1, device=device)
        edge = stratum * count // kept
        low, high = on_device(np.array(key, np.int64), device)
        draws = randomness.uniform(stratum[:-1], low, high)
        position = edge[:-1] + (draws.to(torch.float64) * edge.diff()).to(torch.int64)
        angle = (key[0] | key[1] << 32) % count
        return (position + angle) % count
