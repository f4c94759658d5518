"""The least step time within an error: as brute force finds it, and never above a width that needs no search."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from search.__main__ import main
from search.checking import false_claims
from search.knapsack import within_error
from search.report import as_text, logs
from search.run import search
from search.saved import load_search
from search.tables import Tables
from search.timelines import Timeline, soonest
from search.wishes import Wish

WIDTHS = (2, 3, 4, 6, 8)


def random_tables(layers: int, seed: int, widths: tuple[int, ...] = WIDTHS) -> Tables:
    """Layers of sizes over three decades, whose errors fall by about four a bit."""
    draw = np.random.default_rng(seed)
    numel_L = np.floor(10 ** draw.uniform(2, 5, layers)).astype(np.int64)
    scale_L = np.sqrt(numel_L) * draw.lognormal(0, 1, layers)
    error = scale_L[:, None] / 2.0 ** (2 * np.array(widths)) * draw.uniform(0.9, 1.1, (layers, len(widths)))
    nbytes = numel_L[:, None] * np.array(widths) // 8 + 16
    return Tables([f"layer{row}" for row in range(layers)], widths, error, nbytes, 0, int(numel_L.sum()), numel_L)


def random_timeline(tables: Tables, seed: int, buffers: int, network: float = 1.0, overlaps: bool = True) -> Timeline:
    """Buffers of neighbors, released over a backward of a second; at 4 bits all bytes take `network` seconds."""
    draw = np.random.default_rng(seed)
    release = np.sort(draw.uniform(0, 1, buffers))
    a_byte = network / tables.nbytes[:, len(tables.widths) // 2].sum()
    return Timeline(
        own=1.6,
        backward=1.0,
        release=release,
        buffer=np.sort(draw.integers(0, buffers, len(tables.layers))),
        fixed=draw.uniform(0, 0.01, (buffers, 4)),
        a_byte=a_byte * draw.uniform([0.1, 0.5, 0.1, 0.1], [0.3, 1.5, 0.2, 0.3], (buffers, len(tables.widths), 4)),
        start=0.001,
        contention=draw.uniform(0, 1),
        overlaps=overlaps,
    )


def in_turn(release: list[float], buffer: list[int], a_byte: float, widths: int, backward: float = 1.0) -> Timeline:
    """A network that is all that takes time."""
    buffers = len(release)
    seconds = np.zeros((buffers, widths, 4))
    seconds[..., 1] = a_byte
    return Timeline(backward, backward, release, buffer, np.zeros((buffers, 4)), seconds)


def uniform_error(tables: Tables, width: int) -> float:
    return tables.total_error([width] * len(tables.layers))


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("network", [0.01, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_that_of_brute_force(seed, network, overlaps):
    tables = random_tables(6, seed)
    timeline = random_timeline(tables, seed, buffers=1 + seed % 5, network=network, overlaps=overlaps)
    limit = uniform_error(tables, 4)
    found = soonest(tables, timeline, limit)
    columns_PL = itertools.product(range(len(WIDTHS)), repeat=6)
    bits_P = [tables.bits(row) for row in columns_PL]
    bits_P = [bits for bits in bits_P if tables.total_error(bits) <= limit]
    fastest = min(timeline.seconds(tables, bits) for bits in bits_P)
    assert found.seconds == pytest.approx(fastest, rel=3e-9)
    assert found.lower_bound <= fastest * (1 + 3e-9)
    assert found.gap < 1e-8
    assert found.error <= limit


@pytest.mark.parametrize("seed", range(4))
def test_with_one_buffer_it_is_the_choice_of_fewest_bytes(seed):
    tables = random_tables(40, seed)
    timeline = in_turn([0.5], [0] * 40, 1e-6, len(WIDTHS), backward=0.5)
    limit = uniform_error(tables, 4)
    found, fewest = soonest(tables, timeline, limit), within_error(tables, limit)
    assert fewest.gap == 0
    assert found.seconds == pytest.approx(0.5 + fewest.nbytes * 1e-6, rel=1e-8)


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_is_below_every_choice_also_where_the_work_ends_early(seed):
    tables = random_tables(60, seed)
    timeline = random_timeline(tables, seed, buffers=6, network=0.8)
    limit = uniform_error(tables, 4)
    cut_off, found = soonest(tables, timeline, limit, frontier=2), soonest(tables, timeline, limit)
    assert cut_off.lower_bound <= found.seconds * (1 + 1e-8)
    assert found.gap < 1e-2
    for bits in ((4,) * 60, within_error(tables, limit).bits):
        assert found.seconds <= timeline.seconds(tables, bits)


@pytest.mark.parametrize("seed", range(4))
def test_a_chain_is_never_longer_than_a_step(seed):
    """And as long where it was found: a step's seconds are the longest of all chains."""
    tables = random_tables(20, seed)
    timeline = random_timeline(tables, seed, buffers=4, network=1.0)
    draw = np.random.default_rng(seed)
    parts = [timeline.parts(tables, tables.bits(draw.integers(0, len(WIDTHS), 20))) for _ in range(20)]
    for at in parts:
        chain = timeline.longest(at)
        assert chain(at) == pytest.approx(timeline.seconds_of(at), rel=1e-12)
        assert all(chain(other) <= timeline.seconds_of(other) * (1 + 1e-12) for other in parts)


