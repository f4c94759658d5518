import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import Tables, knapsack, within_budget, within_error
from tests.support.table_examples import every_assignment, fifty_layers, many_layers, small_tables

EVERY_MEASURE = st.sampled_from(["root", "square", "loss"]).flatmap(lambda measure: small_tables(measure=measure))


def exact_errors(tables, assignments):
    """Total errors, rounded once."""
    return np.array([tables.total_error(bits) for bits in assignments.tolist()])


@settings(deadline=None, max_examples=400)
@given(EVERY_MEASURE, st.floats(0, 1))
def test_the_least_error_within_a_budget_is_the_least_of_all_that_fit(tables, fraction):
    error, nbytes, _ = every_assignment(tables)
    bits_a_value = 8 * nbytes / sum(tables.numel)
    budget = float(bits_a_value.min() * (1 - fraction) + bits_a_value.max() * fraction)
    budget = max(budget, float(bits_a_value.min()))
    found = within_budget(tables, budget)
    room = 1e-12 * np.abs(tables.error).sum() * (tables.error.min() < 0)  # where errors of both signs may cancel
    assert found.error == pytest.approx(error[bits_a_value <= budget].min(), rel=1e-12, abs=room)
    assert found.error == tables.total_error(found.bits) == found.lower_bound
    assert found.gap == 0
    assert found.bits_a_value == tables.bits_a_value(found.bits) <= budget


@settings(deadline=None, max_examples=400)
@given(EVERY_MEASURE, st.integers(0, 1023))
def test_the_fewest_bytes_within_an_error_are_the_fewest_of_all_that_keep_it(tables, pick):
    _, nbytes, assignments = every_assignment(tables)
    error = exact_errors(tables, assignments)
    limit = float(error[pick % len(error)])
    found = within_error(tables, limit)
    assert found.error == tables.total_error(found.bits) <= limit
    rounding = 1e-12 * np.abs(tables.error).sum()
    assert nbytes[error <= limit].min() <= found.nbytes <= nbytes[error <= limit - rounding].min(initial=2**60)
    assert found.lower_bound <= nbytes[error <= limit].min() + 1e-9
    assert found.nbytes == tables.encoded_bytes(found.bits)
    assert found.minimized == "nbytes"


@settings(deadline=None, max_examples=200)
@given(small_tables(), st.data())
def test_whole_errors_are_kept_exactly(tables, data):
    whole = st.lists(st.integers(-3, 5).map(float), min_size=tables.error.size, max_size=tables.error.size)
    tables = replace(tables, error=np.reshape(data.draw(whole), tables.error.shape), measure="loss")
    error, nbytes, _ = every_assignment(tables)
    limit = float(data.draw(st.sampled_from(sorted(set(error.tolist())))))
    found = within_error(tables, limit)
    assert found.nbytes == nbytes[error <= limit].min() == found.lower_bound


def test_an_error_above_the_limit_by_the_least_that_a_float_can_is_above_it():
    above = math.nextafter(0.6, 1)
    tables = Tables(["a", "b"], [2, 4], [[above, 0.6], [0.0, 0.0]], [[5, 10], [1, 1]], 0, 99, numel=[8, 8])
    assert within_error(tables, 0.6).bits[0] == 4
    assert within_error(tables, above).bits[0] == 2


@pytest.mark.parametrize("solve", ["budget", "error"])
@settings(deadline=None, max_examples=300)
@given(tables=EVERY_MEASURE, pick=st.integers(0, 1023), frontier=st.integers(1, 3))
def test_the_certificate_holds_however_few_assignments_go_on(solve, tables, pick, frontier):
    _, nbytes, assignments = every_assignment(tables)
    error = exact_errors(tables, assignments)
    pick %= len(error)
    room = 1e-12 * np.abs(tables.error).sum()
    if solve == "budget":
        budget = tables.bits_a_value(assignments[pick].tolist())
        best = error[nbytes <= nbytes[pick]].min()
        found = within_budget(tables, budget, frontier)
        assert found.lower_bound <= best + room
        assert best <= found.error + room
        assert found.bits_a_value <= budget
    else:
        found = within_error(tables, float(error[pick]), frontier)
        assert found.lower_bound <= nbytes[error <= error[pick] - room].min(initial=2**60)
        assert found.error <= error[pick]
        assert found.lower_bound <= found.nbytes


def test_a_narrow_frontier_admits_what_it_does_not_know():
    gaps = [within_budget(fifty_layers(seed), 4.0, frontier=1).gap for seed in range(5)]
    assert all(0 <= gap < 0.05 for gap in gaps)
    assert max(gaps) > 0


