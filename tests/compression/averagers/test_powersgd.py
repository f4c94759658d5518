"""PowerSGD: held against torch's own hook, against one rank that sees the mean, and against its own promises."""

import contextlib
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import compression
from compression import Metered, Solo
from compression.averagers import PowerSGD
from compression.codecs.base import BFloat16
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.threads import ThreadCollectives, run_ranks
from compression.network.torch_distributed import let_works_go

RANK = 2
SHAPES = {"conv": (16, 6, 3, 3), "norm": (16,), "fc": (30, 40), "twin": (30, 40), "slim": (2, 40), "bias": (30,)}
LAYERS = layers_of(SHAPES.items(), 64)
FACTORED = ("conv", "fc", "twin")
OFFSETS = tuple(sum(layer.numel for layer in LAYERS[:index]) for index in range(len(LAYERS)))
VALUES = sum(layer.numel for layer in LAYERS)


def span(name: str) -> slice:
    index = list(SHAPES).index(name)
    return slice(OFFSETS[index], OFFSETS[index] + LAYERS[index].numel)


def gradient(step: int, rank: int = 0) -> Tensor:
    """Noise on top of a few directions that stay, as gradients are."""
    noise = torch.randn(VALUES, generator=torch.Generator().manual_seed(1000 * step + rank))
    stays = torch.zeros(VALUES)
    for name in FACTORED:
        stays[span(name)] = product(name, 3, torch.Generator().manual_seed(9))
    return 0.3 * noise + stays


def product(name: str, rank: int, generator: torch.Generator) -> Tensor:
    """A layer's gradient of low rank, flat."""
    rows, cols = SHAPES[name][0], int(np.prod(SHAPES[name][1:]))
    return (torch.randn(rows, rank, generator=generator) @ torch.randn(rank, cols, generator=generator)).view(-1)


def average(bound: PowerSGD, values: Tensor, step: int = 0, applied: bool = True) -> Tensor:
    flat = values.clone()
    bound.average_(Gradients(flat, tuple(SHAPES), OFFSETS), step)
    bound.settle(applied)
    return flat


def low_rank(ranks: Any = None, rank: int = RANK) -> PowerSGD:
    return PowerSGD(rank, LAYERS, ranks or Solo(), seed=7)


# After gradients that are zero


def dead_corner() -> Tensor:
    """A gradient that is zero in the first rows and columns of each matrix: units that are dead."""
    values = gradient(1)
    for name in FACTORED:
        matrix = values[span(name)].view(SHAPES[name][0], -1)
        matrix[:RANK], matrix[:, :RANK] = 0, 0
    return values


def test_a_gradient_of_zeros_does_not_end_a_layer() -> None:
    bound = low_rank()
    average(bound, torch.zeros(VALUES), 0)
    for step in range(1, 5):
        averages = average(bound, dead_corner(), step)
    for name in FACTORED:
        assert averages[span(name)].norm() > 0.3 * dead_corner()[span(name)].norm()


def test_a_state_that_was_saved_with_zeros_goes_on() -> None:
    bound = low_rank()
    average(bound, gradient(0), 0)
    state = bound.state_dict()
    for values in state["basis"].values():
        values.zero_()
    resumed = low_rank()
    resumed.load_state_dict(state)
    averages = average(resumed, dead_corner(), 1)
    for name in FACTORED:
        assert averages[span(name)].norm() > 0


# Against others


@contextlib.contextmanager
def gloo_alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        let_works_go()
        dist.destroy_process_group()


def bucket(flat: Tensor) -> Any:
    """The part of a DDP bucket that torch's hook needs."""
    views = [flat[span(name)].view(shape) for name, shape in SHAPES.items()]
    return SimpleNamespace(buffer=lambda: flat, gradients=lambda: views, index=lambda: 0, is_last=lambda: True)


def from_torch(state: PowerSGDState) -> dict[str, Any]:
    """The state of torch's hook as ours: it stacks layers of one shape, and its Q is ours transposed."""
    basis, at = {}, 0
    for name in FACTORED:
        cols = int(np.prod(SHAPES[name][1:]))
        basis[name] = state.q_memory_dict[0][at : at + RANK * cols].view(cols, RANK).T.reshape(-1).clone()
        at += RANK * cols
    residual = {name: state.error_dict[0][span(name)].clone() for name in FACTORED}
    return {"rank": RANK, "residual": residual, "basis": basis}


