"""All gradients as one tensor: one encoding and one exchange after backward."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import compression
from compression.exchange.flat_gradient import FlatGradient
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.collectives import Solo
from compression.network.threads import ThreadCollectives, run_ranks

VALUES = 64 * 48 + 48 + 48 * 56 + 56


def model() -> nn.Sequential:
    """Always the same weights, whichever threads draw random numbers meanwhile."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 56))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return network


def backward(wrapped: nn.Module, rank: int = 0, step: int = 0) -> Tensor:
    """The averaged gradient after one backward, as one vector in the model's order."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    wrapped.zero_grad()
    wrapped(torch.randn(4, 64, generator=generator)).square().sum().backward()
    return torch.cat([p.grad.flatten().clone() for p in wrapped.parameters() if p.grad is not None])


class Counted(ThreadCollectives):
    """Counts the calls of this rank."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, slots, barrier)
        self.calls: Counter[str] = Counter()

    def sum_(self, values: Tensor) -> None:
        self.calls["sum"] += 1
        super().sum_(values)

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        self.calls["exchange"] += 1
        return super().exchange(messages, sizes)

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        self.calls["gather"] += 1
        return super().gather(message, sizes)


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compression.exchange.hooks.BUCKET_BYTES", 1)


@pytest.fixture
def one_rank_world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


CALLS = {"none": {"sum": 1}, "maxmin": {"exchange": 1, "gather": 1}, "topk": {"gather": 1}, "dgc": {"gather": 1}}


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("name", CALLS)
def test_one_step_is_one_exchange(name: str) -> None:
    def work(ranks: ThreadCollectives) -> tuple[Counter[str], Counter[str], Tensor]:
        calls = []
        for big_grad in (True, False):
            counted, network = Counted.of(ranks), model()
            compressor = compression.build(name, big_grad=big_grad)
            exchange = compression.attach(network, compressor, counted, seed=3)
            averaged = backward(network, ranks.rank)
            assert exchange.finish()
            exchange.close()
            calls.append(counted.calls)
        return calls[0], calls[1], averaged

    (together, apart, first), (_, _, second) = run_ranks(2, work)
    assert together == CALLS[name]
    assert apart.total() == 4 * together.total()  # one bucket for each parameter
    assert torch.equal(first, second)


@pytest.mark.usefixtures("small_buckets")
def test_a_global_top_k_selects_over_all_layers() -> None:
    network = model()
    exchange = compression.attach(network, compression.build("topk", ratio=0.01, big_grad=True))
    averaged = backward(network)
    exchange.close()
    plain = backward(model())
    matrices = torch.cat([plain[:3072], plain[3120:5808]])
    sent = torch.cat([averaged[:3072], averaged[3120:5808]])
    expected = torch.where(matrices.abs() >= matrices.abs().topk(58).values[-1], matrices, 0.0)
    assert torch.equal(sent, expected)
    assert int(averaged[:3072].count_nonzero()) not in (31, 30)  # not the first layer's own top-k
    assert torch.equal(averaged[3072:3120], plain[3072:3120])
    assert torch.equal(averaged[5808:], plain[5808:])


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("name", ["none", "maxmin"])
def test_what_works_layer_by_layer_gives_the_same_averages_as_one_tensor(name: str) -> None:
    def work(ranks: ThreadCollectives) -> list[Tensor]:
        averages = []
        for big_grad in (True, False):
            network = model()
            compressor = compression.build(name, big_grad=big_grad)
            exchange = compression.attach(network, compressor, ranks, seed=3)
            averages.append(torch.stack([backward(network, ranks.rank, step) for step in range(3)]))
            exchange.close()
        return averages

    for together, apart in run_ranks(2, work):
        assert torch.equal(together, apart)


@pytest.mark.usefixtures("one_rank_world")
@pytest.mark.parametrize("name", ["topk", "dgc"])
def test_ddp_and_hooks_give_the_same_averages(name: str) -> None:
    """DDP's first step comes in other buckets than its later ones."""
    options = {"clip": 0.5} if name == "dgc" else {"error_feedback": True}
    plain = model()
    wrapped = DistributedDataParallel(model(), bucket_cap_mb=0.001)
    compressor = compression.build(name, ratio=0.05, big_grad=True, **options)
    exchanges = [compression.attach(network, compressor) for network in (plain, wrapped)]
    for step in range(4):
        assert torch.equal(backward(plain, 0, step), backward(wrapped, 0, step))
    for exchange in exchanges:
        assert exchange.without_momentum == ({"0.weight", "2.weight"} if name == "dgc" else set())
        exchange.close()


