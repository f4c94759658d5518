"""The least time of a step within an error: widths where they shorten it, and none where backward hides the bytes.

Backward releases buffers of gradients one after the other, and each is encoded, sent and decoded while backward goes
on. Predicted seconds of a step are the longest of many chains of waiting: from the release of some buffer on, through
the encoding, the network and the decoding of it and those that follow. Every chain is a sum, linear in the layers'
choices, and the longest is to be least.

A timeline knows no ranks and no codecs, only what their seconds are; `compression.costs` predicts them, and this
module's arithmetic is that of its steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .hulls import merge_edges
from .knapsack import EFFORT, EPS, Certified, Rest, check_reachable, within_error
from .objective import gap
from .pins import Bounds, bounded, column_bounds, moved_into
from .tables import Floats, Ints, Tables

PARTS = ("encoding", "network", "processor", "decoding")
"""What seconds of a buffer are spent on; `processor` are those of the network's in which the rank's processor works."""

FRONTIER = 16_000
RELAXED = 1e-7  # relative distance of the relaxed problem's bounds at which it counts as solved
ROUNDS = 300  # of finding one more chain and one more assignment for it
CHAINS = 16  # that bound each partial assignment one by one, too
CANDIDATES = 8  # partial assignments that are completed after each layer, those of least bounds
ROUNDINGS = 16  # of the relaxed problem's mixture to whole assignments
TRIALS = 1_000  # of whole assignments in the end, and of groups of layers whose error might be less at equal time
GOLDEN = (math.sqrt(5) - 1) / 2
ROUNDING = 1e-12  # of sums of seconds, relative
EQUAL = 1e-9  # relative difference of equal times


@dataclass(frozen=True, eq=False)
class Chain:
    """A chain of waiting: its seconds at some parts [J, P], and how often each of them counts in it.

    It adds up and compares as its seconds do, so that what is written for seconds finds their chain.
    """

    seconds: float
    weight: Floats
    constant: float = 0.0

    def __call__(self, parts_JP: Floats) -> float:
        """The seconds at other parts."""
        return self.constant + float((self.weight * parts_JP).sum())

    def of_part(self, seconds: float, buffer: int, part: int) -> "Chain":
        """The chain of one part alone."""
        weight = np.zeros_like(self.weight)
        weight[buffer, part] = 1.0
        return Chain(float(seconds), weight)

    def __add__(self, more: "Chain | float") -> "Chain":
        if isinstance(more, Chain):
            return Chain(self.seconds + more.seconds, self.weight + more.weight, self.constant + more.constant)
        return Chain(self.seconds + more, self.weight, self.constant + more)

    def __mul__(self, factor: float) -> "Chain":
        return Chain(self.seconds * factor, self.weight * factor, self.constant * factor)

    def __gt__(self, other: "Chain") -> bool:
        return self.seconds > other.seconds


Number = TypeVar("Number", float, Chain)


def mean_of(chains: Sequence[Chain], weights: Floats) -> Chain:
    """The mean of chains, of weights that add up to 1."""
    first, *others = (chain * float(weight) for chain, weight in zip(chains, weights, strict=True))
    return sum(others, first)


@dataclass(frozen=True, eq=False)
class Timeline:
    """What the seconds of a step are made of, validated on construction.

    L layers, K widths, J buffers in the order of their release, P parts (`PARTS`).

    own         seconds of a step in which nothing is exchanged
    backward    those of its backward
    release     [J], seconds from backward's begin until each buffer is there
    buffer      [L], each layer's buffer
    fixed       [J, P], seconds of each buffer whatever its layers' widths
    a_byte      [J, K, P], seconds of each of a layer's encoded bytes at each width
    start       seconds until an exchange begins
    contention  seconds by which a second of the processor's work delays backward
    overlaps    whether a buffer is encoded or decoded while another travels

    Raises ValueError where a shape or a value makes no sense, and names it.
    """

    own: float
    backward: float
    release: Floats
    buffer: Ints
    fixed: Floats
    a_byte: Floats
    start: float = 0.0
    contention: float = 0.0
    overlaps: bool = False

    def __post_init__(self) -> None:
        for field, dtype in (("release", float), ("buffer", np.int64), ("fixed", float), ("a_byte", float)):
            own: NDArray = np.array(getattr(self, field), dtype=dtype)
            own.setflags(write=False)
            object.__setattr__(self, field, own)
        for field in ("own", "backward", "start", "contention", "release", "buffer", "fixed", "a_byte"):
            values = np.asarray(getattr(self, field))
            if not (np.isfinite(values) & (values >= 0)).all():
                raise ValueError(f"a timeline's {field} must be finite and not negative, got {values.min()}")
        buffers, shape = self.release.size, self.a_byte.shape
        if not buffers or self.fixed.shape != (buffers, len(PARTS)) or shape != (buffers, *shape[1:2], len(PARTS)):
            raise ValueError(
                f"a timeline's release, fixed and a_byte must be [J], [J, P] and [J, K, P] of P = {len(PARTS)}, got "
                f"{self.release.shape}, {self.fixed.shape} and {shape}"
            )
        if self.buffer.ndim != 1 or not self.buffer.size or self.buffer.max() >= buffers:
            raise ValueError(f"a timeline's layers are in one of {buffers} buffers each, got {self.buffer.tolist()}")

    def check(self, tables: Tables) -> None:
        """Raise ValueError where the timeline is not of these tables' layers and widths."""
        found = (len(self.buffer), self.a_byte.shape[1])
        if found != tables.error.shape:
            raise ValueError(f"a timeline must be of the tables' {tables.error.shape} layers and widths, got {found}")

    def parts(self, tables: Tables, bits: Sequence[int]) -> Floats:
        """Seconds of every buffer's parts [J, P] under one assignment."""
        columns_L = tables.columns(bits)
        rows = np.arange(len(columns_L))
        return self.summed(tables.nbytes[rows, columns_L, None] * self.a_byte[self.buffer, columns_L])

    def seconds(self, tables: Tables, bits: Sequence[int]) -> float:
        """Seconds of a step under one assignment."""
        return self.seconds_of(self.parts(tables, bits))

    def hidden(self, tables: Tables, bits: Sequence[int]) -> NDArray[np.bool_]:
        """Which layers [L] have bytes that backward hides: no second of them is in the step's longest chain."""
        weight_JP = self.longest(self.parts(tables, bits)).weight
        a_byte_J = (weight_JP * self.a_byte.max(axis=1)).sum(axis=1)
        return np.asarray(a_byte_J[self.buffer] <= 0)

    def seconds_of(self, parts_JP: Floats) -> float:
        """Seconds of a step whose buffers' parts [J, P] take so many."""
        return float(self._step(parts_JP.tolist(), 0.0))

    def longest(self, parts_JP: Floats) -> "Chain":
        """The longest chain at such parts: below or at the seconds of a step at any others."""
        none = Chain(0.0, np.zeros_like(parts_JP))
        rows = [
            [none.of_part(each, buffer, part) for part, each in enumerate(row)] for buffer, row in enumerate(parts_JP)
        ]
        found = self._step(rows, none)
        assert isinstance(found, Chain)
        return found

    def summed(self, parts_LP: Floats) -> Floats:
        """Seconds of every buffer's parts [J, P] from those of the layers [L, P]."""
        sums = [np.bincount(self.buffer, parts_L, len(self.release)) for parts_L in parts_LP.T]
        return np.asarray(self.fixed + np.stack(sums, axis=1))

    def _step(self, parts: Sequence[Sequence[Number]], none: Number) -> Number:
        """A step's seconds, or the chain that they are: as `StepModel` of the costs has them."""
        paid = thread = encoded = arrived = decoded = none
        for release, (encoding, network, processor, decoding) in zip(self.release.tolist(), parts, strict=True):
            handed_over = paid + release
            if self.overlaps:
                encoded = max(handed_over, encoded) + encoding
                arrived = max(encoded, arrived) + network
                decoded = max(arrived, decoded) + decoding
                thread = max(handed_over, thread) + encoding + decoding + processor * self.contention
            else:
                thread = max(handed_over, thread) + encoding + network + decoding
            paid = paid + (encoding + processor + decoding) * self.contention
        return max(thread, decoded, paid + self.backward) + (self.start + self.own - self.backward)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in plain.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Timeline":
        """The timeline that `to_json` wrote. Raises ValueError where it is none."""
        names = [field.name for field in fields(cls)]
        if not isinstance(content, Mapping) or set(content) != set(names):
            raise ValueError(f"a timeline holds {', '.join(names)}, got {list(content)}")
        return cls(**content)


