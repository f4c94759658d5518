"""Bit widths by differential evolution: the published search, on look-up tables.

It knows tables and an objective. It never sees the optimum, so that the gap between the two is a finding.
"""

import time
from dataclasses import dataclass

import numpy as np
from scipy.optimize import differential_evolution

from .objective import Assignment, Objective
from .tables import Floats, Tables

POPULATION_LIMIT = 1 << 30  # bytes of one population; scipy holds a few of them at a time


@dataclass(frozen=True)
class Evolved(Assignment):
    """The best assignment that differential evolution met, how many it looked at, and for how long."""

    evaluations: int
    seconds: float


def population_nbytes(tables: Tables, popsize: int) -> int:
    """Bytes of a population of float64: max(5, popsize * L) members of L layers."""
    return 8 * max(5, popsize * len(tables.layers)) * len(tables.layers)


def check_population(popsize: int, iterations: int) -> None:
    """Raise ValueError where there would be no population, or a negative number of generations."""
    if popsize < 1 or iterations < 0:
        raise ValueError(
            f"differential evolution needs popsize of at least 1 and iterations of at least 0, "
            f"got {popsize} and {iterations}"
        )


def evolve(
    tables: Tables, alpha: float, beta: float, popsize: int = 5, iterations: int = 2, seed: int | None = None
) -> Evolved:
    """Minimize E^alpha C^beta with scipy's differential evolution (Storn and Price 1997).

    scipy's defaults hold for the strategy, the mutation, the recombination and the Latin hypercube it starts
    from. The variables are integers, a column of the tables for each layer; one call evaluates a generation.

    popsize     members per layer; scipy keeps at least 5 members in all
    iterations  generations after the first population
    seed        the same seed, the same assignment; None draws one

    Exactly max(5, popsize * L) * (iterations + 1) assignments are evaluated: scipy would stop early where the
    members agree, and is told not to. Raises ValueError for powers, popsize or iterations out of range, and for a
    population above 1 GiB.
    """
    return evolve_objective(Objective(tables, alpha, beta), popsize, iterations, seed)


def evolve_objective(objective: Objective, popsize: int, iterations: int, seed: int | None) -> Evolved:
    """Minimize any objective as `evolve` does."""
    check_population(popsize, iterations)
    tables = objective.tables
    if population_nbytes(tables, popsize) > POPULATION_LIMIT:
        raise ValueError(
            f"differential evolution may take a population of 1 GiB, and {popsize} members for each of "
            f"{len(tables.layers):,} layers take {population_nbytes(tables, popsize) / 2**30:.1f} GiB; "
            "use the exact method, or a smaller popsize"
        )
    evaluations = 0

    def sort_key(columns_LP: Floats) -> Floats:
        nonlocal evaluations
        evaluations += columns_LP.shape[1]
        return objective.sort_key(columns_LP.T)

    began = time.perf_counter()
    found = differential_evolution(
        sort_key,
        bounds=[(0, len(tables.widths) - 1)] * len(tables.layers),
        integrality=True,
        vectorized=True,
        updating="deferred",
        polish=False,
        popsize=popsize,
        maxiter=iterations,
        tol=0,
        atol=-1,  # the spread of the population's energies is never below it: no early stop
        rng=seed,
    )
    best = objective.assignment(tables.bits(found.x.astype(np.int64)))
    seconds = time.perf_counter() - began
    return Evolved(best.objective, best.bits, best.log_objective, evaluations, seconds)
