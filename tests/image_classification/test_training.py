"""The training and the validation pass, with models of a few parameters."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils._python_dispatch import TorchDispatchMode

from image_classification.losses import training_loss
from image_classification.optim import parameter_groups, sgd
from image_classification.precision import MixedPrecisionOptimizer, Precision
from image_classification.training import (
    EpochResult,
    NonFiniteGradientError,
    averaged_batch_norm,
    evaluate,
    mean_loss,
    train_epoch,
)

CPU = torch.device("cpu")
CLASSES = 3
TRAIN_METRICS = {
    "train.loss", "train.compute_ips", "train.total_ips", "train.data_time", "train.compute_time", "lr"
}  # fmt: skip
LATENCIES = {"val.compute_latency" + suffix for suffix in ("", "_at95", "_at99", "_at100")}
VAL_METRICS = LATENCIES | {
    "val.top1", "val.top5", "val.loss", "val.compute_ips", "val.total_ips", "val.data_time"
}  # fmt: skip


def small_net(classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, classes))


class Batches:
    """A loader of random batches; `sizes` are theirs. Where `bad` says so, an image has a NaN."""

    num_images = global_batch = 0
    skipped: ClassVar[list[str]] = []

    def __init__(self, sizes: list[int], bad: tuple[int, ...] = (), classes: int = CLASSES, salt: int = 0) -> None:
        self.sizes, self.bad, self.classes, self.salt = sizes, bad, classes, salt

    def __len__(self) -> int:
        return len(self.sizes)

    def batch(self, epoch: int, iteration: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.salt + 1000 * epoch + iteration)
        size = self.sizes[iteration]
        images = torch.randn(size, 3, 2, 2, generator=generator)
        if iteration in self.bad:
            images[0, 0, 0, 0] = torch.nan
        return images, torch.randint(self.classes, (size,), generator=generator)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.batch(epoch, iteration) for iteration in range(start, len(self.sizes)))

    def close(self) -> None: ...


class Alone:
    """The exchange of a world of one: a gradient is its own average."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[str] = []
        self.scales: list[float | Tensor] = []
        self.settled: list[bool] = []
        self.bad_layers: list[str] = []

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.calls.append("no_sync")
        yield

    def begin_step(self, loss_scale: float | Tensor = 1.0) -> None:
        self.calls.append("begin_step")
        self.scales.append(loss_scale)

    def finish(self) -> Tensor:
        self.calls.append("finish")
        self.bad_layers += [
            name for name, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
        ]
        return torch.stack([p.grad.isfinite().all() for p in self.model.parameters() if p.grad is not None]).all()

    def settle(self, applied: Tensor) -> None:
        self.calls.append("settle")
        self.settled.append(bool(applied))

    def flush(self, loss_scale: float | Tensor = 1.0) -> Tensor | None:
        return None

    def nonfinite_layer(self) -> str | None:
        return self.bad_layers[0] if self.bad_layers else None


class Run:
    """A model and all that trains it."""

    def __init__(self, momentum: float = 0.9, **flags: Any) -> None:
        precision = Precision.choose(CPU, **flags)
        self.model = precision.convert(small_net())
        groups = parameter_groups(self.model, weight_decay=0.01)
        self.optimizer = MixedPrecisionOptimizer(groups, partial(sgd, lr=0.0, momentum=momentum), precision)
        self.exchange = Alone(self.model)
        self.lines: list[tuple[int, dict[str, float]]] = []

    def train(self, loader: Batches, *, epoch: int = 0, lr: float = 0.1, **options: Any) -> EpochResult:
        options = {"loss": training_loss(), "log": self.log} | options
        loss = options.pop("loss")
        return train_epoch(self.model, loader, loss, self.optimizer, self.exchange, epoch=epoch, lr=lr, **options)

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        self.lines.append((iteration, dict(metrics)))

    def weights(self) -> list[Tensor]:
        momentum = self.optimizer.state_dict()["momentum"].values()
        return [tensor.detach().clone() for tensor in [*self.model.parameters(), *momentum]]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


# Training ---------------------------------------------------------------------------------------------------


