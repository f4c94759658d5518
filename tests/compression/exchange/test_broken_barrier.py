"""The broken barrier: which averages are applied when, whatever the network's timing."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import compression
from compression.exchange.broken_barrier import prefix_length
from compression.network.collectives import Collectives
from compression.network.threads import ThreadCollectives, run_ranks

CPU = torch.device("cpu")


class Linear(nn.Module):
    """A model whose gradients are what it is asked for: they depend on no weight."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.zeros(*shape) for shape in shapes)

    def forward(self, gradients: Sequence[Tensor | float]) -> Tensor:
        return torch.stack([(p * g).sum() for p, g in zip(self.layers, gradients, strict=True)]).sum()


@contextmanager
def attached(
    shapes: Sequence[Sequence[int]],
    collectives: Collectives,
    fraction: float,
    late_steps: int,
    name: str,
    **options: Any,
) -> Iterator[tuple[Linear, compression.Exchange]]:
    model = Linear(shapes)
    exchange = compression.attach(
        model, compression.build(name, **options), collectives, barrier_fraction=fraction, late_steps=late_steps
    )
    try:
        yield model, exchange
    finally:
        exchange.close()


def received(model: Linear) -> list[Tensor]:
    """The gradients that the optimizer would get; zeros where it would skip the layer."""
    taken = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.layers]
    model.zero_grad()
    return taken


def step(model: Linear, exchange: compression.Exchange, gradients: Sequence[Any], scale: float = 1.0) -> list[Tensor]:
    """One step of a loop; what it gets."""
    exchange.begin_step(scale)
    (model(gradients) * scale).backward()
    exchange.settle(exchange.finish())
    return received(model)


def flushed(model: Linear, exchange: compression.Exchange) -> list[list[Tensor]]:
    """The gradients that steps after the last one get."""
    steps = []
    while (finite := exchange.flush()) is not None:
        exchange.settle(finite)
        steps.append(received(model))
    return steps


# Which layers a step waits for


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e30, allow_subnormal=False), min_size=1, max_size=9), st.floats(0.01, 1))
def test_the_prefix_is_the_shortest_that_holds_the_fraction(squares: list[float], fraction: float) -> None:
    length = prefix_length(squares, fraction)
    assert 1 <= length <= len(squares)
    if sum(squares):
        assert sum(squares[: length - 1]) < fraction * sum(squares) * (1 + 1e-12)
        assert sum(squares[:length]) >= fraction * sum(squares) * (1 - 1e-12)


@pytest.mark.parametrize("squares", [[0.0, 0.0], [1.0, math.nan], [math.inf, 1.0], [math.nan, math.nan]], ids=str)
def test_all_layers_are_waited_for_where_their_norms_say_nothing(squares: list[float]) -> None:
    assert prefix_length(squares, 0.1) == len(squares)


# When what is applied


@st.composite
def trainings(draw: st.DrawFn) -> tuple[list[int], list[int], float, int]:
    """(values of each layer, the power of 4 that each step's gradients are, fraction, late steps)."""
    counts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    powers = draw(st.permutations(range(draw(st.integers(1, 7)))))
    return counts, powers, draw(st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99])), draw(st.integers(1, 3))


def steps_in(values: Tensor, powers: Sequence[int]) -> list[int]:
    """The steps whose averages add up to these values, all equal, where step t's is 4^powers[t]."""
    assert values.unique().numel() == 1
    found = [step for step, power in enumerate(powers) if int(values[0]) >> 2 * power & 3]
    assert float(values[0]) == sum(4.0 ** powers[step] for step in found)
    return found


