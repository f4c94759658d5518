"""The least time of a step within an error: widths where they shorten it, and none where backward hides the bytes.

A network passes one buffer of gradients on after the other, each once backward has released it:

    finish_j = max(finish_(j - 1), release_j) + fixed_j + (seconds of the layers in buffer j)

and the step takes as long as the last one. Written out, that is the greatest of J sums, over k, of release_k and all
that follows it: each of them linear in the layers' choices, and the greatest of them is to be least.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .hulls import merge_edges
from .knapsack import EFFORT, EPS, FRONTIER, PROOF, Certified, Rest, check_reachable
from .objective import gap
from .tables import Floats, Ints, Tables

CANDIDATES = 8  # partial assignments that are completed after each layer, those of least bounds
ROUNDING = 1e-12  # of sums of times, relative
NEWTON = 100  # steps to the relaxed optimum; a handful are enough


@dataclass(frozen=True, eq=False)
class Timeline:
    """What the seconds of a step are made of, validated on construction. L layers, K widths, J buffers in their order.

    release     [J], when each buffer can begin at the soonest, in seconds from the step's begin
    fixed       [J], seconds of each buffer whatever its layers' widths: latency, and what is never compressed
    buffer      [L], each layer's buffer
    seconds     [L, K], what a layer adds to its buffer: its bytes on the network, and its encoding where that waits
    after       seconds of a step after the last buffer

    Raises ValueError where a shape or a value makes no sense, and names it.
    """

    release: Floats
    fixed: Floats
    buffer: Ints
    seconds: Floats
    after: float = 0.0

    def __post_init__(self) -> None:
        for field, dtype in (("release", float), ("fixed", float), ("buffer", np.int64), ("seconds", float)):
            own: NDArray = np.array(getattr(self, field), dtype=dtype)
            own.setflags(write=False)
            object.__setattr__(self, field, own)
            if own.ndim != (2 if field == "seconds" else 1) or not own.size:
                raise ValueError(f"a timeline's {field} must not be empty, got the shape {own.shape}")
            if not (np.isfinite(own) & (own >= 0)).all():
                raise ValueError(f"a timeline's {field} must be finite and not negative, got {own.min()}")
        if not 0 <= self.after < math.inf:
            raise ValueError(f"a timeline's after must be finite and not negative, got {self.after}")
        if len(self.fixed) != len(self.release):
            raise ValueError(
                f"a timeline has one release and one fixed cost a buffer, got {len(self.release)} and {len(self.fixed)}"
            )
        if len(self.buffer) != len(self.seconds) or self.buffer.max() >= len(self.release):
            raise ValueError(
                f"a timeline places each of {len(self.seconds)} layers in one of {len(self.release)} buffers, "
                f"got {len(self.buffer)} layers and a buffer {self.buffer.max()}"
            )

    def check(self, tables: Tables) -> None:
        """Raise ValueError where the timeline is not of these tables' layers and widths."""
        if self.seconds.shape != tables.error.shape:
            raise ValueError(
                f"a timeline's seconds must be [layers, widths] = {tables.error.shape}, got {self.seconds.shape}"
            )

    @property
    def alone(self) -> float:
        """Seconds of a step whose averages take no time."""
        return float(self.release.max()) + self.after

    def step(self, columns_L: Ints) -> float:
        """Seconds of a step under one assignment."""
        return float(self._ends(columns_L).max()) + self.after

    def hidden(self, columns_L: Ints) -> NDArray[np.bool_]:
        """Which layers [L] are in buffers that backward hides: the step would not be shorter without their bytes."""
        ends_J = self._ends(columns_L)
        return np.asarray(self.buffer < int((ends_J >= (1 - 1e-9) * ends_J.max()).argmax()))

    def _ends(self, columns_L: Ints) -> Floats:
        """For each buffer [J], when the last one ends if the network is idle until that buffer's release."""
        seconds_L = self.seconds[np.arange(len(self.buffer)), columns_L]
        seconds_J = self.fixed + np.bincount(self.buffer, seconds_L, len(self.fixed))
        return np.asarray(self.release + _following(seconds_J))

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        arrays = {name: getattr(self, name).tolist() for name in ("release", "fixed", "buffer", "seconds")}
        return {**arrays, "after": self.after}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Timeline":
        """The timeline that `to_json` wrote. Raises ValueError where it is none."""
        if not isinstance(content, Mapping) or set(content) != set(cls.__dataclass_fields__):
            raise ValueError(f"a timeline holds {', '.join(cls.__dataclass_fields__)}, got {list(content)}")
        return cls(**content)


