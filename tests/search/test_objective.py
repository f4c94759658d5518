import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import Objective, Wish, optimum, search
from search.hulls import optimum_of
from tests.support.table_examples import every_assignment, fifty_layers, small_tables

TINY, HUGE = 5e-324, 1.7976931348623157e308
ANY_POWER = st.floats(TINY, HUGE, exclude_min=False) | st.sampled_from([TINY, 1e-300, 0.5, 405.0, 1e300, HUGE])


@settings(deadline=None, max_examples=300)
@given(small_tables(), ANY_POWER, ANY_POWER)
def test_no_finite_power_fails(tables, alpha, beta):
    found = optimum(tables, alpha, beta)
    objective = Objective(tables, alpha, beta)
    _, _, assignments = every_assignment(tables)
    keys = objective.sort_key(np.stack([tables.columns(bits) for bits in assignments.tolist()]))
    assert np.isfinite(keys).all()
    of_found = objective.sort_key(tables.columns(found.bits)[None])[0]
    assert of_found <= keys.min() + 1e-12 * max(1.0, abs(keys.min()))
    assert not math.isnan(found.objective)
    assert not math.isnan(found.log_objective)
    assert found.log_objective < math.inf


@settings(deadline=None, max_examples=200)
@given(small_tables(), st.floats(0.01, 10), st.floats(0.01, 10), st.data())
def test_the_logarithm_is_that_of_the_value(tables, alpha, beta, data):
    bits = data.draw(st.tuples(*[st.sampled_from(tables.widths)] * len(tables.layers)))
    objective = Objective(tables, alpha, beta)
    value, log = objective(bits), objective.log(bits)
    if tables.total_error(bits) == 0:
        assert (value, log) == (0, -math.inf)
    else:
        assert value == pytest.approx(math.exp((alpha + beta) * log), rel=1e-9)


def test_a_value_beyond_float64_is_infinite_and_its_logarithm_is_not():
    tables = replace(fifty_layers(), error=fifty_layers().error * 1e200)
    found = optimum(tables, 405.0, 405.0)
    assert found.objective == math.inf
    assert 0 < found.log_objective < 400
    tiny = optimum(fifty_layers(), 1e-3, 1e300)
    assert tiny.objective == 0
    assert -10 < tiny.log_objective < 0


def test_excesses_are_told_where_values_are_beyond_float64():
    tables = fifty_layers()
    objective = Objective(tables, 300.0, 300.0)
    best, uniform = optimum_of(objective), objective.assignment((8,) * 54)
    expected = math.expm1(600 * (uniform.log_objective - best.log_objective))
    assert objective.excess(uniform, best) == pytest.approx(expected, rel=1e-6)
    assert objective.excess(best, best) == 0
    assert objective.excess(objective.assignment((2,) * 54), best) == math.inf


@settings(deadline=None, max_examples=200)
@given(small_tables(measure="square"))
def test_the_balance_is_the_least_of_one_plus_omega_times_bytes(tables):
    error, nbytes, _ = every_assignment(tables)
    values = (1 + error / tables.norm2) * (nbytes + tables.dense_bytes)
    found = search(tables, Wish.balance(), "exact").installed
    omega = tables.total_error(found) / tables.norm2
    assert (1 + omega) * (tables.encoded_bytes(found) + tables.dense_bytes) == pytest.approx(values.min(), rel=1e-12)


def test_a_balance_needs_a_gradient_that_is_not_zero():
    tables = replace(fifty_layers(), measure="square", norm2=0.0)
    with pytest.raises(ValueError, match=r"a gradient that is not zero, got \|m\|\^2 = 0\.0; search after some steps"):
        search(tables, Wish.balance())


def test_errors_below_zero_have_no_powers():
    tables = replace(fifty_layers(), measure="loss", error=fifty_layers().error - 1)
    with pytest.raises(ValueError, match=r"errors that are not negative, got .*; ask for a number of bits or an error"):
        Objective(tables, 0.5, 0.5)
