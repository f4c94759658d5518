"""The exchange in real backward passes: under DDP over gloo, and through hooks in a single process."""

import contextlib
import copy
import gc
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import compression
from compression.averagers import Averaging
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.streams import Phases
from tests.support.threads import Uncompletable, within


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 301), nn.ReLU(), nn.Linear(301, 10))


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    images = torch.randn(8, 20, generator=generator)
    return images, images[:, :10].argmax(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(rank: int, world_size: int, port: int, work: Callable[[int], Any], results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    results[rank] = work(rank)
    dist.destroy_process_group()


def on_gloo(world_size: int, work: Callable[[int], Any]) -> list[Any]:
    """Results of `work(rank)` in real processes joined by gloo."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank_main, (world_size, free_port(), work, results), nprocs=world_size)
        return [results[rank] for rank in range(world_size)]


@contextlib.contextmanager
def ddp(cap_mb: float = 0.1) -> Iterator[DistributedDataParallel]:
    yield DistributedDataParallel(model(), bucket_cap_mb=cap_mb)


def train(wrapped: nn.Module, exchange: compression.Exchange | None, rank: int, steps: int = 5) -> Tensor:
    """All parameters after some steps of a loop that knows nothing of the exchange, as one vector."""
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        images, labels = batch(rank, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(images), labels).backward()
        optimizer.step()
    if exchange is not None:
        exchange.close()
    return torch.cat([p.detach().flatten() for p in wrapped.parameters()])


def none_against_plain_ddp(rank: int) -> bool:
    with ddp() as plain, ddp() as hooked:
        expected = train(plain, None, rank)
        exchange = compression.attach(hooked, compression.build("none"))
        return torch.equal(train(hooked, exchange, rank), expected)


def test_none_is_bit_identical_to_no_hook_at_all() -> None:
    assert on_gloo(3, none_against_plain_ddp) == [True] * 3


def maxmin_in_two_groupings(rank: int) -> list[Tensor]:
    """Many small DDP buckets, exchanged while backward goes on; then one bucket; then a careful loop."""
    after = []
    for cap_mb in (0.1, 25.0):
        with ddp(cap_mb) as wrapped:
            compressor = compression.build("maxmin", bits=4, error_feedback=True)
            after.append(train(wrapped, compression.attach(wrapped, compressor), rank))
    return after


def test_ranks_hold_equal_bits_whatever_the_buckets_of_ddp() -> None:
    (many, one), (others_many, others_one) = on_gloo(2, maxmin_in_two_groupings)
    assert torch.equal(many, others_many)
    assert torch.equal(one, others_one)
    assert torch.equal(many, one)


ORDERS = ([0, 1, 2, 0, 1, 2, 0, 1, 2], [0, 0, 1, 0, 2, 1, 1, 2, 2])
"""Which of three averages goes on by a phase, on each rank."""


def quantized_in_an_order_of_its_own(rank: int) -> bool:
    """Three averages under way at one time, on one rank all at the same phase, on the other one after the other."""
    found = []
    for together in (False, True):
        network = compression.TorchDistributed(dist.new_group(), dist.new_group())
        layers = layers_of([(name, (64, 64)) for name in "abc"], 64)
        averager = compression.build("maxmin", bucket_size=64).averager(layers, network, 0)
        flats = torch.randn(3, 64 * 64, generator=torch.Generator().manual_seed(rank)).unbind()
        parts = [Gradients(flat, (name,), (0,)) for flat, name in zip(flats, "abc", strict=True)]
        averages = [begin(part) for begin, part in [(averager.post(part, 0), part) for part in parts]]
        for k in ORDERS[rank] if together else [0, 0, 0, 1, 1, 1, 2, 2, 2]:
            next(averages[k], None)
        found.append(torch.stack(flats))
    return torch.equal(*found)


def test_over_gloo_ranks_may_go_on_in_different_orders() -> None:
    assert on_gloo(2, quantized_in_an_order_of_its_own) == [True] * 2


def backward_after_close(rank: int) -> list[str]:
    told = []
    for name in ("none", "maxmin"):
        with ddp() as wrapped:
            exchange = compression.attach(wrapped, compression.build(name))
            backward(wrapped)
            exchange.close()
            with pytest.raises(RuntimeError) as raised:
                backward(wrapped)
            told.append(str(raised.value))
    return told


def test_a_backward_of_a_ddp_model_whose_exchange_is_closed_raises() -> None:
    for told in on_gloo(2, backward_after_close):
        assert len(told) == 2
        assert all("the exchange of this model is closed" in words for words in told)


def held_after_close(rank: int) -> list[str]:
    """What is still there of a model and its exchange once nobody has them."""
    wrapped = DistributedDataParallel(model())
    exchange = compression.attach(wrapped, compression.build("maxmin", error_feedback=True))
    backward(wrapped)
    exchange.close()
    with exchange.no_sync():  # needs no averages
        backward(wrapped)
    held = {"weights": wrapped.module[0].weight, "exchange": exchange, "averager": exchange.averager}
    references = {name: weakref.ref(each) for name, each in held.items()}
    del wrapped, exchange, held
    gc.collect()
    return [name for name, reference in references.items() if reference() is not None]


def test_a_model_whose_exchange_is_closed_can_be_let_go() -> None:
    """A program that trains many would run out of memory."""
    assert on_gloo(2, held_after_close) == [[], []]


def failing_network(rank: int) -> str:
    class Broken(compression.TorchDistributed):
        def post_exchange(self, sizes: Any, chunk: int, device: torch.device) -> Any:
            raise ConnectionError("the cable is out")

    with ddp() as wrapped:
        exchange = compression.attach(wrapped, compression.build("maxmin"), Broken(dist.new_group()))
        try:
            train(wrapped, exchange, rank)
        except ConnectionError as error:
            return str(error)
    return "nothing was raised"


def test_what_goes_wrong_on_the_communication_thread_reaches_the_loop() -> None:
    assert on_gloo(2, failing_network) == ["the cable is out"] * 2


def uneven_messages(rank: int) -> bool:
    """Sizes that differ by rank, zero among them, as the shards of small layers have them."""
    network = compression.TorchDistributed()
    sizes = [0, 5, 3]
    sent = torch.full((8 - sizes[rank],), rank, dtype=torch.uint8)
    received = network.exchange(sent, sizes)
    expected = torch.tensor([other for other in range(3) if other != rank])[:, None].expand(2, sizes[rank])
    gathered = network.gather(torch.full((sizes[rank],), rank, dtype=torch.uint8), sizes)
    return torch.equal(received, expected) and gathered.tolist() == [1] * 5 + [2] * 3


def test_messages_of_any_length_arrive_where_they_belong() -> None:
    assert on_gloo(3, uneven_messages) == [True] * 3


# In a single process


@contextlib.contextmanager
def solo(name: str, record: bool = False, **options: Any) -> Iterator[tuple[nn.Module, compression.Attached]]:
    network = model()
    exchange = compression.attach(network, compression.build(name, **options), record=record)
    try:
        yield network, exchange
    finally:
        exchange.close()


def backward(network: nn.Module, step: int = 0, factor: float = 1.0) -> None:
    images, labels = batch(0, step)
    (nn.functional.cross_entropy(network(images), labels) * factor).backward()


def gradients(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def test_alone_and_uncompressed_gradients_are_autograds() -> None:
    plain = model()
    backward(plain)
    with solo("none") as (network, _):
        backward(network)
        assert torch.equal(gradients(network), gradients(plain))


def test_alone_and_compressed_gradients_are_encoded_before_backward_returns() -> None:
    plain = model()
    backward(plain)
    with solo("maxmin", bits=2) as (network, exchange):
        backward(network)
        assert bool(exchange.finish())
        assert not torch.equal(gradients(network), gradients(plain))
        assert gradients(network).unique().numel() < gradients(plain).unique().numel()


def test_gradients_keep_values_and_layout_of_channels_last_parameters() -> None:
    plain, network = (nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(2))
    network.load_state_dict(plain.state_dict())
    exchange = compression.attach(network, compression.build("none"))
    for each in (plain, network):
        each(torch.arange(75.0).view(1, 3, 5, 5)).square().sum().backward()
    exchange.close()
    assert torch.equal(network.weight.grad, plain.weight.grad)
    assert network.weight.grad.stride() == network.weight.stride() != network.weight.contiguous().stride()


def test_a_gradient_that_does_not_come_counts_as_zero() -> None:
    with solo("none") as (network, exchange):
        for step, used in enumerate((network, network[:3])):
            network.zero_grad()
            used(batch(0, step)[0]).sum().backward()
            exchange.settle(exchange.finish())
        assert not network[4].weight.grad.any()
        assert network[0].weight.grad.any()


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_gradient_that_only_an_earlier_micro_batch_gave_is_averaged(set_to_none: bool) -> None:
    """Also where it was added to the last average's buffer, cleared."""
    plain = model()
    with solo("none") as (network, exchange):
        for step in range(2):
            for each in (plain, network):
                each.zero_grad(set_to_none)
            backward(plain, 2 * step)
            with exchange.no_sync():
                backward(network, 2 * step)
            for each in (plain, network):
                each[:3](batch(0, 2 * step + 1)[0]).sum().backward()
            exchange.settle(exchange.finish())
            assert torch.equal(gradients(network), gradients(plain))


def test_an_average_that_nobody_cleared_is_no_gradient() -> None:
    with solo("none") as (network, exchange):
        for used in (network, network[:3]):
            used(batch(0, 0)[0]).sum().backward()
            exchange.settle(exchange.finish())
        assert not network[4].weight.grad.any()


def test_a_backward_within_a_backward_belongs_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is computed anew in backward has its gradients in a task of autograd's own."""

    def loss(network: nn.Module) -> Tensor:
        hidden = checkpoint(network[1:4], network[0](batch(0, 0)[0]), use_reentrant=True)
        return network[4](hidden).square().sum()

    monkeypatch.setattr("compression.exchange.hooks.BUCKET_BYTES", 1)
    plain = model()
    loss(plain).backward()
    with solo("none") as (network, exchange):
        loss(network).backward()
        exchange.settle(exchange.finish())
        assert torch.equal(gradients(network), gradients(plain))
        assert exchange.step == 1


def test_backwards_within_a_backward_that_leave_nobody_to_tell_its_end_are_refused() -> None:
    """Every trained layer is in one of two checkpoints: the first one's end looks like that of all."""
    network = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)))
    with compression.attach(network, "none") as exchange:
        hidden = torch.ones(4, 8, requires_grad=True)
        for block in network:
            hidden = checkpoint(block, hidden, use_reentrant=True)
        with pytest.raises(RuntimeError, match="reached a reentrant checkpoint before any other layer"):
            hidden.sum().backward()
        assert exchange.step == 0


