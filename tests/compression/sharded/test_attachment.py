"""Sharded models whose hosts average in codes: the same as without, for 2 hosts x 2 ranks over gloo.

The checks take one launch of ranks together, as a launch takes longer than most of them. The first that fails ends its
rank, so that no other waits for it.
"""

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import compression
from compression.sharded.exchange import ShardedExchange
from tests.support import sharded_training
from tests.support.gloo_ranks import as_rank, run
from tests.support.sharded_training import whole

STEPS = 3


class Network(nn.Module):
    """Layers whose rows two ranks do not divide, one that no step uses, and one that some steps skip."""

    def __init__(self, times: int = 1, reentrant: bool | None = None, hidden_output: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.times = nn.Linear(33, 65), nn.Linear(65, 65), times
        self.last, self.idle = nn.Linear(65, 5), nn.Linear(9, 70)
        self.own = nn.Parameter(torch.rand(3, 65) / 10)
        self.reentrant, self.hidden_output, self.skipping = reentrant, hidden_output, False

    def forward(self, inputs: Tensor) -> Any:
        values = (self.first(inputs) + self.own.sum(0)).relu()
        for _ in range(0 if self.skipping else self.times):
            if self.reentrant is None:
                values = self.second(values)
            else:
                values = checkpoint(self.second, values, use_reentrant=self.reentrant)
        values = self.last(values.relu())
        return SimpleNamespace(logits=values) if self.hidden_output else values


class One(nn.Sequential):
    """A model whose only unit is its root, and is reduced after all of its backward."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(33, 65), nn.ReLU(), nn.Linear(65, 5))


MESHES: list[DeviceMesh] = []  # this process': its groups are made once


def mesh() -> DeviceMesh:
    """Hosts x 2 ranks."""
    if not MESHES:
        ranks = torch.arange(dist.get_world_size()).view(-1, 2)
        MESHES.append(DeviceMesh("cpu", ranks, mesh_dim_names=("hosts", "ranks")))
    return MESHES[0]


def sharded(make: Callable[[], nn.Module] = Network, seed: int = 0, apart: str = "second", **how: Any) -> nn.Module:
    """A model of which some modules, and what remains of it, are given to fully_shard."""
    torch.manual_seed(seed)
    model = make()
    for names in apart.split():
        fully_shard([model.get_submodule(name) for name in names.split("+")], mesh=mesh()["ranks"], **how)
    fully_shard(model, mesh=mesh()["ranks"], **how)
    return model


def attached(model: nn.Module, name: str = "maxmin", **how: Any) -> ShardedExchange:
    wanted, takes = {"bucket_size": 64, "error_feedback": True}, compression.COMPRESSORS[name].takes
    options = {option: how.pop(option, value) for option, value in wanted.items() if option in takes}
    exchange = compression.attach(model, compression.build(name, **options), seed=5, **({"mesh": mesh()} | how))
    assert isinstance(exchange, ShardedExchange)
    return exchange


def average_plainly(model: nn.Module) -> None:
    """The same program without us: float32, or whatever is reduced, averaged over hosts as it is."""
    hosts = mesh().size(0)

    def average(values: Tensor) -> None:
        dist.all_reduce(values.mul_(1 / hosts), group=mesh().get_group(0))

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(average)


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(8, 33, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(model: nn.Module, step: int, rank: int | None = None) -> Tensor:
    outputs = model(batch(step, dist.get_rank() if rank is None else rank))
    return getattr(outputs, "logits", outputs).float().square().mean()


def one_backward(model: nn.Module, step: int) -> None:
    loss_of(model, step).backward()


def micro_batches(model: nn.Module, step: int) -> None:
    for turn in range(2):
        loss_of(model, step + 50 * turn).backward()


def micro_batches_apart(model: FSDPModule, step: int) -> None:
    """Gradients that travel with the last one's alone."""
    for turn in range(2):
        model.set_requires_gradient_sync(turn == 1)
        loss_of(model, step + 50 * turn).backward()  # type: ignore[arg-type]


def clipped(model: nn.Module, step: int) -> None:
    one_backward(model, step)
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def skipped(model: Network, step: int) -> None:
    model.skipping = step == 1
    one_backward(model, step)


def divided(model: nn.Module, step: int) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(3.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    one_backward(model, step)


def train(model: Any, backward: Callable[[Any, int], None] = one_backward, first: int = 0, last: int = STEPS) -> Tensor:
    return sharded_training.train(model, backward, first, last)


def everyones(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def equal(values: Tensor) -> bool:
    """Whether all ranks have the same bits."""
    return all(torch.equal(values, other) for other in everyones(values))


def near(weights: Tensor, expected: Tensor, start: Tensor) -> bool:
    """Whether what was trained is not much else."""
    return bool((weights - expected).norm() < 0.5 * (expected - start).norm())


def by_one_process(clip: float | None = None) -> Tensor:
    """The weights of a whole model that sees all ranks' batches."""
    torch.manual_seed(0)
    model, ranks = Network(), dist.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(ranks):
            (loss_of(model, step, rank) / ranks).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Each compressor


def compressor(name: str) -> None:
    expected = by_one_process()
    model = sharded(seed=dist.get_rank() // 2)  # hosts begin apart
    with attached(model, name) as exchange:
        weights = train(model)
        assert equal(weights)
        assert exchange.step == STEPS - 1
        exchange.state_dict()
        assert exchange.step == STEPS
    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in Network().parameters()])
    if name == "none":
        torch.testing.assert_close(weights, expected)
    else:
        assert not torch.equal(weights, expected)
    assert near(weights, expected, start) or name in ("sanity", "topk", "topk_rmsprop", "dgc", "eden", "svd"), name


# The same programs


PROGRAMS: dict[str, tuple[Callable[[Any, int], None], dict[str, Any]]] = {
    "a step": (one_backward, {}),
    "one unit": (one_backward, {"make": One, "apart": ""}),
    "a module that a step uses twice": (one_backward, {"make": partial(Network, times=2)}),
    "a rank without pieces": (one_backward, {"make": lambda: nn.Sequential(nn.Linear(33, 1)), "apart": ""}),
    "many units": (one_backward, {"apart": "first second last"}),
    "modules given at once": (one_backward, {"apart": "last+second"}),
    "outputs in an object": (one_backward, {"make": partial(Network, hidden_output=True)}),
    "micro-batches": (micro_batches, {}),
    "micro-batches that travel together": (micro_batches_apart, {}),
    "clipping": (clipped, {}),
    "a module that a step skips": (skipped, {}),
    "checkpoints": (one_backward, {"make": partial(Network, reentrant=False)}),
    "reentrant checkpoints": (one_backward, {"make": partial(Network, reentrant=True)}),
    "parameters that stay whole": (one_backward, {"reshard_after_forward": False}),
    "columns": (
        one_backward,
        {
            "make": lambda: nn.Sequential(nn.Linear(33, 64), nn.ReLU(), nn.Linear(64, 6)),
            "apart": "",
            "shard_placement_fn": lambda parameter: Shard(int(parameter.shape[-1] == 64 and parameter.ndim == 2)),
        },
    ),
    "offload": (one_backward, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "divide factors": (divided, {}),
    "bfloat16 parameters": (
        one_backward,
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    ),
    **{
        f"{name} reduced": (one_backward, {"mp_policy": MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=kind)})
        for name, kind in {"bfloat16": torch.bfloat16, "float16": torch.float16}.items()
    },
    "float32 parameters, bfloat16 reduced": (
        micro_batches,
        {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)},
    ),
}


def program(name: str) -> None:
    """Without codes the bits of the same program without us; with codes equal replicas that are near."""
    backward, how = PROGRAMS[name]
    model = sharded(**how)
    start = whole(model)
    average_plainly(model)
    expected = train(model, backward)
    model = sharded(**how)
    with attached(model, "none"):
        assert torch.equal(train(model, backward), expected)
    model = sharded(**how)
    with attached(model) as exchange:
        weights = train(model, backward)
        assert equal(weights)
        assert near(weights, expected, start)
        assert exchange.step == STEPS * (2 if backward is micro_batches else 1) - 1
    assert equal(expected)
    if name == "clipping":
        torch.testing.assert_close(expected, by_one_process(0.05))


# Steps


def nothing_finite() -> None:
    """A NaN that one rank has, in one layer, is no one's residual."""
    model = sharded()
    with attached(model) as exchange:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step, bad in enumerate([False, True, False]):
            optimizer.zero_grad()
            exchange.begin_step()
            before = exchange.averager.state_dict()
            loss = loss_of(model, step)
            if bad and dist.get_rank() == 3:
                loss = loss + 0 * torch.sqrt(model.last.bias.sum() * 0)  # type: ignore[operator, union-attr]
            loss.backward()
            finite = exchange.finish()
            assert bool(finite) == (not bad)
            exchange.settle(finite)
            after = exchange.averager.state_dict()
            if bad:
                for kind, values in before.items():
                    assert all(torch.equal(value, after[kind][name]) for name, value in values.items())
            elif step:
                same = [torch.equal(value, after["residual"][name]) for name, value in before["residual"].items()]
                assert not all(same)
        optimizer.zero_grad()
        exchange.begin_step()
        for turn in range(2):  # the first of two micro-batches
            (loss_of(model, turn) * (float("inf") if turn == 0 and dist.get_rank() == 1 else 1)).backward()
        assert not exchange.finish()
        exchange.settle(torch.zeros((), dtype=torch.bool))


def unused_layers() -> None:
    """A step that skips a module is applied, and what is owed of the module stays."""
    model = sharded(apart="first second")
    with attached(model) as exchange:
        train(model, skipped, 0, 1)
        before = exchange.state_dict()[exchange.position["rank"]]["residual"]
        train(model, skipped, 1, 2)
        after = exchange.state_dict()[exchange.position["rank"]]["residual"]
    for name, values in before.items():
        if name.startswith(("second", "idle")):
            assert torch.equal(values, after[name]), name
            assert values.any() == name.startswith("second"), name
        elif name.startswith("first"):
            assert not torch.equal(values, after[name]), name


def loss_scales() -> None:
    """A power of two changes no bit, in any micro-batch of a step."""
    weights = []
    for scale in (1.0, 1024.0):
        model = sharded()
        with attached(model) as exchange:

            def scaled(model: nn.Module, step: int, scale: float = scale, exchange: Any = exchange) -> None:
                exchange.begin_step(scale)
                for turn in range(2):
                    (scale * loss_of(model, step + 50 * turn)).backward()
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.div_(scale)
                exchange.settle(exchange.finish())

            weights.append(train(model, scaled))
    assert torch.equal(*weights)


def random_numbers() -> None:
    """The same gradients twice in a step are rounded anew."""
    model = sharded()
    with attached(model, error_feedback=False):
        gradients = []
        for _ in range(2):
            one_backward(model, 0)
            gradients.append(model.first.weight.grad.full_tensor().clone())  # type: ignore[operator, union-attr]
        first, both = gradients
        assert not torch.equal(both - first, first)
        torch.testing.assert_close(both, 2 * first, atol=float(first.abs().max()), rtol=0)


def checksums() -> None:
    weights = []
    for verify_wire in (False, True):
        model = sharded()
        with attached(model, verify_wire=verify_wire):
            weights.append(train(model))
    assert torch.equal(*weights)


def counts() -> None:
    """Bytes are what the averager promises, and a flag a step; residuals are of this rank's pieces."""
    model = sharded()
    with attached(model) as exchange:
        train(model)
        used = [layer for layer in exchange.layers if not layer.name.startswith("idle")]
        report = exchange.report()
        assert report.bytes_sent == STEPS * (exchange.averager.sent(used, 2).total + 4)
        assert report.bytes_dense == STEPS * 4 * sum(layer.numel for layer in exchange.layers)
        assert report.host_bytes == 2 * report.bytes_sent
        assert report.host_bytes_dense == 2 * report.bytes_dense
        values = sum(layer.numel for layer in exchange.layers)
        assert sum(everyones(values)) == 2 * sum(parameter.numel() for parameter in model.parameters())
        owed = exchange.averager.states["residual"].values
        assert owed == sum(layer.numel for layer in exchange.layers if layer.compressed)


# State


def resumed(save: Callable[[ShardedExchange], Any], load: Callable[[ShardedExchange, Any], None], name: str) -> None:
    """A step, a checkpoint, and the rest in a model whose modules are grouped otherwise: bit for bit the whole run."""
    model = sharded()
    with attached(model, name) as exchange:
        expected = train(model)
    model = sharded()
    with attached(model, name) as exchange:
        train(model, last=1)
        saved = save(exchange)
        weights = model.state_dict()
    again = sharded(seed=1, apart="first last")
    again.load_state_dict(weights)
    with attached(again, name) as exchange:
        load(exchange, saved)
        assert torch.equal(train(again, first=1), expected)
        assert exchange.step == STEPS - 1


def of_a_rank(folder: Path) -> None:
    file = folder / f"state {dist.get_rank()}.pt"

    def save(exchange: ShardedExchange) -> None:
        torch.save(exchange.state_dict(), file)

    resumed(save, lambda exchange, _: exchange.load_state_dict(torch.load(file)), "maxmin")


def of_all_ranks(folder: Path) -> None:
    def load(exchange: ShardedExchange, state: Any) -> None:
        assert all(state.keys() == other.keys() for other in everyones(state))
        exchange.load_state_dict(state)

    resumed(lambda exchange: exchange.gathered_state_dict(), load, "topk")


def distributed_checkpoint(folder: Path, name: str) -> None:
    def save(exchange: ShardedExchange) -> None:
        dcp.save({"exchange": exchange}, checkpoint_id=folder / name)

    def load(exchange: ShardedExchange, _: Any) -> None:
        dcp.load({"exchange": exchange}, checkpoint_id=folder / name)

    resumed(save, load, name)


def other_ranks(folder: Path) -> None:
    model = sharded()
    with attached(model) as exchange:
        train(model)
        own = exchange.position["rank"]
        assert own == f"rank {dist.get_rank() % 2} of 2 on host {dist.get_rank() // 2} of 2"
        state = exchange.state_dict()
        assert [key for key in state if key != "step"] == [own]
        state["rank 0 of 3 on host 0 of 2"] = state.pop(own)
        with pytest.raises(ValueError, match="is that of rank 0 of 3 on host 0 of 2, and this is rank"):
            exchange.load_state_dict(state)
        exchange.load_state_dict(state | {"step": 7}, ranks_alike=False)
        assert exchange.step == 7
        state = exchange.state_dict()
        state[own]["residual"] = {f"{name}?": values for name, values in state[own]["residual"].items()}
        with pytest.raises(ValueError, match=r"do not fit the layers: first\.weight"):
            exchange.load_state_dict(state)


# Refusals


def refused() -> None:
    def refusal(words: str, name: str = "maxmin", model: nn.Module | None = None, **how: Any) -> None:
        with pytest.raises(ValueError, match=words):
            attached(sharded() if model is None else model, name, **how)

    inside, between = mesh().get_group(1), mesh().get_group(0)
    for name, value in {
        "collectives": compression.Solo(), "barrier_fraction": 0.5, "late_steps": 2, "record": True,
        "hierarchical": False, "ranks_per_host": 2,
    }.items():  # fmt: skip
        refusal(f"`{name}` has no use for a sharded model: .*; leave it out", **{name: value})
    refusal("groups and a mesh say the same", groups=(inside, between))
    refusal("this model is sharded over 2 of 4 ranks", mesh=None)
    refusal("groups are .inside, between.", mesh=None, groups=(between, inside))
    refusal("the second of groups, between, has one rank", mesh=None, groups=(inside, compression.Solo()))
    refusal("`verify_wire` puts checksums on messages", "none", verify_wire=True)
    with pytest.raises(ValueError, match="takes all gradients at once"):
        compression.attach(sharded(), "maxmin", mesh=mesh(), big_grad=True)
    torch.manual_seed(0)
    native = Network()
    fully_shard(native, mesh=mesh())
    refusal("a mesh of 1 dimension, and attach with groups=", model=native)
    model = sharded()
    with attached(model):
        refusal("has an exchange already", model=model)
        with pytest.raises(ValueError, match=r"accumulate with set_requires_gradient_sync"):
            model.set_requires_all_reduce(False)  # type: ignore[operator]
        model.set_requires_all_reduce(True)  # type: ignore[operator]
        with pytest.raises(ValueError, match="seed is 0 on rank 0 and 1 on rank 1"):
            compression.attach(sharded(), "maxmin", seed=dist.get_rank(), mesh=mesh())
    with attached(model, mesh=None, groups=(inside, between)):
        assert equal(train(model))
    model.set_requires_all_reduce(False)  # type: ignore[operator]
    refusal("meta device", model=sharded(lambda: Network().to("meta")))


def switched_off() -> None:
    """Backward in no_sync only accumulates, and begins no step."""
    model, other = sharded(), sharded()

    def apart(model: nn.Module, step: int) -> None:
        with exchange.no_sync():
            loss_of(model, step).backward()
        loss_of(model, step + 50).backward()

    with attached(other) as exchange:
        expected = train(other, micro_batches_apart)
    with attached(model) as exchange:
        assert torch.equal(train(model, apart), expected)
        assert exchange.step == STEPS - 1


CHECKS: dict[str, Callable[..., None]] = {
    **{f"compressor {name}": partial(compressor, name) for name in compression.COMPRESSORS if name != "stats"},
    **{f"program {name}": partial(program, name) for name in PROGRAMS},
    **{
        work.__name__: work
        for work in (nothing_finite, unused_layers, loss_scales, random_numbers, checksums, counts, switched_off)
    },
    **{f"state {work.__name__}": work for work in (of_a_rank, of_all_ranks, other_ranks)},
    **{f"state in a distributed checkpoint, {name}": partial(distributed_checkpoint, name=name)
       for name in ("maxmin", "powersgd")},
    "refused": refused,
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each check raised on each rank, "" where nothing."""
    return run(__file__, 4, tmp_path_factory.mktemp("ranks"))[0]


@pytest.mark.parametrize("check", CHECKS)
def test_two_by_two(check: str, outcomes: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert not outcome[check], f"rank {rank}: {outcome[check]}"


def test_three_hosts(tmp_path: Path) -> None:
    outcomes, _ = run(__file__, 6, tmp_path, "compressor maxmin", "compressor none", "compressor powersgd")
    for outcome in outcomes:
        assert not any(outcome.values()), outcome


def work(rank: int, folder: Path, *checks: str) -> dict[str, str]:
    outcomes = dict.fromkeys(checks or CHECKS, "not begun: another check had failed")
    for name in outcomes:
        try:
            CHECKS[name](*([folder] if name.startswith("state") else []))
        except Exception:
            outcomes[name] = traceback.format_exc()
            break
        outcomes[name] = ""
    return outcomes


if __name__ == "__main__":
    as_rank(work)
