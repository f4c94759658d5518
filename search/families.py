"""The choice among families of compressors, layer by layer: none, widths of quantizers, top-k ratios, PowerSGD ranks.

An option is a compressor with one of its settings. Tables of options are tables whose columns are options in place of
bit widths, so that the solvers are the same: their answers are numbers of columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .hulls import optimum_of
from .knapsack import Certified, within_budget, within_error
from .layout import aligned, percent, size
from .objective import Assignment, Objective
from .run import UNITS
from .tables import Tables
from .wishes import Wish

SETTING_OF = {"topk": "ratio", "powersgd": "rank", "none": None}
"""What is chosen of a compressor: of those not named here, its `bits`."""


@dataclass(frozen=True)
class Option:
    """One way for a layer to travel: a compressor's name and all of its options.

    Its text is the name and the setting, as in "eden 2", "topk 0.01", "powersgd 4" and "none".
    """

    family: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def setting(self) -> float | None:
        """The chosen one of its options, None where there is none to choose."""
        name = SETTING_OF.get(self.family, "bits")
        return None if name is None else self.options[name]

    @property
    def route(self) -> tuple[str, Mapping[str, Any]]:
        """The name and the options, as `gradwire.mixed` takes them."""
        return self.family, self.options

    def __str__(self) -> str:
        return self.family if self.setting is None else f"{self.family} {self.setting:g}"


def option_of(text: str, common: Mapping[str, Mapping[str, Any]]) -> Option:
    """The option of a text, with the options that all of its family have in common.

    Raises ValueError where it is no option of one of these families.
    """
    family, _, setting = text.partition(" ")
    name = SETTING_OF.get(family, "bits")
    try:
        if family not in common or (name is None) != (setting == ""):
            raise ValueError
        chosen = {} if name is None else {name: float(setting) if name == "ratio" else int(setting)}
    except ValueError:
        raise ValueError(
            f"an option is a family and its setting, as in 'eden 2' or 'topk 0.01', of {', '.join(common)}, "
            f"got {text!r}"
        ) from None
    return Option(family, {**common[family], **chosen})


def options_of(
    common: Mapping[str, Mapping[str, Any]], widths: Sequence[int], ratios: Sequence[float], ranks: Sequence[int]
) -> tuple[Option, ...]:
    """Every option of some families, "none" first: `common` maps them to the options that all of a family have."""
    settings: dict[str | None, Sequence[float]] = {"bits": widths, "ratio": ratios, "rank": ranks}
    options = [Option("none", common.get("none", {}))]
    for family, given in common.items():
        name = SETTING_OF.get(family, "bits")
        if name is not None:
            options += [Option(family, {**given, name: setting}) for setting in settings[name]]
    return tuple(options)


@dataclass(frozen=True, eq=False)
class OptionTables(Tables):
    """Tables whose K columns are `options`; `widths` are their numbers, and so are the bits of assignments.

    Errors are squared or roots of that, whichever `measure` says: one real encoding's where no expectation has a closed
    form. Bytes are in the unit of what a quantizer encodes, of which ranks send 2 (W - 1) / W.
    """

    options: Sequence[Option] = ()

    def _check_widths(self) -> None:
        if list(self.widths) != list(range(len(self.options))) or len(set(map(str, self.options))) < len(self.options):
            raise ValueError(
                f"columns are numbered options, each of them once, got {len(self.widths)} columns of "
                f"{', '.join(map(str, self.options)) or 'none'}"
            )
        if self.measure == "loss":
            raise ValueError("errors of families are of measure root or square, got 'loss'; choose one of these")

    def only(self, family: str) -> "OptionTables":
        """The columns of one family."""
        columns = [column for column, option in enumerate(self.options) if option.family == family]
        return replace(
            self,
            options=[self.options[column] for column in columns],
            widths=range(len(columns)),
            error=self.error[:, columns],
            nbytes=self.nbytes[:, columns],
        )

    def _columns_to_json(self) -> dict[str, Any]:
        return {"options": [str(option) for option in self.options]}

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families, in the order of their columns."""
        return tuple(dict.fromkeys(option.family for option in self.options))