def test_what_backward_hides_keeps_the_least_error():
    tables = random_tables(30, 0)
    buffer = np.repeat([0, 1, 2], 10)
    timeline = in_turn([0.1, 5.0, 9.0], buffer, 1.0 / tables.nbytes[:, -1].sum(), len(WIDTHS), backward=9.0)
    found = soonest(tables, timeline, uniform_error(tables, 4))
    assert set(found.bits[:20]) == {8}
    assert timeline.hidden(tables, found.bits).tolist() == [True] * 20 + [False] * 10
    assert set(found.bits[20:]) != {8}


def test_bytes_that_keep_the_processor_from_backward_are_not_hidden():
    """The network is never waited for, and handling its bytes delays backward."""
    tables = random_tables(30, 0)
    buffer = np.repeat([0, 1, 2], 10)
    seconds = np.zeros((3, len(WIDTHS), 4))
    seconds[:2, :, 2] = 1.0 / tables.nbytes[:, -1].sum()
    processor = Timeline(9.0, 9.0, [0.1, 0.2, 0.3], buffer, np.zeros((3, 4)), seconds, contention=0.5)
    assert processor.hidden(tables, [8] * 30).tolist() == [False] * 20 + [True] * 10


def test_where_no_width_is_faster_all_have_the_least_error():
    tables = random_tables(30, 0)
    timeline = in_turn([0.1, 0.9], [0] * 30, 0.05 / tables.nbytes[:, -1].sum(), len(WIDTHS))
    found = soonest(tables, timeline, uniform_error(tables, 2))
    assert set(found.bits) == {8}
    assert found.seconds == timeline.own == 1.0
    assert found.gap == 0
    assert timeline.hidden(tables, found.bits).all()


def test_twenty_thousand_layers_have_a_certificate():
    tables = random_tables(20_000, 1, tuple(range(2, 9)))
    timeline = random_timeline(tables, 1, buffers=100, network=1.0)
    found = soonest(tables, timeline, uniform_error(tables, 4))
    assert found.gap < 1e-3
    assert found.error <= uniform_error(tables, 4)


def test_an_error_out_of_reach_is_refused():
    tables = random_tables(3, 0)
    timeline = random_timeline(tables, 0, buffers=2)
    with pytest.raises(ValueError, match="no assignment keeps within an error of 0, for the least possible is"):
        soonest(tables, timeline, 0.0)


def test_timelines_that_make_no_sense_are_refused():
    fixed, a_byte = np.zeros((1, 4)), np.zeros((1, 2, 4))
    with pytest.raises(ValueError, match=r"must be \[J\], \[J, P\] and \[J, K, P\] of P = 4, got \(1,\), \(2, 4\)"):
        Timeline(1.0, 1.0, [0.1], [0, 0], np.zeros((2, 4)), a_byte)
    with pytest.raises(ValueError, match="layers are in one of 1 buffers each, got"):
        Timeline(1.0, 1.0, [0.1], [0, 1], fixed, a_byte)
    with pytest.raises(ValueError, match="release must be finite and not negative, got nan"):
        Timeline(1.0, 1.0, [math.nan], [0, 0], fixed, a_byte)
    with pytest.raises(ValueError, match=r"must be of the tables' \(3, 5\) layers and widths, got \(2, 2\)"):
        soonest(random_tables(3, 0), Timeline(1.0, 1.0, [0.1], [0, 0], fixed, a_byte), 1.0)


