"""Baselines of the search: all keep the budget, and none beats what is proven to be the least."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.search_baselines import BASELINES, clustered, discretized, greedy, linear_in_size, priced, table
from search import Tables, within_budget
from tests.support.table_examples import fifty_layers, small_tables

EVERY_MEASURE = st.sampled_from(["root", "square", "loss"]).flatmap(lambda measure: small_tables(measure=measure))
every_baseline = pytest.mark.parametrize("name", BASELINES)


def two_layers() -> Tables:
    """A large layer that loses little, and a small one that loses much, at 2, 4 and 8 bits."""
    return Tables(
        ["large", "small"], [2, 4, 8], [[4, 1, 0.1], [40, 10, 1]], [[40, 80, 160], [4, 8, 16]], 0, 176, [160, 16]
    )


@every_baseline
@settings(deadline=None, max_examples=200)
@given(tables=EVERY_MEASURE, fraction=st.floats(0, 1))
def test_no_baseline_beats_the_exact_solution_and_all_keep_the_budget(
    name: str, tables: Tables, fraction: float
) -> None:
    least, most = (
        8 * of_L.sum() / sum(tables.numel) for of_L in (tables.nbytes.min(axis=1), tables.nbytes.max(axis=1))
    )
    budget = max(float(least), float(least + fraction * (most - least)))
    bits = BASELINES[name](tables, budget)
    assert tables.bits_a_value(bits) <= budget
    assert tables.total_error(bits) >= within_budget(tables, budget).lower_bound - 1e-12 * np.abs(tables.error).sum()


@every_baseline
@pytest.mark.parametrize("budget", [2.3, 3.1, 4.5, 6.0])
def test_on_many_layers_no_baseline_is_below_the_bound(name: str, budget: float) -> None:
    tables, best = fifty_layers(), within_budget(fifty_layers(), budget)
    bits = BASELINES[name](tables, budget)
    assert tables.bits_a_value(bits) <= budget
    assert best.lower_bound <= tables.total_error(bits) < tables.total_error((2,) * len(tables.layers))


@every_baseline
def test_a_budget_of_everything_loses_least_and_one_of_nothing_is_refused(name: str) -> None:
    tables = two_layers()
    assert BASELINES[name](tables, 8.0) == (8, 8)
    assert BASELINES[name](tables, 2.0) == (2, 2)
    with pytest.raises(
        ValueError, match=r"a budget must hold the cheapest assignment, 2 bits a value, got 1\.5; raise it"
    ):
        BASELINES[name](tables, 1.5)


def test_those_that_look_at_errors_are_close_to_the_least() -> None:
    tables = fifty_layers()
    for budget in (2.5, 3.5, 5.0):
        least = within_budget(tables, budget).lower_bound
        for solve in (discretized, priced, greedy):
            assert tables.total_error(solve(tables, budget)) < 1.05 * least


def test_finer_steps_of_errors_come_closer() -> None:
    tables = fifty_layers()
    coarse, fine = (tables.total_error(discretized(tables, 3.5, levels)) for levels in (50, 20_000))
    assert fine < coarse


def test_small_layers_get_more_bits_of_the_linear_rule() -> None:
    assert linear_in_size(two_layers(), 3.0) == (2, 8)
    tables = fifty_layers()
    bits = np.array(linear_in_size(tables, 4.0))[np.argsort(tables.numel)]
    assert (np.diff(bits) <= 0).all()
    assert len(set(bits.tolist())) > 2


def test_layers_of_one_size_and_norm_get_one_width_of_k_means() -> None:
    tables = two_layers()
    doubled = replace(
        tables,
        layers=["a", "b", "c", "d"],
        error=np.repeat(tables.error, 2, axis=0),
        nbytes=np.repeat(tables.nbytes, 2, axis=0),
        numel=np.repeat(tables.numel, 2).tolist(),
    )
    assert clustered(doubled, 3.0) == (2, 2, 4, 4)


def test_the_table_has_a_row_for_each_and_the_exact_one_first() -> None:
    lines = list(table(fifty_layers(), 3.5, 1))
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| exact", *(f"| {name}" for name in BASELINES)]
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].split(" | ")[2] == "0.000 %"