@pytest.mark.usefixtures("small_buckets")
def test_a_clipped_norm_is_that_of_all_layers() -> None:
    network = model()
    exchange = compression.attach(network, compression.build("dgc", ratio=1.0, clip=1e-3))
    assert backward(network).norm() == pytest.approx(1e-3)
    exchange.close()


def fail_in_backward(network: nn.Module, step: int = 0) -> None:
    """A backward that raises once all but the first layer's gradients are there."""

    def fail(gradient: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    handle = network[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        backward(network, step=step)
    handle.remove()


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("big_grad", [False, True])
def test_what_follows_a_backward_that_fails_is_averaged(big_grad: bool, declared: bool) -> None:
    """By sanity, to zeros. A step begins where the loop says so, or with the next gradient."""

    network = model()
    exchange = compression.attach(network, compression.build("sanity", big_grad=big_grad))
    fail_in_backward(network)
    if declared:
        exchange.begin_step()
    for step in range(2):
        assert not backward(network, step=step).any()
        assert exchange.finish()
    exchange.close()


@pytest.mark.usefixtures("small_buckets")
def test_what_a_backward_that_fails_encoded_leaves_no_residual() -> None:
    network = model()
    exchange = compression.attach(network, compression.build("maxmin", bits=2, error_feedback=True))
    backward(network)
    before = exchange.state_dict()["averager"]["residual"]
    assert any(residual.any() for residual in before.values())
    fail_in_backward(network, step=1)
    after = exchange.state_dict()["averager"]["residual"]
    assert all(torch.equal(after[name], residual) for name, residual in before.items())
    exchange.close()


@pytest.mark.usefixtures("small_buckets")
def test_a_backward_waits_for_what_one_that_failed_has_under_way() -> None:
    class Slow(Solo):
        def sum_(self, values: Tensor) -> None:
            time.sleep(0.1)  # the next backward begins meanwhile, if nothing holds it
            values.mul_(2)

    network = model()
    exchange = compression.attach(network, compression.build("none"), Slow())
    fail_in_backward(network)
    assert torch.equal(backward(network), 2 * backward(model()))
    exchange.close()


def test_parts_are_joined_in_order_and_parted_again() -> None:
    layers = layers_of([("a", (3,)), ("b", (4, 4)), ("c", (2,)), ("d", (5, 5))], 4)
    values = torch.arange(46.0)
    starts = dict(zip("abcd", itertools.accumulate([3, 16, 2], initial=0), strict=True))
    parts = [
        Gradients(torch.cat([values[21:], values[19:21]]).to(torch.float16), ("d", "c"), (0, 25)),
        Gradients(values[:19].clone(), ("a", "b"), (0, 3)),
    ]
    whole = FlatGradient(layers)
    joined = whole.join(parts)
    assert joined.names == ("b", "d", "a", "c")
    assert joined.flat.dtype == torch.float32
    assert joined.flat.tolist() == [*range(3, 19), *range(21, 46), *range(3), 19, 20]
    joined.flat.neg_()
    whole.split(joined, parts)
    for part in parts:
        for name, at in zip(part.names, part.offsets, strict=True):
            size = {"a": 3, "b": 16, "c": 2, "d": 25}[name]
            assert part.flat[at : at + size].tolist() == (-values[starts[name] :][:size]).tolist()


def test_one_buffer_serves_every_step() -> None:
    whole = FlatGradient(layers_of([("a", (3,))], 4))
    first = whole.join([Gradients(torch.ones(3), ("a",), (0,))]).flat
    assert whole.join([Gradients(torch.zeros(3), ("a",), (0,))]).flat.data_ptr() == first.data_ptr()


def test_every_listed_compressor_takes_it() -> None:
    for name, row in compression.COMPRESSORS.items():
        if row.listed:
            assert compression.build(name, big_grad=True).needs_full_gradient


@pytest.mark.parametrize("options", [{"ratio": 0.3}, {"ratio": 0.3, "efx_randk": 0.2}, {"ratio": 0.3, "efx_bits": 4}])
def test_a_loss_scale_is_out_of_what_is_selected(options: dict[str, Any]) -> None:
    averages = []
    for scale in (1.0, 1024.0):
        network = model()
        exchange = compression.attach(network, compression.build("topk", big_grad=True, **options), Solo(), seed=1)
        exchange.begin_step(torch.tensor(scale))
        output = network(torch.randn(4, 64, generator=torch.Generator().manual_seed(1))).square().sum()
        (output * scale).backward()
        averages.append(torch.cat([p.grad.flatten() / scale for p in network.parameters() if p.grad is not None]))
        exchange.close()
    assert torch.equal(*averages)