def test_timelines_survive_their_json():
    tables = random_tables(5, 0)
    timeline = random_timeline(tables, 0, buffers=3)
    again = Timeline.from_json(json.loads(json.dumps(timeline.to_json())))
    assert again.seconds(tables, WIDTHS) == timeline.seconds(tables, WIDTHS)
    with pytest.raises(ValueError, match="a timeline holds own, backward"):
        Timeline.from_json({"release": [0.1]})


def test_pinned_layers_keep_their_widths_and_the_others_make_up_for_them():
    tables = random_tables(12, 3)
    timeline = random_timeline(tables, 3, buffers=3)
    pins = {"layer0": 2, "layer5": (6, 8), "layer9": 8}
    result = search(tables, Wish.time(4), "exact", pins=pins, timeline=timeline)
    bits = result.bits_by_layer()
    assert (bits["layer0"], bits["layer9"]) == (2, 8)
    assert bits["layer5"] in (6, 8)
    assert tables.total_error(result.installed) <= uniform_error(tables, 4)
    free = search(tables, Wish.time(4), "exact", timeline=timeline)
    assert free.certified.lower_bound <= result.certified.seconds
    assert result.certified.seconds == timeline.seconds(tables, result.installed)


def written(tmp_path, link: float = 1.0):
    """The file of a search for time, its result, and what it holds."""
    tables = random_tables(12, 3)
    result = search(tables, Wish.time(4), "exact", timeline=random_timeline(tables, 3, buffers=3, network=link))
    path = tmp_path / "search_0.json"
    path.write_bytes(logs(result, 0, [])["search_0.json"])
    return path, result, json.loads(path.read_text())


def test_a_search_for_time_survives_its_file_and_its_claims_are_checked(tmp_path):
    path, result, content = written(tmp_path)
    again = load_search(path)
    assert again.certified == result.certified
    assert again.wish == Wish.time(4)
    assert false_claims(content) == []
    for key, factor, claim in (("seconds", 0.9, "time.seconds is"), ("lower_bound", 1.1, "time.lower_bound is")):
        false = content | {"time": content["time"] | {key: factor * content["time"][key]}}
        assert any(claim in each for each in false_claims(false))
    del content["timeline"]
    with pytest.raises(ValueError, match="holds a timeline, and this one has none"):
        false_claims(content)


def test_a_file_is_solved_again_for_bytes_and_for_time(tmp_path, capsys):
    path, *_ = written(tmp_path)
    assert main([str(path), "--target-error", "4", "--objective", "bytes"]) == 0
    assert "for the fewest bytes" in capsys.readouterr().out
    assert main([str(path), "--target-error", "6", "--objective", "time"]) == 0
    assert "for the least step time with at most the error of uniform 6 bits" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(path), "--objective", "time"])
    assert "--objective is of what is within an error; add --target-error" in capsys.readouterr().err


def test_the_report_says_where_fewer_bits_buy_nothing(tmp_path):
    _, result, _ = written(tmp_path, link=1e-6)
    said = "fewer bits buy nothing here, for all layers at 8 bits take"
    assert f"The codes hide behind backward: {said}" in as_text(result, 0)
    late = replace(result.timeline, fixed=result.timeline.fixed + 1.0)
    late = search(result.tables, Wish.time(4), "exact", timeline=late)
    assert f"Latency and fixed costs decide: {said}" in as_text(late, 0)
    _, slow, _ = written(tmp_path, link=10.0)
    assert "buy nothing here" not in as_text(slow, 0)
    assert "least possible" in as_text(slow, 0)
    tables = random_tables(30, 0)
    buffer = np.repeat([0, 1, 2], 10)
    timeline = in_turn([0.1, 5.0, 9.0], buffer, 3.0 / tables.nbytes[:, -1].sum(), len(WIDTHS), backward=9.0)
    result = search(tables, Wish.time(4), "exact", timeline=timeline)
    assert "Backward hides the bytes of 20 of 30 layers" in as_text(result, 0)


def test_the_least_time_needs_a_timeline():
    with pytest.raises(ValueError, match="needs what a step's seconds are made of, got no timeline; give one"):
        search(random_tables(3, 0), Wish.time(4), "exact")
