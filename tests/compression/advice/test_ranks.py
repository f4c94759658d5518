"""Advice among real ranks, in one level and two: all get the same, and compression attaches afterwards as ever."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import compression
from tests.support.gloo_ranks import as_rank, run


def failing(rank: int) -> dict[str, Any]:
    """A step that fails before its forward on one rank, of a model whose buffers DDP would broadcast in the others'."""
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32)))

    def step() -> None:
        if rank == 1:
            raise RuntimeError("no data")
        model(torch.randn(8, 64)).square().mean().backward()

    try:
        compression.advise(model, step)
    except ValueError as error:
        return {"said": str(error), "broadcasts": model.will_sync_module_buffers()}
    return {}


def sharded() -> dict[str, Any]:
    """A model that shards its own gradients, which no advice times."""
    model = nn.Linear(64, 32)
    fully_shard(model)
    with pytest.raises(ValueError, match="this model was given to fully_shard; give the model as it was before"):
        compression.advise(model, lambda: None, simulate="hosts=2 link=1gbit")
    return {}


def work(rank: int, folder: Path, ranks_per_host: str) -> dict[str, Any]:
    if ranks_per_host == "failing":
        return failing(rank)
    if ranks_per_host == "sharded":
        return sharded()
    if rank == 0 and hasattr(os, "sched_setaffinity"):  # ranks that may use other cores than others still agree
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    torch.manual_seed(rank)
    images = torch.randn(8, 64)

    def step() -> None:
        model(images).square().mean().backward()

    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = compression.advise(model, step, ranks_per_host=int(ranks_per_host))
    clean = all(parameter.grad is None for parameter in model.parameters())
    same = all(torch.equal(*each) for each in zip(before, model.parameters(), strict=True))
    with compression.attach(model, "maxmin", bits=4, ranks_per_host=int(ranks_per_host)) as exchange:
        step()
        sent = exchange.report().bytes_sent
    cluster = (found.cluster.hosts, found.cluster.ranks_per_host)
    return {"advice": found.to_json(), "clean": clean and same, "sent": sent, "cluster": cluster}


@pytest.mark.parametrize(("ranks", "ranks_per_host"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_all_ranks_end_with_the_same_advice(ranks: int, ranks_per_host: int, tmp_path: Path) -> None:
    results, _ = run(__file__, ranks, tmp_path, str(ranks_per_host))
    first, *others = results
    assert all(each["advice"] == first["advice"] for each in others)
    assert all(each["clean"] and each["sent"] > 0 for each in results)
    assert first["cluster"] == (ranks // ranks_per_host, ranks_per_host)
    names = {each["name"] for each in first["advice"]["choices"]}
    assert ("maxmin, bits 4, two levels" in names) == (ranks_per_host > 1)
    assert first["advice"]["measured"]["costs"]["per_copied_byte"] > 0


def test_a_step_that_fails_before_its_forward_holds_up_no_rank(tmp_path: Path) -> None:
    results, _ = run(__file__, 2, tmp_path, "failing")
    said = "a step of this model fails: RuntimeError: no data; run it without advice first"
    assert results == [{"said": said, "broadcasts": True}] * 2


def test_a_sharded_model_is_refused(tmp_path: Path) -> None:
    """In a process of its own: what FSDP keeps of a thread hangs or ends processes that another thread forks later."""
    run(__file__, 1, tmp_path, "sharded")


if __name__ == "__main__":
    as_rank(work)
