"""Bit widths for the layers of a model: an error table, differential evolution, and the true optimum beside it.

It knows codecs by what they lose and what they send. It knows no model and no ranks.
"""

from .budget import Budgeted, check_budget, within_budget
from .evolution import Evolved, evolve
from .hulls import optimum
from .objective import Assignment, Objective
from .plotting import plot
from .report import as_text, write_logs
from .run import SearchResult, search
from .scheme import load_scheme
from .tables import Tables, measure
from .tradeoff import Breakpoint, ratio_for_bits

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
    "measure",
    "optimum",
    "plot",
    "ratio_for_bits",
    "search",
    "within_budget",
    "write_logs",
]