def test_an_epoch_is_bit_for_bit_what_a_bare_loop_does() -> None:
    run, loader = Run(), Batches([4] * 7)
    run.train(loader)

    model = small_net()
    decaying = [p for name, p in model.named_parameters() if not name.startswith("2.")]
    optimizer = torch.optim.SGD(
        [{"params": decaying, "weight_decay": 0.01}, {"params": model[2].parameters()}],
        lr=0.1,
        momentum=0.9,
        fused=True,
    )
    for images, labels in loader.epoch(0):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert same(list(run.model.parameters()), list(model.parameters()))
    assert same(list(run.model.buffers()), list(model.buffers()))


@settings(deadline=None, max_examples=20)
@given(accumulation=st.integers(1, 5), batches=st.integers(1, 13))
def test_micro_batches_travel_once_per_step_and_what_is_left_over_is_dropped(accumulation: int, batches: int) -> None:
    assume(batches >= accumulation)
    run = Run()
    result = run.train(Batches([2] * batches), accumulation=accumulation)
    steps = batches // accumulation
    step = ["no_sync"] * (accumulation - 1) + ["begin_step", "finish", "settle"]
    assert run.exchange.calls == step * steps
    assert (result.steps, result.iteration, result.finished) == (steps, steps * accumulation, True)


class Late(Alone):
    """An exchange that holds some averages back: gradients of 1 for the last layer."""

    def __init__(self, model: nn.Module, held: int, finite: bool = True) -> None:
        super().__init__(model)
        self.held, self.finite = held, torch.tensor(finite)

    def flush(self, loss_scale: float | Tensor = 1.0) -> Tensor | None:
        self.calls.append("flush")
        self.held -= 1
        self.model[4].bias.grad = torch.ones(CLASSES) * loss_scale
        return None if self.held < 0 else self.finite


@pytest.mark.parametrize("flags", [{}, {"amp": True, "static_loss_scale": 8.0}], ids=str)
def test_what_an_exchange_holds_back_is_applied_at_the_end_of_an_epoch(flags: dict[str, Any]) -> None:
    late, alone = Run(momentum=0.0, **flags), Run(momentum=0.0, **flags)
    late.exchange = Late(late.model, held=2)
    result = late.train(Batches([4] * 3), lr=0.25)
    alone.train(Batches([4] * 3), lr=0.25)
    assert late.exchange.calls[-8:] == ["begin_step", "finish", "settle", "flush", "settle", "flush", "settle", "flush"]
    assert late.exchange.calls.count("flush") == 3
    assert result.steps == 3
    assert torch.equal(late.model[4].weight, alone.model[4].weight)
    decayed = alone.model[4].bias.detach()
    for _ in range(2):
        decayed = decayed - 0.25 * (1 + 0.01 * decayed)
    torch.testing.assert_close(late.model[4].bias.detach(), decayed)


def test_nothing_that_is_held_back_is_applied_where_an_epoch_stops_early() -> None:
    run = Run()
    run.exchange = Late(run.model, held=2)
    assert not run.train(Batches([4] * 3), should_stop=lambda: True).finished
    assert "flush" not in run.exchange.calls


def test_what_is_held_back_and_not_finite_ends_the_run_too() -> None:
    run = Run()
    run.exchange = Late(run.model, held=1, finite=False)
    with pytest.raises(NonFiniteGradientError, match="was not finite in epoch 0"):
        run.train(Batches([4] * 3), print_freq=100)


def test_an_accumulated_gradient_is_the_mean_over_its_images() -> None:
    loader = Batches([4] * 6)

    class Joined(Batches):
        def batch(self, epoch: int, iteration: int) -> tuple[Tensor, Tensor]:
            images, labels = zip(*(loader.batch(epoch, 3 * iteration + part) for part in range(3)), strict=True)
            return torch.cat(images), torch.cat(labels)

    runs = Run(), Run()
    for run in runs:
        run.model[2] = nn.Identity()  # a batch norm would tell the two apart
    results = runs[0].train(loader, accumulation=3), runs[1].train(Joined([12] * 2))
    for left, right in zip(runs[0].weights(), runs[1].weights(), strict=True):
        torch.testing.assert_close(left, right)
    assert results[0].metrics["train.loss"] == pytest.approx(results[1].metrics["train.loss"])


