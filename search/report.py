"""Reports of a search: the contents of three JSON files, and a page of text for the terminal.

They read a `SearchResult` and calculate nothing that decides anything. Who writes the files is the caller's business.
The pictures are in `plotting.py`.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .families import FamilyResult
from .fronts import Front, front
from .hulls import optimum_of
from .layout import aligned, percent, size
from .objective import Objective
from .pins import bounded
from .run import NAMES, UNITS, SearchResult
from .scheme import scheme_of, scheme_of_options
from .tables import Tables
from .timelines import Timed
from .tradeoff import ratios_for_bits
from .wishes import Wish

BANG_BANG = 0.5  # an optimum with more than this fraction of layers at one end of the range is called so
TELLING = 0.01  # a difference of predicted steps, as a fraction, that is worth telling
SHOWN = 8  # layers that are shown one by one, those of most bytes

# How a caller states wishes, to be filled in with their numbers; a command line has words of its own.
WORDS = {
    "objective": "Wish.objective({alpha:g}, {beta:g})",
    "bits": "Wish.bits({target:g})",
    "error": "Wish.error({target:g})",
    "balance": "Wish.balance()",
    "time": "Wish.time({target:g})",
}


def logs(result: SearchResult, when: int | str, uncompressed: Collection[str]) -> dict[str, bytes]:
    """File name -> content of `epochN.json`, `compress_scheme_N.json` and `search_N.json`.

    N is `when`: the epoch, or "calibration". `uncompressed` are the names of layers that are never compressed. Raises
    ValueError where a number is not finite, for which JSON has no word.
    """
    scheme = scheme_of(result.bits_by_layer(), uncompressed)
    return {
        f"epoch{when}.json": as_json(result.error_by_layer(), indent=1),
        f"compress_scheme_{when}.json": as_json(scheme, indent=1),
        f"search_{when}.json": as_json({**result.to_json(), "uncompressed": list(uncompressed)}),
    }


def family_logs(result: FamilyResult, when: int | str, uncompressed: Collection[str]) -> dict[str, bytes]:
    """Likewise of a search among families, whose tables and findings are in `families_N.json`."""
    scheme = scheme_of_options(result.option_by_layer(), uncompressed)
    return {
        f"epoch{when}.json": as_json(result.error_by_layer(), indent=1),
        f"compress_scheme_{when}.json": as_json(scheme, indent=1),
        f"families_{when}.json": as_json({**result.to_json(), "uncompressed": list(uncompressed)}),
    }


def as_json(content: Any, indent: int | None = None) -> bytes:
    """A file's bytes. Raises ValueError where a number is not finite."""
    return (json.dumps(content, indent=indent, allow_nan=False) + "\n").encode()


def as_text(result: SearchResult, when: int | str, words: Mapping[str, str] = WORDS) -> str:
    """The search as a page: what it gains first, then what else there is to choose, then how it was found.

    words  a wish's kind to how the caller states it, with {alpha}, {beta} and {target} for its numbers
    """
    tables = result.tables
    title = f"Search, epoch {when}" if isinstance(when, int) else f"Search, {when}"
    reached = front(tables, result.installed, result.bounds)
    lines = [
        f"{title}: {len(tables.layers):,} layers of {sum(tables.numel):,} values, for {result.wish}",
        *_gains(result),
        *_wishes(result, reached, words),
        *_comparison(result),
        *_evolution(result),
        *_certificate(result),
        *_step_times(result),
        f"Installed: {NAMES[result.installed_by]}.",
        *aligned(list(_widths(result))),
        *_largest(result),
        *_tradeoff(result, words),
        *result.notes,
    ]
    return "\n".join(lines)


def _state(wish: Wish, words: Mapping[str, str]) -> str:
    numbers = {"alpha": wish.alpha, "beta": wish.beta, "target": wish.target}
    return words[wish.kind].format(**numbers)


# What is gained