@dataclass(frozen=True)
class Timed(Certified):
    """An assignment of least predicted time within an error, `seconds` a step; the bound is of seconds."""

    seconds: float = 0.0

    @property
    def gap(self) -> float:
        """Upper bound of the excess over the least, as a fraction of the lower bound; 0 is the optimum."""
        return gap(self.seconds, self.lower_bound)


def soonest(tables: Tables, timeline: Timeline, limit: float, frontier: int = FRONTIER) -> Timed:
    """The assignment of least step time whose total error is at most `limit`; of equals, the one of least error.

    Layers are decided in the order in which the network has them, those of one buffer by their error, the most first. A
    partial assignment is a time at which the network is free and an error so far. It goes on only if
    * no other is free as soon with as little error (a later release makes many equal), and
    * its bound is not above the best time so far.
    The bound weighs the J sums, any weights that add up to 1: their mean is not above the greatest. A mean is a sum over
    layers, so that the undecided ones' hull bounds it, as in `within_error`. The weights are those of the relaxed
    problem (`_prices`), for which the bound is tight. Where the work ends early, the least bound of those that would go
    on is the certificate, as there.

    Raises ValueError where even the least total error is above the limit, naming it, and where the timeline is of
    other tables.
    """
    timeline.check(tables)
    check_reachable(tables, limit)
    problem = _Problem(tables, timeline, limit)
    columns_L, bound = problem.solve(frontier)
    bits, seconds = tables.bits(columns_L), timeline.step(columns_L)
    bound = seconds if bound is None else bound
    return Timed(
        error=tables.total_error(bits),
        bits=bits,
        bits_a_value=tables.bits_a_value(bits),
        nbytes=tables.encoded_bytes(bits),
        minimized="seconds",
        lower_bound=min(bound, seconds),
        seconds=seconds,
    )


