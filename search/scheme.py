"""Schemes: files that say which layers travel at which bit width, written by a search and read back.

A scheme is a JSON object of widths to lists of layer names, with "32" for layers that are not compressed:
{"4": ["layer1.0.conv1.weight", "fc.weight"], "32": ["bn1.weight"]}. One of several families has options in place of
widths: {"eden 3": ["layer1.0.conv1.weight"], "topk 0.01": ["fc.weight"], "32": ["bn1.weight"]}.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .families import Option, option_of

Value = TypeVar("Value")

UNCOMPRESSED = "32"
WIDTHS = tuple(str(bits) for bits in range(1, 9))


def scheme_of(bits_by_layer: Mapping[str, int], uncompressed: Collection[str]) -> dict[str, list[str]]:
    """A scheme from the compressed layers' widths and the names of everything else."""
    widths = sorted(set(bits_by_layer.values()))
    scheme = {str(width): [name for name, bits in bits_by_layer.items() if bits == width] for width in widths}
    return {**scheme, UNCOMPRESSED: list(uncompressed)}


def load_scheme(
    path: str | Path, compressed: Collection[str], parameters: Collection[str] | None = None
) -> dict[str, int]:
    """Bit widths of the compressed layers from a scheme, in the order of `compressed`.

    compressed  names that need a width
    parameters  names of all parameters of the model; the scheme need not list those that are not compressed. Without
                them, any name may stand under 32

    Raises ValueError, in one line, where the file cannot be read, is no scheme, or does not fit the model.
    """

    def bits_of(width: str) -> int:
        if width not in (*WIDTHS, UNCOMPRESSED):
            raise ValueError(f"a width is 1 to 8 bits, or 32 for what is not compressed, got {width!r}")
        return int(width)

    return _by_name(path, compressed, parameters, bits_of, "1 to 8")


def scheme_of_options(option_by_layer: Mapping[str, Option], uncompressed: Collection[str]) -> dict[str, list[str]]:
    """A scheme from the compressed layers' options and the names of everything else."""
    scheme: dict[str, list[str]] = {}
    for name, option in option_by_layer.items():
        scheme.setdefault(str(option), []).append(name)
    return {**scheme, UNCOMPRESSED: list(uncompressed)}


def families_in(path: str | Path) -> tuple[str, ...]:
    """Names of the families in a scheme, in its order; none in one of widths.

    Raises ValueError, in one line, where the file cannot be read or is no scheme.
    """
    texts = (text for text, _ in _entries(Path(path)) if not text.isdecimal())
    return tuple(dict.fromkeys(text.partition(" ")[0] for text in texts))


def load_options(
    path: str | Path,
    compressed: Collection[str],
    common: Mapping[str, Mapping[str, Any]],
    parameters: Collection[str] | None = None,
) -> dict[str, Option]:
    """Likewise the options of the compressed layers from a scheme of families, with what each family has in `common`.

    Raises ValueError likewise.
    """

    def option(text: str) -> Option | None:
        return None if text == UNCOMPRESSED else option_of(text, common)

    options = _by_name(path, compressed, parameters, option, "an option")
    return {name: each for name, each in options.items() if each is not None}


def _by_name(
    path: str | Path,
    compressed: Collection[str],
    parameters: Collection[str] | None,
    value_of: Callable[[str], Value],
    under: str,
) -> dict[str, Value]:
    """What `value_of` makes of the key of every compressed layer, in the order of `compressed`."""
    by_name: dict[str, Value] = {}
    for width, names in _entries(Path(path)):
        try:
            value = value_of(width)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: width {width} needs a list of layer names, got {json.dumps(names)[:60]}")
        for name in names:
            _check_name(path, name, width, name in by_name, compressed, parameters)
            by_name[name] = value
    missing = [name for name in compressed if name not in by_name]
    if missing:
        raise ValueError(
            f"{path}: a scheme gives every compressed layer a width, but {_these(missing)} has none; "
            f"add it under {under}, or search again with this model and bucket size"
        )
    return {name: by_name[name] for name in compressed}


def _entries(path: Path) -> tuple[tuple[str, Any], ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(
            f"{path}: cannot read the scheme ({reason}); give a compress_scheme_N.json that a search wrote"
        ) from None
    try:
        # Pairs instead of a dict, which would keep the last of two entries and hide the first.
        entries = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, tuple):
        raise ValueError(
            f"{path}: a scheme is a JSON object of widths to lists of layer names, and this file is none; "
            f"give a compress_scheme_N.json that a search wrote"
        )
    return entries


def _check_name(
    path: str | Path,
    name: str,
    width: str,
    seen: bool,
    compressed: Collection[str],
    parameters: Collection[str] | None,
) -> None:
    if seen:
        raise ValueError(f"{path}: a layer has one width, but {name} is listed twice; remove one")
    others_count = parameters is None and width == UNCOMPRESSED
    if not others_count and name not in (compressed if parameters is None else parameters):
        raise ValueError(
            f"{path}: the model has no layer {name} (width {width}); remove it, or give the scheme of this model"
        )
    if width == UNCOMPRESSED and name in compressed:
        raise ValueError(f"{path}: {name} is compressed, and width 32 is for what is not; give it 1 to 8 bits")
    if width != UNCOMPRESSED and name not in compressed:
        raise ValueError(f"{path}: {name} is not compressed and has no width, got {width}; move it to 32, or remove it")


def _these(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
