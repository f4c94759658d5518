"""Arithmetic of the exchange benchmarks around measurements: buckets, medians, tables, and predictions of scale."""

import math
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.exchange import Row, draw, mbit, row_of, table
from benchmarks.methods import Measured, Turn, Workload, bucketed
from benchmarks.ranks import over_loopback
from benchmarks.scale import METHODS, clusters, extrapolated_table, predicted, square_layers
from compression.costs import CodecCosts, Costs, Run
from compression.network.hosts import Hosts
from image_classification.models import build

CODECS = {name: CodecCosts(2e-9, 1e-9) for name in ("bfloat16", "maxmin-4", "topk-0.01")}
TRUE = Costs(2e-3, 1e-4, 5e-5, 1e-9, 3e-10, CODECS)


def runs() -> list[Run]:
    """Every method at some numbers of ranks on this machine, with a small and a large gradient."""
    return [
        method.run(square_layers(values), cluster)
        for ranks in (2, 4, 8, 16)
        for cluster in clusters(ranks)
        for values in (500_000, 8_000_000)
        for method in METHODS.values()
        if method.hierarchical == (cluster.ranks_per_host > 1)
    ]


def test_buckets_are_those_that_ddp_makes() -> None:
    parameters = dict(build("resnet18").named_parameters())
    names = list(parameters)[::-1]
    assigned, _ = dist._compute_bucket_assignment_by_size([parameters[name] for name in names], [2**20, 25 * 2**20])
    ours = bucketed({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    assert list(ours) == [[names[k] for k in bucket] for bucket in assigned]


@given(st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=12))
@settings(deadline=None, max_examples=25)
def test_every_value_lies_in_one_bucket(shapes: list[tuple[int, int]]) -> None:
    work = Workload({str(k): shape for k, shape in enumerate(shapes)}, 0, Hosts.single(1))
    for bucket in work.buckets:
        bucket.flat.add_(1000)
    assert (work.flat > 500).all()
    assert sum(len(bucket.flat) for bucket in work.buckets) == sum(math.prod(shape) for shape in shapes)
    assert sorted(name for bucket in work.buckets for name in bucket.names) == sorted(work.shapes)
    work.restore()
    assert (work.flat < 500).all()


def test_ranks_have_gradients_of_their_own() -> None:
    first, second = (Workload({"weight": (8, 8)}, rank, Hosts.separate(2)).flat for rank in range(2))
    assert not torch.equal(first, second)


def test_a_turn_takes_as_long_as_its_slowest_rank() -> None:
    fast = Measured([Turn(seconds, 10.0, 8.0, 11.0) for seconds in (1.0, 9.0, 2.0)], peak=5.0)
    slow = Measured([Turn(seconds, 30.0, 20.0, 31.0) for seconds in (3.0, 4.0, 4.0)], peak=7.0)
    assert row_of([fast, slow]) == Row(seconds=4.0, counted=20.0, crossing=14.0, kernel=21.0, memory=7.0)


def test_a_hosts_bytes_are_those_that_its_ranks_send_to_other_hosts() -> None:
    """Every rank of a host reads the counter of the one link."""
    ranks = [Measured([Turn(1.0, 30.0, crossing, 31.0)], peak=5.0) for crossing in (0.0, 30.0, 0.0, 30.0)]
    row = row_of(ranks, ranks_per_host=2)
    assert (row.counted, row.crossing, row.kernel) == (30.0, 30.0, 31.0)


def test_the_table_leaves_out_what_nobody_counted() -> None:
    rows = {"float32": Row(0.5, 2e6, 1e6, None, 100.0), "hook": Row(0.25, None, None, None, 300.0)}
    assert list(table({"no limit": rows}, nbytes=200)) == [
        "| method | MB sent | MB on a host's link | by the kernel | memory | no limit, s | x float32 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| float32 | 2.00 | 1.00 |  | 0.50 | 0.500 | 1.00 |",
        "| hook |  |  |  | 1.50 | 0.250 | 2.00 |",
    ]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    fast, slow = (Row(seconds, 1.0, 1.0, 1.0, 1.0) for seconds in (0.5, 5.0))
    rates = {"no limit": {"float32": fast}, "100 Mbit/s": {"float32": slow}}
    draw({"2 ranks": rates, "2 hosts x 2 ranks": rates}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("word", ["0", "-5", "inf", "nan", "fast"])
def test_a_rate_is_a_number_above_zero(word: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"^expected a rate above 0 in Mbit/s, or none, got '{word}'$"):
        mbit(word)


def test_no_rate_is_a_choice() -> None:
    assert [mbit("none"), mbit("100")] == [None, 100.0]


def test_a_prediction_has_not_seen_its_number_of_ranks() -> None:
    seconds = {run: TRUE.seconds(run) * (3 if run.cluster.ranks == 8 else 1) for run in runs()}
    for run, said in predicted(seconds).items():
        if run.cluster.ranks == 8:
            assert said == pytest.approx(TRUE.seconds(run))


def test_hosts_are_measured_where_there_are_pairs() -> None:
    shapes = {ranks: [(each.hosts, each.ranks_per_host) for each in clusters(ranks)] for ranks in (2, 3, 4, 8)}
    assert shapes == {2: [(2, 1)], 3: [(3, 1)], 4: [(4, 1), (2, 2)], 8: [(8, 1), (4, 2)]}


def test_the_extrapolation_has_every_method_up_to_1024_ranks() -> None:
    """Megabytes are of all eight ranks of a host: flat, most of what all of them send."""
    _, _, *lines = extrapolated_table(TRUE, {"weight": (512, 512)})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(row[0], row[1]) for row in rows] == [(n, name) for n in ("16", "64", "256", "1024") for name in METHODS]
    last = {row[1]: row for row in rows[-len(METHODS) :]}
    assert float(last["float32"][2]) == pytest.approx(2 * 1023 / 1024 * 4 * 512 * 512 / 1e6, abs=0.05)
    assert float(last["maxmin-4"][2]) == pytest.approx(8 * float(last["maxmin-4, two levels"][2]), abs=0.5)
    assert all(float(row[4]) <= float(row[3]) for row in rows)


def test_ranks_over_loopback_learn_their_hosts() -> None:
    script = "import os; print(*(os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'GROUP_RANK')))"
    outputs = over_loopback(4, [sys.executable, "-c", script], ranks_per_host=2)
    assert [output.split() for output in outputs] == [
        ["0", "0", "2", "0"], ["1", "1", "2", "0"], ["2", "0", "2", "1"], ["3", "1", "2", "1"],
    ]  # fmt: skip