class _Problem:
    """Seconds of layers count from their least, which are in the buffers' own; errors likewise, out of `room`."""

    def __init__(self, tables: Tables, timeline: Timeline, limit: float) -> None:
        self.tables, self.timeline, self.limit = tables, timeline, limit
        self.rows = np.arange(len(tables.layers))
        least_L = timeline.seconds.min(axis=1)
        self.release_J, self.buffer_L = timeline.release, timeline.buffer
        self.own_J = timeline.fixed + np.bincount(timeline.buffer, least_L, len(timeline.fixed))
        self.seconds_LK = timeline.seconds - least_L[:, None]
        self.error_LK = tables.error - tables.error.min(axis=1)[:, None]
        self.room = limit - math.fsum(tables.error.min(axis=1))
        sizes = math.fsum(np.abs(tables.error).min(axis=1)) + abs(limit)
        self.slack = EPS * (tables.error.size + 8) * sizes

    def key(self, columns_L: Ints) -> tuple[float, float, int]:
        """The time, the error and the bytes of an assignment, in the order of their importance."""
        error = math.fsum(self.tables.error[self.rows, columns_L])
        return self.timeline.step(columns_L), error, int(self.tables.nbytes[self.rows, columns_L].sum())

    def fits(self, columns_L: Ints) -> bool:
        return math.fsum(self.tables.error[self.rows, columns_L]) <= self.limit

    def solve(self, frontier: int) -> tuple[Ints, float | None]:
        """Columns [L] of the best assignment, and a lower bound of the seconds where it may not be the best."""
        tables, widths = self.tables, len(self.tables.widths)
        timeline, buffers = self.timeline, len(self.release_J)
        best_L = np.lexsort((tables.nbytes, timeline.seconds, tables.error), axis=-1)[:, 0]
        best = self.key(best_L)
        least = timeline.step(timeline.seconds.argmin(axis=1))
        if best[0] <= least:
            return best_L, None  # no assignment is faster, and none has less error
        price_J = self._prices()
        weight_J = np.diff(price_J, prepend=0.0)
        edges = merge_edges(self.error_LK, price_J[self.buffer_L, None] * self.seconds_LK)
        # What is still to come after each buffer: weighted, and at the least.
        tail_J = _following(weight_J * self.release_J + price_J * self.own_J) - (
            weight_J * self.release_J + price_J * self.own_J
        )
        rest_J = _following(self.own_J) - self.own_J
        order = np.lexsort((-np.ptp(self.error_LK, axis=1), self.buffer_L))
        lower_bound = math.inf
        trail: list[tuple[Ints, Ints]] = []
        undecided_L = np.ones(len(order), dtype=bool)
        free_S, error_S, nbytes_S = np.full(1, -math.inf), np.zeros(1), np.zeros(1, dtype=np.int64)
        cells, begun = 0, 0
        for layer in order:
            buffer = int(self.buffer_L[layer])
            free_S = self._through(free_S, begun, buffer + 1)
            begun = buffer + 1
            free_S = (free_S[:, None] + self.seconds_LK[layer]).ravel()
            error_S = (error_S[:, None] + self.error_LK[layer]).ravel()
            nbytes_S = (nbytes_S[:, None] + tables.nbytes[layer]).ravel()
            undecided_L[layer] = False
            rest = Rest(edges, undecided_L)
            left_S = self.room - error_S
            bound_S = np.interp(left_S + self.slack, rest.weight_P, rest.value_P)
            bound_S += price_J[buffer] * free_S + tail_J[buffer]
            bound_S = (1 - ROUNDING) * (np.maximum(bound_S, free_S + rest_J[buffer]) + timeline.after)

            going = np.flatnonzero((left_S >= -self.slack) & (bound_S <= best[0]))
            going = going[np.lexsort((nbytes_S[going], error_S[going], free_S[going]))]
            going = going[np.diff(np.minimum.accumulate(error_S[going]), prepend=math.inf) < 0]
            by_bound = going[np.lexsort((error_S[going], bound_S[going]))]
            undecided = bool(undecided_L.any())
            if not undecided:  # of all that are left, by what counts
                ends_S = self._through(free_S[going], begun, buffers)
                by_bound = going[np.lexsort((error_S[going], ends_S))]
            for state in by_bound[:CANDIDATES]:
                corner = int(np.searchsorted(rest.weight_P, left_S[state] - undecided * self.slack, side="right")) - 1
                if corner < 0 and undecided:
                    continue
                columns_L = edges.start_L.copy()
                parent, columns_L[layer] = divmod(int(state), widths)
                for decided, (parent_S, column_S) in zip(order[len(trail) - 1 :: -1], trail[::-1], strict=False):
                    columns_L[decided], parent = column_S[parent], parent_S[parent]
                columns_L = rest.complete(columns_L, max(corner, 0))
                if self.fits(columns_L) and (key := self.key(columns_L)) < best:
                    best_L, best = columns_L, key
            if len(going) > frontier:
                lower_bound = min(lower_bound, float(bound_S[by_bound[frontier]]))
                going = np.sort(by_bound[:frontier])
            if not len(going) or not undecided:
                break
            cells += len(free_S) + len(rest.value_P)
            ahead = min(lower_bound, float(bound_S[going].min()))
            if cells > 20 * EFFORT or (cells > EFFORT and gap(best[0], ahead) <= PROOF):
                lower_bound = ahead
                break
            trail.append((going // widths, (going % widths).astype(np.int8)))
            free_S, error_S, nbytes_S = free_S[going], error_S[going], nbytes_S[going]
        return best_L, (None if lower_bound >= best[0] else lower_bound)

    def _through(self, free_S: Floats, begin: int, end: int) -> Floats:
        """When the network is free after some buffers, all of whose layers take their least."""
        for buffer in range(begin, end):
            free_S = np.maximum(free_S, self.release_J[buffer]) + self.own_J[buffer]
        return free_S

    def _prices(self) -> Floats:
        """What a second in each buffer [J] adds to the relaxed step, from 0 where backward hides it to 1.

        Relaxed, layers may be between two widths of their hull. The least error for a given time T is then found
        greedily: along all layers' hulls, the steepest edges first, every edge goes into its buffer while that is open,
        and once the sum from some k on is full the buffers from k on close: for such nested limits that is optimal
        (Federgruen and Groenevelt 1986). A second of a buffer is worth the slope at which it closed. The least error
        is a convex function of T, whose slope is the last buffer's, so that Newton's steps rise to the least T that
        keeps the limit and end there.
        """
        edges = merge_edges(self.seconds_LK, self.error_LK)
        least = math.fsum(self.error_LK[self.rows, edges.start_L])
        slope_M = -edges.y_M / edges.x_M
        ends_J = self.release_J + _following(self.own_J)
        time, worth_J = float(ends_J.max()), np.zeros(len(ends_J))
        buffer_M = self.buffer_L[edges.layer_M]
        for step in range(NEWTON):
            error, found_J = _relaxed(edges.x_M, -edges.y_M, slope_M, buffer_M, time - ends_J)
            error = least - error
            if error <= self.room and step == 0:  # no error keeps anything from the least time
                return np.asarray(np.arange(len(ends_J)) >= ends_J.argmax(), dtype=np.float64)
            if found_J[-1] > 0:
                worth_J = found_J
            if error <= self.room or found_J[-1] == 0:
                break
            further = time + (error - self.room) / found_J[-1]
            if further <= time:
                break
            time = further
        return np.asarray(worth_J / worth_J[-1])


def _relaxed(
    seconds_M: Floats, gain_M: Floats, slope_M: Floats, buffer_M: Ints, room_J: Floats
) -> tuple[float, Floats]:
    """The most that edges gain within the room [J] of all buffers from each on, and what a second of each is worth."""
    room_J, worth_J = np.maximum(room_J, 0.0), np.zeros(len(room_J))
    open_until, gained = len(room_J), 0.0
    left = np.arange(len(seconds_M))
    while len(left) and open_until:
        used_J = np.bincount(buffer_M[left], seconds_M[left], len(room_J))
        if (_following(used_J) <= room_J).all():
            gained += float(gain_M[left].sum())
            break
        # The first edge too many: all before `low` fit, and with that at `high - 1` they do not.
        low, high = 0, len(left)
        while high - low > 1:
            middle = (low + high) // 2
            part = left[low:middle]
            more_J = _following(np.bincount(buffer_M[part], seconds_M[part], len(room_J)))
            if (more_J <= room_J).all():
                low, room_J, gained = middle, room_J - more_J, gained + float(gain_M[part].sum())
            else:
                high = middle
        edge = left[low]
        reached = buffer_M[edge] + 1
        tightest = int(room_J[:reached].argmin())
        taken = min(room_J[tightest], seconds_M[edge])
        gained += float(slope_M[edge] * taken)
        room_J = room_J - taken * (np.arange(len(room_J)) < reached)
        worth_J[tightest:open_until] = slope_M[edge]
        open_until = tightest
        left = left[low + 1 :]
        left = left[buffer_M[left] < open_until]
    return gained, worth_J


def _following(seconds_J: Floats) -> Floats:
    """The sum from each buffer [J] on."""
    return np.asarray(seconds_J[::-1].cumsum()[::-1])
