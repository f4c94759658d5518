"""Reports: sums of steps, means over ranks, and metrics per step."""

import pytest
import torch

from compression import Report

CPU = torch.device("cpu")
SOME = Report(
    steps=4, bytes_sent=100, bytes_dense=400, ratio=0.25, comm_seconds=2, codec_seconds=1, exposed_seconds=0.5,
    host_bytes=200, host_bytes_dense=800,
)


def test_metrics_are_per_step() -> None:
    assert SOME.metrics() == {
        "comm.bytes_sent": 25,
        "comm.bytes_dense": 100,
        "comm.ratio": 0.25,
        "comm.host_bytes": 50,
        "comm.host_bytes_dense": 200,
        "comm.host_ratio": 0.25,
        "comm.time": 0.5,
        "comm.exposed_time": 0.125,
        "codec.time": 0.25,
    }


def test_there_are_none_without_a_step() -> None:
    assert Report().metrics() == {}
    assert (Report() + Report()).metrics() == {}
    assert Report().mean(lambda values: values, 1, CPU) == Report()


def test_reports_add_up() -> None:
    assert Report() + SOME == SOME
    more = SOME + Report(steps=1, bytes_sent=50, bytes_dense=100, ratio=0.5)
    assert (more.steps, more.bytes_sent, more.bytes_dense) == (5, 150, 500)
    assert more.metrics()["comm.ratio"] == 0.3


def test_where_nothing_is_sent_the_ratio_is_the_mean_over_the_steps() -> None:
    both = Report(steps=3, ratio=0.5) + Report(steps=1, ratio=0.1)
    assert both.metrics()["comm.ratio"] == pytest.approx(0.4)


def test_the_mean_over_ranks_takes_one_sum() -> None:
    asked = []

    def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
        asked.append(values)
        return values + torch.tensor([4, 300, 400, 3, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)

    mean = SOME.mean(sum_over_ranks, 2, CPU)
    assert (mean.steps, mean.bytes_sent, mean.bytes_dense, mean.comm_seconds) == (4, 200, 400, 1)
    assert mean.metrics()["comm.ratio"] == 0.5
    assert [(values.dtype, values.shape) for values in asked] == [(torch.float64, (11,))]
