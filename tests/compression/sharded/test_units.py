"""Units of sharded models: whose parameters travel together, and how they lie in the buffers that do."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from compression.sharded.units import Unit, mesh_of, units_of, watch
from tests.support.gloo_ranks import as_rank, run


class Inner(nn.Sequential):
    """Like attention, it uses a layer's parameters without the layer's forward."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 8))

    def forward(self, values: Tensor) -> Tensor:
        last = self[2]
        return nn.functional.linear(self[1](self[0](values)), last.weight, last.bias)


class Network(nn.Module):
    """A shared weight, a layer that no step uses, and sizes that two ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.last.weight = self.embedding.weight
        self.inner = Inner()
        self.idle = nn.Linear(3, 3)
        self.own = nn.Parameter(torch.rand(5, 8))  # of the module itself: before those of its modules, not in buffers
        self.norm, self.shift = nn.LayerNorm(8), nn.Linear(8, 8)  # given to fully_shard at once

    def forward(self, tokens: Tensor) -> Tensor:
        values = self.norm(self.shift(self.inner(self.embedding(tokens)) + self.own.sum(0)))
        return torch.as_tensor(self.last(values))


def sharded() -> Network:
    torch.manual_seed(0)
    model, mesh = Network(), init_device_mesh("cpu", (2,))
    fully_shard(model.inner, mesh=mesh)
    fully_shard([model.shift, model.norm], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def names(unit: Unit) -> list[str]:
    return [piece.name for piece in unit.pieces]


def pieces(rank: int) -> None:
    model = sharded()
    outer, inner, last = units_of(model)
    assert (outer.name, inner.name, last.name) == ("", "inner", "norm")
    assert names(outer) == ["embedding.weight", "idle.weight", "idle.bias", "own"]
    assert names(last) == ["shift.weight", "shift.bias", "norm.weight", "norm.bias"]
    assert names(inner) == ["inner.0.weight", "inner.0.bias", "inner.2.weight", "inner.2.bias"]
    assert mesh_of([outer, inner, last]).size() == 2
    parameters = dict(model.named_parameters())
    for unit in (outer, inner, last):
        for piece in unit.pieces:
            parameter = parameters[piece.name]
            assert isinstance(parameter, DTensor)
            assert piece.shapes[rank] == parameter.to_local().shape


def travelling(rank: int) -> None:
    """What a step reduces is where the pieces say, and what has no gradient does not travel."""
    model = sharded()
    units, whole = units_of(model), Network()
    whole.load_state_dict({name: each.full_tensor() for name, each in model.state_dict().items()})
    tokens, seen = torch.arange(6), []
    whole(tokens).square().sum().backward()
    gradients = {name: each.grad for name, each in whole.named_parameters()}
    handles = watch(units)

    def hook(unit: Unit) -> None:
        def catch(values: Tensor) -> None:
            at = 0
            for piece in unit.travelling(values.numel()):
                seen.append(piece.name)
                gradient = gradients[piece.name]
                assert gradient is not None
                own = gradient[rank * piece.shapes[0][0] :][: piece.shapes[rank][0]]
                assert torch.allclose(values[at : at + own.numel()].view(own.shape), own, atol=1e-5)
                at += piece.padded

        unit.module.set_all_reduce_hook(catch)

    for unit in units:
        hook(unit)
    for _ in range(2):
        model(tokens).square().sum().backward()
    assert sorted(seen) == sorted(2 * [name for name in gradients if not name.startswith("idle")])
    for handle in handles:
        handle.remove()
    model(tokens)
    with pytest.raises(RuntimeError, match="attach before the first forward"):
        units[0].travelling(88)


def refused(rank: int) -> None:
    model, mesh = Network(), init_device_mesh("cpu", (2,))
    fully_shard(model.inner, mesh=mesh)
    with pytest.raises(ValueError, match="parameter own is outside of any module"):
        units_of(model)
    model = Network()
    fully_shard(model, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("hosts", "ranks")))
    with pytest.raises(ValueError, match="a mesh of 1 dimension"):
        units_of(model)
    columns = nn.Linear(4, 6, bias=False)
    fully_shard(columns, mesh=mesh, shard_placement_fn=lambda parameter: Shard(1))
    (piece,) = units_of(columns)[0].pieces
    assert piece.shapes == ((6, 2), (6, 2))


TASKS = {work.__name__: work for work in (pieces, travelling, refused)}


@pytest.mark.parametrize("task", TASKS)
def test_units(task: str, tmp_path: Path) -> None:
    run(__file__, 2, tmp_path, task)


def work(rank: int, folder: Path, task: str) -> None:
    TASKS[task](rank)


if __name__ == "__main__":
    as_rank(work)