def test_gradients_are_gone_after_every_step() -> None:
    run = Run()
    run.train(Batches([4] * 3))
    assert all(parameter.grad is None for parameter in run.model.parameters())


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_exchange_knows_the_scale_of_the_gradients_it_sees(dynamic: bool) -> None:
    run = Run(static_loss_scale=8.0, dynamic_loss_scale=dynamic)
    run.train(Batches([4] * 2))
    assert [float(scale) for scale in run.exchange.scales] == ([2.0**16] * 2 if dynamic else [8.0] * 2)
    assert isinstance(run.exchange.scales[0], Tensor) == dynamic


def test_the_learning_rate_is_the_one_given() -> None:
    run = Run()
    before = [p.detach().clone() for p in run.model.parameters()]
    result = run.train(Batches([4] * 3), lr=0.0)
    assert same(list(run.model.parameters()), before)
    assert result.metrics["lr"] == 0.0


@pytest.mark.parametrize("flags", [{}, {"amp": True}, {"fp16": True}, {"amp": True, "opt_level": "O3"}], ids=str)
def test_training_learns_in_every_precision(flags: dict[str, Any]) -> None:
    run, loader = Run(**flags), Batches([32] * 30)
    loader.batch = lambda epoch, iteration: Batches.batch(loader, 0, 0)  # type: ignore[method-assign]
    first = run.train(loader, iterations=1).metrics["train.loss"]
    run.train(loader)
    assert run.train(loader, iterations=1).metrics["train.loss"] < first / 2


def test_the_loss_is_the_mean_over_images_and_ranks() -> None:
    def constant(logits: Tensor, labels: Tensor) -> Tensor:
        return 0 * logits.sum() + len(labels)

    def with_a_rank_of_twice_that_loss(totals: Tensor) -> Tensor:
        return totals + totals * torch.tensor([2, 1, 1, 1, 1])

    run, loader = Run(), Batches([2, 6])
    assert run.train(loader, loss=constant).metrics["train.loss"] == pytest.approx((2 * 2 + 6 * 6) / 8)
    both = run.train(loader, loss=constant, sum_over_ranks=with_a_rank_of_twice_that_loss, world_size=2)
    assert both.metrics["train.loss"] == pytest.approx(1.5 * (2 * 2 + 6 * 6) / 8)


def test_prof_trains_on_the_first_iterations_only() -> None:
    runs = Run(), Run()
    short = runs[0].train(Batches([4] * 9), iterations=4)
    runs[1].train(Batches([4] * 4))
    assert (short.iteration, short.finished) == (4, True)
    assert same(runs[0].weights(), runs[1].weights())


def mix(images: Tensor, labels: Tensor, epoch: int, iteration: int) -> tuple[Tensor, Tensor]:
    weight = 1 / (2 + epoch + iteration)
    targets = one_hot(labels, CLASSES).float()
    return images.lerp(images.flip(0), weight), targets.lerp(targets.flip(0), weight)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 5), st.integers(1, 2))
def test_an_interrupted_epoch_goes_on_exactly_where_it_stopped(steps_before: int, accumulation: int) -> None:
    whole, cut = Run(), Run()
    loader = Batches([4] * 12)
    whole.train(loader, epoch=3, mix=mix, accumulation=accumulation)

    answers = iter([False] * (steps_before - 1) + [True])
    options = {"epoch": 3, "mix": mix, "accumulation": accumulation}
    part = cut.train(loader, should_stop=lambda: next(answers), **options)
    assert (part.finished, part.steps, part.iteration) == (False, steps_before, steps_before * accumulation)
    rest = cut.train(loader, start=part.iteration, **options)
    assert (rest.finished, rest.iteration) == (True, 12)
    assert same(whole.weights(), cut.weights())


def test_a_stop_after_the_last_step_leaves_nothing_to_finish() -> None:
    assert Run().train(Batches([4]), should_stop=lambda: True).finished


def test_whether_to_stop_is_asked_once_per_step() -> None:
    asked = []
    Run().train(Batches([4] * 6), accumulation=2, should_stop=lambda: bool(asked.append(1)))
    assert len(asked) == 3


@pytest.mark.parametrize(("accumulation", "expected"), [(1, [3, 6, 9]), (2, [4, 6, 10]), (5, [5, 10])])
def test_a_line_is_written_whenever_a_multiple_of_print_freq_is_reached(accumulation: int, expected: list[int]) -> None:
    run = Run()
    run.train(Batches([4] * 11), print_freq=3, accumulation=accumulation)
    assert [iteration for iteration, _ in run.lines] == expected


