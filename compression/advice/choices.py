"""Choices: every compressor of the registry at its usual settings, flat and in two levels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..registry import COMPRESSORS, Compressor, Row, build

WIDTHS = (1, 2, 3, 4, 8)
"""Bits that are tried of compressors which have a choice."""


@dataclass(frozen=True)
class Choice:
    """One way for gradients to travel: a compressor with its options, in one level or two."""

    compressor: Compressor
    hierarchical: bool = False

    @property
    def codec(self) -> str:
        """The name of its speed and of its error, which the levels do not change."""
        compressor = self.compressor
        if compressor.name == "none":
            return str(compressor.options.dense_dtype)
        words = [compressor.name]
        for name in ("bits", "ratio", "rank"):
            if name in compressor.option_values:
                words.append(f"{name} {compressor.option_values[name]:g}")
        return ", ".join(words)

    @property
    def encodes(self) -> bool:
        """Whether it sends codes: neither float32 nor bfloat16 as they are."""
        return COMPRESSORS[self.compressor.name].encodes

    @property
    def given(self) -> dict[str, Any]:
        """Its options that are no defaults."""
        options = self.compressor.options
        values = {each.name: getattr(options, each.name) for each in fields(options)}
        return {each.name: values[each.name] for each in fields(options) if values[each.name] != each.default}

    def __str__(self) -> str:
        return f"{self.codec}, two levels" if self.hierarchical else self.codec


def choices(
    two_levels: bool = False, *, all_reduces_bfloat16: bool = True, rows: Mapping[str, Row] = COMPRESSORS
) -> list[Choice]:
    """All choices, the simplest first: float32, bfloat16, then the others as the registry lists them.

    Error feedback is on where a compressor takes it. What sends neither codes nor rounded values is left out, as it is
    for looking at gradients, or none. `two_levels`: whether there are hosts of several ranks each.
    `all_reduces_bfloat16`: whether the network adds up bfloat16.
    """
    found = []
    for name, row in rows.items():
        for options in settings(row):
            if options.get("dense_dtype") == "bfloat16" and not all_reduces_bfloat16:
                continue
            choice = Choice(build(name, **options))
            found.append(choice)
            if two_levels and choice.compressor.encodes:
                found.append(Choice(choice.compressor, hierarchical=True))
    return sorted(found, key=lambda choice: choice.encodes)  # stable


def settings(row: Row, widths: Sequence[int] = WIDTHS) -> Iterator[dict[str, Any]]:
    """The usual options of a compressor, those that differ from its defaults."""
    if not row.encodes:
        if "dense_dtype" in row.takes:
            yield from ({}, {"dense_dtype": "bfloat16"})
        return
    common = {"error_feedback": True} if "error_feedback" in row.takes and not row.needs_feedback else {}
    if not row.has_bits:
        yield common
        return
    yield from ({"bits": bits, **common} for bits in widths if bits >= row.min_bits)
