import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import within_budget
from tests.support.table_examples import every_assignment, fifty_layers, small_tables


@settings(deadline=None, max_examples=400)
@given(small_tables(), st.floats(0, 1))
def test_the_least_error_within_a_budget_is_the_least_of_all_that_fit(tables, fraction):
    error, nbytes, _ = every_assignment(tables)
    bits_a_value = 8 * nbytes / sum(tables.numel)
    budget = float(bits_a_value.min() * (1 - fraction) + bits_a_value.max() * fraction)
    budget = max(budget, float(bits_a_value.min()))
    found = within_budget(tables, budget)
    assert found.error == pytest.approx(error[bits_a_value <= budget].min(), rel=1e-12, abs=0)
    assert found.error == tables.total_error(found.bits) == found.lower_bound
    assert found.gap == 0
    assert found.bits_a_value == tables.bits_a_value(found.bits) <= budget


@settings(deadline=None, max_examples=300)
@given(small_tables(), st.integers(0, 1023), st.integers(1, 3))
def test_the_certificate_holds_however_few_assignments_go_on(tables, pick, frontier):
    error, nbytes, assignments = every_assignment(tables)
    pick %= len(error)
    budget = tables.bits_a_value(assignments[pick].tolist())
    best = error[nbytes <= nbytes[pick]].min()
    found = within_budget(tables, budget, frontier)
    assert found.lower_bound <= best * (1 + 1e-12)
    assert best <= found.error * (1 + 1e-12)
    assert found.bits_a_value <= budget


def test_a_narrow_frontier_admits_what_it_does_not_know():
    gaps = [within_budget(fifty_layers(seed), 4.0, frontier=1).gap for seed in range(5)]
    assert all(0 <= gap < 0.05 for gap in gaps)
    assert max(gaps) > 0


@pytest.mark.parametrize("budget", [2.2, 3.0, 4.0, 5.5, 7.9])
def test_fifty_layers_are_solved_to_the_optimum(budget):
    found = within_budget(fifty_layers(), budget)
    assert found.gap == 0
    assert budget - 0.01 < found.bits_a_value <= budget


def test_scales_count_so_that_four_bits_take_more_than_a_budget_of_four():
    tables = fifty_layers()
    found = within_budget(
        replace(tables, widths=[4], error=tables.error[:, 2:3], nbytes=tables.nbytes[:, 2:3]), 4.13
    )
    assert 4.12 < found.bits_a_value < 4.13
    assert set(found.bits) == {4}


def test_an_impossible_budget_names_the_least_possible_one():
    tables = fifty_layers()
    with pytest.raises(
        ValueError, match=r"the cheapest assignment, .* bits a value with its scales, got 1;"
    ) as caught:
        within_budget(tables, 1.0)
    named = float(re.search(r"assignment, ([\d.]+) bits", str(caught.value)).group(1))
    assert within_budget(tables, named).bits == (2,) * 54


@pytest.mark.parametrize("budget", [0.0, -4.0, math.nan, math.inf])
def test_a_budget_is_a_finite_number_above_zero(budget):
    with pytest.raises(
        ValueError, match=f"a budget must be a finite number of bits a value above 0, got {budget}"
    ):
        within_budget(fifty_layers(), budget)


def test_a_budget_needs_the_layers_sizes():
    with pytest.raises(ValueError, match="got Tables without numel"):
        within_budget(replace(fifty_layers(), numel=()), 4.0)