@settings(deadline=None, max_examples=25)
@given(trainings())
def test_every_average_is_applied_once_in_its_step_or_a_fixed_number_of_steps_later(training: Any) -> None:
    counts, powers, fraction, late_steps = training
    layers = range(len(counts))

    def train(ranks: ThreadCollectives) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        with attached([[count] for count in counts], ranks, fraction, late_steps, "none") as (model, exchange):
            own = 2 * ranks.rank  # the ranks' mean is 1
            taken = [step(model, exchange, [own * 4.0**power] * len(counts)) for power in powers]
            return taken, flushed(model, exchange)

    (taken, after), others = run_ranks(2, train)
    for mine, theirs in zip(taken + after, others[0] + others[1], strict=True):
        assert all(map(torch.equal, mine, theirs))
    squares = [math.nan] * len(counts)
    late: set[tuple[int, int]] = set()  # (step, layer)
    for now, values in enumerate(taken):
        length = prefix_length(squares, fraction)
        for layer in layers:
            due = [now - late_steps] * ((now - late_steps, layer) in late) + [now] * (layer < length)
            assert steps_in(values[layer], powers) == due
            if due:
                squares[layer] = counts[layer] * 16.0 ** powers[due[-1]]
        late -= {(now - late_steps, layer) for layer in layers}
        late |= {(now, layer) for layer in layers[length:]}
    steps = sorted({step for step, _ in late})
    assert [[steps_in(each, powers) for each in values] for values in after] == [
        [[step] * ((step, layer) in late) for layer in layers] for step in steps
    ]


def test_a_layer_is_late_exactly_where_the_prefix_of_its_step_ends_before_it() -> None:
    with attached([[3], [3], [3]], compression.Solo(), 0.9, 2, "none") as (model, exchange):
        taken = [[float(layer[0]) for layer in step(model, exchange, [6, 2, now + 1])] for now in range(5)]
        taken += [[float(layer[0]) for layer in late] for late in flushed(model, exchange)]
    assert taken == [[6, 2, 1], [6, 2, 0], [6, 2, 0], [6, 2, 2], [6, 2, 3], [0, 0, 4], [0, 0, 5]]


def test_a_parameter_without_an_average_that_is_due_has_no_gradient() -> None:
    with attached([[3], [3]], compression.Solo(), 0.5, 3, "none") as (model, exchange):
        for expected in (False, True, True, True, False):
            exchange.begin_step()
            model([5, 1]).backward()
            exchange.settle(exchange.finish())
            assert (model.layers[1].grad is None) == expected
            assert model.layers[0].grad is not None
            model.zero_grad()


def test_micro_batches_only_accumulate() -> None:
    with attached([[3], [3]], compression.Solo(), 0.5, 1, "none") as (model, exchange):
        for expected in (2.0, 0.0, 2.0):
            with exchange.no_sync():
                model([5, 1]).backward()
            first, second = step(model, exchange, [5, 1])
            assert (float(first[0]), float(second[0])) == (10.0, expected)


def test_late_averages_get_the_loss_scale_of_the_step_that_applies_them() -> None:
    for name, options in (("none", {}), ("maxmin", {"bits": 8, "bucket_size": 3})):
        with attached([[1, 3], [1, 3]], compression.Solo(), 0.5, 1, name, **options) as (model, exchange):
            last = [float(step(model, exchange, [5, 1], scale)[1][0, 0]) for scale in (2.0**10, 2.0**4, 2.0**3)]
        assert last == [2.0**10, 0.0, 2.0**3]


# Whatever is on the wire


class Slow(ThreadCollectives):
    """A network on which late averages pile up."""

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        time.sleep(0.01)
        return super().exchange(messages, sizes)


QUANTIZED = [[30, 40], [600], [20, 60], [50, 50]]


def train_quantized(network: ThreadCollectives, fraction: float, steps: int = 6) -> list[Tensor]:
    with attached(QUANTIZED, network, fraction, 2, "maxmin", bits=3, error_feedback=True) as (model, exchange):
        taken = []
        for now in range(steps):
            generator = torch.Generator().manual_seed(10 * now + network.rank)
            sizes = [4, 1, 2, 1] if now % 3 else [1, 1, 1, 5]  # so that the prefix grows and shrinks
            shapes = zip(sizes, QUANTIZED, strict=True)
            gradients = [size * torch.randn(shape, generator=generator) for size, shape in shapes]
            taken += step(model, exchange, gradients)
        for late in flushed(model, exchange):
            taken += late
        return taken


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.95])
def test_averages_do_not_depend_on_the_order_on_the_wire(fraction: float) -> None:
    first, second = run_ranks(2, lambda ranks: train_quantized(ranks, fraction))
    slow, _ = run_ranks(2, lambda ranks: train_quantized(Slow.of(ranks), fraction))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, slow))


