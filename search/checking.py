"""A check of what a search's file claims, from its tables alone.

Every number is computed again, and every claim to be best is held against a solution found anew.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .hulls import optimum_of
from .knapsack import Certified
from .objective import Objective
from .pins import bounded, column_bounds
from .run import SearchResult, certified_for, limit_name, limit_of
from .saved import naming_damage, search_from
from .timelines import Timed

TOLERANCE = 1e-9  # relative; sums of thousands of numbers round


def false_claims(content: Mapping[str, Any], path: str = "the file") -> list[str]:
    """Sentences on what a `search_N.json` claims and is not so; none where all holds.

    Raises ValueError where the content is no search's.
    """
    with naming_damage(path):
        result = search_from(content, path)
        return [*_installed(content, result), *_objectives(content, result), *_limits(content, result)]


def _installed(content: Mapping[str, Any], result: SearchResult) -> Iterator[str]:
    by, found = result.installed_by, result.found()
    if by not in found:
        yield f"installed says that {by} found it, and the file holds nothing of {by}"
    elif found[by] != result.installed:
        yield f"installed says that {by} found it, and {by} has other bits"
    if by in ("de", "optimum") and len(found) == 2 and result.method == "both":
        objective = Objective.of(result.wish, result.tables)
        keys = objective.sort_key(np.stack([result.tables.columns(bits) for bits in found.values()]))
        best = list(found)[int(keys.argmin())]
        if keys.min() < objective.sort_key(result.tables.columns(result.installed)[None])[0] - TOLERANCE:
            yield f"installed is what {by} found, and {best} found something better"
    for name, bits in found.items() | {("installed", result.installed)}:
        columns_L = result.tables.columns(bits)
        low_L, high_L = column_bounds(result.tables, result.bounds)
        outside = np.flatnonzero((columns_L < low_L) | (columns_L > high_L))
        if len(outside):
            layer = result.tables.layers[outside[0]]
            yield f"{name} has {bits[outside[0]]} bits for {layer}, beyond its pin"


def _objectives(content: Mapping[str, Any], result: SearchResult) -> Iterator[str]:
    if result.tables.measure == "loss":  # changes of the loss may be negative, and have no objective
        return
    objective = Objective.of(result.wish, result.tables)
    rows = {name: content[name] for name in ("de", "optimum", "installed") if name in content}
    for name, row in rows.items():
        if "objective" in row:
            yield from _differs(f"{name}.objective", row["objective"], objective(row["bits"]))
        if "log_objective" in row:
            yield from _differs(f"{name}.log_objective", row["log_objective"], objective.log(row["bits"]))
    for width, value in result.uniform.items():
        yield from _differs(f"uniform.{width}", content["uniform"][str(width)], value)
    if result.optimum is not None:
        within = Objective.of(result.wish, bounded(result.tables, result.bounds))
        best = optimum_of(within)
        if best.log_objective < result.optimum.log_objective - TOLERANCE:
            yield f"optimum is not the least objective: {best.objective:g} is less than {result.optimum.objective:g}"


def _limits(content: Mapping[str, Any], result: SearchResult) -> Iterator[str]:
    wish, name, tables = result.wish, limit_name(result.wish), result.tables
    if (found := result.certified) is None:
        if wish.target is not None:
            yield f"the wish has a limit, and the file has no {name}"
        return
    for key in ("error", "bits_a_value", "nbytes", "seconds"):
        if key in content[name]:
            yield from _differs(f"{name}.{key}", content[name][key], getattr(found, key))
    limit = limit_of(wish, tables)
    assert limit is not None
    if wish.kind == "bits":
        if found.bits_a_value > limit:
            yield f"{name} takes {found.bits_a_value:g} bits a value, above the budget of {limit:g}"
    elif found.error > limit:
        yield f"{name} has an error of {found.error:g}, above {limit:g} of uniform {wish.target} bits"
    value = _minimized(found)
    least = _minimized(certified_for(wish, tables, limit, result.timeline, result.bounds))
    room = TOLERANCE * (abs(value) + abs(least))
    if found.minimized != {"bits": "error", "error": "nbytes", "time": "seconds"}[wish.kind]:
        yield f"{name}.minimized is {found.minimized!r}, and the wish is {wish}"
    if not math.isfinite(found.lower_bound):
        yield f"{name}.lower_bound is {found.lower_bound}, which bounds nothing"
    if found.lower_bound > least + room:
        yield f"{name}.lower_bound is {found.lower_bound:g}, and an assignment within the limit has {least:g}"
    if found.lower_bound > value + room:
        yield f"{name}.lower_bound is {found.lower_bound:g}, above what it bounds, {value:g}"


def _minimized(found: Certified) -> float:
    if isinstance(found, Timed):
        return found.seconds
    return found.error if found.minimized == "error" else found.nbytes


def _differs(what: str, claimed: Any, computed: float) -> Iterator[str]:
    """A sentence where a claimed number is not the computed one; null stands for what JSON has no number for."""
    if claimed is None:
        if math.isfinite(computed):
            yield f"{what} is null, and computed {computed:.12g}"
    elif not math.isclose(claimed, computed, rel_tol=TOLERANCE, abs_tol=1e-300):
        yield f"{what} is {claimed:.12g}, and computed {computed:.12g}"
