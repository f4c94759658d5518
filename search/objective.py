"""The number that a search makes small, and how two assignments compare under it.

It knows tables, and nothing of how assignments are found.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .tables import Floats, Ints, Tables
from .wishes import Wish

BLOCK = 1 << 20  # cells that are looked up at once: a block stays below the size of any population worth splitting


@dataclass(frozen=True)
class Assignment:
    """One assignment and its worth.

    objective      E^alpha C^beta; 0 or infinite where it leaves the range of float64
    bits           the L layers' bit widths
    log_objective  the objective's logarithm over alpha + beta: finite for all powers, and -inf where E is 0
    """

    objective: float
    bits: tuple[int, ...]
    log_objective: float


def gap(found: float, best: float) -> float:
    """Excess of `found` over `best`, as a fraction of it: 0 where they are equal, infinite above a best of 0."""
    if found == best:
        return 0.0
    return (found - best) / abs(best) if best else math.inf


@dataclass(frozen=True, eq=False)
class Objective:
    """E^alpha C^beta over the assignments of one set of tables; less is better.

    E is the sum of the layers' errors, C the ratio of bytes sent to float32's. Only beta / alpha decides which
    assignment is best. All comparisons are of logarithms, so that no power is too large or too small. With
    `norm2`, 1 + E / norm2 stands in the place of E.

    Raises ValueError for powers that are not above 0, and for errors below 0, which have no powers.
    """

    tables: Tables
    alpha: float
    beta: float
    norm2: float | None = None

    def __post_init__(self) -> None:
        Wish.objective(self.alpha, self.beta)
        if self.tables.error.min() < 0:
            raise ValueError(
                f"a power of the error needs errors that are not negative, got {self.tables.error.min():g}; "
                "ask for a number of bits or an error instead"
            )
        if self.norm2 is not None and not 0 < self.norm2 < math.inf:
            raise ValueError(
                f"a balance needs a gradient that is not zero, got |m|^2 = {self.norm2}; search after some steps"
            )

    @classmethod
    def of(cls, wish: Wish, tables: Tables) -> "Objective":
        """The objective that a wish makes least; the published one for wishes that have a limit instead."""
        if wish.kind == "balance":
            return cls(tables, 1.0, 1.0, tables.norm2)
        return cls(tables, wish.alpha or 0.5, wish.beta or 0.5)

    def __call__(self, bits: Sequence[int]) -> float:
        """The objective of one assignment; 0 or infinite where it leaves the range of float64."""
        error, ratio = self._error(self.tables.total_error(bits)), self.tables.ratio(bits)
        try:
            value = error**self.alpha * ratio**self.beta
        except OverflowError:
            value = math.inf
        if 0 < value < math.inf or error == 0:
            return value
        log_value = self.scaled_up(self.log(bits))  # one factor may have left the range where the product has not
        return math.exp(log_value) if log_value < math.log(np.finfo(np.float64).max) else math.inf

    def log(self, bits: Sequence[int]) -> float:
        """The objective's logarithm over alpha + beta: a mean of log E and log C. -inf where E is 0."""
        error, ratio = self._error(self.tables.total_error(bits)), self.tables.ratio(bits)
        of_error, of_ratio = self._weights()
        return of_error * math.log(error) + of_ratio * math.log(ratio) if error > 0 else -math.inf

    def scaled_up(self, log_objective: float) -> float:
        """The objective's natural logarithm, from what `log` gives."""
        return self.alpha * log_objective + self.beta * log_objective if log_objective else 0.0

    def assignment(self, bits: Sequence[int]) -> Assignment:
        """One assignment with its worth."""
        return Assignment(self(bits), tuple(bits), self.log(bits))

    def excess(self, found: Assignment, best: Assignment) -> float:
        """Excess of one objective over another, as a fraction of it; infinite where that leaves float64."""
        if found.log_objective == best.log_objective:
            return 0.0
        if 0 < found.objective < math.inf and 0 < best.objective < math.inf:
            return gap(found.objective, best.objective)
        try:
            return math.expm1(self.scaled_up(found.log_objective - best.log_objective))
        except OverflowError:
            return math.inf

    def sort_key(self, columns_PL: Ints | Floats) -> Floats:
        """Numbers [P] that order P assignments as the objective does; columns may be floats."""
        rows = np.arange(columns_PL.shape[-1])
        error_P = np.empty(len(columns_PL))
        nbytes_P = np.empty(len(columns_PL), dtype=np.int64)
        height = max(1, BLOCK // len(rows))
        for start in range(0, len(columns_PL), height):
            block = slice(start, start + height)
            columns_BL = columns_PL[block].astype(np.int64)
            error_P[block] = self.tables.error[rows, columns_BL].sum(axis=-1)
            nbytes_P[block] = self.tables.nbytes[rows, columns_BL].sum(axis=-1)
        return self.sort_key_of_totals(error_P, nbytes_P)

    def sort_key_of_totals(self, error_P: Floats, nbytes_P: Ints) -> Floats:
        """Numbers [P] that order P totals as the objective does; finite at E = 0, too.

        The key is the objective's logarithm over alpha + beta. All assignments without error share the objective 0, and
        of those the one with the fewest bytes is wanted. So E = 0 counts as an error so small that fewer bytes
        never outweigh it: bytes then decide among the zeros.
        """
        of_error, of_ratio = self._weights()
        dense_bytes, entries = self.tables.dense_bytes, self.tables.error
        fewest, most = (column(self.tables.nbytes, axis=1).sum() + dense_bytes for column in (np.min, np.max))
        least = entries.min(where=entries > 0, initial=max(entries.max(), 1.0))
        key_at_zero = of_error * math.log(least) - of_ratio * math.log(most / fewest) - 1
        error_P = self._error(error_P)
        positive_P = error_P > 0
        key_P = np.where(positive_P, of_error * np.log(np.where(positive_P, error_P, 1.0)), key_at_zero)
        return key_P + of_ratio * np.log((nbytes_P + dense_bytes) / (4 * self.tables.values))

    def _weights(self) -> tuple[float, float]:
        """alpha and beta over their sum, which may itself be infinite."""
        larger = max(self.alpha, self.beta)
        of_error, of_ratio = self.alpha / larger, self.beta / larger
        return of_error / (of_error + of_ratio), of_ratio / (of_error + of_ratio)

    def _error(self, error: Any) -> Any:
        """The error's place in the objective, of one total or of many."""
        return error if self.norm2 is None else 1 + error / self.norm2
