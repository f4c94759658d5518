"""Files of searches, read back: `search_N.json`, of today and of before."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from .evolution import Evolved
from .knapsack import Certified
from .objective import Assignment, Objective
from .pins import as_bounds
from .run import METHODS, NAMES, SearchResult, limit_name
from .tables import Tables
from .timelines import Timed, Timeline
from .wishes import Wish

WAY_OUT = "give a search_N.json that a search wrote"


def load_search(path: str | Path) -> SearchResult:
    """The search that a `search_N.json` tells of.

    Older files hold no wish. There it is what was installed that tells it: the powers, or a budget of as many bits a
    value as the installed assignment takes.

    Raises ValueError, in one line, where the file cannot be read or tells of no search.
    """
    return search_from(read_json(path), path)


def read_json(path: str | Path) -> dict[str, Any]:
    """A file's JSON object. Raises ValueError, in one line, where it holds none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read the file ({error.strerror}); {WAY_OUT}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: the file holds no JSON; {WAY_OUT}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a search's file is a JSON object, and this one is none; {WAY_OUT}")
    return content


@contextlib.contextmanager
def naming_damage(path: str | Path) -> Iterator[None]:
    """A block that works on what a file says: ValueError, in one line, where a value is of no use to it."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: the file is damaged, {' '.join(str(error).split())}; {WAY_OUT}") from None


def search_from(content: Mapping[str, Any], path: str | Path) -> SearchResult:
    """The search that a file's content tells of; `path` is for messages."""
    if "options" in content and "widths" not in content:
        raise ValueError(f"{path}: a search among families has options in place of widths; {WAY_OUT}")
    try:
        return _search_from(content)
    except KeyError as error:
        raise ValueError(f"{path}: a search's file has an entry {error}, and this one has none; {WAY_OUT}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}; {WAY_OUT}") from None


def _search_from(content: Mapping[str, Any]) -> SearchResult:
    known = {field.name for field in fields(Tables)}
    tables = Tables(
        **{"numel": (), **{key: value for key, value in content.items() if key in known}}
        | {key: np.array(content[key]) for key in ("error", "nbytes")}
    )
    wish = _wish(content)
    name, installed = limit_name(wish), content["installed"]
    if installed["by"] not in NAMES:
        raise ValueError(f"a search installs what one of {', '.join(NAMES)} found, got {installed['by']!r}")
    if (method := content.get("method", "both")) not in METHODS:
        raise ValueError(f"a search's method is one of {', '.join(METHODS)}, got {method!r}")
    bits = tables.bits(tables.columns(installed["bits"]))
    de = optimum = certified = None
    if "de" in content:
        row = content["de"]
        best = _assignment(wish, tables, row["bits"])
        de = Evolved(best.objective, best.bits, best.log_objective, row["evaluations"], row["seconds"])
    if "optimum" in content:
        optimum = _assignment(wish, tables, content["optimum"]["bits"])
    timeline = None
    if "timeline" in content:
        timeline = Timeline.from_json(content["timeline"])
        timeline.check(tables)
    if name in content:
        row = content[name]
        found = tuple(row["bits"])
        minimized, nbytes = row.get("minimized", "error"), tables.encoded_bytes(found)
        error, average = tables.total_error(found), tables.bits_a_value(found)
        certified = Certified(error, found, average, nbytes, minimized, row["lower_bound"])
        if wish.kind == "time":
            if timeline is None:
                raise ValueError("a search for the least step time holds a timeline, and this one has none")
            certified = Timed(**vars(certified), seconds=timeline.seconds(tables, found))
    uniform = {}
    if "uniform" in content:
        objective = Objective.of(wish, tables)
        uniform = {int(width): objective((int(width),) * len(tables.layers)) for width in content["uniform"]}
    pins = {layer: (least, most) for layer, (least, most) in content.get("pins", {}).items()}
    return SearchResult(
        tables,
        wish,
        method,
        de,
        optimum,
        uniform,
        certified,
        bits,
        installed["by"],
        content.get("popsize", 5),
        content.get("iterations", 2),
        content.get("seed"),
        as_bounds(pins, tables.layers, tables.widths),
        dict(content.get("settings", {})),
        tuple(content.get("notes", ())),
        timeline,
    )


def _wish(content: Mapping[str, Any]) -> Wish:
    if "wish" in content:
        return Wish.from_json(content["wish"])
    if "budget" in content:
        return Wish.bits(content["budget"]["bits_a_value"])
    return Wish.objective(content["alpha"], content["beta"])


def _assignment(wish: Wish, tables: Tables, bits: list[int]) -> Assignment:
    return Objective.of(wish, tables).assignment(tables.bits(tables.columns(bits)))