def _gains(result: SearchResult) -> Iterator[str]:
    """Bytes and error before and after: against float32, and against uniform widths at equal bytes and equal error."""
    tables, bits = result.tables, result.installed
    nbytes, error = tables.encoded_bytes(bits), tables.total_error(bits)
    every, float32 = nbytes + tables.dense_bytes, 4 * tables.values
    yield (
        f"Bytes: {size(every)} a gradient, {float32 / every:.4g} times fewer than the {size(float32)} "
        f"of float32; {tables.bits_a_value(bits):.3f} bits a value, scales included. "
        f"{UNITS[tables.measure].capitalize()}: {error:.4g}{_omega(result)}."
    )
    if len(tables.widths) == 1:
        return
    at_equal_bytes, at_equal_error = _uniform_at(result, nbytes, error)
    if at_equal_bytes is None:
        yield "At equal bytes: no mix of uniform widths takes so many or so few."
    else:
        more = f", {_change(error, at_equal_bytes)} of it" if at_equal_bytes > 0 and error >= 0 else ""
        before = f"uniform widths have a {UNITS[tables.measure]} of {at_equal_bytes:.4g}"
        yield f"At equal bytes: {before}; the search's is {error:.4g}{more}."
    if at_equal_error is None:
        yield "At equal error: no mix of uniform widths has so much or so little."
    else:
        uniform = at_equal_error + tables.dense_bytes
        yield (
            f"At equal error: uniform widths take {size(uniform)}; the search's take {size(every)}, "
            f"{_change(every, uniform)} of it."
        )


def _change(after: float, before: float) -> str:
    return percent(after / before)


def _omega(result: SearchResult) -> str:
    """omega, the squared error over |m|^2, where both are known."""
    norm2 = result.tables.norm2
    if result.tables.measure == "loss" or norm2 == 0:
        return ""
    errors = result.error_by_layer().values()
    squares = errors if result.tables.measure == "square" else (error**2 for error in errors)
    return f", omega: {math.fsum(squares) / norm2:.4g}"


def _uniform_at(result: SearchResult, nbytes: int, error: float) -> tuple[float | None, float | None]:
    """Error of uniform widths at so many bytes, and their bytes at so much error.

    Between two widths the error falls with the bytes in a straight line of logarithms, as it does where it
    quarters with every bit; where it is not above 0 throughout, in a straight line.
    """
    tables = result.tables
    rows = [(width,) * len(tables.layers) for width in tables.widths]
    nbytes_K = np.array([tables.encoded_bytes(bits) for bits in rows], dtype=np.float64)
    error_K = np.array([tables.total_error(bits) for bits in rows])
    positive = bool(error_K.min() > 0) and error > 0
    y_K, y = (np.log(error_K), math.log(error)) if positive else (error_K, error)
    at_bytes = at_error = None
    if (np.diff(nbytes_K) > 0).all() and nbytes_K[0] <= nbytes <= nbytes_K[-1]:
        at_bytes = float(np.interp(nbytes, nbytes_K, y_K))
        at_bytes = math.exp(at_bytes) if positive else at_bytes
    if (np.diff(y_K) < 0).all() and y_K[-1] <= y <= y_K[0]:
        at_error = float(np.interp(-y, -y_K, nbytes_K))
    return at_bytes, at_error


def _wishes(result: SearchResult, reached: Front, words: Mapping[str, str]) -> Iterator[str]:
    """What each uniform width leaves on the table, and the wish that takes it."""
    tables = result.tables
    yield "What the search can do for each uniform width, at the least, and how to ask for it:"
    rows: list[Sequence[str]] = [
        ("", "bytes", UNITS[tables.measure], "same bytes, error", "ask", "same error, bytes", "ask")
    ]
    for width in tables.widths:
        bits = (width,) * len(tables.layers)
        nbytes, error = tables.encoded_bytes(bits), tables.total_error(bits)
        average = math.ceil(tables.bits_a_value(bits) * 1e4) / 1e4
        least, fewest = reached.least_error(nbytes), reached.fewest_bytes(error)
        less = ("none", "") if least is None else (f"{least:.4g}", _state(Wish.bits(average), words))
        fewer = ("none", "")
        if fewest is not None:
            fewer = size(fewest + tables.dense_bytes), _state(Wish.error(width), words)
        rows.append((f"uniform {width} bits", size(nbytes + tables.dense_bytes), f"{error:.4g}", *less, *fewer))
    yield from aligned(rows)
    if tables.measure == "square" and tables.norm2 > 0:
        best = optimum_of(Objective.of(Wish.balance(), bounded(tables, result.bounds))).bits
        yield (
            f"The least (1 + omega) x bytes is at {tables.bits_a_value(best):.3f} bits a value: "
            f"ask with {_state(Wish.balance(), words)}."
        )


