import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from search import Tables, optimum, ratio_for_bits
from tests.support.table_examples import fifty_layers, small_tables


@settings(deadline=None, max_examples=200)
@given(small_tables(), st.floats(0, 1))
def test_the_optimum_meets_the_average_above_the_named_power_and_misses_it_below(tables, fraction):
    least, most = (8 * bound(tables.nbytes, axis=1).sum() / sum(tables.numel) for bound in (np.min, np.max))
    average = max(least, least * (1 - fraction) + most * fraction)
    point = ratio_for_bits(tables, average)
    assert point.bits_a_value <= average
    if point.power in (0, math.inf):
        met = tables.bits_a_value(optimum(tables, 1.0, 1.0).bits) <= average
        assert met == (point.power == 0)
        return
    scale = 1 / (1 + point.power)
    step = 1e-6 + 1e-13 / (point.power * scale)  # else a small power's objectives differ by less than a float can
    assume(step < 1)
    powers = (point.power * scale * factor for factor in (1 + step, 1 - step))
    above, below = (optimum(tables, scale, power).bits for power in powers)
    assert tables.bits_a_value(above) <= average < tables.bits_a_value(below)


@pytest.mark.parametrize("average", [2.5, 3.0, 4.0, 6.0])
def test_on_fifty_layers_the_optimum_jumps_over_the_average_at_the_named_power(average):
    tables = fifty_layers()
    point = ratio_for_bits(tables, average)
    above, below = (optimum(tables, 0.5, 0.5 * point.power * factor).bits for factor in (1 + 1e-9, 1 - 1e-9))
    assert tables.bits_a_value(above) == point.bits_a_value <= average < tables.bits_a_value(below)


def test_an_average_that_any_power_meets_needs_none():
    assert ratio_for_bits(fifty_layers(), 9.0).power == 0


def test_where_an_assignment_is_without_error_no_power_moves_the_optimum():
    tables = Tables(["only"], [2, 8], [[1.0, 0.0]], [[2, 8]], dense_bytes=0, values=8, numel=[8])
    assert ratio_for_bits(tables, 4.0).power == math.inf
    assert ratio_for_bits(tables, 8.0).power == 0


def test_less_than_the_cheapest_average_is_refused():
    with pytest.raises(ValueError, match=r"no beta/alpha takes fewer than the cheapest 2\.\d+ bits a value, got 1"):
        ratio_for_bits(fifty_layers(), 1.0)