@dataclass(frozen=True, eq=False)
class FamilyResult:
    """Result of a search among families.

    found      the assignment: with a certificate where the wish has a limit, else the optimum
    alone      each family's best assignment for the same wish, None where it cannot keep within the limit
    settings   what the caller says of the search, written into its file
    """

    tables: OptionTables
    wish: Wish
    found: Certified | Assignment
    alone: Mapping[str, Certified | Assignment | None]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def option_by_layer(self) -> dict[str, Option]:
        """The option of each layer."""
        options = (self.tables.options[column] for column in self.found.bits)
        return dict(zip(self.tables.layers, options, strict=True))

    def error_by_layer(self) -> dict[str, float]:
        """Each layer's error by its option."""
        errors = self.tables.error[np.arange(len(self.tables.layers)), self.tables.columns(self.found.bits)]
        return dict(zip(self.tables.layers, errors.tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers; options are their texts, `columns` of `found` in the order of `layers`."""
        tables = self.tables
        return {
            **tables.to_json(),
            "wish": self.wish.to_json(),
            "settings": dict(self.settings),
            "installed": self._plain(tables, self.found),
            "alone": {
                family: self._plain(tables.only(family), found) if found is not None else None
                for family, found in self.alone.items()
            },
        }

    @staticmethod
    def _plain(tables: OptionTables, found: Certified | Assignment) -> dict[str, Any]:
        plain = {
            "options": [str(tables.options[column]) for column in found.bits],
            "error": tables.total_error(found.bits),
            "encoded_bytes": tables.encoded_bytes(found.bits),
        }
        return plain | ({"lower_bound": found.lower_bound} if isinstance(found, Certified) else {})


def search_options(tables: OptionTables, wish: Wish, settings: Mapping[str, Any] | None = None) -> FamilyResult:
    """Choose an option for each layer: exactly, as for widths, or with a proven gap.

    An error limit is that of the quantizer whose error at that many bits is least. Raises ValueError for powers of
    errors, which sending everything as it is makes zero, and for what the tables cannot serve.
    """
    if wish.kind == "objective":
        raise ValueError(
            "powers of the error are least where nothing is encoded and the error is zero; among families ask for a "
            "number of bits, an error or a balance"
        )
    if wish.kind == "time":
        raise ValueError("the least step time is searched among bit widths; among families ask for the fewest bytes")
    limit = None
    if wish.kind == "error":
        at_width = [k for k, option in enumerate(tables.options) if "bits" in option.options]
        at_width = [k for k in at_width if tables.options[k].setting == wish.target]
        if not at_width:
            raise ValueError(
                f"a limit of error is that of a quantizer at {wish.target:g} bits, and none of the options is; search "
                "among more widths, or add a quantizer"
            )
        limit = min(tables.total_error([k] * len(tables.layers)) for k in at_width)
    if wish.kind == "balance":
        wish.check((), tables.measure)
    alone: dict[str, Certified | Assignment | None] = {}
    for family in tables.families:
        try:
            alone[family] = _solved(tables.only(family), wish, limit)
        except ValueError:  # its cheapest assignment takes more, or its best loses more
            alone[family] = None
    return FamilyResult(tables, wish, _solved(tables, wish, limit), alone, dict(settings or {}))


def _solved(tables: OptionTables, wish: Wish, limit: float | None) -> Certified | Assignment:
    if limit is not None:
        return within_error(tables, limit)
    if wish.kind == "bits":
        assert wish.target is not None
        return within_budget(tables, wish.target)
    return optimum_of(Objective.of(wish, tables))


def families_as_text(result: FamilyResult, when: int | str) -> str:
    """The search as a page: what was chosen, then each family alone under the same wish."""
    tables, found = result.tables, result.found
    every, float32 = tables.encoded_bytes(found.bits) + tables.dense_bytes, 4 * tables.values
    title = f"Search among families, epoch {when}" if isinstance(when, int) else f"Search among families, {when}"
    rows = [("", "bits/value", UNITS[tables.measure], "bytes"), _row("mixed", tables, found)]
    rows += [
        _row(family, tables.only(family), alone) if alone is not None else (family, "-", "-", "-")
        for family, alone in result.alone.items()
    ]
    chosen = [str(option) for option in result.option_by_layer().values()]
    counts = [("option", "layers", "values", "of all")]
    for text in map(str, tables.options):
        values = sum(n for n, name in zip(tables.numel, chosen, strict=True) if name == text)
        if text in chosen:
            counts.append((text, str(chosen.count(text)), f"{values:,}", percent(values / sum(tables.numel))))
    lines = [
        f"{title}: {len(tables.layers):,} layers of {sum(tables.numel):,} values, for {result.wish}",
        f"Bytes: {size(every)} a gradient, {float32 / every:.4g} times fewer than the {size(float32)} of float32.",
        *aligned(rows),
        *aligned(counts, left=1),
    ]
    if isinstance(found, Certified):
        lines.append(
            "This is the optimum." if not found.gap else f"At most {percent(found.gap)} above the least possible."
        )
    return "\n".join(lines)


def _row(name: str, tables: OptionTables, found: Certified | Assignment) -> tuple[str, ...]:
    bits, error = tables.bits_a_value(found.bits), tables.total_error(found.bits)
    return name, f"{bits:.3f}", f"{error:.4g}", size(tables.encoded_bytes(found.bits))
