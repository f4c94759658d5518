"""Reduce-scatters in codes under FSDP2, over gloo: right against the same program without them."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import compression
from tests.support import sharded_training
from tests.support.gloo_ranks import as_rank, run
from tests.support.sharded_training import whole

STEPS = 3
MESHES: list[DeviceMesh] = []  # of this process: groups are made once


class Network(nn.Module):
    """Layers whose rows no number of ranks divides, and one that no step uses."""

    def __init__(self, width: int = 33, inner: int = 65) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, inner), nn.Linear(inner, 47)
        self.last, self.idle = nn.Linear(47, 5), nn.Linear(9, 70)
        self.checkpointed = False
        self.skipping = False

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).relu()
        if not self.skipping:
            twice = partial(checkpoint, self._middle, use_reentrant=False)
            hidden = twice(hidden) if self.checkpointed else self._middle(hidden)
        return torch.as_tensor(self.last(hidden[:, :47]))

    def _middle(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(self.second(hidden).relu())


class Attending(nn.Module):
    """Attention takes the weights of a module inside it, which it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(33, 16), nn.Linear(16, 5)
        self.second = nn.TransformerEncoderLayer(16, 2, 40, 0.0, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.last(self.second(self.first(inputs)[None]))[0])


def mesh() -> DeviceMesh:
    if not MESHES:
        MESHES.append(init_device_mesh("cpu", (dist.get_world_size(),)))
    return MESHES[0]


def sharded(make: Callable[[], nn.Module] = Network, apart: str = "second", **how: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    for name in apart.split():
        fully_shard(model.get_submodule(name), mesh=mesh(), **how)
    fully_shard(model, mesh=mesh(), **how)
    return model


def attached(model: nn.Module, name: str = "none", **options: Any) -> compression.Exchange:
    how = {key: options.pop(key) for key in ("ranks_per_host", "hierarchical", "verify_wire") if key in options}
    if "bucket_size" in compression.COMPRESSORS[name].takes:
        options = {"bucket_size": 64} | options
    exchange = compression.attach(model, compression.build(name, **options), seed=5, **how)
    assert isinstance(exchange, compression.Exchange)
    return exchange


def batch(step: int, width: int = 33) -> Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def loss_of(model: nn.Module, step: int) -> Tensor:
    return torch.as_tensor(model(batch(step)).float().square().mean())


def step_once(model: nn.Module, step: int) -> None:
    loss_of(model, step).backward()


def accumulate(model: nn.Module, step: int) -> None:
    """Two micro-batches, of each of which gradients travel."""
    for micro in (0, 1):
        loss_of(model, 10 * step + micro).backward()


def accumulate_locally(model: nn.Module, step: int) -> None:
    """Three micro-batches, after the last of which gradients travel."""
    assert isinstance(model, FSDPModule)
    for micro in (0, 1, 2):
        model.set_requires_gradient_sync(micro == 2)
        loss_of(model, 10 * step + micro).backward()


def clip(model: nn.Module, step: int) -> None:
    step_once(model, step)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    assert norm.full_tensor() > 0.05  # type: ignore[attr-defined]


def skip_a_module(model: nn.Module, step: int) -> None:
    model.skipping = step == 1  # type: ignore[assignment]
    step_once(model, step)


def train(
    model: nn.Module, backward: Callable[[nn.Module, int], None] = step_once, first: int = 0, last: int = STEPS
) -> Tensor:
    return sharded_training.train(model, backward, first, last)


def by_columns(parameter: nn.Parameter) -> Shard | None:
    """Of matrices whose columns all ranks divide, as FSDP asks."""
    return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % dist.get_world_size() == 0 else None


def wide() -> nn.Module:
    return Network(33, 66)


def checkpointed() -> nn.Module:
    model = Network()
    model.checkpointed = True
    return model


LOW = torch.bfloat16
CASES: dict[str, tuple[dict[str, Any], Callable[[nn.Module, int], None]]] = {
    "plain": ({}, step_once),
    "one unit": ({"apart": ""}, step_once),
    "accumulation": ({}, accumulate),
    "local accumulation": ({}, accumulate_locally),
    "clipping": ({}, clip),
    "a module that a step skips": ({}, skip_a_module),
    "checkpointing": ({"make": checkpointed}, step_once),
    "offload": ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, accumulate),
    "attention": ({"make": Attending}, step_once),
    "no resharding": ({"reshard_after_forward": False}, step_once),
    "columns": ({"make": wide, "shard_placement_fn": by_columns}, step_once),
    "bfloat16 reduced": ({"mp_policy": MixedPrecisionPolicy(reduce_dtype=LOW)}, accumulate),
    "float16 reduced": ({"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float16)}, step_once),
    "bfloat16 parameters": ({"mp_policy": MixedPrecisionPolicy(param_dtype=LOW)}, step_once),
    "bfloat16 parameters, reduced in float32": (
        {"mp_policy": MixedPrecisionPolicy(param_dtype=LOW, reduce_dtype=torch.float32)}, accumulate_locally
    ),
}  # fmt: skip


def the_same_program(rank: int, folder: Path) -> None:
    """In float32 as without us, but for the order of sums; in codes near that, and the same again."""
    for case, (how, backward) in CASES.items():
        expected = train(sharded(**how), backward)
        model = sharded(**how)
        with attached(model) as exchange:
            got = train(model, backward)
            report = exchange.report()
            assert 0 < report.bytes_sent < 1.01 * report.bytes_dense + 1000, case  # parameters without gradient stay
        low = any(policy is not torch.float32 for policy in _dtypes(how))
        tolerance = {"rtol": 2e-2, "atol": 2e-3} if low else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(got, expected, **tolerance, msg=lambda text, case=case: f"{case}: {text}")
        runs = []
        for checked in (False, True):
            model = sharded(**how)
            with attached(model, "maxmin", bits=6, verify_wire=checked):
                runs.append(train(model, backward))
        assert torch.equal(*runs), case
        assert not torch.equal(runs[0], got), case
        assert (runs[0] - got).norm() < 0.01 * got.norm(), case


def _dtypes(how: dict[str, Any]) -> list[torch.dtype]:
    policy = how.get("mp_policy", MixedPrecisionPolicy())
    return [each for each in (policy.param_dtype, policy.reduce_dtype) if each is not None]


def divide_factors(rank: int, folder: Path) -> None:
    """Gloo has no such sum of its own: against the mean."""
    model = sharded()
    with attached(model):
        step_once(model, 0)
        means = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]  # type: ignore[attr-defined]
        for factor in (1.0, 8.0):
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(factor)
            model.zero_grad()
            step_once(model, 0)
            sums = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]  # type: ignore[attr-defined]
            for mean, total in zip(means, sums, strict=True):
                torch.testing.assert_close(total, mean * dist.get_world_size() / factor)
        assert isinstance(model, FSDPModule)
        model.set_gradient_divide_factor(float(dist.get_world_size()))
        model.set_force_sum_reduction_for_comms(True)
        model.zero_grad()
        step_once(model, 0)
        for mean, parameter in zip(means[:2], list(model.parameters())[:2], strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), mean)  # type: ignore[union-attr]