@pytest.mark.parametrize("effort", [0, 10, 1000])
def test_work_that_ends_early_leaves_a_certificate_that_holds(monkeypatch, effort):
    exact = within_budget(fifty_layers(), 4.0), within_error(fifty_layers(), 6.0)
    assert [found.gap for found in exact] == [0, 0]
    monkeypatch.setattr(knapsack, "EFFORT", effort)
    early = within_budget(fifty_layers(), 4.0), within_error(fifty_layers(), 6.0)
    assert early[0].lower_bound <= exact[0].error <= early[0].error
    assert early[1].lower_bound <= exact[1].nbytes <= early[1].nbytes
    assert all(0 <= found.gap < 0.05 for found in early)


@pytest.mark.parametrize("budget", [2.2, 3.0, 4.0, 5.5, 7.9])
def test_fifty_layers_are_solved_to_the_optimum(budget):
    found = within_budget(fifty_layers(), budget)
    assert found.gap == 0
    assert budget - 0.01 < found.bits_a_value <= budget


def test_the_two_limits_lead_to_the_same_assignments():
    tables = fifty_layers()
    least = within_budget(tables, 4.0)
    fewest = within_error(tables, least.error)
    assert fewest.gap == 0
    assert fewest.nbytes <= least.nbytes
    assert within_budget(tables, fewest.bits_a_value).error == least.error


@pytest.mark.parametrize("width", range(2, 9))
def test_the_error_of_a_uniform_width_takes_no_more_than_its_bytes(width):
    tables = fifty_layers()
    uniform = (width,) * 54
    found = within_error(tables, tables.total_error(uniform))
    assert found.nbytes <= tables.encoded_bytes(uniform)
    assert found.gap == 0


def test_twenty_thousand_layers_are_solved_within_a_thousandth():
    tables = many_layers(20_000)
    least = within_budget(tables, 4.0)
    assert 3.99 < least.bits_a_value <= 4
    limit = tables.total_error((4,) * 20_000)
    fewest = within_error(tables, limit)
    assert 0.999 * limit < fewest.error <= limit
    assert all(0 <= found.gap < 1e-3 for found in (least, fewest))


def test_one_large_layer_among_twenty_thousand_is_decided_exactly():
    """Its edges are longer than all others together, and no hull helps with them."""
    tables = many_layers(20_000)
    nbytes, error = tables.nbytes.copy(), tables.error.copy()
    nbytes[7] = nbytes.sum(axis=0)
    error[7] = 1000 * error.sum(axis=0)
    tables = replace(tables, nbytes=nbytes, error=error, numel=[sum(tables.numel), *tables.numel[1:]])
    found = within_budget(tables, 4.0)
    assert 0 <= found.gap < 1e-3


def test_layers_that_are_all_alike_have_many_optima_and_one_is_found():
    tables = Tables(
        [f"layer{row}" for row in range(300)],
        [2, 4, 8],
        np.tile([0.1, 0.07, 0.01], (300, 1)),
        np.tile([10, 20, 40], (300, 1)),
        dense_bytes=0,
        values=12000,
        numel=[40] * 300,
    )
    found = within_error(tables, tables.total_error((4,) * 300))
    assert found.error <= tables.total_error((4,) * 300)
    assert found.gap < 1e-3


def test_a_budget_above_the_largest_width_buys_the_least_error():
    tables = fifty_layers()
    found = within_budget(tables, 100.0)
    assert found.error == math.fsum(tables.error.min(axis=1))
    assert found.bits == (8,) * 54


def test_scales_count_so_that_four_bits_take_more_than_a_budget_of_four():
    tables = fifty_layers()
    found = within_budget(replace(tables, widths=[4], error=tables.error[:, 2:3], nbytes=tables.nbytes[:, 2:3]), 4.13)
    assert 4.12 < found.bits_a_value < 4.13
    assert set(found.bits) == {4}


def test_an_impossible_budget_names_the_least_possible_one():
    tables = fifty_layers()
    with pytest.raises(ValueError, match=r"the cheapest assignment, .* bits a value with its scales, got 1;") as caught:
        within_budget(tables, 1.0)
    named = float(re.search(r"assignment, ([\d.]+) bits", str(caught.value)).group(1))
    assert within_budget(tables, named).bits == (2,) * 54


def test_an_impossible_error_names_the_least_possible_one():
    tables = fifty_layers()
    least = math.fsum(tables.error.min(axis=1))
    with pytest.raises(ValueError, match=f"the least possible is {least:.6g}; allow the error of a smaller width"):
        within_error(tables, 0.99 * least)
    with pytest.raises(ValueError, match="no assignment keeps within an error of nan"):
        within_error(tables, math.nan)
    assert within_error(tables, least).error == least


@pytest.mark.parametrize("budget", [0.0, -4.0, math.nan, math.inf])
def test_a_budget_is_a_finite_number_above_zero(budget):
    with pytest.raises(ValueError, match=f"a budget must be a finite number of bits a value above 0, got {budget}"):
        within_budget(fifty_layers(), budget)


def test_a_budget_needs_the_layers_sizes():
    with pytest.raises(ValueError, match="got Tables without numel"):
        within_budget(replace(fifty_layers(), numel=()), 4.0)
