"""Bit widths for the layers of a model: an error table, differential evolution, and the true optimum beside it.

It knows codecs by what they lose and what they send. It knows no model and no ranks.
"""

from .budget import Budgeted, hold_budget, within_budget
from .evolution import Evolved, evolve
from .hulls import optimum
from .objective import Choice, Objective
from .plotting import plot
from .report import as_text, write_logs
from .run import SearchResult, search
from .scheme import load_scheme
from .steering import Landing, power_reaching
from .tables import Tables, measure

__all__ = [
    "Budgeted",
    "Choice",
    "Evolved",
    "Landing",
    "Objective",
    "SearchResult",
    "Tables",
    "as_text",
    "evolve",
    "hold_budget",
    "load_scheme",
    "measure",
    "optimum",
    "plot",
    "power_reaching",
    "search",
    "within_budget",
    "write_logs",
]