def every_compressor(rank: int, folder: Path) -> None:
    """All that average pieces train; the others are refused, and the model is left as it was."""
    expected = train(sharded())
    for name, row in compression.COMPRESSORS.items():
        model = sharded()
        if row.quantizer is None and row.reduce_scatter is None:
            with pytest.raises(ValueError, match=r"groups=\(inside, between\)"):
                attached(model, name)
            assert torch.equal(train(model), expected), name
            continue
        options = {"error_feedback": True} if row.needs_feedback else {}
        with attached(model, name, **options) as exchange:
            weights = train(model)
            assert exchange.step == STEPS - 1
        assert (weights - expected).norm() < 0.1 * expected.norm(), name
        del exchange
        assert not torch.equal(train(model, last=1), weights)  # FSDP's own again
    with pytest.raises(ValueError, match="error_feedback=True"):
        attached(sharded(), "1bit")


def not_finite(rank: int, folder: Path) -> None:
    """A NaN of one rank's is in one owner's piece, and all of them drop the step."""
    model = sharded()
    with attached(model, "maxmin", error_feedback=True) as exchange:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kept: dict[str, Any] = {}
        for step in range(4):
            before = copy.deepcopy(exchange.state_dict())
            optimizer.zero_grad()
            exchange.begin_step()
            loss = loss_of(model, step)
            if step == 2 and rank == 1:
                loss = loss * torch.nan
            loss.backward()
            finite = exchange.finish()
            assert bool(finite) == (step != 2)
            if finite:
                optimizer.step()
            exchange.settle(finite)
            if step == 2:
                kept = exchange.state_dict()
                assert _equal_states(before, kept, but_step=True)
        assert not _equal_states(kept, exchange.state_dict(), but_step=True)
        assert whole(model).isfinite().all()


def _equal_states(one: dict[str, Any], other: dict[str, Any], but_step: bool = False) -> bool:
    if one.keys() != other.keys():
        return False
    for key, value in one.items():
        if key == "step" and but_step:
            continue
        same = (
            _equal_states(value, other[key]) if isinstance(value, dict)
            else torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        )  # fmt: skip
        if not same:
            return False
    return True