@dataclass(frozen=True)
class Timed(Certified):
    """An assignment of least predicted time within an error, `seconds` a step; the bound is of seconds."""

    seconds: float = 0.0

    @property
    def gap(self) -> float:
        """Upper bound of the excess over the least, as a fraction of the lower bound; 0 is the optimum."""
        return gap(self.seconds, self.lower_bound)


def soonest(
    tables: Tables,
    timeline: Timeline,
    limit: float,
    bounds: Mapping[str, Bounds] | None = None,
    frontier: int = FRONTIER,
) -> Timed:
    """The assignment of least step time whose total error is at most `limit`; of equals, one of less error.

    1. Relaxed, where layers may be mixtures of widths, it is a game of two: one names an assignment, the other a chain
       that is long under it. A mean of chains, of weights that add up to 1, is not above the longest; and it is a sum
       over layers, whose least within the error is an ordinary knapsack. The best mean bounds all assignments.
    2. Layers are then decided one after the other, as in `within_error`. A partial assignment goes on only if its bound
       is below the best time so far: of the mean, with the undecided layers' hull at the error left, and of each of its
       chains. The least bound of those left behind is the certificate; where none was, there is no better assignment.
    3. Layers whose error can be less at equal time get it. Where backward hides all bytes, that is the least error.

    What was found is not above the time of fewest bytes (`within_error`), which is looked at first. `bounds` are least
    and largest widths of pinned layers.

    Raises ValueError where even the least total error is above the limit, naming it, and where the timeline is of
    other tables.
    """
    timeline.check(tables)
    bounds = bounds or {}
    within = bounded(tables, bounds)
    check_reachable(within, limit)
    columns_LK = np.broadcast_to(np.arange(len(tables.widths)), tables.error.shape)
    low_L, high_L = column_bounds(tables, bounds)
    nearest_LK = np.clip(columns_LK, low_L[:, None], high_L[:, None])
    parts_LKP = tables.nbytes[..., None] * timeline.a_byte[timeline.buffer]
    parts_LKP = np.take_along_axis(parts_LKP, nearest_LK[..., None], axis=1)
    problem = _Problem(within, timeline, parts_LKP, limit)
    bound = problem.solve(frontier)
    bits = moved_into(tables, bounds, tables.bits(problem.refined()))
    seconds = timeline.seconds(tables, bits)
    return Timed(
        error=tables.total_error(bits),
        bits=bits,
        bits_a_value=tables.bits_a_value(bits),
        nbytes=tables.encoded_bytes(bits),
        minimized="seconds",
        lower_bound=seconds if bound >= (1 - EQUAL) * seconds else bound,
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Relaxed:
    """Chains and their weights, whose mean is the best bound; and assignments with their shares in a mixture."""

    chains: list[Chain]
    weights: Floats
    assignments: list[Ints]
    shares_V: Floats


class _Problem:
    """The best assignment so far, `best_L`, which takes `best` seconds; and what makes it better."""

    def __init__(self, tables: Tables, timeline: Timeline, parts_LKP: Floats, limit: float) -> None:
        self.tables, self.timeline, self.parts_LKP, self.limit = tables, timeline, parts_LKP, limit
        self.rows = np.arange(len(tables.layers))
        self.least_L = tables.error.argmin(axis=1)
        self.best_L, self.best = self.least_L, math.inf
        self.offer(self.least_L)
        self.offer(tables.columns(within_error(tables, limit).bits))

    def offer(self, columns_L: Ints) -> None:
        """Take an assignment where it is the fastest so far, and within the limit."""
        seconds = self.timeline.seconds_of(self.parts(columns_L))
        if seconds < self.best and self.error(columns_L) <= self.limit:
            self.best_L, self.best = columns_L, seconds

    def error(self, columns_L: Ints) -> float:
        return math.fsum(self.tables.error[self.rows, columns_L].tolist())

    def parts(self, columns_L: Ints) -> Floats:
        return self.timeline.summed(self.parts_LKP[self.rows, columns_L])

    def weighted(self, chain: Chain) -> tuple[float, Floats]:
        """A chain as what the layers' columns [L, K] add to a constant."""
        seconds_LK = np.einsum("lkp,lp->lk", self.parts_LKP, chain.weight[self.timeline.buffer])
        return chain.constant + float((chain.weight * self.timeline.fixed).sum()), seconds_LK

    def relax(self) -> "_Relaxed":
        """The relaxed problem's solution, from two sides: a mixture of assignments, and a mean of chains."""
        from scipy.optimize import linprog

        error_LK, limit = self.tables.error, self.limit
        scale = max(abs(limit), float(np.abs(error_LK).max())) or 1.0
        starts = (self.least_L, self.best_L, self.parts_LKP.sum(axis=2).argmin(axis=1))
        assignments = list(starts)
        parts = [self.parts(columns_L) for columns_L in starts]
        chains = [self.timeline.longest(parts_JP) for parts_JP in parts]
        best: _Relaxed | None = None
        bound = -math.inf
        for _ in range(ROUNDS):
            # min t: every chain's mean over the assignments is at most t, their mean error at most the limit.
            weight_CX = np.stack([chain.weight.ravel() for chain in chains])
            parts_VX = np.stack([parts_JP.ravel() for parts_JP in parts])
            times_CV = weight_CX @ parts_VX.T + np.array([[chain.constant] for chain in chains])
            excess_V = np.array([self.error(columns_L) - limit for columns_L in assignments]) / scale
            unit = float(times_CV.max())
            solved = linprog(
                np.append(np.zeros(len(parts)), 1.0),
                A_ub=np.block([[times_CV / unit, np.full((len(chains), 1), -1.0)], [excess_V, np.zeros(1)]]),
                b_ub=np.zeros(len(chains) + 1),
                A_eq=np.append(np.ones(len(parts)), 0.0)[None],
                b_eq=np.ones(1),
                bounds=[(0, None)] * len(parts) + [(None, None)],
            )
            if solved.status != 0:
                break
            prices = np.maximum(-solved.ineqlin.marginals, 0.0)
            weights, price = prices[:-1] / prices[:-1].sum(), float(prices[-1]) * unit / scale
            shares_V = np.maximum(solved.x[:-1], 0.0)
            constant, seconds_LK = self.weighted(mean_of(chains, weights))
            priced_LK = seconds_LK + price * error_LK
            if (least := constant + math.fsum(priced_LK.min(axis=1).tolist()) - price * limit) > bound:
                bound = least
                kept = np.flatnonzero(weights > 0)
                best = _Relaxed([chains[row] for row in kept], weights[kept], list(assignments), shares_V)
            longest = self.timeline.longest(np.tensordot(shares_V, np.stack(parts), 1))
            if longest.seconds - bound <= RELAXED * longest.seconds:
                break
            assignments.append(priced_LK.argmin(axis=1))
            parts.append(self.parts(assignments[-1]))
            chains += [longest, self.timeline.longest(parts[-1])]
        return best or _Relaxed(chains[:1], np.ones(1), assignments[:1], np.ones(1))

    def round_off(self, relaxed: "_Relaxed", seconds_LK: Floats) -> None:
        """Offer whole assignments that are near the relaxed problem's mixture."""
        until_V = relaxed.shares_V.cumsum() / relaxed.shares_V.sum()
        columns_VL = np.stack(relaxed.assignments)
        for turn in range(ROUNDINGS):
            place_L = (self.rows * GOLDEN + turn / ROUNDINGS) % 1.0  # evenly spread over the layers
            nearest_L = np.searchsorted(until_V, place_L).clip(max=len(until_V) - 1)
            self.offer(self.within(columns_VL[nearest_L, self.rows], seconds_LK))

    def within(self, columns_L: Ints, seconds_LK: Floats) -> Ints:
        """The assignment, or one with less error that is within the limit: fewest seconds for it first."""
        columns_L = columns_L.copy()
        for _ in range(len(self.tables.widths)):
            own_L = self.tables.error[self.rows, columns_L]
            if (excess := self.error(columns_L) - self.limit) <= 0:
                break
            gain_LK = own_L[:, None] - self.tables.error
            cost_LK = seconds_LK - seconds_LK[self.rows, columns_L][:, None]
            worth_LK = np.where(gain_LK > 0, gain_LK / np.maximum(cost_LK, 1e-30), -1.0)
            to_L = worth_LK.argmax(axis=1)
            order = np.argsort(-worth_LK[self.rows, to_L], kind="stable")
            gain_L = np.maximum(gain_LK[self.rows, to_L][order], 0.0).cumsum()
            order = order[: int(np.searchsorted(gain_L, excess)) + 1]
            columns_L[order] = to_L[order]
        return columns_L

    def solve(self, frontier: int) -> float:
        """Look for the best assignment; the lower bound of all assignments' seconds."""
        tables, widths, limit = self.tables, len(self.tables.widths), self.limit
        relaxed = self.relax()
        chains, weights = relaxed.chains, relaxed.weights
        constant, seconds_LK = self.weighted(mean_of(chains, weights))
        self.round_off(relaxed, seconds_LK)
        self.shorten()
        least_error_L = tables.error.min(axis=1)
        error_LK = tables.error - least_error_L[:, None]
        room = limit - math.fsum(least_error_L.tolist())
        slack = EPS * (tables.error.size + 8) * (math.fsum(np.abs(least_error_L).tolist()) + abs(limit))
        base = constant + math.fsum(seconds_LK.min(axis=1).tolist())
        seconds_LK = seconds_LK - seconds_LK.min(axis=1)[:, None]
        edges = merge_edges(error_LK, seconds_LK)
        # Each chain by itself: what the layers add to it at least, and what a column adds to that.
        single = [self.timeline.longest(self.parts(self.best_L)), *(chains[row] for row in np.argsort(-weights))]
        alone = [self.weighted(chain) for chain in single[:CHAINS]]
        base_Q = np.array([start + least_LK.min(axis=1).sum() for start, least_LK in alone])
        alone_LKQ = np.stack([least_LK - least_LK.min(axis=1)[:, None] for _, least_LK in alone], axis=2)

        order = np.argsort(-np.ptp(error_LK, axis=1), kind="stable")
        undecided_L = np.ones(len(order), dtype=bool)
        error_S, seconds_S, chains_SQ = np.zeros(1), np.zeros(1), np.zeros((1, len(alone)))
        trail: list[tuple[Ints, Ints]] = []
        lower_bound, cells = math.inf, 0
        for layer in order:
            error_S = (error_S[:, None] + error_LK[layer]).ravel()
            seconds_S = (seconds_S[:, None] + seconds_LK[layer]).ravel()
            chains_SQ = (chains_SQ[:, None] + alone_LKQ[layer]).reshape(-1, len(alone))
            undecided_L[layer] = False
            rest = Rest(edges, undecided_L)
            left_S = room - error_S
            bound_S = base + seconds_S + np.interp(left_S + slack, rest.weight_P, rest.value_P)
            bound_S = (1 - ROUNDING) * np.maximum(bound_S, (base_Q + chains_SQ).max(axis=1))
            going = np.flatnonzero((left_S >= -slack) & (bound_S < (1 - EQUAL) * self.best))
            going = going[np.argsort(bound_S[going], kind="stable")]
            decided = list(zip(order[len(trail) - 1 :: -1], trail[::-1], strict=False))

            def assignments(
                states: Ints, layer: int = int(layer), decided: Sequence[tuple[int, tuple[Ints, Ints]]] = decided
            ) -> Ints:
                """The columns [states, L] of some states, and of their undecided layers at the start."""
                columns_SL = np.tile(edges.start_L, (len(states), 1))
                parent_S, columns_SL[:, layer] = np.divmod(states, widths)
                for before, (parents, columns) in decided:
                    columns_SL[:, before], parent_S = columns[parent_S], parents[parent_S]
                return columns_SL

            if not undecided_L.any():
                most = max(1, EFFORT // len(order))
                rest_bound = float(bound_S[going[most]]) if len(going) > most else math.inf
                return min(lower_bound, rest_bound, self.settle(assignments(going[:most]), bound_S[going[:most]]))
            for state, columns_L in zip(going, assignments(going[:CANDIDATES]), strict=False):
                corner = int(np.searchsorted(rest.weight_P, left_S[state] - slack, side="right")) - 1
                self.offer(rest.complete(columns_L, max(corner, 0)))
            going = going[bound_S[going] < (1 - EQUAL) * self.best]
            if len(going) > frontier:
                lower_bound = min(lower_bound, float(bound_S[going[frontier]]))
                going = going[:frontier]
            if not len(going):
                break
            cells += len(bound_S) + len(rest.value_P)
            if cells > EFFORT:
                lower_bound = min(lower_bound, float(bound_S[going[0]]))
                break
            trail.append((going // widths, (going % widths).astype(np.int8)))
            error_S, seconds_S, chains_SQ = error_S[going], seconds_S[going], chains_SQ[going]
        return lower_bound

    def settle(self, columns_SL: Ints, bound_S: Floats) -> float:
        """Offer the best of many assignments; what bounds those that are left, infinite where none is better.

        Each time the one of least bound is looked at, and the longest chain under it bounds all of them.
        """
        for _ in range(TRIALS):
            if not len(bound_S) or bound_S.min() >= (1 - EQUAL) * self.best:
                return math.inf
            state = int(bound_S.argmin())
            self.offer(columns_SL[state])
            constant, seconds_LK = self.weighted(self.timeline.longest(self.parts(columns_SL[state])))
            chain_S = constant + seconds_LK[self.rows, columns_SL].sum(axis=1)
            bound_S = np.maximum(bound_S, (1 - ROUNDING) * chain_S)
            if self.error(columns_SL[state]) > self.limit:  # by rounding
                bound_S[state] = math.inf
            left = bound_S < (1 - EQUAL) * self.best
            columns_SL, bound_S = columns_SL[left], bound_S[left]
        return float(bound_S.min(initial=math.inf))

    def shorten(self) -> None:
        """Use what error is left to shorten the longest chain, the most seconds for it first."""
        for _ in range(ROUNDINGS):
            before = self.best
            columns_L = self.best_L
            left = self.limit - self.error(columns_L)
            _, seconds_LK = self.weighted(self.timeline.longest(self.parts(columns_L)))
            gain_LK = seconds_LK[self.rows, columns_L][:, None] - seconds_LK
            cost_LK = self.tables.error - self.tables.error[self.rows, columns_L][:, None]
            gain_LK[cost_LK > left] = 0.0
            to_L = gain_LK.argmax(axis=1)
            layer = int(gain_LK[self.rows, to_L].argmax())
            if gain_LK[layer, to_L[layer]] <= 0:
                break
            columns_L = columns_L.copy()
            columns_L[layer] = to_L[layer]
            self.offer(columns_L)
            if self.best >= before:
                break

    def refined(self) -> Ints:
        """The best assignment with less error where that takes no more time, found by halving groups of layers."""
        columns_L, most = self.best_L.copy(), (1 + EQUAL) * self.best
        waiting, trials = [np.argsort(self.timeline.buffer, kind="stable")], 0
        while waiting and trials < TRIALS:
            group = waiting.pop()
            group = group[columns_L[group] != self.least_L[group]]
            if not len(group):
                continue
            trials += 1
            tried_L = columns_L.copy()
            tried_L[group] = self.least_L[group]
            if self.timeline.seconds_of(self.parts(tried_L)) <= most:
                columns_L = tried_L
            elif len(group) > 1:
                waiting += [group[len(group) // 2 :], group[: len(group) // 2]]
        return columns_L
