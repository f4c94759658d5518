"""Sharded models whose hosts average in codes: the same as without, for 2 hosts x 2 ranks over gloo."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import compression
from tests.support.gloo_ranks import as_rank, run

STEPS = 3


class Network(nn.Module):
    """Layers whose rows two ranks do not divide, and one that no step uses."""

    def __init__(self, width: int = 33) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 65), nn.Linear(65, 47)
        self.last, self.idle = nn.Linear(47, 5), nn.Linear(9, 70)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.last(self.second(self.first(inputs).relu()).relu()))


def hosts_of_two() -> DeviceMesh:
    return DeviceMesh("cpu", torch.arange(dist.get_world_size()).view(-1, 2), mesh_dim_names=("hosts", "ranks"))


MESHES: list[DeviceMesh] = []  # of this process: groups are made once


def mesh() -> DeviceMesh:
    if not MESHES:
        MESHES.append(hosts_of_two())
    return MESHES[0]


def sharded(make: Callable[[], nn.Module] = Network, seed: int = 0, apart: str = "second", **how: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = make()
    for name in filter(None, apart.split()):
        fully_shard(model.get_submodule(name), mesh=mesh()["ranks"], **how)
    fully_shard(model, mesh=mesh()["ranks"], **how)
    return model


def attached(model: nn.Module, name: str = "maxmin", **how: Any) -> compression.Exchange:
    wanted, takes = {"bucket_size": 64, "error_feedback": True}, compression.COMPRESSORS[name].takes
    options = {option: value for option, value in wanted.items() if option in takes}
    exchange = compression.attach(model, compression.build(name, **options), seed=5, **({"mesh": mesh()} | how))
    assert isinstance(exchange, compression.Exchange)
    return exchange


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(8, 33, generator=torch.Generator().manual_seed(100 * step + rank))


def whole(model: nn.Module) -> Tensor:
    """All weights, gathered from the ranks of the host."""
    return torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()])  # type: ignore[attr-defined]


def train(model: nn.Module, first: int = 0, last: int = STEPS) -> Tensor:
    """The weights after some steps of a loop that knows nothing of an exchange."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(first, last):
        optimizer.zero_grad()
        model(batch(step, dist.get_rank())).square().mean().backward()
        optimizer.step()
    return whole(model)


def equal(values: Tensor) -> bool:
    """Whether all ranks have the same bits."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    return all(torch.equal(values, other) for other in everyone)


def by_one_process(make: Callable[[], nn.Module] = Network) -> Tensor:
    """The weights of a whole model that sees all ranks' batches."""
    torch.manual_seed(0)
    model, ranks = make(), dist.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(ranks):
            (model(batch(step, rank)).square().mean() / ranks).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def compressors(rank: int) -> None:
    expected = by_one_process()
    for name in ("none", "maxmin", "1bit", "topk", "powersgd"):
        model = sharded(seed=rank // 2)  # hosts begin apart
        with attached(model, name) as exchange:
            weights = train(model)
            assert equal(weights), name
            assert exchange.step == STEPS - 1
            exchange.state_dict()
            assert exchange.step == STEPS
        if name == "none":
            torch.testing.assert_close(weights, expected)
        else:
            assert not torch.equal(weights, expected)
        assert (weights - expected).norm() < (0.1 if name in ("none", "maxmin") else 1) * expected.norm(), name


TASKS = {work.__name__: work for work in (compressors,)}


@pytest.mark.parametrize("task", TASKS)
def test_two_by_two(task: str, tmp_path: Path) -> None:
    run(__file__, 4, tmp_path, task)


def work(rank: int, folder: Path, task: str) -> None:
    TASKS[task](rank)


if __name__ == "__main__":
    as_rank(work)
