"""One whole search on one rank: evolution, the exact solution, and which of their assignments is installed.

It knows tables. Gathering the gradients before it and applying the widths after it is its caller's business.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np

from .evolution import POPULATION_LIMIT, Evolved, check_population, evolve_objective, population_nbytes
from .hulls import optimum_of
from .knapsack import Certified, within_budget, within_error
from .objective import Assignment, Objective
from .pins import Bounds, Pins, as_bounds, bounded, moved_into
from .tables import Tables
from .timelines import Timeline, soonest
from .wishes import Wish

Method = Literal["de", "exact", "both"]
A = TypeVar("A", bound=Assignment)
METHODS = ("de", "exact", "both")
NAMES = {
    "de": "differential evolution",
    "optimum": "optimum",
    "budget": "least error in budget",
    "bytes": "fewest bytes within error",
    "time": "least step time within error",
}
UNITS = {"root": "total error", "square": "total squared error", "loss": "change of the loss"}  # by the tables' measure


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Result of a search, with all that is needed to check it from outside.

    wish       what was asked for
    method     which of evolution and the exact solution were to run
    de         the assignment that evolution found, where it ran
    optimum    the assignment of least objective, where it ran; None too where errors may be negative
    uniform    bit width to the objective with all layers at it; empty where errors may be negative
    certified  the assignment within the wish's limit, where it has one
    installed  the layers' widths, found by `installed_by`, a key of NAMES
    bounds     least and largest width of each pinned layer
    settings   what the caller says of the search, written into its file
    notes      sentences on what was left out
    timeline   what the seconds of a step are made of, where that is known
    """

    tables: Tables
    wish: Wish
    method: Method
    de: Evolved | None
    optimum: Assignment | None
    uniform: Mapping[int, float]
    certified: Certified | None
    installed: tuple[int, ...]
    installed_by: str
    popsize: int = 5
    iterations: int = 2
    seed: int | None = None
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    timeline: Timeline | None = None

    @property
    def gap(self) -> float | None:
        """Excess of differential evolution's objective over the optimum, as a fraction of it, where both ran."""
        if self.de is None or self.optimum is None:
            return None
        return Objective.of(self.wish, self.tables).excess(self.de, self.optimum)

    def found(self) -> dict[str, tuple[int, ...]]:
        """The assignments by who found them, a key of NAMES."""
        certified = {limit_name(self.wish): self.certified}
        rows = {"de": self.de, "optimum": self.optimum, **certified}
        return {by: row.bits for by, row in rows.items() if row is not None}

    def bits_by_layer(self) -> dict[str, int]:
        """The installed width of each layer."""
        return dict(zip(self.tables.layers, self.installed, strict=True))

    def error_by_layer(self) -> dict[str, float]:
        """Each layer's error at its installed width."""
        rows = np.arange(len(self.tables.layers))
        errors = self.tables.error[rows, self.tables.columns(self.installed)]
        return dict(zip(self.tables.layers, errors.tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers; `bits` are in the order of `layers`, `uniform` by width as text.

        What float64 or JSON has no number for is null.
        """
        tables = self.tables
        plain: dict[str, Any] = {
            **tables.to_json(),
            "wish": self.wish.to_json(),
            "method": self.method,
            "popsize": self.popsize,
            "iterations": self.iterations,
            "seed": self.seed,
            "pins": {name: list(bounds) for name, bounds in self.bounds.items()},
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "installed": {"by": self.installed_by, "bits": list(self.installed)},
        }
        if self.timeline is not None:
            plain["timeline"] = self.timeline.to_json()
        if self.uniform:
            objective = Objective.of(self.wish, tables)
            if objective.norm2 is None:
                plain |= {"alpha": objective.alpha, "beta": objective.beta}
            plain["uniform"] = {str(width): _finite(value) for width, value in self.uniform.items()}
            worth = asdict(objective.assignment(self.installed))
            plain["installed"] = {"by": self.installed_by} | _all_finite(worth)
        for name, row in {"de": self.de, "optimum": self.optimum, limit_name(self.wish): self.certified}.items():
            if row is not None:
                plain[name] = _all_finite(asdict(row))
        return plain


def limit_name(wish: Wish) -> str:
    """The key of NAMES for what keeps within a wish's limit."""
    return {"error": "bytes", "time": "time"}.get(wish.kind, "budget")


def certified_for(
    wish: Wish, tables: Tables, limit: float, timeline: Timeline | None, bounds: Mapping[str, Bounds]
) -> Certified:
    """The best assignment within a wish's limit, of its bits a value or of an error, and within bounds."""
    if wish.kind == "time":
        if timeline is None:
            raise ValueError("the least step time needs what a step's seconds are made of, got no timeline; give one")
        return soonest(tables, timeline, limit, bounds)
    within = bounded(tables, bounds)
    found = within_budget(within, limit) if wish.kind == "bits" else within_error(within, limit)
    return replace(found, bits=moved_into(tables, bounds, found.bits))


def limit_of(wish: Wish, tables: Tables) -> float | None:
    """The limit of a wish, where it has one: its bits a value, or the error of its uniform width."""
    if wish.target is None or wish.kind == "bits":
        return wish.target
    return tables.total_error((int(wish.target),) * len(tables.layers))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and math.isinf(value) else value


def _all_finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _finite(value) for key, value in row.items()}


def search(
    tables: Tables,
    wish: Wish | None = None,
    method: Method = "both",
    popsize: int = 5,
    iterations: int = 2,
    seed: int | None = None,
    pins: Pins | None = None,
    settings: Mapping[str, Any] | None = None,
    timeline: Timeline | None = None,
) -> SearchResult:
    """Choose a bit width for each layer, as a wish says; without one, for the least E^0.5 C^0.5.

    With "both", evolution runs beside the exact solution and the better one is installed; with "exact" it does not
    run, and with "de" what it found is installed. Wishes that have a limit, and the balance, install the exact
    solution. Evolution and the optimum of the objective then stand there to compare. Where a population takes more than
    1 GiB, "both" leaves evolution out and the result says so.

    pins      layer name to a width, or to its least and largest width
    settings  what else the file of the search is to say: names and plain values
    timeline  what a step's seconds are made of, which the wish for the least step time needs

    Raises ValueError for a wish that the tables cannot serve, for numbers that are out of range, and for tables
    without `numel`.
    """
    wish = wish or Wish.objective()
    wish.check(tables.widths, tables.measure)
    if method not in METHODS:
        raise ValueError(f"a search's method is one of {', '.join(METHODS)}, got {method!r}")
    if method == "de" and wish.kind != "objective":
        raise ValueError(
            f"differential evolution alone serves the powers of error and bytes, and the wish is {wish}; "
            "use the method both or exact"
        )
    check_population(popsize, iterations)
    if not tables.numel:
        raise ValueError("a search needs the layers' sizes, got Tables without numel")
    bounds = as_bounds(pins, tables.layers, tables.widths)
    within = bounded(tables, bounds)

    if timeline is not None:
        timeline.check(tables)
    certified = None
    if (limit := limit_of(wish, tables)) is not None:
        certified = certified_for(wish, tables, limit, timeline, bounds)
    evolved, best, uniform, notes = None, None, {}, []
    if tables.measure != "loss":
        objective = Objective.of(wish, within)
        if method != "de":
            best = _moved(optimum_of(objective), tables, bounds)
        if method == "both" and population_nbytes(tables, popsize) > POPULATION_LIMIT:
            nbytes = population_nbytes(tables, popsize)
            notes.append(f"Differential evolution was left out: its population would take {nbytes / 2**30:.1f} GiB.")
        elif method != "exact":
            evolved = _moved(evolve_objective(objective, popsize, iterations, seed), tables, bounds)
        everywhere = Objective.of(wish, tables)
        uniform = {width: everywhere((width,) * len(tables.layers)) for width in tables.widths}

    if certified is not None:
        installed, by = certified.bits, limit_name(wish)
    else:
        installed, by = _better(Objective.of(wish, tables), best, evolved)
    return SearchResult(
        tables,
        wish,
        method,
        evolved,
        best,
        uniform,
        certified,
        installed,
        by,
        popsize,
        iterations,
        seed,
        bounds,
        dict(settings or {}),
        tuple(notes),
        timeline,
    )


def _moved(found: A, tables: Tables, bounds: Mapping[str, Bounds]) -> A:
    """An assignment within the bounds."""
    return replace(found, bits=moved_into(tables, bounds, found.bits))


def _better(objective: Objective, best: Assignment | None, evolved: Evolved | None) -> tuple[tuple[int, ...], str]:
    """The better of two assignments and its finder; of equals, the optimum."""
    if best is None or evolved is None:
        return (best.bits, "optimum") if best is not None else (evolved.bits, "de")  # type: ignore[union-attr]
    tables = objective.tables
    of_best, of_evolved = objective.sort_key(np.stack([tables.columns(best.bits), tables.columns(evolved.bits)]))
    return (evolved.bits, "de") if of_evolved < of_best else (best.bits, "optimum")
