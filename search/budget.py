"""The least error within a budget of bytes: a multiple-choice knapsack, solved with a certificate.

One width for each layer, the least sum of errors, so many bytes in all. The answer need not lie on the hull of
all assignments, as the optimum of E^alpha C^beta does; but the hull bounds it, and the bound does the work.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .hulls import Edges, merge_edges
from .objective import gap
from .tables import Ints, MeasuredCodec, Tables


@dataclass(frozen=True)
class Budgeted:
    """An assignment within a budget, and a proof of how good it is.

    error         E of the assignment
    lower_bound   no assignment within the budget has less error; equal to `error` where that is the optimum
    bits_a_value  its cost: encoded bits for each value of the compressed layers
    """

    error: float
    bits: tuple[int, ...]
    bits_a_value: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """Upper bound of the error's excess over the least, as a fraction of the lower bound; 0 is the optimum."""
        return gap(self.error, self.lower_bound)


def within_budget(tables: Tables, bits_a_value: float, frontier: int = 100_000) -> Budgeted:
    """The assignment of least error that takes at most `bits_a_value` bits a value on average.

    Bytes are the encoded bytes of the compressed layers, scales included, over those layers' values. With
    two float32 scales a bucket that is more than the width: 4-bit max-min in buckets of 512 takes 4.125.

    Layers are decided one after the other, the largest first. A partial assignment goes on only if
    * no other that takes at most its bytes has at most its error (Nemhauser and Ullmann 1969), and
    * its bound is below the best error so far. The bound adds the undecided layers' hull at the bytes left,
      which no completion can undercut; the hull's corner before that point is a completion, so that every
      partial assignment also offers a whole one (Sinha and Zoltners 1979).
    When all layers are decided, the best is the optimum. ResNet-50 needs a dozen partial assignments at a time;
    should more than `frontier` go on, those with the least bounds do, and the least bound of those left behind
    is the certificate: `lower_bound`.

    Raises ValueError where even the cheapest assignment takes more, naming its bits.
    """
    budget = _budget_nbytes(tables, bits_a_value)
    edges = merge_edges(tables)
    widths = len(tables.widths)
    order = np.argsort(-np.ptp(tables.nbytes, axis=1), kind="stable")

    best_L, best_error = edges.start_L, math.inf
    lower_bound = math.inf
    columns_SL = np.zeros((1, len(order)), dtype=np.int8)
    nbytes_S, error_S = np.zeros(1, dtype=np.int64), np.zeros(1)
    for decided, layer in enumerate(order, start=1):
        nbytes_S = (nbytes_S[:, None] + tables.nbytes[layer]).ravel()
        error_S = (error_S[:, None] + tables.error[layer]).ravel()

        rest = _Rest(tables, edges, order[decided:])
        left_S = budget - nbytes_S
        corner_S = np.searchsorted(rest.nbytes_P, left_S, side="right") - 1
        fits_S = corner_S >= 0
        complete_S = np.where(fits_S, error_S + rest.error_P[corner_S], math.inf)
        if complete_S.min() < best_error:
            best = int(complete_S.argmin())
            best_error = complete_S[best]
            best_L = rest.complete(columns_SL[best // widths], corner_S[best])
            best_L[layer] = best % widths

        # A bound must not be too high, not even by the rounding of the interpolation.
        rounding_S = 8 * np.finfo(np.float64).eps * rest.error_P[corner_S]
        bound_S = error_S + np.interp(left_S, rest.nbytes_P, rest.error_P) - rounding_S
        going = np.flatnonzero(fits_S & (bound_S < best_error))
        going = going[np.lexsort((error_S[going], nbytes_S[going]))]
        going = going[np.diff(np.minimum.accumulate(error_S[going]), prepend=math.inf) < 0]
        if len(going) > frontier:
            going = going[np.argsort(bound_S[going], kind="stable")]
            lower_bound = min(lower_bound, bound_S[going[frontier]])
            going = going[:frontier]
        columns_SL = columns_SL[going // widths]
        columns_SL[:, layer] = going % widths
        nbytes_S, error_S = nbytes_S[going], error_S[going]
        if not len(going):
            break

    bits = tables.bits(best_L)
    error = tables.total_error(bits)
    return Budgeted(error, bits, tables.bits_a_value(bits), min(float(lower_bound), error))


class _Rest:
    """The hull of all that the undecided layers can add: P corners, nbytes_P rising and error_P falling."""

    def __init__(self, tables: Tables, edges: Edges, layers: Sequence[int] | Ints) -> None:
        undecided_L = np.zeros(len(tables.layers), dtype=bool)
        undecided_L[layers] = True
        of_rest_M = undecided_L[edges.layer_M]
        self._edges = edges
        self._steps = np.flatnonzero(of_rest_M)
        self._undecided_L = undecided_L
        start_nbytes = tables.nbytes[layers, edges.start_L[layers]].sum()
        self.nbytes_P = start_nbytes + np.append(0, edges.nbytes_M[of_rest_M].cumsum())
        # Summed from the least error up: the other direction would cancel.
        saved_M = -edges.error_M[of_rest_M]
        least = tables.error[layers].min(axis=1).sum()
        self.error_P = least + np.append(0.0, saved_M[::-1].cumsum())[::-1]

    def complete(self, columns_L: Ints, corner: int) -> Ints:
        """A copy of an assignment with the undecided layers at one of the corners."""
        taken = self._steps[:corner]
        completed_L = np.where(self._undecided_L, self._edges.start_L, columns_L)
        completed_L[self._edges.layer_M[taken]] = self._edges.column_M[taken]  # a layer's last step stays
        return completed_L


def _budget_nbytes(tables: Tables, bits_a_value: float) -> int:
    """The most bytes that are at most so many bits a value."""
    _check_bits(bits_a_value, tables.bits_a_value(tables.bits(tables.nbytes.argmin(axis=1))))
    values = sum(tables.numel)
    nbytes = math.floor(bits_a_value * values / 8) + 1
    while 8 * nbytes / values > bits_a_value:
        nbytes -= 1
    return nbytes


def check_budget(
    numel: Sequence[int], codec_at: Callable[[int], MeasuredCodec], widths: Sequence[int], bits_a_value: float
) -> None:
    """Raise ValueError where layers of so many values cannot keep within a budget, known before any gradient is."""
    cheapest = sum(min(codec_at(width).wire_bytes(count) for width in widths) for count in numel)
    _check_bits(bits_a_value, 8 * cheapest / sum(numel))


def _check_bits(bits_a_value: float, cheapest: float) -> None:
    if not 0 < bits_a_value < math.inf:
        raise ValueError(f"a budget must be a finite number of bits a value above 0, got {bits_a_value}")
    if bits_a_value < cheapest:
        raise ValueError(
            f"a budget must hold the cheapest assignment, {math.ceil(cheapest * 1e4) / 1e4:.4f} bits a value with "
            f"its scales, got {bits_a_value:g}; raise it, or lower the least width"
        )