def test_the_lines_of_a_resumed_epoch_are_where_they_would_have_been() -> None:
    run = Run()
    run.train(Batches([4] * 11), print_freq=3, start=5)
    assert [iteration for iteration, _ in run.lines] == [6, 9]


def test_lines_and_result_have_the_metrics_of_the_report() -> None:
    run = Run()
    result = run.train(Batches([4] * 6), print_freq=2)
    assert set(result.metrics) == TRAIN_METRICS
    assert all(set(metrics) == TRAIN_METRICS for _, metrics in run.lines)
    losses = [metrics["train.loss"] for _, metrics in run.lines]
    assert result.metrics["train.loss"] == pytest.approx(sum(losses) / 3)
    for metrics in (result.metrics, run.lines[0][1]):
        seconds = metrics["train.data_time"] + metrics["train.compute_time"]
        assert metrics["train.total_ips"] == pytest.approx(4 / seconds)
        assert metrics["train.compute_ips"] == pytest.approx(4 / metrics["train.compute_time"])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("start", [0, 2])
def test_the_seconds_of_a_step_are_where_they_were_spent(
    accumulation: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still but for 3 s a batch in the loader, 5 in the loss, 2 in each exchange, 100 in lines.

    All are powers or sums of powers of 2, so that nothing is rounded.
    """
    now = [0.0]
    monkeypatch.setattr("image_classification.training.time.perf_counter", lambda: now[0])

    class Slow(Batches):
        def batch(self, epoch: int, iteration: int) -> tuple[Tensor, Tensor]:
            now[0] += 3
            return super().batch(epoch, iteration)

    run = Run()
    compute, finish = training_loss(), run.exchange.finish

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        now[0] += 5
        return compute(logits, targets)

    def exchanged() -> Tensor:
        now[0] += 2
        return finish()

    def log(iteration: int, metrics: dict[str, float]) -> None:
        now[0] += 100

    run.exchange.finish = exchanged  # type: ignore[method-assign]
    options = {"loss": loss, "log": log, "accumulation": accumulation, "start": start, "print_freq": 3}
    result = run.train(Slow([4] * 10), **options)
    data, work = 3.0 * accumulation, 5.0 * accumulation
    assert result.step_times(accumulation, 2.0) == {
        "step.time": data + work + 2, "step.data_time": data, "step.compute_time": work, "step.exchange_time": 2,
    }  # fmt: skip
    assert result.step_times(accumulation, None) == {
        "step.time": data + work + 2, "step.data_time": data, "step.compute_time": work + 2,
    }  # fmt: skip


def test_images_per_second_are_those_of_all_ranks() -> None:
    run = Run()
    result = run.train(Batches([4] * 2), print_freq=2, world_size=3, sum_over_ranks=lambda totals: 3 * totals)
    for metrics in (result.metrics, run.lines[0][1]):
        seconds = metrics["train.data_time"] + metrics["train.compute_time"]
        assert metrics["train.total_ips"] == pytest.approx(3 * 4 / seconds)


class CountReads(TorchDispatchMode):
    """Counts how often the host reads a value from the device."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Unread(Alone):
    """An exchange that reads nothing itself."""

    def finish(self) -> Tensor:
        return torch.stack([p.grad.isfinite().all() for p in self.model.parameters()]).all()

    def settle(self, applied: Tensor) -> None: ...


@pytest.mark.parametrize("flags", [{}, {"amp": True, "dynamic_loss_scale": True}, {"fp16": True}], ids=str)
def test_no_step_waits_for_the_device_and_none_costs_a_collective(flags: dict[str, Any]) -> None:
    reads, sums = [], []
    for batches in (4, 24):
        run = Run(**flags)
        run.exchange = Unread(run.model)
        with CountReads() as counter:
            run.train(Batches([4] * batches), print_freq=100, sum_over_ranks=lambda totals: (sums.append(1), totals)[1])
        reads.append(counter.reads)
    assert reads[0] == reads[1]
    assert len(sums) == 2


@settings(deadline=None, max_examples=25)
@given(
    bad=st.integers(0, 23),
    print_freq=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    flags=st.sampled_from([{}, {"fp16": True}, {"static_loss_scale": 128.0}]),
)
def test_without_a_scale_that_moves_a_bad_gradient_ends_the_run_in_time_and_names_its_layer(
    bad: int, print_freq: int, accumulation: int, flags: dict[str, Any]
) -> None:
    run, loader = Run(momentum=0.0, **flags), Batches([4] * 24, bad=(bad,))
    run.model[2] = nn.Identity()  # its statistics would pass the NaN on
    steps = []
    options = {"print_freq": print_freq, "accumulation": accumulation}
    with pytest.raises(NonFiniteGradientError, match=r"the gradient of 1\.weight was not finite in epoch 0, at or"):
        run.train(loader, should_stop=lambda: bool(steps.append(1)), **options)
    step_of_bad = bad // accumulation + 1
    assert step_of_bad <= len(steps)
    assert len(steps) * accumulation <= step_of_bad * accumulation + print_freq
    assert run.exchange.settled.index(False) == step_of_bad - 1
    assert run.exchange.settled.count(False) == 1
    assert all(tensor.isfinite().all() for tensor in run.weights())


def test_a_bad_step_just_before_a_stop_is_an_error_too() -> None:
    with pytest.raises(NonFiniteGradientError, match="the step was not applied; use a lower `lr`, or `dynamic_loss"):
        Run().train(Batches([4] * 5, bad=(1,)), print_freq=100, should_stop=iter([False, True]).__next__)


def test_with_a_scale_that_moves_the_run_goes_on_at_half_of_it() -> None:
    run, without = Run(dynamic_loss_scale=True), Run(dynamic_loss_scale=True)
    for each in (run, without):
        each.model[2] = nn.Identity()
    result = run.train(Batches([4] * 6, bad=(2,)), print_freq=1)
    assert result.steps == 6
    assert run.exchange.settled == [True, True, False, True, True, True]
    assert run.optimizer.scale.state_dict()["scale"] == 2**15

    class Skipping(Batches):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            return (self.batch(epoch, iteration) for iteration in (0, 1, 3, 4, 5))

    without.train(Skipping([4] * 6), iterations=5)
    assert same(run.weights(), without.weights())


def test_a_scale_that_moves_ends_the_run_too_once_it_cannot_help() -> None:
    run = Run(dynamic_loss_scale=True)
    with pytest.raises(NonFiniteGradientError, match=r"with a loss scale of 1\.52588e-05; .*; use a lower `lr`$"):
        run.train(Batches([4] * 40, bad=tuple(range(40))), print_freq=1)
    assert len(run.exchange.settled) == 32


def test_an_epoch_without_a_whole_step_is_an_error() -> None:
    with pytest.raises(ValueError, match="an epoch of 3 iterations is too short for one optimizer step of 4"):
        Run().train(Batches([4] * 3), accumulation=4)


@pytest.mark.parametrize(("start", "accumulation"), [(3, 2), (8, 2), (9, 2), (-2, 2)])
def test_training_starts_at_a_step_of_the_epoch(start: int, accumulation: int) -> None:
    with pytest.raises(ValueError, match=f"iteration {start} starts no optimizer step: they start at multiples of 2"):
        Run().train(Batches([4] * 9), start=start, accumulation=accumulation)


def test_a_loader_that_ends_early_is_an_error() -> None:
    class Short(Batches):
        def __len__(self) -> int:
            return len(self.sizes) + 1

    with pytest.raises(ValueError, match="the loader gave fewer batches than its length says"):
        Run().train(Short([4] * 2))


# Validation -------------------------------------------------------------------------------------------------


def together(rank_functions: list[Callable[[Callable[[Tensor], Tensor]], Any]]) -> list[Any]:
    """Call each with its own `sum_over_ranks`, as threads that stand for ranks."""
    world = len(rank_functions)
    shared: list[Tensor] = [torch.zeros(())] * world
    results: list[Any] = [None] * world
    barrier = threading.Barrier(world)

    def work(rank: int) -> None:
        def sum_over_ranks(values: Tensor) -> Tensor:
            shared[rank] = values
            barrier.wait(timeout=900)
            total = torch.stack(list(shared)).sum(0)
            barrier.wait(timeout=900)
            return total

        results[rank] = rank_functions[rank](sum_over_ranks)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@settings(deadline=None, max_examples=15)
@given(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=4), st.sampled_from([2, 3, 5, 9]))
def test_every_image_of_every_rank_counts_once_however_unevenly_they_are_spread(
    sizes: list[list[int]], classes: int
) -> None:
    assume(any(sizes))
    model = small_net(classes)
    loaders = [Batches(of_rank, classes=classes, salt=rank * 10**6) for rank, of_rank in enumerate(sizes)]
    scores = together(
        [
            lambda sum_over_ranks, loader=loader: evaluate(model, loader, Precision(CPU), sum_over_ranks=sum_over_ranks)
            for loader in loaders
        ]
    )
    batches = [batch for loader in loaders for batch in loader.epoch(0)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = model.eval()(images)
    place = (logits > logits.gather(1, labels[:, None])).sum(1)
    for score in scores:
        assert score["val.top1"] == pytest.approx(100 * (place < 1).double().mean().item())
        assert score["val.top5"] == pytest.approx(100 * (place < 5).double().mean().item())
        assert score["val.loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
        shared = VAL_METRICS - LATENCIES
        assert {name: score[name] for name in shared} == {name: scores[0][name] for name in shared}


def test_the_loss_of_a_model_as_it_is_takes_statistics_of_batches_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    precision = Precision.choose(CPU)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 4, generator=generator), torch.arange(8) % 3) for _ in range(2)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    found = mean_loss(model, batches, nn.functional.cross_entropy, precision)
    assert found == mean_loss(model, batches, nn.functional.cross_entropy, precision)  # nothing is dropped out
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert model[1].track_running_stats
    model[1].running_mean.fill_(1e3)
    assert mean_loss(model, batches, nn.functional.cross_entropy, precision) == found
    model.eval()
    mean_loss(model, batches, nn.functional.cross_entropy, precision)
    assert not any(module.training for module in model.modules())


