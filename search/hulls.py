"""The best assignment of bit widths, exactly, by walking a convex hull.

Nothing here is random and nothing iterates to convergence: one sort, one walk. Sums run along the walk, so that its
M + 1 assignments of L layers never stand side by side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .objective import Assignment, Objective
from .tables import Floats, Ints, Tables


def optimum(tables: Tables, alpha: float, beta: float) -> Assignment:
    """The assignment with the least E^alpha C^beta of all K^L; of equals, the one with fewer bytes.

    Raises ValueError where alpha or beta is not above 0.
    """
    return optimum_of(Objective(tables, alpha, beta))


def optimum_of(objective: Objective) -> Assignment:
    """The assignment with the least objective of all K^L; of equals, the one with fewer bytes.

    Why a walk of at most L (K - 1) + 1 steps is enough. Give every assignment its point (bytes, E).

    1. log(E^alpha C^beta) = alpha log E + beta log C is concave and rises with E and with bytes, and so it does with
       1 + omega in the place of E. A concave function on a segment is least at one of its ends, so over the
       convex hull of all points it is least at a corner, and every corner is an assignment. As it rises in both
       directions, the corner lies on the hull's lower left border: it has the least E + price * bytes for some
       price of a byte.
    2. E + price * bytes is a sum over layers, so at a given price every layer decides for itself: it goes to
       that corner of its own lower left hull where the slope passes -price.
    3. Let the price fall from infinity to 0. At first every layer has its cheapest width. Where the price
       passes the slope of an edge of some layer's hull, that layer steps along it, to its next corner. So
       all layers' edges in one list, the steepest first, lead past every corner of the sum, and the best
       assignment on the way is the optimum.

    Edges of one slope are walked one by one; what lies between them is an assignment on the border and no
    better than both of its ends. Where the least E is 0, only the walk's last point has it, and that has the
    fewest bytes of all that do. Widths that cost more and lose more are on no hull and do no harm.
    """
    tables = objective.tables
    walk = Walk.of(tables)
    best = int(objective.sort_key_of_totals(walk.error_P, walk.nbytes_P).argmin())
    return objective.assignment(tables.bits(walk.columns(best)))


@dataclass(frozen=True, eq=False)
class Edges:
    """All layers' hull edges in one list, the steepest first: M steps, each of one layer to its next corner.

    start_L   every layer's column of least x, where the walk begins
    layer_M, column_M  which layer steps to which column
    x_M       what the step adds to x, above 0
    y_M       what it adds to y, below 0
    """

    start_L: Ints
    layer_M: Ints
    column_M: Ints
    x_M: NDArray
    y_M: Floats


def merge_edges(x_LK: NDArray, y_LK: NDArray) -> Edges:
    """Every layer's lower left hull, cut into edges and merged by slope.

    All layers' hulls at once, each by gift wrapping: from a corner, the steepest descent leads to the next one, and of
    the points on that line the farthest is it.
    """
    layers = np.arange(len(x_LK))
    corner_L = start_L = np.lexsort((y_LK, x_LK), axis=-1)[:, 0]
    before_L = np.full(len(layers), -math.inf)
    steps: list[tuple[Floats, Ints, Ints, Ints]] = []
    for _ in range(x_LK.shape[1] - 1):
        x_to_LK = x_LK[layers] - x_LK[layers, corner_L][:, None]
        y_to_LK = y_LK[layers] - y_LK[layers, corner_L][:, None]
        slope_LK = np.full(x_to_LK.shape, math.inf)
        np.divide(y_to_LK, x_to_LK, out=slope_LK, where=(x_to_LK > 0) & (y_to_LK < 0))
        slope_L = slope_LK.min(axis=1)
        next_L = np.where(slope_LK == slope_L[:, None], x_to_LK, -1).argmax(axis=1)
        goes_on = slope_L < math.inf
        if not goes_on.any():
            break
        # Rounding must not turn a layer's steps around.
        slope_L = np.maximum(slope_L, before_L)
        steps.append((slope_L[goes_on], layers[goes_on], corner_L[goes_on], next_L[goes_on]))
        layers, corner_L, before_L = layers[goes_on], next_L[goes_on], slope_L[goes_on]
    if not steps:
        none: Ints = np.zeros(0, dtype=np.int64)
        return Edges(start_L, none, none, x_LK[:0, 0], y_LK[:0, 0])
    slope_M, layer_M, before_M, column_M = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    steepest_first = np.lexsort((layer_M, slope_M))  # stable: a layer's own steps stay in their order
    layer_M, before_M, column_M = (of_M[steepest_first] for of_M in (layer_M, before_M, column_M))
    return Edges(
        start_L=start_L,
        layer_M=layer_M,
        column_M=column_M,
        x_M=x_LK[layer_M, column_M] - x_LK[layer_M, before_M],
        y_M=y_LK[layer_M, column_M] - y_LK[layer_M, before_M],
    )


@dataclass(frozen=True, eq=False)
class Walk:
    """Every corner of the lower left hull of all assignments' (bytes, E), from the fewest bytes to the least error.

    nbytes_P, error_P  totals at P = M + 1 corners, of which M is at most L (K - 1)
    """

    edges: Edges
    nbytes_P: Ints
    error_P: Floats

    @classmethod
    def of(cls, tables: Tables) -> "Walk":
        """The walk over one set of tables."""
        edges = merge_edges(tables.nbytes, tables.error)
        fewest = tables.nbytes.min(axis=1).sum()
        least = math.fsum(tables.error.min(axis=1))
        return cls(edges, fewest + np.append(0, edges.x_M.cumsum()), least + sums_of_the_rest(edges.y_M))

    def columns(self, corner: int) -> Ints:
        """The assignment [L] at one of the corners."""
        return completed(self.edges, np.s_[:corner], self.edges.start_L)


def sums_of_the_rest(y_M: Floats) -> Floats:
    """How far y is above its least at each of M + 1 corners, summed from the last one: the other way would cancel."""
    return np.append(0.0, -y_M[::-1].cumsum())[::-1]


def completed(edges: Edges, taken: slice | Ints, columns_L: Ints) -> Ints:
    """A copy of an assignment after some steps, in their order: a layer's last step stays."""
    copy_L: Ints = columns_L.copy()
    copy_L[edges.layer_M[taken]] = edges.column_M[taken]
    return copy_L


def lower_hull(x_P: Sequence[float], y_P: Sequence[float]) -> list[int]:
    """Indices of the corners of the lower left convex hull of P points, in ascending x.

    Along it y falls, ever more slowly. It begins at the least x and ends at the least y; where several points
    share that, at the one that is better in the other coordinate.
    """
    corners: list[int] = []
    for point in sorted(range(len(x_P)), key=lambda p: (x_P[p], y_P[p])):
        if corners and y_P[point] >= y_P[corners[-1]]:
            continue
        while len(corners) > 1 and slope(x_P, y_P, *corners[-2:]) >= slope(x_P, y_P, corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def slope(x_P: Sequence[float], y_P: Sequence[float], start: int, end: int) -> float:
    """Rise of the straight line from one of P points to another."""
    return (y_P[end] - y_P[start]) / (x_P[end] - x_P[start])