# How it was found


def _comparison(result: SearchResult) -> Iterator[str]:
    tables, best = result.tables, result.optimum
    heading = ("", UNITS[tables.measure], "ratio", "bits/value")
    rows = {NAMES[by]: bits for by, bits in result.found().items()}
    if result.certified is None:  # else the objective is not what was asked for
        rows = {f"uniform {width} bits": (width,) * len(tables.layers) for width in tables.widths} | rows
    objective_of = Objective.of(result.wish, tables) if result.uniform else None
    table: list[Sequence[str]] = [(*heading, *(("objective",) if objective_of else ()))]
    if objective_of and best:
        table = [(*heading, "objective", "above optimum")]
    for name, bits in rows.items():
        cells = [
            name,
            f"{tables.total_error(bits):.4g}",
            f"{tables.ratio(bits):.4f}",
            f"{tables.bits_a_value(bits):.3f}",
        ]
        if objective_of:
            worth = objective_of.assignment(bits)
            cells.append(_value(objective_of, worth.objective, worth.log_objective))
            if best:
                cells.append(percent(objective_of.excess(worth, best)))
        table.append(cells)
    yield from aligned(table)


def _value(objective: Objective, value: float, log_value: float) -> str:
    """The objective, or the power of e that it is where float64 has no number for it."""
    if 0 < value < math.inf or log_value == -math.inf:
        return f"{value:.5g}"
    return f"e^{objective.scaled_up(log_value):.6g}"


def _evolution(result: SearchResult) -> Iterator[str]:
    if result.de is not None:
        above = "" if result.gap is None else f" is {percent(result.gap)} above the optimum"
        ran = f"{result.de.evaluations:,} evaluations in {result.de.seconds:.2f} s"
        yield f"Differential evolution{above} after {ran}." if above else f"Differential evolution took {ran}."


def _certificate(result: SearchResult) -> Iterator[str]:
    if (found := result.certified) is None:
        return
    least = "fewest" if found.minimized == "nbytes" else "least"
    proof = (
        f"which is the {least} possible"
        if found.gap == 0
        else f"at most {percent(found.gap)} above the {least} possible"
    )
    if found.minimized == "error":
        within = f"Within the budget: {UNITS[result.tables.measure]} {found.error:.4g}"
    elif isinstance(found, Timed):
        within = f"Within the error: predicted {_ms(found.seconds)} a step"
    else:
        within = f"Within the error: {size(found.nbytes)} encoded"
    yield f"{within} at {found.bits_a_value:.3f} bits a value, {proof}."


def _step_times(result: SearchResult) -> Iterator[str]:
    """Predicted steps: of the search, of uniform widths and without a network; and where fewer bits buy nothing."""
    timeline, tables = result.timeline, result.tables
    if timeline is None:
        return
    seconds = timeline.seconds(tables, result.installed)
    uniform = {width: timeline.seconds(tables, (width,) * len(tables.layers)) for width in tables.widths}
    steps = ", ".join(f"{_ms(each)} at {width} bits" for width, each in uniform.items())
    yield f"Predicted step: {_ms(seconds)}; {_ms(timeline.own)} if nothing were sent; all layers alike, {steps}."
    widest = tables.widths[-1]
    if uniform[widest] <= seconds * (1 + TELLING):
        hides = seconds <= timeline.own * (1 + TELLING)
        why = "The codes hide behind backward" if hides else "Latency and fixed costs decide"
        yield (
            f"{why}: fewer bits buy nothing here, for all layers at {widest} bits take "
            f"{percent(max(0.0, uniform[widest] / seconds - 1))} longer."
        )
        return
    hidden_L = timeline.hidden(tables, result.installed)
    if hidden_L.any():
        values = np.array(tables.numel)
        yield (
            f"Backward hides the bytes of {hidden_L.sum():,} of {len(hidden_L):,} layers, "
            f"{percent(values[hidden_L].sum() / values.sum())} of the values: fewer bits buy nothing for these."
        )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.4g} ms"


