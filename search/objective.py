"""The number that a search makes small, and how two assignments compare under it.

It knows tables, and nothing of how assignments are found.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .tables import Floats, Ints, Tables


@dataclass(frozen=True)
class Assignment:
    """One assignment and its worth: the L layers' bit widths, and E^alpha C^beta."""

    objective: float
    bits: tuple[int, ...]


def gap(found: float, best: float) -> float:
    """Excess of `found` over `best`, as a fraction of it: 0 where they are equal, infinite above a best of 0."""
    if found == best:
        return 0.0
    return found / best - 1 if best else math.inf


@dataclass(frozen=True, eq=False)
class Objective:
    """E^alpha C^beta over the assignments of one set of tables; less is better.

    E is the sum of the layers' errors, C the ratio of bytes sent to float32's. Only beta / alpha decides
    which assignment is best. Raises ValueError for powers that are not above 0.
    """

    tables: Tables
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        for name, power in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 < power < math.inf:
                raise ValueError(f"the search's {name} must be a finite number above 0, got {power}")

    def __call__(self, bits: Sequence[int]) -> float:
        """The objective of one assignment. Raises ValueError where it leaves the range of float64."""
        error, ratio = self.tables.total_error(bits), self.tables.ratio(bits)
        try:
            value = error**self.alpha * ratio**self.beta
        except OverflowError:
            value = math.inf
        if math.isinf(value) or (value == 0 and error > 0):
            raise ValueError(
                f"{error:g}^alpha {ratio:g}^beta leaves the range of float64 at alpha={self.alpha:g} and "
                f"beta={self.beta:g}; only beta/alpha matters, so divide both"
            )
        return value

    def sort_key(self, columns_PL: Ints) -> Floats:
        """Numbers [P] that order P assignments as the objective does; finite at E = 0, too.

        It is the objective's logarithm over alpha, log E + (beta/alpha) log C. All assignments without error
        share the objective 0, and of those the one with the fewest bytes is wanted. So E = 0 counts as an
        error so small that fewer bytes never outweigh it: bytes then decide among the zeros.
        """
        error_P, nbytes_P = self.tables.totals(columns_PL)
        power = self.beta / self.alpha
        dense_bytes, entries = self.tables.dense_bytes, self.tables.error
        fewest, most = (column(self.tables.nbytes, axis=1).sum() + dense_bytes for column in (np.min, np.max))
        least = entries.min(where=entries > 0, initial=max(entries.max(), 1.0))
        log_zero = math.log(least) - power * math.log(most / fewest) - 1
        positive_P = error_P > 0
        log_error_P = np.where(positive_P, np.log(np.where(positive_P, error_P, 1.0)), log_zero)
        return log_error_P + power * np.log((nbytes_P + dense_bytes) / (4 * self.tables.values))
