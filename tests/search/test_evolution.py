from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import Objective, Tables, evolve, optimum
from search import objective as objective_module
from tests.support.table_examples import fifty_layers, many_layers, small_tables

ALIKE = Tables(["a", "b", "c"], [2, 4], np.ones((3, 2)), np.ones((3, 2)), dense_bytes=0, values=8, numel=[2, 2, 2])


def numbers(count, widths):
    """Tables of `count` layers in which nothing is like anything else."""
    cells = np.arange(1, 1 + count * widths).reshape(count, widths)
    return Tables([str(row) for row in range(count)], range(1, 1 + widths), 1 / cells, cells, 0, 100)


@pytest.mark.parametrize(("popsize", "iterations"), [(5, 2), (2, 0), (3, 7)])
@pytest.mark.parametrize("tables", [numbers(4, 3), numbers(20, 8), ALIKE, replace(ALIKE, error=np.zeros((3, 2)))])
def test_exactly_popsize_by_layers_by_generations_are_evaluated(monkeypatch, tables, popsize, iterations):
    seen = []
    rank = Objective.sort_key

    def counted(self, choices):
        seen.append(len(choices))
        return rank(self, choices)

    monkeypatch.setattr(Objective, "sort_key", counted)
    found = evolve(tables, 0.5, 0.5, popsize, iterations, seed=0)
    assert found.evaluations == sum(seen) == popsize * len(tables.layers) * (iterations + 1)


def test_a_population_has_at_least_five_members():
    assert evolve(numbers(2, 3), 0.5, 0.5, popsize=1, iterations=3, seed=0).evaluations == 5 * 4


@settings(deadline=None, max_examples=60)
@given(small_tables(), st.sampled_from([0.5, 2.0]), st.integers(0, 3))
def test_evolution_reports_its_assignments_objective_and_never_beats_the_optimum(tables, beta, seed):
    found = evolve(tables, 0.5, beta, popsize=2, iterations=1, seed=seed)
    assert found.objective == Objective(tables, 0.5, beta)(found.bits)
    assert found.objective >= optimum(tables, 0.5, beta).objective * (1 - 1e-12)
    assert found.seconds > 0


def test_the_same_seed_finds_the_same_and_another_seed_something_else():
    found = [evolve(fifty_layers(), 0.5, 0.5, seed=seed).bits for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]


def test_small_problems_are_solved():
    tables = numbers(3, 4)
    assert evolve(tables, 0.5, 0.5, popsize=20, iterations=20, seed=0).bits == optimum(tables, 0.5, 0.5).bits


def test_on_fifty_layers_evolution_stays_far_above_the_optimum():
    tables = fifty_layers()
    found = evolve(tables, 0.5, 0.5, seed=0)
    assert found.objective > 1.2 * optimum(tables, 0.5, 0.5).objective


def test_more_generations_find_something_better():
    tables = fifty_layers()
    short, long = (evolve(tables, 0.5, 0.5, 5, iterations, seed=0) for iterations in (0, 20))
    assert long.objective < short.objective


def test_evolution_looks_populations_up_in_blocks(monkeypatch):
    whole = evolve(fifty_layers(), 0.5, 0.5, seed=0)
    monkeypatch.setattr(objective_module, "BLOCK", 100)
    assert evolve(fifty_layers(), 0.5, 0.5, seed=0).bits == whole.bits


def test_a_population_above_a_gibibyte_is_refused_with_a_way_out():
    tables = many_layers(20_000)
    with pytest.raises(
        ValueError, match=r"5 members for each of 20,000 layers take 14\.9 GiB; use the exact method, or"
    ):
        evolve(tables, 0.5, 0.5)


def test_of_widths_without_error_the_cheapest_is_found():
    tables = Tables(["only"], [2, 4, 8], [[0, 0, 1]], [[9, 5, 1]], dense_bytes=0, values=4)
    assert evolve(tables, 0.5, 5.0, popsize=20, iterations=5, seed=0).bits == (4,)


def test_a_single_layer_with_a_single_width_is_legal():
    tables = Tables(["only"], [3], [[2.0]], [[8]], dense_bytes=0, values=4)
    assert evolve(tables, 1.0, 1.0, seed=0).bits == (3,)


@pytest.mark.parametrize(("popsize", "iterations"), [(0, 2), (5, -1)])
def test_an_empty_population_and_negative_generations_are_refused(popsize, iterations):
    with pytest.raises(ValueError, match=f"popsize of at least 1 and .* got {popsize} and {iterations}"):
        evolve(ALIKE, 0.5, 0.5, popsize, iterations)
