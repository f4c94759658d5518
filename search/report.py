"""Reports of a search: the contents of three JSON files, and a page of text for the terminal.

They read a `SearchResult` and calculate nothing that decides anything. Who writes the files is the caller's business.
The picture is in `plotting.py`.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from .objective import Objective, gap
from .run import NAMES, SearchResult
from .scheme import scheme_of
from .tradeoff import ratio_for_bits

MOST = 0.5  # an optimum with more than this fraction of layers at one end of the range is called bang-bang


def logs(result: SearchResult, when: int | str, uncompressed: Collection[str]) -> dict[str, bytes]:
    """File name -> content of `epochN.json`, `compress_scheme_N.json` and `search_N.json`.

    N is `when`: the epoch, or "calibration". `uncompressed` are the names of layers that are never compressed. Raises
    ValueError where a number is not finite, for which JSON has no word.
    """
    scheme = scheme_of(result.bits_by_layer(), uncompressed)
    return {
        f"epoch{when}.json": _json(result.error_by_layer(), indent=1),
        f"compress_scheme_{when}.json": _json(scheme, indent=1),
        f"search_{when}.json": _json(result.to_json()),
    }


def _json(content: Any, indent: int | None = None) -> bytes:
    return (json.dumps(content, indent=indent, allow_nan=False) + "\n").encode()


def as_text(result: SearchResult, when: int | str) -> str:
    """The search as a table: uniform widths, differential evolution and the optimum, then the widths installed."""
    tables = result.tables
    title = f"Search, epoch {when}" if isinstance(when, int) else f"Search, {when}"
    lines = [
        f"{title}: {len(tables.layers)} layers of {sum(tables.numel):,} values, "
        f"(total error)^{result.alpha:g} x (ratio)^{result.beta:g}",
        *_columns(list(_comparison(result))),
        f"Differential evolution is {_percent(result.gap)} above the optimum after "
        f"{result.de.evaluations:,} evaluations in {result.de.seconds:.2f} s.",
        *_budget(result),
        f"Installed: {NAMES[result.installed_by]}.",
        *_columns(list(_widths(result))),
        *_tradeoff(result),
    ]
    return "\n".join(lines)


def _comparison(result: SearchResult) -> Iterator[Sequence[str]]:
    tables, best = result.tables, result.optimum.objective
    objective_of = Objective(tables, result.alpha, result.beta)
    yield "", "total error", "ratio", "bits/value", "objective", "above optimum"
    rows = {f"uniform {width} bits": (width,) * len(tables.layers) for width in tables.widths}
    rows |= {NAMES[by]: bits for by, bits in result.found().items()}
    for name, bits in rows.items():
        objective = objective_of(bits)
        yield (
            name,
            f"{tables.total_error(bits):.4g}",
            f"{tables.ratio(bits):.4f}",
            f"{tables.bits_a_value(bits):.3f}",
            f"{objective:.5g}",
            _percent(gap(objective, best)),
        )


def _budget(result: SearchResult) -> Iterator[str]:
    if result.budget is not None:
        proof = (
            "which is the least possible"
            if result.budget.gap == 0
            else f"at most {_percent(result.budget.gap)} above the least possible"
        )
        yield (
            f"Within the budget: total error {result.budget.error:.4g} at {result.budget.bits_a_value:.3f} "
            f"bits a value, {proof}."
        )


def _widths(result: SearchResult) -> Iterator[Sequence[str]]:
    """Layers by installed width: a line for each width, however many layers there are."""
    yield "bits", "layers", "values", "error", ""
    tables, bits, errors = result.tables, result.installed.bits, list(result.error_by_layer().values())
    for width in sorted(set(bits)):
        rows = [row for row, b in enumerate(bits) if b == width]
        names = ", ".join(tables.layers[row] for row in rows[:2])
        more = f" and {len(rows) - 2} more" if len(rows) > 2 else ""
        values = sum(tables.numel[row] for row in rows) / sum(tables.numel)
        error = sum(errors[row] for row in rows) / (sum(errors) or 1)
        yield str(width), str(len(rows)), _percent(values), _percent(error), names + more


def _tradeoff(result: SearchResult) -> Iterator[str]:
    """The optimum under other powers, where most of its layers are at one end of the range."""
    tables, widths = result.tables, result.tables.widths
    width, count = Counter(result.optimum.bits).most_common(1)[0]
    if width not in (widths[0], widths[-1]) or count <= MOST * len(tables.layers) or len(widths) == 1:
        return
    end = "largest" if width == widths[-1] else "smallest"
    yield f"The optimum has {count} of {len(tables.layers)} layers at {width} bits, the {end} width."
    yield "Along uniform widths this objective is bang-bang. What other powers would make of the optimum:"
    rows = [("for at most", "beta/alpha above", "gives")]
    for target in widths[:-1]:
        at_most = tables.bits_a_value((target,) * len(tables.layers))
        point = ratio_for_bits(tables, at_most)
        reached = math.isfinite(point.power)
        power, gives = (f"{point.power:.4g}", f"{point.bits_a_value:.3f}") if reached else ("none", "")
        rows.append((f"{at_most:.3f} bits/value", power, gives))
    yield from _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells, the headings first, as aligned lines: names, which have no heading, to the left."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(size) if heading else cell.ljust(size)
            for cell, heading, size in zip(row, rows[0], sizes, strict=True)
        ).rstrip()
        for row in rows
    ]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g} %"
