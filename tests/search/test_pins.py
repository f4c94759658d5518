import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import Wish, resolve_pins, search
from tests.support.table_examples import every_assignment, fifty_layers, small_tables, some_bounds

LAYERS = ["conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.weight", "fc.weight"]


def test_patterns_match_as_file_names_do_and_the_last_one_holds():
    pins = resolve_pins(["layer1.*=3", "fc.*=8", "layer1.[1-9]*=4-6"], LAYERS, range(2, 9))
    assert pins == {"layer1.0.conv1.weight": (3, 3), "fc.weight": (8, 8), "layer1.1.conv1.weight": (4, 6)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("head.*=8", "the pin 'head.*=8' matches no compressed layer; there are conv1.weight, layer1.0"),
        ("FC.*=8", "matches no compressed layer"),
        ("fc.*=9", "the pin 'fc.*=9' must be within the widths 2, 3, 4, got 9; there are conv1.weight"),
        ("fc.*=1-4", "must be within the widths 2, 3, 4, got 1"),
        ("fc.*=4-2", "has its bounds reversed, 4 above 2; write 2-4; there are"),
        ("fc.*", "a pin is PATTERN=BITS or PATTERN=LEAST-MOST, as in fc.*=8 or fc.*=4-8, got 'fc.*'; there are conv1"),
        ("fc.*=", "a pin is PATTERN=BITS"),
        ("fc.*=x", "a pin is PATTERN=BITS"),
        ("fc.*=2-3-4", "a pin is PATTERN=BITS"),
        ("=4", "a pin is PATTERN=BITS"),
        ("fc.*=-4", "a pin is PATTERN=BITS"),
        ("", "a pin is PATTERN=BITS"),
    ],
)
def test_a_pin_that_means_nothing_names_the_layers_that_there_are(text, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the words are compared below, as they stand
        resolve_pins([text], LAYERS, [2, 3, 4])
    assert words in str(caught.value)
    assert "there are conv1.weight" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_many_layers_some_are_named():
    with pytest.raises(ValueError, match=r"layer7\.weight and 92 more$"):
        resolve_pins(["fc=8"], [f"layer{row}.weight" for row in range(100)], range(2, 9))


def test_a_search_takes_widths_and_bounds_by_name():
    found = search(fifty_layers(), Wish.bits(4.0), pins={"layer3": 8, "layer27": (5, 6)}, seed=0)
    bits = found.bits_by_layer()
    assert bits["layer3"] == 8
    assert bits["layer27"] in (5, 6)
    assert found.certified.bits_a_value <= 4
    assert all(assignment[3] == 8 and assignment[27] in (5, 6) for assignment in found.found().values())
    assert found.to_json()["pins"] == {"layer3": [8, 8], "layer27": [5, 6]}


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        ({"fc": 4}, "pins must be of compressed layers, got one of fc; there are layer0"),
        ({"layer0": 9}, "the pin of layer0 must be within the widths 2, 3, 4, 5, 6, 7, 8, got 9"),
        ({"layer0": (5, 3)}, "the pin of layer0 has its bounds reversed, 5 above 3; write 3-5"),
    ],
)
def test_a_search_refuses_pins_that_mean_nothing(pins, words):
    with pytest.raises(ValueError, match=words):
        search(fifty_layers(), pins=pins)


def test_pins_that_leave_no_room_for_a_wish_are_refused():
    pins = dict.fromkeys(fifty_layers().layers, 8)
    with pytest.raises(ValueError, match=r"a budget must hold the cheapest assignment, 8\.12"):
        search(fifty_layers(), Wish.bits(4.0), pins=pins)
    with pytest.raises(
        ValueError, match="allow the error of a smaller width, search among larger widths, or loosen the"
    ):
        search(fifty_layers(), Wish.error(8), pins={"layer3": 2})


@st.composite
def bounded_tables(draw, **kind):
    tables = draw(small_tables(**kind))
    return tables, draw(some_bounds(tables))


def within(tables, bounds):
    """Totals of the assignments that keep within bounds."""
    _, nbytes, assignments = every_assignment(tables)
    low = np.array([bounds.get(name, (1, 8))[0] for name in tables.layers])
    high = np.array([bounds.get(name, (1, 8))[1] for name in tables.layers])
    kept = ((assignments >= low) & (assignments <= high)).all(axis=1)
    error = np.array([tables.total_error(bits) for bits in assignments[kept].tolist()])
    return error, nbytes[kept], {tuple(bits) for bits in assignments[kept].tolist()}


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["root", "square", "loss"]).flatmap(lambda measure: bounded_tables(measure=measure)), st.data())
def test_within_bounds_every_wish_finds_the_best_of_all_that_keep_them(bounded, data):
    tables, bounds = bounded
    error, nbytes, kept = within(tables, bounds)
    room = 1e-12 * np.abs(tables.error).sum()
    pick = data.draw(st.integers(0, len(error) - 1))
    least = search(tables, Wish.bits(8 * int(nbytes[pick]) / sum(tables.numel)), "exact", pins=bounds)
    assert least.installed in kept
    assert tables.total_error(least.installed) <= error[nbytes <= nbytes[pick]].min() + room
    uniform = data.draw(st.sampled_from(tables.widths))
    limit = tables.total_error((uniform,) * len(tables.layers))
    if error.min() <= limit:
        fewest = search(tables, Wish.error(uniform), "exact", pins=bounds)
        assert fewest.installed in kept
        assert tables.total_error(fewest.installed) <= limit
        assert tables.encoded_bytes(fewest.installed) <= nbytes[error <= limit - room].min(initial=2**60)
    else:
        with pytest.raises(ValueError, match="loosen the pins"):
            search(tables, Wish.error(uniform), "exact", pins=bounds)
    if tables.measure != "loss":
        best = search(tables, Wish.objective(1.0, 2.0), "exact", pins=bounds)
        ratio = (nbytes + tables.dense_bytes) / (4 * tables.values)
        assert best.installed in kept
        assert best.optimum.objective == pytest.approx((error * ratio**2).min(), rel=1e-12, abs=0)
    if tables.measure == "square":
        balanced = search(tables, Wish.balance(), "exact", pins=bounds).installed
        values = (1 + error / tables.norm2) * (nbytes + tables.dense_bytes)
        value = 1 + tables.total_error(balanced) / tables.norm2
        value *= tables.encoded_bytes(balanced) + tables.dense_bytes
        assert balanced in kept
        assert math.isclose(value, values.min(), rel_tol=1e-12)
