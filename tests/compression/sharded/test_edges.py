"""Sharded models in programs that FSDP serves in ways of its own: where a backward ends, what wraps modules, whose
hooks there are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

import compression
from compression.sharded import scatter
from tests.support.gloo_ranks import as_rank, run

FEEDBACK: dict[str, Any] = {"bits": 4, "bucket_size": 16, "error_feedback": True}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4))


def sharded(model: nn.Sequential, **of_root: Any) -> nn.Sequential:
    """The middle layer as a unit of its own."""
    fully_shard(model[1])
    fully_shard(model, **of_root)
    return model


def batch(rank: int, step: int = 0) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))


@contextmanager
def attached(model: nn.Module, **how: Any) -> Iterator[Any]:
    with compression.attach(model, "maxmin", **{**FEEDBACK, **how}) as exchange:
        yield exchange


class Wrapper(nn.Module):
    """Computes the loss, and is not sharded itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.model(inputs).square().mean())


def ends(rank: int) -> None:
    """A backward is one step wherever FSDP reduces its root, and what is not finite in an inner unit is told of."""
    cast = MixedPrecisionPolicy(output_dtype=torch.float64)  # another tensor than the one that FSDP hooks
    for model in (sharded(network(), mp_policy=cast), Wrapper(sharded(network()))):
        with attached(model) as exchange:
            for step in range(3):
                model(batch(rank, step)).square().mean().backward()
                assert exchange.finish()
            assert exchange.step + exchange.open == 3
            assert exchange.report().steps == 3
            loss = model(batch(rank, 3)).square().mean()
            loss.backward(torch.full_like(loss, float("nan")) if rank == 0 else None)
            assert not exchange.finish()


def micro_batches(rank: int) -> None:
    """A step that is dropped leaves residuals as it found them, whichever of its backwards was not finite."""
    model = sharded(network())
    with attached(model) as exchange:
        for step in range(2):
            exchange.begin_step()
            model(batch(rank, step)).square().mean().backward()
            exchange.settle(exchange.finish())
        before = exchange.averager.state_dict()
        for bad in range(3):
            exchange.begin_step()
            for number in range(3):
                loss = model(batch(rank, 5 + number)).square().mean()
                (loss * float("inf") if number == bad and rank == 0 else loss).backward()
            finite = exchange.finish()
            assert not finite
            exchange.settle(finite)
            after = exchange.averager.state_dict()
            assert all(torch.equal(after["residual"][name], values) for name, values in before["residual"].items())
        exchange.begin_step()
        for number in range(3):
            model(batch(rank, 9 + number)).square().mean().backward()
        exchange.settle(exchange.finish())
        after = exchange.averager.state_dict()["residual"]
        assert any(not torch.equal(after[name], values) for name, values in before["residual"].items())


def frozen(rank: int) -> None:
    """What fully_shard ignores may be frozen; what is frozen at first needs another exchange once it is not."""
    model = network()
    model[0].requires_grad_(False)
    fully_shard(model, ignored_params=set(model[0].parameters()))
    with attached(model) as exchange:
        model(batch(rank)).square().mean().backward()
        assert exchange.finish()
    model = network()
    model[1].requires_grad_(False)
    sharded(model)
    with attached(model) as exchange:
        model(batch(rank)).square().mean().backward()
        model[1].requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"1\.weight was frozen when compression was attached"):
            model(batch(rank)).square().mean().backward()


def other_forwards(rank: int) -> None:
    """A unit whose forward has another name."""

    class Encoder(nn.Linear):
        def encode(self, inputs: Tensor) -> Tensor:
            return torch.as_tensor(self(inputs))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.last = Encoder(8, 8), nn.Linear(8, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.as_tensor(self.last(torch.nn.functional.linear(inputs, *self.encoder.parts())))

    Encoder.parts = lambda self: (self.weight, self.bias)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model = Model()
    fully_shard(model.encoder)
    register_fsdp_forward_method(model.encoder, "parts")
    fully_shard(model)
    with attached(model) as exchange:
        model.encoder.encode(batch(rank)).square().mean().backward()
        assert exchange.finish()


def names(rank: int) -> None:
    """A state outlives the compiling of a module."""
    model = sharded(network())
    with attached(model) as exchange:
        model(batch(rank)).square().mean().backward()
        state = exchange.state_dict()
    model = network()
    model[1] = torch.compile(model[1], backend="eager")  # type: ignore[assignment]
    fully_shard(model)
    with attached(model) as exchange:
        exchange.load_state_dict(state)
        assert set(exchange.averager.state_dict()["residual"]) == {"0.weight", "1.weight", "2.weight"}


def left_as_it_was(rank: int) -> None:
    """FSDP's own collectives come back; an exchange that could not be made leaves nothing."""
    model = sharded(network())
    model.set_allocate_memory_from_process_group_for_comm(True)  # type: ignore[operator]
    group = model._get_fsdp_state()._fsdp_param_group  # type: ignore[operator]
    before = group._reduce_scatter_comm, group._all_gather_comm
    with attached(model, gather_bits=8):
        assert group._reduce_scatter_comm is not before[0]
    assert (group._reduce_scatter_comm, group._all_gather_comm) == before

    def failing(*_: Any) -> None:
        raise OSError("no memory")

    whole, scatter.Gathering = scatter.Gathering, failing  # type: ignore[assignment,misc]
    with pytest.raises(OSError, match="no memory"), attached(model, gather_bits=8):
        pass
    scatter.Gathering = whole  # type: ignore[misc]
    with attached(model) as exchange:
        model(batch(rank)).square().mean().backward()
        assert exchange.finish()
    for bits in (8.0, True, 3):
        with pytest.raises(ValueError, match="those of a parameter's code in all-gathers"), attached(
            model, gather_bits=bits
        ):
            pass


def hooks_of_others(rank: int) -> None:
    """A hook that is there already would run no more."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("hosts", "ranks"))
    model = network()
    fully_shard(model, mesh=mesh["ranks"])
    model.set_all_reduce_hook(lambda _: None)  # type: ignore[operator]
    with pytest.raises(ValueError, match="the root module has an all-reduce hook already"), attached(model, mesh=mesh):
        pass
    model.set_all_reduce_hook(None)  # type: ignore[operator]
    with attached(model, mesh=mesh) as exchange:
        model(batch(rank)).square().mean().backward()
        assert exchange.finish()


def widths(rank: int) -> None:
    """All ranks set widths of all layers, whatever pieces they have."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("hosts", "ranks"))
    model = network()
    fully_shard(model, mesh=mesh["ranks"])
    with attached(model, mesh=mesh) as exchange:
        exchange.set_widths({"0.weight": 2, "2.weight": 32})
        assert exchange.widths["0.weight"] == 2
        for wrong in ({"0.bias": 2}, {"0.weight": 9}, {"nothing": 2}):
            with pytest.raises(ValueError, match=r"is not a compressed layer|1 to 8 bits"):
                exchange.set_widths(wrong)


TASKS = (ends, micro_batches, frozen, other_forwards, names, left_as_it_was, hooks_of_others, widths)


def test_edges(tmp_path: Path) -> None:
    run(__file__, 2, tmp_path)


def work(rank: int, folder: Path) -> None:
    for task in TASKS:
        task(rank)
        dist.barrier()


if __name__ == "__main__":
    as_rank(work)
