"""Bit widths by differential evolution: the published search, on look-up tables.

It knows tables and an objective. It never sees the optimum, so that the gap between the two is a finding.
"""

import time
from dataclasses import dataclass

import numpy as np
from scipy.optimize import differential_evolution

from .objective import Assignment, Objective
from .tables import Floats, Tables


@dataclass(frozen=True)
class Evolved(Assignment):
    """The best assignment that differential evolution met, how many it looked at, and for how long."""

    evaluations: int
    seconds: float


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
    members agree, and is told not to. Raises ValueError for powers, popsize or iterations out of range.
    """
    if popsize < 1 or iterations < 0:
        raise ValueError(
            f"differential evolution needs popsize of at least 1 and iterations of at least 0, "
            f"got {popsize} and {iterations}"
        )
    objective = Objective(tables, alpha, beta)
    evaluations = 0

    def sort_key(columns_LP: Floats) -> Floats:
        nonlocal evaluations
        evaluations += columns_LP.shape[1]
        return objective.sort_key(columns_LP.T.astype(np.int64))

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
    bits = tables.bits(found.x.astype(np.int64))
    return Evolved(objective(bits), bits, evaluations, time.perf_counter() - began)
