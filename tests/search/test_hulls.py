import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import Objective, Tables, optimum
from search.hulls import Walk, lower_hull
from tests.support.table_examples import every_assignment, fifty_layers, many_layers, small_tables

POWERS = st.sampled_from([0.1, 0.5, 1.0, 2.0, 5.0])


@settings(deadline=None, max_examples=400)
@given(small_tables(), POWERS, POWERS)
def test_optimum_is_the_least_of_all_assignments(tables, alpha, beta):
    error, nbytes, _ = every_assignment(tables)
    ratio = (nbytes + tables.dense_bytes) / (4 * tables.values)
    found = optimum(tables, alpha, beta)
    assert found.objective == pytest.approx((error**alpha * ratio**beta).min(), rel=1e-12, abs=0)
    assert found.objective == tables.total_error(found.bits) ** alpha * tables.ratio(found.bits) ** beta
    if error.min() == 0:
        assert tables.encoded_bytes(found.bits) == nbytes[error == 0].min()


@settings(deadline=None, max_examples=50)
@given(small_tables(), POWERS, POWERS)
def test_only_the_quotient_of_the_powers_decides(tables, alpha, beta):
    assert optimum(tables, alpha, beta).bits == optimum(tables, 4 * alpha, 4 * beta).bits


@pytest.mark.parametrize("beta", [0.5, 1.5, 4.0])
def test_no_change_of_one_or_two_layers_improves_a_large_optimum(beta):
    tables = fifty_layers()
    found = optimum(tables, 0.5, beta)
    choice = tables.columns(found.bits)
    neighbors = []
    for first in range(54):
        for second in range(first, 54, 7):
            for change in np.ndindex(7, 7):
                neighbor = choice.copy()
                neighbor[[first, second]] = change
                neighbors.append(neighbor)
    objective = Objective(tables, 0.5, beta)
    assert objective.sort_key(np.array(neighbors)).min() >= objective.sort_key(choice[None])[0] - 1e-12


def test_equal_powers_put_nearly_all_layers_at_the_maximum():
    assert optimum(fifty_layers(), 0.5, 0.5).bits.count(8) > 40


def test_a_single_layer_with_a_single_width_gets_it():
    tables = Tables(["only"], [3], [[2.0]], [[8]], dense_bytes=0, values=4)
    assert optimum(tables, 1.0, 1.0).bits == (3,)


def test_of_equal_errors_the_cheaper_and_of_equal_bytes_the_better_width_is_taken():
    tables = Tables(["a", "b"], [2, 4], [[1, 1], [3, 2]], [[9, 5], [5, 5]], dense_bytes=0, values=4)
    assert optimum(tables, 1.0, 1.0).bits == (4, 4)


def test_the_walk_goes_from_the_fewest_bytes_to_the_least_error():
    tables = fifty_layers()
    walk = Walk.of(tables)
    assert walk.nbytes_P[0] == tables.nbytes.min(axis=1).sum()
    assert walk.error_P[-1] == pytest.approx(tables.error.min(axis=1).sum(), rel=1e-12)
    assert (np.diff(walk.nbytes_P) > 0).all()
    assert (np.diff(walk.error_P) < 0).all()


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["root", "loss"]).flatmap(lambda measure: small_tables(measure=measure)))
def test_every_corner_has_the_totals_that_the_walk_says(tables):
    walk = Walk.of(tables)
    columns = np.stack([walk.columns(corner) for corner in range(len(walk.nbytes_P))])
    error, nbytes = tables.totals(columns)
    assert walk.nbytes_P.tolist() == nbytes.tolist()
    assert walk.error_P == pytest.approx(error, rel=1e-12, abs=1e-12 * np.abs(tables.error).max())
    assert walk.error_P[-1] == math.fsum(tables.error.min(axis=1))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["root", "loss"]).flatmap(lambda measure: small_tables(measure=measure)))
def test_no_assignment_lies_below_the_walk(tables):
    error, nbytes, _ = every_assignment(tables)
    walk = Walk.of(tables)
    room = 1e-9 * np.abs(tables.error).sum()
    assert (error >= np.interp(nbytes, walk.nbytes_P, walk.error_P) - room).all()


def test_twenty_thousand_layers_have_an_optimum():
    tables = many_layers(20_000)
    found = optimum(tables, 0.5, 0.5)
    objective = Objective(tables, 0.5, 0.5)
    choice = tables.columns(found.bits)
    neighbors = np.tile(choice, (140, 1))
    neighbors[np.arange(140), np.arange(140) // 7] = np.arange(140) % 7
    assert objective.sort_key(neighbors).min() >= objective.sort_key(choice[None])[0] - 1e-12


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_a_lower_hull_turns_left_and_leaves_no_point_below(points):
    x, y = zip(*points, strict=True)
    corners = lower_hull(x, y)
    slopes = [(y[b] - y[a]) / (x[b] - x[a]) for a, b in pairwise(corners)]
    assert all(slope < 0 for slope in slopes)
    assert slopes == sorted(set(slopes))
    assert min(points) == points[corners[0]]
    assert min((b, a) for a, b in points) == (y[corners[-1]], x[corners[-1]])
    heights = np.interp(x, [x[corner] for corner in corners], [y[corner] for corner in corners])
    assert (np.array(y) >= heights - 1e-12).all()


def test_powers_that_are_not_above_zero_are_refused():
    with pytest.raises(ValueError, match="alpha must be a finite number above 0, got 0"):
        optimum(fifty_layers(), 0.0, 1.0)
    with pytest.raises(ValueError, match="beta must be a finite number above 0, got nan"):
        optimum(fifty_layers(), 1.0, math.nan)
