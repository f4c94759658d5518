"""Bit widths for the layers of a model: an error table, differential evolution, and the true optimum beside it.

It knows codecs by what they lose and what they send. It knows no model and no ranks.

The functions `evolve`, `optimum` and `plot` share their names with the modules that hold them; as attributes of
the package the names are the functions.
"""

from search.budget import Budgeted, hold_budget, within_budget
from search.evolve import Evolved, evolve
from search.objective import Choice, Objective
from search.optimum import optimum
from search.plot import plot
from search.report import as_text, write_logs
from search.run import SearchResult, search
from search.scheme import load_scheme
from search.steering import Landing, power_reaching
from search.tables import Tables, measure

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