def test_errors_are_those_of_torchs_own_hook_from_the_same_start() -> None:
    ours = low_rank()
    with gloo_alone():
        theirs = PowerSGDState(None, RANK, start_powerSGD_iter=2, min_compression_rate=1)
        theirs.iter = theirs.start_powerSGD_iter
        powerSGD_hook(theirs, bucket(gradient(0))).wait()
        ours.load_state_dict(from_torch(theirs))
        owed_by_us = owed_by_them = torch.zeros(VALUES)
        for step in range(1, 12):
            flat = gradient(step)
            powerSGD_hook(theirs, bucket(flat)).wait()
            owed_by_them = owed_by_them + gradient(step) - flat
            owed_by_us = owed_by_us + gradient(step) - average(ours, gradient(step), step)
            for name in FACTORED:
                ratio = owed_by_us[span(name)].norm() / owed_by_them[span(name)].norm()
                assert ratio == pytest.approx(1, abs=0.05)


def test_ranks_average_as_one_rank_that_sees_the_mean_would() -> None:
    def work(ranks: ThreadCollectives) -> list[Tensor]:
        bound = low_rank(ranks)
        return [average(bound, gradient(step, ranks.rank), step) for step in range(8)]

    alone = low_rank()
    mean = [sum(gradient(step, rank) for rank in range(3)) / 3 for step in range(8)]
    expected = [average(alone, values, step) for step, values in enumerate(mean)]
    for averages in run_ranks(3, work):
        for seen, wanted in zip(averages, expected, strict=True):
            assert torch.allclose(seen, wanted, atol=1e-3)


def test_in_bfloat16_only_what_is_not_factored_is_rounded() -> None:
    """It travels in a message of its own, which the network adds up."""

    def work(ranks: ThreadCollectives) -> tuple[Tensor, Tensor, list[int]]:
        class Noted(ThreadCollectives):
            sums: list[int]

            def sum_(self, values: Tensor) -> None:
                self.sums.append(values.nbytes)
                super().sum_(values)

        noted = Noted.of(ranks)
        noted.sums = []
        exact, rounded = low_rank(noted), PowerSGD(RANK, LAYERS, noted, seed=7, dense=BFloat16())
        plain, seen = (average(bound, gradient(0, ranks.rank)) for bound in (exact, rounded))
        return plain, seen, noted.sums

    dense = {name: layer.numel for name, layer in zip(SHAPES, LAYERS, strict=True) if name not in FACTORED}
    lefts, rights = 4 * RANK * (16 + 30 + 30), 4 * RANK * (54 + 40 + 40)
    for plain, seen, sums in run_ranks(2, work):
        assert sums == [lefts + 4 * sum(dense.values()), rights, lefts, 2 * sum(dense.values()), rights]
        for name in SHAPES:
            parts = [(gradient(0, rank)[span(name)] * 0.5).bfloat16() for rank in range(2)]
            expected = plain[span(name)] if name in FACTORED else (parts[0] + parts[1]).float()
            assert torch.equal(seen[span(name)], expected)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(20, 150), nn.ReLU(), nn.Linear(150, 151), nn.ReLU(), nn.Linear(151, 10))

    def forward(self, values: Tensor) -> Tensor:
        return self.layers(values)