def test_validation_has_the_metrics_of_the_report_and_its_latencies_are_in_order() -> None:
    scores = evaluate(small_net(), Batches([4] * 30), Precision(CPU))
    assert set(scores) == VAL_METRICS
    at = [scores[f"val.compute_latency_at{percent}"] for percent in (95, 99, 100)]
    assert 0 < scores["val.compute_latency"] <= at[2]
    assert at == sorted(at)


def test_validation_changes_nothing_in_the_model() -> None:
    model = small_net()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    evaluate(model, Batches([4] * 3), Precision(CPU))
    assert same(list(model.state_dict().values()), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_prof_scores_the_first_iterations_only() -> None:
    few = evaluate(small_net(), Batches([4] * 9), Precision(CPU), iterations=2)
    assert few["val.loss"] == evaluate(small_net(), Batches([4] * 2), Precision(CPU))["val.loss"]


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no validation image to score"):
        evaluate(small_net(), Batches([]), Precision(CPU))


def test_batch_norms_are_averaged_inside_and_each_ranks_own_outside() -> None:
    models = [small_net() for _ in range(3)]
    for rank, model in enumerate(models):
        model[2].running_mean.fill_(rank)
        model[2].running_var.fill_(10.0**rank)
        model[2].num_batches_tracked.fill_(rank)

    def work(sum_over_ranks: Callable[[Tensor], Tensor], model: nn.Module) -> list[float]:
        norm = model[2]
        with averaged_batch_norm(model, sum_over_ranks):
            return [x.double().mean().item() for x in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]

    inside = together([partial(work, model=model) for model in models])
    assert inside == [pytest.approx([1.0, 37.0, rank]) for rank in range(3)]
    for rank, model in enumerate(models):
        assert torch.equal(model[2].running_mean, torch.full((5,), float(rank)))
        assert torch.equal(model[2].running_var, torch.full((5,), 10.0**rank))


def test_batch_norms_come_back_after_an_error_and_in_half_precision() -> None:
    model = Precision.choose(CPU, amp=True, opt_level="O3").convert(small_net())
    model[2].running_mean.fill_(3)
    inside = []
    with suppress(KeyboardInterrupt), averaged_batch_norm(model, lambda values: values + 1):
        inside.append(model[2].running_mean.clone())
        raise KeyboardInterrupt
    assert torch.equal(inside[0], torch.full((5,), 2, dtype=torch.bfloat16))
    assert torch.equal(model[2].running_mean, torch.full((5,), 3, dtype=torch.bfloat16))


def test_a_model_without_batch_norm_costs_no_collective() -> None:
    def never(values: Tensor) -> Tensor:
        raise AssertionError

    with averaged_batch_norm(nn.Linear(2, 2), never):
        pass
