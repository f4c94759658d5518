"""Bit widths for the layers of a model: an error table, differential evolution, and the true optimum beside it.

It knows codecs by their errors and their bytes. It knows no model and no ranks.

Names are loaded when they are used: importing this package loads nothing that is heavy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budget import Budgeted, check_budget, within_budget
    from .evolution import Evolved, evolve
    from .hulls import optimum
    from .objective import Assignment, Objective
    from .plotting import plot
    from .report import as_text, logs
    from .run import SearchResult, search
    from .scheme import load_scheme
    from .tables import Tables, measure
    from .tradeoff import Breakpoint, ratio_for_bits

_MODULE_OF = {
    "Assignment": "objective",
    "Breakpoint": "tradeoff",
    "Budgeted": "budget",
    "Evolved": "evolution",
    "Objective": "objective",
    "SearchResult": "run",
    "Tables": "tables",
    "as_text": "report",
    "check_budget": "budget",
    "evolve": "evolution",
    "load_scheme": "scheme",
    "logs": "report",
    "measure": "tables",
    "optimum": "hulls",
    "plot": "plotting",
    "ratio_for_bits": "tradeoff",
    "search": "run",
    "within_budget": "budget",
}

__all__ = [
    "Assignment",
    "Breakpoint",
    "Budgeted",
    "Evolved",
    "Objective",
    "SearchResult",
    "Tables",
    "as_text",
    "check_budget",
    "evolve",
    "load_scheme",
    "logs",
    "measure",
    "optimum",
    "plot",
    "ratio_for_bits",
    "search",
    "within_budget",
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