def train_under_ddp(rank: int, port: int, results: Any) -> None:
    """Five steps in many DDP buckets, on which torch's own hook would hang."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(Model(), bucket_cap_mb=0.05)
    exchange = compression.attach(model, compression.build("powersgd", rank=RANK))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        images = torch.randn(8, 20, generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), images[:, :10].argmax(1)).backward()
        optimizer.step()
    exchange.close()
    results[rank] = torch.cat([p.detach().flatten() for p in model.parameters()])
    dist.destroy_process_group()


def test_replicas_stay_equal_over_gloo_in_many_ddp_buckets() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(train_under_ddp, (port, results), nprocs=2)
        start = torch.cat([p.detach().flatten() for p in Model().parameters()])
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], start)


# Its own promises


@settings(deadline=None, max_examples=20)
@given(rank=st.integers(1, RANK), seed=st.integers(0, 1000), scale=st.sampled_from([1e-25, 1.0, 1e25]))
def test_a_gradient_of_no_higher_rank_arrives_as_it_is(rank: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(VALUES)
    for name in FACTORED:
        values[span(name)] = scale * product(name, rank, generator)
    bound = low_rank()
    average(bound, torch.zeros(VALUES))  # a layer without gradients must not wear the bases out
    lost = (average(bound, values) - values) / scale
    assert lost.norm() <= 1e-2 * (values / scale).norm()


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_what_is_applied_follows_the_gradients_and_residuals_stay_bounded(shape: tuple[int, int]) -> None:
    """On ranks whose gradients differ for ever, too: no residual collects the difference, as the paper's would."""
    layers = layers_of([("weight", shape)], 64)

    def work(ranks: ThreadCollectives) -> tuple[float, float, Tensor]:
        bound = PowerSGD(1, layers, ranks, seed=3)
        generator = torch.Generator().manual_seed(ranks.rank)
        own, applied, given = torch.randn(96, generator=generator), torch.zeros(96), torch.zeros(96)
        largest = 0.0
        for step in range(1000):
            flat = own + torch.randn(96, generator=generator)
            given += flat
            bound.average_(Gradients(flat, ("weight",), (0,)), step)
            bound.settle(True)
            applied += flat
            largest = max(largest, bound.state_dict()["residual"]["weight"].norm().item() / own.norm().item())
        paper = (given - applied).norm().item() / own.norm().item()
        return largest, paper, torch.stack([given, applied])

    results = run_ranks(2, work)
    compensated = (results[0][2][0] + results[1][2][0]) / 2 - results[0][2][1]
    assert compensated.norm() < 20 * 96**0.5
    for largest, paper, _ in results:
        assert largest < 30
        assert paper > 300


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bytes_are_those_of_the_factors(world_size: int) -> None:
    def work(ranks: ThreadCollectives) -> tuple[float, int]:
        metered = Metered(ranks)
        bound = low_rank(metered)
        average(bound, gradient(0, ranks.rank))
        return metered.traffic.bytes_sent, bound.encoded_bytes

    factors = sum(4 * RANK * (SHAPES[name][0] + int(np.prod(SHAPES[name][1:]))) for name in FACTORED)
    dense = sum(4 * layer.numel for layer in LAYERS if layer.name not in FACTORED)
    for sent, encoded in run_ranks(world_size, work):
        assert encoded == factors + dense
        assert sent == pytest.approx(2 * (world_size - 1) / world_size * (factors + dense))


def test_what_gains_nothing_travels_as_it_is() -> None:
    values = gradient(0)
    seen = average(low_rank(), values)
    for name in SHAPES:
        assert torch.equal(seen[span(name)], values[span(name)]) == (name not in FACTORED)


def test_a_step_that_is_not_applied_leaves_no_trace() -> None:
    tried, clean = low_rank(), low_rank()
    for bound in (tried, clean):
        average(bound, gradient(0))
    average(tried, gradient(1), applied=False)
    assert torch.equal(average(tried, gradient(2)), average(clean, gradient(2)))
    assert tried.state_dict().keys() == clean.state_dict().keys()
    for kind in ("residual", "basis"):
        for name in FACTORED:
            assert torch.equal(tried.state_dict()[kind][name], clean.state_dict()[kind][name])


@pytest.mark.parametrize("rank", [1, RANK])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("around", [0.0, 1.0])
def test_one_bad_value_spoils_the_average_on_every_rank(rank: int, bad: float, around: float) -> None:
    def work(ranks: ThreadCollectives) -> list[bool]:
        finite = []
        for name in SHAPES:
            values = around * gradient(0, ranks.rank)
            if ranks.rank == 1:
                values[span(name).start + 5] = bad
            finite.append(bool(torch.isfinite(average(low_rank(ranks, rank), values)[span(name)]).all()))
        return finite

    for finite in run_ranks(2, work):
        assert finite == [False] * len(SHAPES)


def test_the_largest_floats_leave_averages_and_residuals_finite() -> None:
    bound = low_rank()
    assert torch.isfinite(average(bound, gradient(0).sign() * 3e38)).all()
    assert all(torch.isfinite(values).all() for values in bound.state_dict()["residual"].values())


def test_a_checkpoint_of_another_rank_is_refused() -> None:
    bound = low_rank()
    average(bound, gradient(0))
    with pytest.raises(ValueError, match="holds factors of rank 2, and this run makes them of rank 3; resume with"):
        low_rank(rank=3).load_state_dict(bound.state_dict())


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank counts the columns of a factor, at least 1, got 0"):
        compression.build("powersgd", rank=0)
