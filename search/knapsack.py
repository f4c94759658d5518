"""The best assignment within a limit: a multiple-choice knapsack, solved with a certificate.

One width for each layer; the least sum of errors within so many bytes, or the fewest bytes within so much error. Both
are one problem with its two columns exchanged. The answer need not lie on the hull of all assignments, as the optimum
of E^alpha C^beta does; but the hull bounds it, and the bound does the work.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .hulls import Edges, completed, merge_edges, sums_of_the_rest
from .objective import gap
from .tables import Ints, Tables
from .wishes import check_target

EPS = float(np.finfo(np.float64).eps)
FRONTIER = 100_000
EFFORT = 10_000_000  # cells after which a proof of PROOF is enough; after 20 times as many any proof is
PROOF = 1e-5
TRIES = 1_000  # complete assignments at the limit whose totals are summed exactly before one is found within it


@dataclass(frozen=True)
class Certified:
    """An assignment within a limit, and a proof of how good it is.

    error         E of the assignment
    bits_a_value  its cost: encoded bits for each value of the compressed layers
    nbytes        its encoded bytes
    minimized     what is least: the error, the bytes, or the predicted seconds of a step
    lower_bound   no assignment within the limit has less of it; equal to what was found where that is the optimum
    """

    error: float
    bits: tuple[int, ...]
    bits_a_value: float
    nbytes: int
    minimized: Literal["error", "nbytes", "seconds"]
    lower_bound: float

    @property
    def gap(self) -> float:
        """Upper bound of the excess over the least, as a fraction of the lower bound; 0 is the optimum."""
        return gap(self.error if self.minimized == "error" else self.nbytes, self.lower_bound)


def within_budget(tables: Tables, bits_a_value: float, frontier: int = FRONTIER) -> Certified:
    """The assignment of least error that takes at most `bits_a_value` bits a value on average.

    Bytes are the encoded bytes of the compressed layers, scales included, over those layers' values. With
    two float32 scales a bucket that is more than the width: 4-bit max-min in buckets of 512 takes 4.125.

    Raises ValueError where even the cheapest assignment takes more, naming its bits.
    """
    budget = _budget_nbytes(tables, bits_a_value)
    columns_L, bound = _solve(tables.error, tables.nbytes, budget, 0.0, frontier, lambda _: True)
    bits = tables.bits(columns_L)
    error = tables.total_error(bits)
    bound = error if bound is None else min(bound, error)
    return Certified(error, bits, tables.bits_a_value(bits), tables.encoded_bytes(bits), "error", bound)


def within_error(tables: Tables, limit: float, frontier: int = FRONTIER) -> Certified:
    """The assignment of fewest bytes whose total error is at most `limit`.

    Totals that are compared with the limit are rounded once. The certificate is of the assignments that keep below the
    limit by more than rounding, a few parts in 10^16 for each layer.

    Raises ValueError where even the least total error is above the limit, naming it.
    """
    check_reachable(tables, limit)
    rows = np.arange(len(tables.layers))

    def fits(columns_L: Ints) -> bool:
        return math.fsum(tables.error[rows, columns_L]) <= limit

    sizes = math.fsum(np.abs(tables.error).min(axis=1)) + abs(limit)
    slack = EPS * (tables.error.size + 8) * sizes
    columns_L, bound = _solve(tables.nbytes, tables.error, limit, slack, frontier, fits)
    bits = tables.bits(columns_L)
    nbytes = tables.encoded_bytes(bits)
    bound = nbytes if bound is None else min(math.ceil(bound), nbytes)
    error = tables.total_error(bits)
    return Certified(error, bits, tables.bits_a_value(bits), nbytes, "nbytes", bound)


def check_reachable(tables: Tables, limit: float) -> None:
    """Raise ValueError where even the least total error is above the limit."""
    least = math.fsum(tables.error.min(axis=1))
    if not least <= limit:
        raise ValueError(
            f"no assignment keeps within an error of {limit:.6g}, for the least possible is {least:.6g}; allow the "
            "error of a smaller width, search among larger widths, or loosen the pins"
        )


def _solve(
    value_LK: NDArray,
    weight_LK: NDArray,
    limit: float,
    slack: float,
    frontier: int,
    fits: Callable[[Ints], bool],
) -> tuple[Ints, float | None]:
    """Columns [L] of least value whose weight is within a limit, and a lower bound where they may not be the best.

    slack  how far sums of weights may be off
    fits   whether an assignment, of which that leaves doubts, is within the limit

    Layers are decided one after the other, the largest first. A partial assignment goes on only if
    * no other that has at most its weight has at most its value (Nemhauser and Ullmann 1969), and
    * its bound is below the best value so far. The bound adds the undecided layers' hull at the weight left,
      which no completion can undercut; the hull's corner before that point is a completion, so that every
      partial assignment also offers a whole one (Sinha and Zoltners 1979).
    When all layers are decided, the best is the optimum. ResNet-50 needs a dozen partial assignments at a time;
    should more than `frontier` go on, those with the least bounds do, and the least bound of those left behind
    is the certificate. So is the least bound of all that go on, where the work ends early: with thousands of layers the
    first bound is already within a hundred-thousandth, and what is left to decide moves ever less.

    Each layer's values and weights count from their least, so that all sums are of numbers that are not negative.
    """
    least_value_L, least_weight_L = value_LK.min(axis=1), weight_LK.min(axis=1)
    # Bytes stay whole numbers: their bounds round up.
    whole = value_LK.dtype.kind == "i"
    base = float(least_value_L.sum()) if whole else math.fsum(least_value_L)
    room = limit - (float(least_weight_L.sum()) if weight_LK.dtype.kind == "i" else math.fsum(least_weight_L))
    value_LK, weight_LK = value_LK - least_value_L[:, None], weight_LK - least_weight_L[:, None]
    edges = merge_edges(weight_LK, value_LK)
    order = np.argsort(-np.ptp(weight_LK, axis=1), kind="stable")
    rows = np.arange(len(order))

    # Of least weight, and within the limit if any is.
    best_L, best = edges.start_L, float(value_LK[rows, edges.start_L].sum())
    lower_bound = math.inf
    trail: list[tuple[Ints, Ints]] = []
    undecided_L = np.ones(len(order), dtype=bool)
    value_S, weight_S = np.zeros(1), np.zeros(1)
    cells = 0
    for layer in order:
        widths = value_LK.shape[1]
        value_S = (value_S[:, None] + value_LK[layer]).ravel()
        weight_S = (weight_S[:, None] + weight_LK[layer]).ravel()
        undecided_L[layer] = False
        rest = Rest(edges, undecided_L)

        def assignment(state: int, corner: int, layer: int = layer, rest: Rest = rest, widths: int = widths) -> Ints:
            """The columns of a state, and of its undecided layers at a corner of their hull."""
            columns_L = edges.start_L.copy()
            parent, columns_L[layer] = divmod(state, widths)
            for decided, (parent_S, column_S) in zip(order[len(trail) - 1 :: -1], trail[::-1], strict=False):
                columns_L[decided], parent = column_S[parent], parent_S[parent]
            return rest.complete(columns_L, corner)

        left_S = room - weight_S
        undecided = undecided_L.any()
        corner_S = np.searchsorted(rest.weight_P, left_S - (slack if undecided else -slack), side="right") - 1
        complete_S = np.where(corner_S >= 0, value_S + rest.value_P[corner_S], math.inf)
        better = np.flatnonzero(complete_S < best)
        better = better[np.argsort(complete_S[better], kind="stable")]
        for tries, state in enumerate(better):
            if tries == TRIES:
                lower_bound = min(lower_bound, complete_S[state])
                break
            columns_L = assignment(int(state), int(corner_S[state]))
            if fits(columns_L):
                best_L, best = columns_L, float(complete_S[state])
                break

        # A bound must not be too high, not even by the rounding of the interpolation.
        rounding_S = 8 * EPS * rest.value_P[np.maximum(corner_S, 0)]
        bound_S = value_S + np.interp(left_S + slack, rest.weight_P, rest.value_P) - rounding_S
        if whole:
            bound_S = np.ceil(bound_S - 1e-6)
        going = np.flatnonzero((left_S >= -slack) & (bound_S < best))
        going = going[np.lexsort((value_S[going], weight_S[going]))]
        going = going[np.diff(np.minimum.accumulate(value_S[going]), prepend=math.inf) < 0]
        if len(going) > frontier:
            going = going[np.argsort(bound_S[going], kind="stable")]
            lower_bound = min(lower_bound, bound_S[going[frontier]])
            going = going[:frontier]
        if not len(going) or not undecided:
            break
        cells += len(value_S) + len(rest.value_P)
        proven = gap(base + best, base + min(lower_bound, bound_S[going].min()))
        if cells > 20 * EFFORT or (cells > EFFORT and proven <= PROOF):
            lower_bound = min(lower_bound, bound_S[going].min())
            break
        trail.append((going // widths, (going % widths).astype(np.int8)))
        value_S, weight_S = value_S[going], weight_S[going]
    return best_L, (None if lower_bound >= best else base + float(lower_bound))


class Rest:
    """The hull of all that the undecided layers can add: P corners, weight_P rising and value_P falling."""

    def __init__(self, edges: Edges, undecided_L: NDArray[np.bool_]) -> None:
        self._edges = edges
        self._steps = np.flatnonzero(undecided_L[edges.layer_M])
        self.weight_P = np.append(0.0, edges.x_M[self._steps].cumsum())
        self.value_P = sums_of_the_rest(edges.y_M[self._steps].astype(np.float64))

    def complete(self, columns_L: Ints, corner: int) -> Ints:
        """A copy of an assignment, of undecided layers at the start, with these at one of the corners."""
        return completed(self._edges, self._steps[:corner], columns_L)


def _budget_nbytes(tables: Tables, bits_a_value: float) -> int:
    """The most bytes that are at most so many bits a value."""
    check_target(bits_a_value)
    cheapest = tables.bits_a_value(tables.bits(tables.nbytes.argmin(axis=1)))
    if bits_a_value < cheapest:
        raise ValueError(
            f"a budget must hold the cheapest assignment, {math.ceil(cheapest * 1e4) / 1e4:.4f} bits a value with "
            f"its scales, got {bits_a_value:g}; raise it, or lower the least width"
        )
    values, most = sum(tables.numel), int(tables.nbytes.max(axis=1).sum())
    if bits_a_value >= 8 * most / values:
        return most
    nbytes = math.floor(bits_a_value * values / 8) + 1
    while 8 * nbytes / values > bits_a_value:
        nbytes -= 1
    return nbytes
