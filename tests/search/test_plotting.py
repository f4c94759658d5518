from dataclasses import replace

import numpy as np
import pytest

from search import Tables, Wish, plot, plot_bits_over_time, plot_front, search
from search.plotting import NAMED, SINGLE, draw, draw_bits_over_time
from tests.support.table_examples import fifty_layers, many_layers

PNG = b"\x89PNG\r\n"


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.fixture(scope="module")
def result():
    return search(fifty_layers(), Wish.bits(4.0), seed=1)


def test_layers_have_their_names_on_the_axis(result):
    by_layer, sizes, plane = draw(result).get_axes()
    assert sizes.get_xticks().tolist() == list(range(54))
    assert labels(sizes.xaxis) == list(result.tables.layers)
    assert by_layer.get_yticks().tolist() == list(range(2, 9))
    assert plane.get_xlabel() == "bytes sent over float32's"


def test_long_names_keep_their_ends():
    tables = fifty_layers()
    tables = replace(tables, layers=[f"backbone.{'very.' * 10}{row}.weight" for row in range(54)])
    names = labels(draw(search(tables, method="exact")).get_axes()[1].xaxis)
    assert all(name.startswith("...") and name.endswith(f"{row}.weight") for row, name in enumerate(names))


def test_a_layer_alone_is_drawn():
    tables = Tables(["only"], [2, 4], [[2.0, 1.0]], [[2, 4]], dense_bytes=0, values=8, numel=[8])
    found = search(tables, Wish.bits(4.0), seed=0)
    assert labels(draw(found).get_axes()[1].xaxis) == ["only"]
    assert plot(found).startswith(PNG)


@pytest.mark.parametrize("count", [SINGLE + 1, 20_000])
def test_of_many_layers_shares_are_drawn_and_some_named(count):
    found = search(many_layers(count), Wish.bits(4.0), "exact")
    by_layer, sizes, _ = draw(found).get_axes()
    assert by_layer.get_ylabel() == "share of neighboring layers, as installed"
    assert 1 < len(sizes.get_xticks()) <= NAMED
    assert f"of {count:,} named" in sizes.get_xlabel()
    assert plot(found).startswith(PNG)


def test_shares_of_neighbors_are_those_of_the_assignment():
    found = search(many_layers(1000), Wish.bits(4.0), "exact")
    patches = draw(found).get_axes()[0].patches
    tops = np.array([patch.get_data().values for patch in patches])
    assert tops[-1] == pytest.approx(np.ones(tops.shape[1]))
    edges = (patches[0].get_data().edges + 0.5).astype(int)
    least = np.array(found.installed[edges[0] : edges[1]]) == min(found.installed)
    assert tops[0, 0] == pytest.approx(least.mean())


def test_widths_over_time_are_an_image_of_layers_by_searches(result):
    other = search(fifty_layers(), Wish.bits(6.0), "exact")
    axes = draw_bits_over_time({"calibration": result, "3": other}).get_axes()[0]
    image = axes.get_images()[0].get_array()
    assert image[:, 0].tolist() == list(result.installed)
    assert image[:, 1].tolist() == list(other.installed)
    assert labels(axes.xaxis) == ["calibration", "3"]
    assert labels(axes.yaxis) == list(result.tables.layers)
    assert plot_bits_over_time([result, other]).startswith(PNG)


def test_widths_over_time_need_searches_of_the_same_layers(result):
    with pytest.raises(ValueError, match="needs at least one search, got none"):
        plot_bits_over_time([])
    with pytest.raises(ValueError, match="of the same layers throughout, got different ones"):
        plot_bits_over_time([result, search(many_layers(54), method="exact")])


def test_the_front_is_drawn(result):
    assert plot_front(result).startswith(PNG)
