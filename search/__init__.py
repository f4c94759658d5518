"""Bit widths for the layers of a model: an error table, differential evolution, and the true optimum beside it.

It knows codecs by what they lose and what they send. It knows no model, no ranks and no command line.

The functions `evolve` and `optimum` share their names with the modules that hold them; as attributes of the
package the names are the functions.
"""

from search.budget import Budgeted, within_budget
from search.evolve import Evolved, evolve
from search.objective import Choice, Objective
from search.optimum import optimum
from search.steering import Landing, power_reaching
from search.tables import Tables, measure

__all__ = [
    "Budgeted",
    "Choice",
    "Evolved",
    "Landing",
    "Objective",
    "Tables",
    "evolve",
    "measure",
    "optimum",
    "power_reaching",
    "within_budget",
]
