"""The least step time within an error: as brute force finds it, and never above a width that needs no search."""

import itertools
import json
import math

import numpy as np
import pytest

from search.knapsack import within_error
from search.tables import Tables
from search.timelines import Timeline, soonest

WIDTHS = (2, 3, 4, 6, 8)


def random_tables(layers: int, seed: int, widths: tuple[int, ...] = WIDTHS) -> Tables:
    """Layers of sizes over three decades, whose errors fall by about four a bit."""
    draw = np.random.default_rng(seed)
    numel_L = np.floor(10 ** draw.uniform(2, 5, layers)).astype(np.int64)
    scale_L = np.sqrt(numel_L) * draw.lognormal(0, 1, layers)
    error = scale_L[:, None] / 2.0 ** (2 * np.array(widths)) * draw.uniform(0.9, 1.1, (layers, len(widths)))
    nbytes = numel_L[:, None] * np.array(widths) // 8 + 16
    return Tables([f"layer{row}" for row in range(layers)], widths, error, nbytes, 0, int(numel_L.sum()), numel_L)


def random_timeline(tables: Tables, seed: int, buffers: int, network: float = 1.0) -> Timeline:
    """Buffers of neighbors, released over a backward of a second; at 4 bits all bytes take `network` seconds."""
    draw = np.random.default_rng(seed)
    layers = len(tables.layers)
    buffer = np.sort(draw.integers(0, buffers, layers))
    release = np.sort(draw.uniform(0, 1, buffers))
    a_byte = network / tables.nbytes[:, len(tables.widths) // 2].sum()
    return Timeline(release, draw.uniform(0, 0.02, buffers), buffer, tables.nbytes * a_byte, after=0.1)


def uniform_error(tables: Tables, width: int) -> float:
    return tables.total_error([width] * len(tables.layers))


@pytest.mark.parametrize("network", [0.01, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_that_of_brute_force(seed, network):
    tables = random_tables(6, seed)
    timeline = random_timeline(tables, seed, buffers=1 + seed % 5, network=network)
    limit = uniform_error(tables, 4)
    found = soonest(tables, timeline, limit)
    columns_PL = np.array(list(itertools.product(range(len(WIDTHS)), repeat=6)))
    columns_PL = [row for row in columns_PL if math.fsum(tables.error[np.arange(6), row]) <= limit]
    times = np.array([timeline.step(row) for row in columns_PL])
    assert found.seconds == pytest.approx(times.min(), rel=1e-12)
    assert found.lower_bound == found.seconds
    assert found.gap == 0
    equal = [row for row, time in zip(columns_PL, times, strict=True) if time <= times.min()]
    assert found.error <= min(math.fsum(tables.error[np.arange(6), row]) for row in equal)
    assert found.error <= limit


@pytest.mark.parametrize("seed", range(4))
def test_with_one_buffer_it_is_the_choice_of_fewest_bytes(seed):
    tables = random_tables(40, seed)
    timeline = Timeline([0.5], [0.001], [0] * 40, tables.nbytes * 1e-6)
    limit = uniform_error(tables, 4)
    found, fewest = soonest(tables, timeline, limit), within_error(tables, limit)
    assert fewest.gap == 0
    assert found.seconds == pytest.approx(0.501 + fewest.nbytes * 1e-6, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_is_below_every_choice_also_where_the_work_ends_early(seed):
    tables = random_tables(60, seed)
    timeline = random_timeline(tables, seed, buffers=6, network=0.8)
    limit = uniform_error(tables, 4)
    cut_off, found = soonest(tables, timeline, limit, frontier=2), soonest(tables, timeline, limit)
    assert cut_off.lower_bound <= found.seconds <= cut_off.seconds
    assert found.gap < 1e-3
    assert found.seconds <= timeline.step(np.full(60, WIDTHS.index(4)))


def test_what_backward_hides_keeps_the_least_error():
    tables = random_tables(30, 0)
    buffer = np.repeat([0, 1, 2], 10)
    timeline = Timeline([0.1, 5.0, 9.0], [0.0] * 3, buffer, tables.nbytes * (1.0 / tables.nbytes[:, -1].sum()))
    found = soonest(tables, timeline, uniform_error(tables, 4))
    assert set(found.bits[:20]) == {8}
    assert timeline.hidden(tables.columns(found.bits)).tolist() == [True] * 20 + [False] * 10
    assert set(found.bits[20:]) != {8}


def test_where_no_width_is_faster_all_have_the_least_error():
    tables = random_tables(30, 0)
    timeline = Timeline([0.1, 0.2], [0.0, 0.0], [0] * 30, tables.nbytes * (0.05 / tables.nbytes[:, -1].sum()))
    found = soonest(tables, timeline, uniform_error(tables, 2))
    assert set(found.bits) == {8}
    assert found.seconds == timeline.alone == pytest.approx(0.2)


def test_twenty_thousand_layers_have_a_certificate():
    tables = random_tables(20_000, 1, tuple(range(2, 9)))
    timeline = random_timeline(tables, 1, buffers=300, network=1.0)
    found = soonest(tables, timeline, uniform_error(tables, 4))
    assert found.gap < 1e-4
    assert found.error <= uniform_error(tables, 4)


def test_an_error_out_of_reach_is_refused():
    tables = random_tables(3, 0)
    timeline = random_timeline(tables, 0, buffers=2)
    with pytest.raises(ValueError, match="no assignment keeps within an error of 0, for the least possible is"):
        soonest(tables, timeline, 0.0)


def test_timelines_that_make_no_sense_are_refused():
    seconds = [[0.1, 0.2], [0.1, 0.2]]
    with pytest.raises(ValueError, match="one release and one fixed cost a buffer, got 1 and 2"):
        Timeline([0.1], [0.0, 0.0], [0, 0], seconds)
    with pytest.raises(ValueError, match="in one of 1 buffers, got 2 layers and a buffer 1"):
        Timeline([0.1], [0.0], [0, 1], seconds)
    with pytest.raises(ValueError, match="seconds must be finite and not negative, got nan"):
        Timeline([0.1], [0.0], [0, 0], [[0.1, math.nan], [0.1, 0.2]])
    with pytest.raises(ValueError, match=r"must be \[layers, widths\] = \(3, 5\), got \(2, 2\)"):
        soonest(random_tables(3, 0), Timeline([0.1], [0.0], [0, 0], seconds), 1.0)


def test_timelines_survive_their_json():
    tables = random_tables(5, 0)
    timeline = random_timeline(tables, 0, buffers=3)
    again = Timeline.from_json(json.loads(json.dumps(timeline.to_json())))
    columns_L = np.array([0, 1, 2, 3, 4])
    assert again.step(columns_L) == timeline.step(columns_L)
    with pytest.raises(ValueError, match="a timeline holds release, fixed"):
        Timeline.from_json({"release": [0.1]})