def resuming(rank: int, folder: Path) -> None:
    """Bit for bit, whoever's residuals: each rank's are its own, under a name that says so."""
    weights = []
    for interrupted in (False, True):
        model = sharded()
        exchange = attached(model, "maxmin", bits=2, error_feedback=True)
        train(model, last=2)
        state = exchange.gathered_state_dict()
        if interrupted:
            exchange.close()
            exchange = attached(model, "maxmin", bits=2, error_feedback=True)
            exchange.load_state_dict(state)
        weights.append(train(model, first=2, last=4))
        exchange.close()
    assert torch.equal(*weights)
    ranks = dist.get_world_size()
    assert sorted(state) == [*(f"rank {r} of {ranks}" for r in range(ranks)), "step"]
    owed = sum(values.numel() for values in state[f"rank {rank} of {ranks}"]["residual"].values())
    compressed = sum(parameter.numel() for parameter in Network().parameters() if parameter.ndim == 2)
    assert owed == pytest.approx(compressed * (ranks - 1) / ranks, rel=0.05)
    with attached(sharded(), "maxmin", bits=2, error_feedback=True) as exchange:
        others = {key.replace(f"of {ranks}", f"of {ranks + 1}"): value for key, value in state.items()}
        with pytest.raises(ValueError, match=f"this is rank {rank} of {ranks}: each rank remembers"):
            exchange.load_state_dict(others)


def refusals(rank: int, folder: Path) -> None:
    with pytest.raises(ValueError, match="has an exchange already"), attached(model := sharded()):
        attached(model)
    with pytest.raises(ValueError, match="`record` has no use"):
        compression.attach(sharded(), "maxmin", record=True)
    with pytest.raises(ValueError, match="nobody sends"):
        attached(sharded(), "maxmin", second_hop_bits=8)
    with pytest.raises(ValueError, match="bits is 4 on rank 0 and"):
        attached(sharded(), "maxmin", bits=4 + rank)
    with pytest.raises(ValueError, match="needs several hosts"):
        attached(sharded(), "maxmin", hierarchical=True)
    part = [DeviceMesh("cpu", [each]) for each in range(dist.get_world_size())][rank]
    alone = fully_shard(Network(), mesh=part)
    with pytest.raises(ValueError, match=r"sharded over 1 of 2 ranks"):
        attached(alone)  # type: ignore[arg-type]


def levels(rank: int, folder: Path) -> None:
    """Hosts of two: as without us in float32, and in codes a host's link carries less than flat."""
    expected = train(sharded())
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("compression").addHandler(handler)
    sent = {}
    for name in ("none", "maxmin"):
        for hierarchical in (None, False):
            model = sharded()
            how = {"ranks_per_host": 2, "hierarchical": hierarchical, "verify_wire": name == "maxmin"}
            with attached(model, name, **how) as exchange:
                assert (exchange.levels is None) == (hierarchical is False)
                weights = train(model)
                sent[name, hierarchical] = exchange.report()
            if name == "none":
                torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
            assert (weights - expected).norm() < 0.05 * expected.norm()
        in_levels, flat = sent[name, None], sent[name, False]
        assert in_levels.host_bytes < 0.6 * flat.host_bytes
    costs = [text for text in records if "in one level over" in text]
    assert len(costs) == (2 if rank == 0 else 0)
    weights = []
    for interrupted in (False, True):
        model = sharded()
        exchange = attached(model, "eden", bits=2, error_feedback=True, ranks_per_host=2)
        train(model, last=2)
        state = exchange.gathered_state_dict()
        if interrupted:
            exchange.close()
            exchange = attached(model, "eden", bits=2, error_feedback=True, ranks_per_host=2)
            exchange.load_state_dict(state)
        weights.append(train(model, first=2, last=4))
        exchange.close()
    assert torch.equal(*weights)
    memory = [text for text in records if "MB of residuals" in text]
    assert len(memory) == (3 if rank == 0 else 0)
    with (
        attached(sharded(), "eden", bits=2, error_feedback=True) as exchange,
        pytest.raises(ValueError, match="each rank remembers"),
    ):
        exchange.load_state_dict(state)


TASKS = {
    work.__name__: work
    for work in (the_same_program, divide_factors, every_compressor, not_finite, resuming, refusals, levels)
}


def test_two_ranks(tmp_path: Path) -> None:
    run(__file__, 2, tmp_path, "the_same_program", "divide_factors", "every_compressor", "refusals")


def test_three_ranks(tmp_path: Path) -> None:
    run(__file__, 3, tmp_path, "divide_factors", "not_finite", "resuming")


def test_three_hosts_of_two(tmp_path: Path) -> None:
    run(__file__, 6, tmp_path, "levels")


def work(rank: int, folder: Path, *tasks: str) -> None:
    for task in tasks:
        TASKS[task](rank, folder)


if __name__ == "__main__":
    as_rank(work)