LATE_NAMES = compression.with_stale_updates()
LATE: list[tuple[str, dict[str, Any]]] = [
    *((name, {"error_feedback": True}) for name in LATE_NAMES if name in compression.with_bits()),
    *((name, {}) for name in LATE_NAMES),
    ("maxmin", {"error_feedback": True, "warmup_steps": 2}),
]


@pytest.mark.parametrize(("name", "options"), LATE, ids=str)
def test_ranks_get_the_same_bits_from_every_compressor_that_can_be_late(name: str, options: dict[str, Any]) -> None:
    def train(ranks: ThreadCollectives) -> list[list[Tensor]]:
        with attached(QUANTIZED, ranks, 0.1, 2, name, **options) as (model, exchange):
            generator = torch.Generator().manual_seed(ranks.rank)
            for _ in range(3):
                step(model, exchange, [torch.randn(shape, generator=generator) for shape in QUANTIZED])
            return flushed(model, exchange)

    first, second = run_ranks(2, train)
    assert len(first) == (0 if name == "sanity" else 2)  # all zeros say nothing of what to wait for
    for mine, theirs in zip(first, second, strict=True):
        assert all(map(torch.equal, mine, theirs))
        assert any(values.any() for values in mine)


def test_what_goes_wrong_on_the_network_reaches_the_loop() -> None:
    class Broken(compression.Solo):
        def sum_(self, values: Tensor) -> None:
            raise ConnectionError("the cable is out")

    with (
        attached([[3], [3]], Broken(), 0.5, 1, "none") as (model, exchange),
        pytest.raises(ConnectionError, match="the cable is out"),
    ):
        step(model, exchange, [5, 1])


# What is remembered


def test_what_an_encoding_loses_is_sent_later_and_once() -> None:
    """All that is applied, and what the residuals still hold, is all that there was."""
    with attached([[30, 40], [50, 60]], compression.Solo(), 0.5, 2, "maxmin", bits=2, error_feedback=True) as (
        model,
        exchange,
    ):
        total = [torch.zeros_like(p) for p in model.layers]
        for now in range(8):
            generator = torch.Generator().manual_seed(now)
            gradients = [3 * torch.randn(30, 40, generator=generator), torch.randn(50, 60, generator=generator)]
            for kept, gradient, taken in zip(total, gradients, step(model, exchange, gradients), strict=True):
                kept += gradient - taken
        for late in flushed(model, exchange):
            for kept, taken in zip(total, late, strict=True):
                kept -= taken
        residuals = exchange.state_dict()["averager"]
    for index, left in enumerate(total):
        held = sum(residuals[hop][f"layers.{index}"] for hop in ("residual", "share_residual"))
        assert held.norm() > 1
        assert torch.allclose(left.flatten(), held, atol=1e-4)


def test_a_late_average_that_is_not_finite_stops_its_own_step_and_leaves_no_trace() -> None:
    with attached([[30, 40], [50, 60]], compression.Solo(), 0.5, 2, "maxmin", error_feedback=True) as (model, exchange):

        def finish(*gradients: Any) -> bool:
            exchange.begin_step()
            model(gradients).backward()
            finite = exchange.finish()
            exchange.settle(finite)
            model.zero_grad()
            return bool(finite)

        generator = torch.Generator().manual_seed(0)
        good = [3 * torch.randn(30, 40, generator=generator), torch.randn(50, 60, generator=generator)]
        assert finish(*good)
        before = exchange.state_dict()["averager"]["residual"]["layers.1"]
        assert finish(good[0], good[1] * math.inf)
        assert finish(*good)
        assert exchange.nonfinite_layer() is None
        assert not finish(*good)
        assert exchange.nonfinite_layer() == "layers.1"
        after = exchange.state_dict()
        assert not torch.equal(after["averager"]["residual"]["layers.1"], before)  # of the two good steps since
        assert all(values.isfinite().all() for values in after["averager"]["residual"].values())
        assert finish(*good)
        assert len(exchange.state_dict()["late"]) == 1  # of the step that was not applied: now all were waited for