# What is installed


def _widths(result: SearchResult) -> Iterator[Sequence[str]]:
    """Layers by installed width: a line for each width, however many layers there are."""
    yield "bits", "layers", "values", "error", ""
    tables, bits_L = result.tables, np.array(result.installed)
    numel_L, error_L = np.array(tables.numel), np.array(list(result.error_by_layer().values()))
    for width in np.unique(bits_L).tolist():
        rows = np.flatnonzero(bits_L == width)
        names = ", ".join(tables.layers[row] for row in rows[:2])
        more = f" and {len(rows) - 2:,} more" if len(rows) > 2 else ""
        values = numel_L[rows].sum() / numel_L.sum()
        error = _part(tables, math.fsum(error_L[rows]), math.fsum(error_L))
        yield str(width), f"{len(rows):,}", percent(values), error, names + more


def _part(tables: Tables, error: float, total: float) -> str:
    """A share of the total error; where errors may be negative and have none, the error itself."""
    return f"{error:.3g}" if tables.measure == "loss" else percent(error / (total or 1))


def _largest(result: SearchResult) -> Iterator[str]:
    """The layers that take most bytes, and how much the others do."""
    tables = result.tables
    rows_L = np.arange(len(tables.layers))
    nbytes_L = tables.nbytes[rows_L, tables.columns(result.installed)]
    shown = np.argsort(-nbytes_L, kind="stable")[:SHOWN]
    errors = list(result.error_by_layer().values())
    total = math.fsum(errors)
    table: list[Sequence[str]] = [("layer", "values", "bits", "bytes", "error")]
    for row in shown:
        pinned = ", pinned" if tables.layers[row] in result.bounds else ""
        share = percent(nbytes_L[row] / nbytes_L.sum())
        cells = f"{tables.numel[row]:,}", str(result.installed[row]), share, _part(tables, errors[row], total)
        table.append((tables.layers[row] + pinned, *cells))
    yield "Layers of most bytes:"
    yield from aligned(table, left=1)
    if len(shown) < len(rows_L):
        rest = 1 - nbytes_L[shown].sum() / nbytes_L.sum()
        yield f"  and {len(rows_L) - len(shown):,} more, which take {percent(rest)} of the encoded bytes"


def _tradeoff(result: SearchResult, words: Mapping[str, str]) -> Iterator[str]:
    """What moves the optimum, where most of its layers are at one end of the range."""
    tables, widths = result.tables, result.tables.widths
    if result.wish.kind != "objective" or result.optimum is None or len(widths) == 1:
        return
    width, count = Counter(result.optimum.bits).most_common(1)[0]
    if width not in (widths[0], widths[-1]) or count <= BANG_BANG * len(tables.layers):
        return
    end = "largest" if width == widths[-1] else "smallest"
    averages = [tables.bits_a_value((target,) * len(tables.layers)) for target in widths[:-1]]
    yield f"The optimum has {count:,} of {len(tables.layers):,} layers at {width} bits, the {end} width."
    within = bounded(tables, result.bounds)
    cheapest = within.bits_a_value(within.bits(within.nbytes.argmin(axis=1)))
    within_reach = [average for average in averages if average >= cheapest] or [cheapest]
    middle = math.ceil(within_reach[len(within_reach) // 2] * 1e3) / 1e3
    yield (
        "Along uniform widths this objective is bang-bang. To choose the average instead, ask for it: "
        f"{_state(Wish.bits(middle), words)}."
    )
    rows = [("beta/alpha above", "gives bits/value")]
    points = ratios_for_bits(within, [average for average in averages if average >= cheapest])
    for point in sorted(set(points), key=lambda point: point.power):
        if 0 < point.power < math.inf:
            rows.append((f"{point.power:.4g}", f"{point.bits_a_value:.3f}"))
    if len(rows) > 1:
        yield "What other powers would make of the optimum:"
        yield from aligned(rows)
