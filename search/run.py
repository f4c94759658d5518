"""One whole search on one rank: evolution, the optimum, and which of their assignments is installed.

It knows tables. Gathering the gradients before it and applying the widths after it is its caller's business.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .budget import Budgeted, within_budget
from .evolution import Evolved, evolve
from .hulls import optimum
from .objective import Assignment, Objective, gap
from .tables import Tables

NAMES = {"de": "differential evolution", "optimum": "optimum", "budget": "least error in budget"}


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Result of a search, with all that is needed to check it from outside.

    uniform    bit width to the objective with all layers at it
    budget     the assignment of least error within a budget, where one was asked for
    installed  the layers' assignment; found by `installed_by`, a key of NAMES: "budget" where there is one, else
               the better of "optimum" and "de"
    """

    tables: Tables
    alpha: float
    beta: float
    de: Evolved
    optimum: Assignment
    uniform: Mapping[int, float]
    budget: Budgeted | None
    installed: Assignment
    installed_by: str

    @property
    def gap(self) -> float:
        """Excess of differential evolution's objective over the optimum, as a fraction of it."""
        return gap(self.de.objective, self.optimum.objective)

    def found(self) -> dict[str, tuple[int, ...]]:
        """The assignments by who found them, a key of NAMES."""
        found = {"de": self.de.bits, "optimum": self.optimum.bits}
        return found if self.budget is None else {**found, "budget": self.budget.bits}

    def bits_by_layer(self) -> dict[str, int]:
        """The installed width of each layer."""
        return dict(zip(self.tables.layers, self.installed.bits, strict=True))

    def error_by_layer(self) -> dict[str, float]:
        """Each layer's error at its installed width."""
        rows = np.arange(len(self.tables.layers))
        errors = self.tables.error[rows, self.tables.columns(self.installed.bits)]
        return dict(zip(self.tables.layers, errors.tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers; `bits` are in the order of `layers`, `uniform` by width as text."""
        tables = self.tables
        plain = {
            "layers": list(tables.layers),
            "numel": list(tables.numel),
            "widths": list(tables.widths),
            "error": tables.error.tolist(),
            "nbytes": tables.nbytes.tolist(),
            "dense_bytes": tables.dense_bytes,
            "values": tables.values,
            "alpha": self.alpha,
            "beta": self.beta,
            "de": asdict(self.de),
            "optimum": asdict(self.optimum),
            "uniform": {str(width): objective for width, objective in self.uniform.items()},
            "installed": {"by": self.installed_by, **asdict(self.installed)},
        }
        if self.budget is not None:
            plain["budget"] = asdict(self.budget)
        return plain


def search(
    tables: Tables,
    alpha: float = 0.5,
    beta: float = 0.5,
    popsize: int = 5,
    iterations: int = 2,
    seed: int | None = None,
    target_bits: float | None = None,
) -> SearchResult:
    """Choose a bit width for each layer.

    Minimizes E^alpha C^beta; with `target_bits`, the least error with at most so many encoded bits a value on
    average is installed instead, and evolution and optimum are there to compare. Raises ValueError for powers,
    population or budget that are out of range, and for tables without `numel`.
    """
    objective = Objective(tables, alpha, beta)
    budget = None if target_bits is None else within_budget(tables, target_bits)
    evolved = evolve(tables, alpha, beta, popsize, iterations, seed)
    best = optimum(tables, alpha, beta)
    installed, by = best, "optimum"
    key_of_optimum, key_of_evolved = objective.sort_key(
        np.stack([tables.columns(best.bits), tables.columns(evolved.bits)])
    )
    if key_of_evolved < key_of_optimum:
        installed, by = Assignment(evolved.objective, evolved.bits), "de"
    if budget is not None:
        installed, by = Assignment(objective(budget.bits), budget.bits), "budget"
    uniform = {width: objective((width,) * len(tables.layers)) for width in tables.widths}
    return SearchResult(tables, alpha, beta, evolved, best, uniform, budget, installed, by)
