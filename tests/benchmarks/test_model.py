"""Arithmetic of the exchange benchmarks around measurements: buckets, medians, tables, and the model of scale."""

import math
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.exchange import Row, draw, mbit, row_of, table
from benchmarks.methods import Measured, Turn, Workload, bucketed
from benchmarks.scale import METHODS, Model, Run, predicted
from compression.network.hosts import Hosts
from image_classification.models import build

TRUE = Model(start=2e-3, message=5e-5, byte=1e-9, codecs=(3e-9, 4e-9))


def runs() -> list[Run]:
    """Every method at some numbers of ranks on two cores, with a small and a large gradient."""
    found = []
    for ranks in (2, 4, 8, 16):
        for values, buckets in ((500_000, 1), (8_000_000, 2)):
            for method, nbytes in zip(METHODS, (4.0, 0.52, 0.52), strict=True):
                sent = 2 * (ranks - 1) / ranks * nbytes * values
                found.append(Run(method, ranks, values, buckets, sent, sharing=ranks / 2))
    return found


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


def test_the_model_finds_the_coefficients_that_made_the_runs() -> None:
    found = Model.fit({run: TRUE.seconds(run) for run in runs()})
    coefficients = [(model.start, model.message, model.byte, *model.codecs) for model in (found, TRUE)]
    assert coefficients[0] == pytest.approx(coefficients[1])


def test_a_prediction_has_not_seen_its_number_of_ranks() -> None:
    seconds = {run: TRUE.seconds(run) * (3 if run.ranks == 8 else 1) for run in runs()}
    for run, said in predicted(seconds).items():
        if run.ranks == 8:
            assert said == pytest.approx(TRUE.seconds(run))


def test_a_slow_link_costs_its_bytes_and_a_fast_one_nothing() -> None:
    run = Run("float32", 2, 1_000_000, 1, nbytes=4e6)
    assert TRUE.seconds(run, link_mbit=8) == pytest.approx(TRUE.start + 2 * TRUE.message + 4.0)
    assert TRUE.seconds(run, link_mbit=1e6) == TRUE.seconds(run)
