"""The best assignment of bit widths, exactly, by walking a convex hull.

Nothing here is random and nothing iterates to convergence: one sort, one walk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .objective import Assignment, Objective
from .tables import Floats, Ints, Tables


def optimum(tables: Tables, alpha: float, beta: float) -> Assignment:
    """The assignment with the least E^alpha C^beta of all K^L; of equals, the one with fewer bytes.

    Why a walk of at most L (K - 1) + 1 steps is enough. Give every assignment its point (bytes, E).

    1. log(E^alpha C^beta) = alpha log E + beta log C is concave and rises with E and with bytes. A concave
       function on a segment is least at one of its ends, so over the convex hull of all points it is least
       at a corner, and every corner is an assignment. As it rises in both directions, the corner lies on the
       hull's lower left border: it has the least E + price * bytes for some price of a byte.
    2. E + price * bytes is a sum over layers, so at a given price every layer decides for itself: it goes to
       that corner of its own lower left hull where the slope passes -price.
    3. Let the price fall from infinity to 0. At first every layer has its cheapest width. Where the price
       passes the slope of an edge of some layer's hull, that layer steps along it, to its next corner. So
       all layers' edges in one list, the steepest first, lead past every corner of the sum, and the best
       assignment on the way is the optimum.

    Edges of one slope are walked one by one; what lies between them is an assignment on the border and no
    better than both of its ends. Where the least E is 0, only the walk's last point has it, and that has the
    fewest bytes of all that do. Widths that cost more and lose more are on no hull and do no harm.

    Raises ValueError where alpha or beta is not above 0.
    """
    objective = Objective(tables, alpha, beta)
    columns_PL = hull_walk(tables)
    bits = tables.bits(columns_PL[objective.sort_key(columns_PL).argmin()])
    return Assignment(objective(bits), bits)


@dataclass(frozen=True, eq=False)
class Edges:
    """All layers' hull edges in one list, the steepest first: M steps, each of one layer to its next corner.

    start_L   every layer's column of fewest bytes, where the walk begins
    layer_M, column_M  which layer steps to which column
    nbytes_M  the bytes that the step adds, above 0
    error_M   the error that it adds, below 0
    """

    start_L: Ints
    layer_M: Ints
    column_M: Ints
    nbytes_M: Ints
    error_M: Floats


def merge_edges(tables: Tables) -> Edges:
    """Every layer's lower left hull, cut into edges and merged by slope."""
    starts, steps = [], []
    rows = zip(tables.nbytes.tolist(), tables.error.tolist(), strict=True)
    for layer, (nbytes_K, error_K) in enumerate(rows):
        corners = lower_hull(nbytes_K, error_K)
        starts.append(corners[0])
        steps += [(slope(nbytes_K, error_K, a, b), layer, a, b) for a, b in pairwise(corners)]
    steepest_first = [step[1:] for step in sorted(steps)]
    layer_M, before_M, column_M = np.array(steepest_first, dtype=np.int64).reshape(-1, 3).T
    return Edges(
        start_L=np.array(starts),
        layer_M=layer_M,
        column_M=column_M,
        nbytes_M=tables.nbytes[layer_M, column_M] - tables.nbytes[layer_M, before_M],
        error_M=tables.error[layer_M, column_M] - tables.error[layer_M, before_M],
    )


def hull_walk(tables: Tables) -> Ints:
    """Every corner of the lower left hull of all assignments' (bytes, E), as columns [P, L].

    From the fewest bytes to the least error; P is at most L (K - 1) + 1.
    """
    edges = merge_edges(tables)
    columns_PL = np.tile(edges.start_L, (len(edges.layer_M) + 1, 1))
    for step, (layer, column) in enumerate(zip(edges.layer_M, edges.column_M, strict=True), start=1):
        columns_PL[step:, layer] = column
    return columns_PL


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