def test_micro_batches_accumulate_and_are_encoded_once() -> None:
    with solo("maxmin") as (network, exchange):
        with exchange.no_sync():
            backward(network, 0)
        assert exchange.report().steps == 0
        backward(network, 1)
        exchange.settle(exchange.finish())
        assert exchange.report().steps == 1


def test_the_compressor_sees_gradients_without_the_loss_scale() -> None:
    """A residual in another unit would be wrong by the scale's quotient as soon as the scale moves."""
    after = []
    for scales in ((1.0, 1.0), (2.0**10, 2.0**4)):
        with solo("maxmin", error_feedback=True) as (network, exchange):
            for step, scale in enumerate(scales):
                network.zero_grad()
                exchange.begin_step(torch.tensor(scale))
                backward(network, step, scale)
                exchange.settle(exchange.finish())
            after.append(gradients(network) / scales[-1])
    assert torch.equal(*after)


def test_an_unfinite_gradient_is_named_and_forgotten() -> None:
    with solo("maxmin", error_feedback=True) as (network, exchange):
        backward(network, 0)
        exchange.settle(exchange.finish())
        before = exchange.state_dict()["averager"]["residual"]
        network.zero_grad()
        exchange.begin_step()
        backward(network, 1, float("inf"))
        finite = exchange.finish()
        assert not bool(finite)
        exchange.settle(finite)
        assert exchange.nonfinite_layer() == "0.weight"
        assert exchange.nonfinite_layer() is None
        after = exchange.state_dict()["averager"]["residual"]
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("barrier_fraction", [1.0, 0.5])
def test_averages_that_cannot_be_handed_over_keep_nobody_waiting(
    barrier_fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compression.exchange.pipeline.device_future", lambda device: Uncompletable())
    network = model()
    exchange = compression.attach(network, compression.build("none"), barrier_fraction=barrier_fraction)

    def step() -> None:
        backward(network)
        exchange.finish()

    for work in (step, exchange.finish):
        with pytest.raises(OSError, match="no event can be recorded"):
            within(900, work)
    exchange.close()


def test_the_recorder_keeps_the_decaying_sum_of_own_gradients() -> None:
    plain = model()
    with solo("maxmin", record=True, bits=1) as (network, exchange):
        assert exchange.recorder is not None
        expected = torch.zeros_like(plain[0].weight)
        for step in range(3):
            for net in (plain, network):
                net.zero_grad()
                backward(net, step)
            exchange.settle(exchange.finish())
            expected = 0.8 * expected + plain[0].weight.grad
        recorded = exchange.recorder.averaged(compression.Solo())
        assert torch.allclose(recorded["0.weight"], expected, atol=1e-6)
        assert "0.bias" not in recorded


def test_after_a_restart_the_recorder_keeps_the_mean_and_residuals_stay() -> None:
    plain = model()
    with solo("maxmin", record=True, bits=1, error_feedback=True) as (network, exchange):
        assert exchange.recorder is not None
        gradients = []
        for step in range(4):
            if step == 1:
                before = exchange.state_dict()["averager"]
                exchange.recorder.restart()
                after = exchange.state_dict()["averager"]
                assert all(torch.equal(before["residual"][name], kept) for name, kept in after["residual"].items())
            for net in (plain, network):
                net.zero_grad()
                backward(net, step)
            exchange.finish()
            exchange.settle(torch.tensor(step != 2))
            gradients.append(plain[0].weight.grad.clone())
        recorded = exchange.recorder.averaged(compression.Solo())["0.weight"]
        assert torch.allclose(recorded, (gradients[1] + gradients[3]) / 2, atol=1e-6)
        state = exchange.state_dict()
    with solo("maxmin", record=True, bits=1, error_feedback=True) as (_, exchange):
        assert exchange.recorder is not None
        exchange.load_state_dict(state)
        assert exchange.recorder.mean
        assert torch.equal(exchange.recorder.averaged(compression.Solo())["0.weight"], recorded)


def test_the_state_of_earlier_code_holds_decaying_sums_of_all_layers() -> None:
    with solo("maxmin", record=True) as (network, exchange):
        backward(network)
        exchange.settle(exchange.finish())
        state = exchange.state_dict()
        del state["recorder"]
        assert exchange.recorder is not None
        recorded = exchange.recorder.averaged(compression.Solo())["0.weight"]
        exchange.load_state_dict(state)
        assert not exchange.recorder.mean
        assert torch.equal(exchange.recorder.averaged(compression.Solo())["0.weight"], recorded)


def test_a_layer_without_any_gradient_is_named_and_one_with_zeros_is_not() -> None:
    with solo("maxmin", record=True) as (network, exchange):
        assert exchange.recorder is not None
        with pytest.raises(ValueError, match="needs at least one training step"):
            exchange.recorder.averaged(compression.Solo())
        with exchange.no_sync():
            (0 * network[0](batch(0, 0)[0]).sum()).backward()
        exchange.record()
        with pytest.raises(ValueError, match=r"no finite gradient of 2\.weight was recorded yet, on no rank"):
            exchange.recorder.averaged(compression.Solo())
        with exchange.no_sync():
            (0 * network(batch(0, 0)[0]).sum()).backward()
        exchange.record()
        assert not any(values.any() for values in exchange.recorder.averaged(compression.Solo()).values())


@pytest.mark.parametrize("big_grad", [False, True])
def test_a_layer_that_no_step_used_is_named(big_grad: bool) -> None:
    """Its zeros travel, and are no gradient of it, which would have no error at any width."""
    with solo("maxmin", record=True, big_grad=big_grad) as (network, exchange):
        network[0](batch(0, 0)[0]).sum().backward()
        exchange.settle(exchange.finish())
        assert exchange.recorder is not None
        with pytest.raises(ValueError, match=r"no finite gradient of 2\.weight was recorded yet, on no rank"):
            exchange.recorder.averaged(compression.Solo())
        backward(network)
        exchange.settle(exchange.finish())
        assert all(values.any() for values in exchange.recorder.averaged(compression.Solo()).values())


def test_moved_weights_come_back_with_their_bits() -> None:
    network = nn.Conv2d(3, 32, 3).to(memory_format=torch.channels_last)
    exchange = compression.attach(network, compression.build("maxmin"), record=True)
    before = network.weight.detach().clone()
    with exchange.no_sync():
        network(torch.randn(2, 3, 8, 8)).square().sum().backward()
    exchange.record()
    assert exchange.recorder is not None
    recorded = exchange.recorder.averaged(compression.Solo())
    with exchange.moved(recorded, -0.5):
        moved = network.weight.detach().clone()
    assert torch.allclose(moved, before - 0.5 * network.weight.grad)
    assert torch.equal(network.weight, before)
    exchange.close()


def test_gradients_are_recorded_in_one_order_whether_they_travel_or_not() -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = nn.Conv2d(3, 32, 3).to(memory_format=torch.channels_last)
    recorded = []
    for travels in (True, False):
        exchange = compression.attach(network, compression.build("maxmin"), record=True)
        network.zero_grad()
        with contextlib.nullcontext() if travels else exchange.no_sync():
            network(images).square().sum().backward()
        if travels:
            exchange.settle(exchange.finish())
        else:
            exchange.record()
        assert exchange.recorder is not None
        recorded.append(exchange.recorder.averaged(compression.Solo())["weight"])
        exchange.close()
    assert torch.equal(*recorded)


def test_a_report_counts_steps_and_what_was_encoded() -> None:
    with solo("maxmin", bits=4, bucket_size=512) as (network, exchange):
        for step in range(3):
            backward(network, step)
            exchange.settle(exchange.finish())
        report = exchange.report()
        codec = compression.codec("maxmin", bits=4, bucket_size=512)
        layers = exchange.layers
        encoded = sum(codec.wire_bytes(layer.numel) if layer.compressed else 4 * layer.numel for layer in layers)
        assert report.steps == 3
        assert report.bytes_sent == 0
        assert report.ratio == pytest.approx(encoded / (4 * sum(layer.numel for layer in layers)))
        assert exchange.report().steps == 0


def test_a_report_is_of_steps_that_were_taken_not_of_those_that_were_loaded() -> None:
    with solo("maxmin") as (network, exchange):
        for step in range(3):
            backward(network, step)
        state = exchange.state_dict()
    with solo("maxmin") as (network, exchange):
        backward(network, 0)
        exchange.load_state_dict(state)
        backward(network, 3)
        assert exchange.report().steps == 2


def test_loading_ends_a_step_that_the_loop_did_not_end() -> None:
    with solo("maxmin", error_feedback=True) as (network, exchange):
        for step in range(2):
            backward(network, step)
        saved = copy.deepcopy(exchange.state_dict())
        backward(network, 2)
        exchange.load_state_dict(saved)
        loaded = exchange.state_dict()
        assert loaded["step"] == saved["step"] == 2
        residuals = [state["averager"]["residual"] for state in (loaded, saved)]
        assert all(torch.equal(residuals[0][name], values) for name, values in residuals[1].items())


def test_the_time_that_backward_does_not_hide_is_counted() -> None:
    """The last averages come this much after backward's last gradient."""
    seconds = 0.02

    class Slow(compression.Solo):
        def sum_(self, values: Tensor) -> None:
            time.sleep(seconds)

    network = model()
    exchange = compression.attach(network, compression.build("none"), Slow())
    train(network, exchange, rank=0, steps=3)
    exchange.state_dict()  # ends the last step
    report = exchange.report()
    assert report.steps == 3
    assert report.exposed_seconds >= 3 * seconds
    assert report.comm_seconds >= 3 * seconds
    assert exchange.report().exposed_seconds == 0


def trained_on_gpu(barrier_fraction: float) -> Tensor:
    network = model().cuda()
    compressor = compression.build("maxmin", error_feedback=True)
    exchange = compression.attach(network, compressor, barrier_fraction=barrier_fraction, late_steps=2)
    post = exchange.averager.post

    def slow(gradients: Gradients, step: int) -> Averaging:
        averaging = post(gradients, step)

        def sleep_and_average(gradients: Gradients) -> Phases:
            torch.cuda._sleep(20_000_000)  # cycles: a stream that does not wait for this one is far ahead
            yield from averaging(gradients)

        return sleep_and_average

    exchange.averager.post = slow  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for step in range(6):
        images, labels = (each.cuda() for each in batch(0, step))
        exchange.begin_step()
        nn.functional.cross_entropy(network(images), labels).backward()
        applied = exchange.finish()
        optimizer.step()
        exchange.settle(applied)
        optimizer.zero_grad()
    while exchange.flush() is not None:
        optimizer.step()
        exchange.settle(torch.tensor(True, device="cuda"))
    exchange.close()
    return torch.cat([p.detach().flatten() for p in network.parameters()]).cpu()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU whose streams to order")
@pytest.mark.parametrize("barrier_fraction", [1.0, 0.5])
def test_on_a_gpu_the_exchange_and_backward_wait_for_one_another(
    barrier_fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_its_own_stream = trained_on_gpu(barrier_fraction)
    make, default = torch.cuda.Stream, torch.cuda.default_stream()
    # The engine's stream is the one made with a device; torch wraps those that it has by their numbers.
    monkeypatch.setattr(torch.cuda, "Stream", lambda *device, **named: default if device else make(**named))
    assert torch.equal(on_its_own_stream, trained_on_gpu(barrier_fraction))