@pytest.mark.parametrize("name", ["none", "maxmin"])
def test_a_run_that_is_resumed_within_an_epoch_goes_on_with_the_same_bits(name: str) -> None:
    options = {"error_feedback": True} if name == "maxmin" else {}

    def gradients(now: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(now)
        return [size * torch.randn(20, 40, generator=generator) for size in (3, 1, 2)]

    def go_on(model: Linear, exchange: compression.Exchange) -> list[Tensor]:
        steps = [step(model, exchange, gradients(now)) for now in range(4, 8)]
        return [values for each in steps + flushed(model, exchange) for values in each]

    arguments = ([[20, 40]] * 3, compression.Solo(), 0.5, 3, name)
    with attached(*arguments, **options) as (model, exchange):
        for now in range(4):
            step(model, exchange, gradients(now))
        state = exchange.state_dict()
        straight = go_on(model, exchange)
    assert [(late["step"], late["due"]) for late in state["late"]] == [(1, 4), (2, 5), (3, 6)]
    with attached(*arguments, **options) as (model, exchange):
        exchange.load_state_dict(state)
        resumed = go_on(model, exchange)
    assert len(straight) == len(resumed)
    assert all(map(torch.equal, straight, resumed))


def test_without_a_broken_barrier_nothing_that_is_outstanding_is_forgotten() -> None:
    with attached([[3], [3]], compression.Solo(), 0.5, 1, "none") as (model, exchange):
        for _ in range(2):
            step(model, exchange, [5, 1])
        state = exchange.state_dict()
    with attached([[3], [3]], compression.Solo(), 1.0, 1, "none") as (_, exchange):
        with pytest.raises(ValueError, match="the checkpoint holds averages that a broken barrier is still to apply; "):
            exchange.load_state_dict(state)
        assert exchange.flush() is None


# What is refused


def test_a_loop_that_never_asks_for_the_averages_is_told_so() -> None:
    with attached([[3], [3]], compression.Solo(), 0.5, 1, "none") as (model, _):
        model([5, 1]).backward()
        with pytest.raises(ValueError, match="the averages of a broken barrier come with finish\\(\\)"):
            model([5, 1]).backward()


@pytest.mark.parametrize("name", [name for name in compression.COMPRESSORS if name not in LATE_NAMES])
def test_compressors_that_settle_whole_steps_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"compressor {name} averages whole steps, and a broken barrier lets layers "):
        compression.attach(Linear([[3]]), compression.build(name), barrier_fraction=0.5)


def test_a_step_that_is_under_way_has_no_state() -> None:
    model = Linear([[3], [2]])
    exchange = compression.attach(model, compression.build("none"), barrier_fraction=0.5)
    exchange.begin_step()
    with pytest.raises(ValueError, match="the last step ended without; call finish"):
        exchange.state_dict()
    exchange.close()


@pytest.mark.parametrize(("fraction", "late_steps"), [(0.0, 1), (1.5, 1), (math.nan, 1), (0.5, 0)])
def test_numbers_that_make_no_sense_are_refused(fraction: float, late_steps: int) -> None:
    with pytest.raises(ValueError, match="a broken barrier waits for a fraction above 0 and at most 1, and is late "):
        compression.attach(
            Linear([[3]]), compression.build("none"), barrier_fraction=fraction, late_steps=late_steps
        )
