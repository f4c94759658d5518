"""Bit widths for the layers of a model: an error table, differential evolution, and the true optimum beside it.

It knows codecs by their errors and their bytes. It knows no model, and ranks only where it is given an exchange.

Names are loaded when they are used: importing this package loads nothing that is heavy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checking import false_claims
    from .comparison import compare
    from .evolution import Evolved, evolve
    from .exchanges import check_search, option_tables, search_exchange, search_families
    from .families import FamilyResult, Option, OptionTables, families_as_text, option_of, options_of, search_options
    from .fronts import Front, front
    from .hulls import optimum
    from .knapsack import Certified, within_budget, within_error
    from .objective import Assignment, Objective
    from .pins import resolve_pins
    from .plotting import plot, plot_bits_over_time, plot_front
    from .report import as_text, family_logs, logs
    from .run import SearchResult, search
    from .saved import load_search
    from .scheme import families_in, load_options, load_scheme
    from .tables import Tables, measure
    from .timelines import Timed, Timeline, soonest
    from .tradeoff import Breakpoint, ratio_for_bits
    from .wishes import Wish

_MODULE_OF = {
    "Assignment": "objective",
    "Breakpoint": "tradeoff",
    "Certified": "knapsack",
    "Evolved": "evolution",
    "FamilyResult": "families",
    "Front": "fronts",
    "Objective": "objective",
    "Option": "families",
    "OptionTables": "families",
    "SearchResult": "run",
    "Tables": "tables",
    "Timed": "timelines",
    "Timeline": "timelines",
    "Wish": "wishes",
    "as_text": "report",
    "check_search": "exchanges",
    "compare": "comparison",
    "evolve": "evolution",
    "false_claims": "checking",
    "families_as_text": "families",
    "families_in": "scheme",
    "family_logs": "report",
    "front": "fronts",
    "load_options": "scheme",
    "load_scheme": "scheme",
    "load_search": "saved",
    "logs": "report",
    "measure": "tables",
    "optimum": "hulls",
    "option_of": "families",
    "option_tables": "exchanges",
    "options_of": "families",
    "plot": "plotting",
    "plot_bits_over_time": "plotting",
    "plot_front": "plotting",
    "ratio_for_bits": "tradeoff",
    "resolve_pins": "pins",
    "search": "run",
    "search_exchange": "exchanges",
    "search_families": "exchanges",
    "search_options": "families",
    "soonest": "timelines",
    "within_budget": "knapsack",
    "within_error": "knapsack",
}

__all__ = [
    "Assignment",
    "Breakpoint",
    "Certified",
    "Evolved",
    "FamilyResult",
    "Front",
    "Objective",
    "Option",
    "OptionTables",
    "SearchResult",
    "Tables",
    "Timed",
    "Timeline",
    "Wish",
    "as_text",
    "check_search",
    "compare",
    "evolve",
    "false_claims",
    "families_as_text",
    "families_in",
    "family_logs",
    "front",
    "load_options",
    "load_scheme",
    "load_search",
    "logs",
    "measure",
    "optimum",
    "option_of",
    "option_tables",
    "options_of",
    "plot",
    "plot_bits_over_time",
    "plot_front",
    "ratio_for_bits",
    "resolve_pins",
    "search",
    "search_exchange",
    "search_families",
    "search_options",
    "soonest",
    "within_budget",
    "within_error",
]


if not TYPE_CHECKING:  # else every name, misspelled ones too, would be one of the package's

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"`{name}` needs {error.name}: install it, or gradwire[search], which brings it", name=error.name
            ) from error
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
