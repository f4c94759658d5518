"""Pins: layers whose widths are given, or bounded, before a search begins.

A pinned layer takes part like any other. In its row of the tables, a width beyond the bounds counts as the nearest
one within, so that no solver has to know of bounds; what it chose is then moved into them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from re import fullmatch

import numpy as np

from .tables import Ints, Tables

Bounds = tuple[int, int]
Pins = Mapping[str, int | Bounds]


def resolve_pins(pins: Sequence[str], layers: Sequence[str], widths: Sequence[int]) -> dict[str, Bounds]:
    """Layer name -> its least and largest width, from patterns like "fc.*=8" and "layer1.*=4-8".

    `*`, `?` and `[...]` match as in file names, and case counts. Where several patterns match a layer, the last one
    holds. Raises ValueError where a pattern matches nothing, a width is none of `widths`, or the text is malformed.
    """
    bounds: dict[str, Bounds] = {}
    for text in pins:
        pattern, _, given = text.rpartition("=")
        if not pattern or not fullmatch("[0-9]+(-[0-9]+)?", given):
            raise ValueError(
                f"a pin is PATTERN=BITS or PATTERN=LEAST-MOST, as in fc.*=8 or fc.*=4-8, got {text!r}; "
                f"{_there_are(layers)}"
            )
        least, most = (int(given.split("-")[end]) for end in (0, -1))
        matched = [name for name in layers if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"the pin {text!r} matches no compressed layer; {_there_are(layers)}")
        _check_bounds(f"the pin {text!r}", (least, most), widths, f"; {_there_are(layers)}")
        bounds |= dict.fromkeys(matched, (least, most))
    return bounds


def as_bounds(pins: Pins | None, layers: Sequence[str], widths: Sequence[int]) -> dict[str, Bounds]:
    """Least and largest width of each pinned layer. Raises ValueError for unknown layers and widths."""
    bounds = {name: (given, given) if isinstance(given, int) else given for name, given in (pins or {}).items()}
    known = set(layers)
    for name, given in bounds.items():
        if name not in known:
            raise ValueError(f"pins must be of compressed layers, got one of {name}; {_there_are(layers)}")
        _check_bounds(f"the pin of {name}", given, widths, "")
    return bounds


def column_bounds(tables: Tables, bounds: Mapping[str, Bounds]) -> tuple[Ints, Ints]:
    """Every layer's least and largest column of the tables [L]."""
    low_L = np.zeros(len(tables.layers), dtype=np.int64)
    high_L = np.full(len(tables.layers), len(tables.widths) - 1)
    if bounds:
        row_of = {name: row for row, name in enumerate(tables.layers)}
        for name, (least, most) in bounds.items():
            low_L[row_of[name]], high_L[row_of[name]] = tables.widths.index(least), tables.widths.index(most)
    return low_L, high_L


def bounded(tables: Tables, bounds: Mapping[str, Bounds]) -> Tables:
    """The tables in which a width beyond a layer's bounds counts as the nearest one within."""
    if not bounds:
        return tables
    low_L, high_L = column_bounds(tables, bounds)
    nearest_LK = np.clip(np.arange(len(tables.widths)), low_L[:, None], high_L[:, None])
    return replace(
        tables,
        error=np.take_along_axis(tables.error, nearest_LK, axis=1),
        nbytes=np.take_along_axis(tables.nbytes, nearest_LK, axis=1),
    )


def moved_into(tables: Tables, bounds: Mapping[str, Bounds], bits: Sequence[int]) -> tuple[int, ...]:
    """An assignment of the bounded tables, with every width within its layer's bounds."""
    if not bounds:
        return tuple(bits)
    return tables.bits(np.clip(tables.columns(bits), *column_bounds(tables, bounds)))


def _check_bounds(what: str, bounds: Bounds, widths: Sequence[int], way_out: str) -> None:
    least, most = bounds
    if least > most:
        raise ValueError(f"{what} has its bounds reversed, {least} above {most}; write {most}-{least}{way_out}")
    for width in bounds:
        if width not in widths:
            raise ValueError(f"{what} must be within the widths {', '.join(map(str, widths))}, got {width}{way_out}")


def _there_are(layers: Sequence[str], most: int = 8) -> str:
    more = f" and {len(layers) - most} more" if len(layers) > most else ""
    return f"there are {', '.join(layers[:most])}{more}"
