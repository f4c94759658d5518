"""Averaging without a backward: any tensors, equal on all ranks, in place."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import compression
from compression import COMPRESSORS
from compression.network.threads import ThreadCollectives, run_ranks

VARIANTS = [
    (name, {"bucket_size": 64} if "bucket_size" in row.takes else {}) for name, row in COMPRESSORS.items()
] + [("topk", {"big_grad": True}), ("dgc", {"clip": 1.0}), ("maxmin", {"error_feedback": True, "warmup_steps": 1})]


def tensors(rank: int) -> dict[str, Tensor]:
    """Of no dimension, half precision, strided and transposed, and a plain matrix."""
    generator = torch.Generator().manual_seed(rank)
    return {
        "scale": torch.randn((), generator=generator),
        "half": torch.randn(33, 8, generator=generator).bfloat16(),
        "strided": torch.randn(40, 30, generator=generator)[:, ::3],
        "transposed": torch.randn(16, 24, generator=generator).t(),
        "matrix": torch.randn(50, 40, generator=generator),
    }


def values(named: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.float().flatten() for tensor in named.values()])


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_ranks_get_the_same_means_in_place(name: str, options: dict[str, Any]) -> None:
    def work(ranks: ThreadCollectives) -> Tensor:
        own = tensors(ranks.rank)
        with compression.averaging(own, name, ranks, **options) as averaging:
            assert averaging.average_()
            assert (averaging.report().bytes_sent > 0) == (name != "sanity")
        return values(own)

    first, *others = run_ranks(3, work)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.2)])
def test_means_are_near_the_true_ones(bits: int, error: float) -> None:
    def work(ranks: ThreadCollectives) -> Tensor:
        own = tensors(ranks.rank)
        with compression.averaging(own, "maxmin", ranks, bits=bits, bucket_size=64) as averaging:
            averaging.average_()
        return values(own)

    true = (values(tensors(0)) + values(tensors(1))) / 2
    found = run_ranks(2, work)[0]
    assert float((found - true).norm() / true.norm()) < error


def test_without_compression_means_are_exact() -> None:
    def work(ranks: ThreadCollectives) -> dict[str, Tensor]:
        own = tensors(ranks.rank)
        with compression.averaging(own, "none", ranks) as averaging:
            averaging.average_()
        return own

    found, one, other = run_ranks(2, work)[0], tensors(0), tensors(1)
    for name, tensor in found.items():
        assert torch.equal(tensor, (0.5 * one[name].float() + 0.5 * other[name].float()).to(tensor.dtype)), name


def test_means_that_are_not_finite_change_nothing_and_are_told_to_all() -> None:
    def work(ranks: ThreadCollectives) -> tuple[list[bool], bool]:
        own = tensors(ranks.rank)
        with compression.averaging(own, "maxmin", ranks, bucket_size=64, error_feedback=True) as averaging:
            told = [averaging.average_()]
            residual = {name: each.clone() for name, each in averaging.state_dict()["averager"]["residual"].items()}
            if ranks.rank == 1:
                own["matrix"][3, 3] = float("nan")
            before = values(own)
            told.append(averaging.average_())
            kept = torch.equal(before.nan_to_num(), values(own).nan_to_num())
            after = averaging.state_dict()["averager"]["residual"]
            return told, kept and all(torch.equal(each, after[name]) for name, each in residual.items())

    assert run_ranks(2, work) == [([True, False], True)] * 2


def test_what_is_remembered_goes_from_call_to_call_and_is_saved() -> None:
    def work(ranks: ThreadCollectives) -> tuple[Tensor, Tensor, str]:
        def run(
            calls: range, state: dict[str, Any] | None = None, every_rank: bool = False
        ) -> tuple[Tensor, dict[str, Any]]:
            own = tensors(ranks.rank)
            with compression.averaging(own, "maxmin", ranks, bits=2, bucket_size=64, error_feedback=True) as averaging:
                if state is not None:
                    averaging.load_state_dict(state)
                for call in calls:
                    for name, tensor in tensors(10 * call + ranks.rank).items():
                        own[name].copy_(tensor)
                    averaging.average_()
                return values(own), averaging.gathered_state_dict() if every_rank else averaging.state_dict()

        whole, _ = run(range(4))
        _, state = run(range(2))
        resumed, _ = run(range(2, 4), state)
        _, gathered = run(range(2), every_rank=True)
        assert torch.equal(resumed, run(range(2, 4), ranks.broadcast(gathered))[0])
        other = ranks.collect(state)[1 - ranks.rank]
        refused = ""
        try:
            run(range(0), other)
        except ValueError as error:
            refused = str(error)
        return whole, resumed, refused

    for whole, resumed, refused in run_ranks(2, work):
        assert torch.equal(whole, resumed)
        assert "each rank remembers what it owes alone" in refused


def test_a_report_is_of_calls_that_were_made_not_of_those_that_were_loaded() -> None:
    with compression.averaging(tensors(0), "maxmin") as averaging:
        for _ in range(3):
            averaging.average_()
        state = averaging.state_dict()
    with compression.averaging(tensors(0), "maxmin") as averaging:
        averaging.load_state_dict(state)
        averaging.average_()
        assert averaging.report().steps == 1


def test_alone_tensors_are_encoded_and_stay_near() -> None:
    own = tensors(0)
    with compression.averaging(own, "maxmin", bits=8, bucket_size=64) as averaging:
        assert averaging.average_()
        report = averaging.report()
    assert 0 < report.ratio < 0.5
    assert 0 < float((values(own) - values(tensors(0))).norm() / values(tensors(0)).norm()) < 0.01


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ({}, "there is nothing to average"),
        ({"count": torch.zeros(3, dtype=torch.int64)}, "count is of torch.int64"),
        ({"sparse": torch.zeros(3, 3).to_sparse()}, "sparse is of torch.float32, torch.sparse_coo"),
    ],
)
def test_tensors_without_a_mean_are_refused(named: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        compression.averaging(named, "none")


def test_ranks_that_give_other_tensors_are_refused() -> None:
    def work(ranks: ThreadCollectives) -> str:
        own = {"matrix": torch.zeros(4, 4 + ranks.rank)}
        try:
            compression.averaging(own, "none", ranks)
        except ValueError as error:
            return str(error)
        return ""

    for message in run_ranks(2, work):
        assert "all ranks choose alike, and tensors is [('matrix', (4, 4))] on rank 0" in message
