"""One pass over the training images, and one over the validation images.

The loop takes everything it needs as an argument and keeps nothing between calls. It knows no file, no
network and no compression: gradients are averaged by a `GradientExchange`, sums over ranks by a callable.
Losses and counts stay on the device until a line is due, so that a step neither waits for the device nor
costs a collective.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from image_classification.data import Loader
from image_classification.precision import MixedPrecisionOptimizer, Precision

Loss = Callable[[Tensor, Tensor], Tensor]
"""(float32 logits [B, C], labels [B] or soft targets [B, C]) -> the mean over the batch."""

Mix = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
"""(images, labels, epoch, iteration) -> (images, soft targets [B, C]). A pure function, so that a resumed
epoch mixes as an uninterrupted one does."""

Log = Callable[[int, Mapping[str, float]], None]
"""(iterations done in this epoch, metrics by name)."""

SumOverRanks = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks; the tensor itself where there is one."""


class GradientExchange(Protocol):
    """An exchange of one optimizer step's gradients for their averages over the ranks."""

    def no_sync(self) -> AbstractContextManager[None]:
        """A block for forward and backward of a micro-batch whose gradients only accumulate."""
        ...

    def begin_step(self, loss_scale: float | Tensor = 1.0) -> None:
        """Announce the backward whose gradients travel; they are `loss_scale` times too large."""
        ...

    def finish(self) -> Tensor:
        """Wait until every .grad holds the average, still scaled, or is None where no average is due.

        Returns a bool scalar on the device, equal on all ranks: all averages are finite.
        """
        ...

    def settle(self, applied: Tensor) -> None:
        """Make pending residuals current where the bool scalar `applied` is true, drop them where it is not."""
        ...

    def flush(self, loss_scale: float | Tensor = 1.0) -> Tensor | None:
        """Put averages that are still to come after the last step into .grad, `loss_scale` times too large.

        Returns what `finish` does, and None where nothing is left.
        """
        ...

    def nonfinite_layer(self) -> str | None:
        """The first layer that was not finite since the last call. Synchronizes with the device."""
        ...


class NonFiniteGradientError(ValueError):
    """A step was skipped because its gradients were not finite, and no loss scale can help."""


@dataclass(frozen=True)
class EpochResult:
    """Result of a training pass."""

    metrics: Mapping[str, float]
    """train.loss (mean over the images of all ranks), train.compute_ips and train.total_ips (images per second
    of all ranks, without and with the wait for data), train.data_time and train.compute_time (seconds per
    iteration, mean over ranks), lr."""
    steps: int
    """Optimizer steps of this call, skipped ones included."""
    iteration: int
    """The batch to start at in order to continue this epoch."""
    finished: bool
    """False where `should_stop` ended the pass before its last step."""

    def step_times(self, accumulation: int, exchange_seconds: float | None) -> dict[str, float]:
        """Seconds of an optimizer step of `accumulation` iterations, and its parts, which add up to it.

        step.time = step.data_time (waiting for images) + step.exchange_time (waiting for averages: `exchange_seconds`
        of each step) + step.compute_time (the rest). The exchange is part of the rest where it is None. All are means
        over the ranks where that one is.
        """
        data = accumulation * self.metrics["train.data_time"]
        rest = accumulation * self.metrics["train.compute_time"]
        if exchange_seconds is None:
            return {"step.time": data + rest, "step.data_time": data, "step.compute_time": rest}
        return {
            "step.time": data + rest,
            "step.data_time": data,
            "step.compute_time": rest - exchange_seconds,
            "step.exchange_time": exchange_seconds,
        }


def train_epoch(
    model: nn.Module,
    loader: Loader,
    loss: Loss,
    optimizer: MixedPrecisionOptimizer,
    exchange: GradientExchange,
    *,
    epoch: int,
    lr: float,
    start: int = 0,
    iterations: int | None = None,
    accumulation: int = 1,
    world_size: int = 1,
    mix: Mix | None = None,
    print_freq: int = 10,
    log: Log = lambda iteration, metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    sum_over_ranks: SumOverRanks = lambda values: values,
) -> EpochResult:
    """Train on the batches of one epoch from number `start` on, or on its first `iterations` batches only.

    An iteration is one batch of each rank, `accumulation` of them are one optimizer step. The rest at the end of the
    epoch is dropped, so that every step sees equally many images. At the end of the epoch, and nowhere else, averages
    that the exchange still holds back are applied, by steps of their own.

    `model` is converted by the optimizer's precision, and called forward: DDP's wrapper where there is one. `log` is
    called after every step in which a multiple of `print_freq` iterations was reached, with the metrics of
    `EpochResult` for the iterations since the last call; the loss is this rank's. `should_stop` is asked once per step,
    after it. All ranks must get the same answer at the same step.

    Raises NonFiniteGradientError where some step since the last line, or since the start, had a NaN or infinite
    gradient; that step was skipped on every rank alike, and so the weights are good. Raises ValueError where no step
    fits into the epoch, or `start` is not the first batch of one.
    """
    end = last_iteration(len(loader), start=start, iterations=iterations, accumulation=accumulation)
    model.train()
    optimizer.set_lr(lr)
    precision = optimizer.precision
    batches = loader.epoch(epoch, start)
    meter = _Meter(precision.device)
    for iteration in range(start, end):
        images, labels = meter.fetch(batches)
        images, targets = (images, labels) if mix is None else mix(images, labels, epoch, iteration)
        done = iteration + 1
        completes_step = done % accumulation == 0
        with nullcontext() if completes_step else exchange.no_sync():
            batch_loss = loss(precision.logits(model, images), targets)
            if completes_step:
                exchange.begin_step(optimizer.scale.value)
            optimizer.scaled(batch_loss, accumulation).backward()
        meter.count_batch(len(labels), batch_loss.detach())
        if not completes_step:
            continue

        finite: Tensor | None = exchange.finish()
        while finite is not None:
            applied = optimizer.step(finite)
            exchange.settle(applied)
            optimizer.zero_grad()
            meter.count_step(applied)
            finite = exchange.flush(optimizer.scale.value) if done == end else None

        stop = should_stop()
        line_is_due = done // print_freq > (done - accumulation) // print_freq
        if line_is_due or stop or done == end:
            totals, skipped = meter.read()
            if skipped and not optimizer.scale.can_back_off():
                raise _non_finite(exchange.nonfinite_layer(), epoch, done, optimizer.scale.value)
            if line_is_due:
                log(done, _train_metrics(totals, world_size, lr))
            meter.restart()
        if stop:
            break
    totals = sum_over_ranks(meter.totals.to(precision.device))
    return EpochResult(
        metrics=_train_metrics(totals, world_size, lr),
        steps=(done - start) // accumulation,
        iteration=done,
        finished=done == end,
    )


def last_iteration(batches: int, *, start: int = 0, iterations: int | None = None, accumulation: int = 1) -> int:
    """End of an epoch of `batches` batches that `train_epoch` begins at batch `start`: after its last whole step.

    Raises ValueError as `train_epoch` does.
    """
    end = batches if iterations is None else min(iterations, batches)
    if end < accumulation:
        raise ValueError(
            f"an epoch of {end} iterations is too short for one optimizer step of {accumulation}; "
            "use more images, or a smaller `batch_size` or `accumulation`"
        )
    end -= end % accumulation
    if start % accumulation or not 0 <= start < end:
        raise ValueError(
            f"iteration {start} starts no optimizer step: they start at multiples of {accumulation} below {end}; "
            "resume with the batch sizes and `iterations` of the run that was interrupted"
        )
    return end


class _Meter:
    """Sums over batches of this rank: loss, images, batches, seconds of data, seconds of compute.

    The loss and the skipped steps are summed on the device, and read when a line is due. Reading waits for
    the device, so that the time between two readings is right without a clock on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(5, dtype=torch.float64)
        """Sums of the whole pass, up to the last reading."""
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Begin anew; the time since the last reading, in which the caller wrote its line, is not counted."""
        self._on_device = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._images = self._batches = 0
        self._data_time = 0.0
        self._started = time.perf_counter()

    def fetch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        asked = time.perf_counter()
        batch = next(batches, None)
        self._data_time += time.perf_counter() - asked
        if batch is None:
            raise ValueError("the loader gave fewer batches than its length says")
        return batch

    def count_batch(self, images: int, mean_loss: Tensor) -> None:
        self._on_device[0].add_(mean_loss, alpha=images)
        self._images += images
        self._batches += 1

    def count_step(self, applied: Tensor) -> None:
        self._on_device[1].add_(applied.logical_not())

    def read(self) -> tuple[Tensor, int]:
        """The sums since the last restart, and how many steps were skipped in that time."""
        loss, skipped = self._on_device.tolist()
        compute_time = time.perf_counter() - self._started - self._data_time
        sums = [loss, self._images, self._batches, self._data_time, compute_time]
        since = torch.tensor(sums, dtype=torch.float64)
        self.totals += since
        return since, int(skipped)


def _train_metrics(totals: Tensor, world_size: int, lr: float) -> dict[str, float]:
    """Metrics from a meter's totals, of one rank or summed over the ranks: these are ratios."""
    loss, images, batches, data_time, compute_time = totals.tolist()
    return {
        "train.loss": loss / images,
        "train.compute_ips": images * world_size / compute_time,
        "train.total_ips": images * world_size / (data_time + compute_time),
        "train.data_time": data_time / batches,
        "train.compute_time": compute_time / batches,
        "lr": lr,
    }


def _non_finite(layer: str | None, epoch: int, iteration: int, loss_scale: float | Tensor) -> NonFiniteGradientError:
    what = f"the gradient of {layer}" if layer else "a half-precision gradient"
    remedy = "use a lower `lr`"
    if isinstance(loss_scale, float):
        remedy += ", or `dynamic_loss_scale` where half precision overflows"
    return NonFiniteGradientError(
        f"{what} was not finite in epoch {epoch}, at or before iteration {iteration}, with a loss scale of "
        f"{float(loss_scale):g}; the step was not applied; {remedy}"
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    precision: Precision,
    *,
    iterations: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    sum_over_ranks: SumOverRanks = lambda values: values,
) -> dict[str, float] | None:
    """Score `model` on all ranks' batches, or on the first `iterations` of each rank.

    Ranks may differ in their number of batches: nothing travels before the end. The model is the converted
    one, without DDP around it.

    Returns val.top1, val.top5 (percent; among fewer than 5 classes, the best of all), val.loss (plain cross-entropy),
    all per image; val.compute_ips, val.total_ips (images per second of all ranks, without and with the wait for data);
    val.data_time (seconds per batch, mean over ranks); val.compute_latency, its mean in seconds per batch of this rank,
    and _at95, _at99, _at100: the latency that so many percent of this rank's batches did not exceed. Returns None, on
    all ranks, where `should_stop` stopped any of them before a batch.

    Raises ValueError where there is no image on any rank.
    """
    model.eval()
    hits_and_loss = torch.zeros(3, dtype=torch.float64, device=precision.device)
    images_seen = 0
    data_time = 0.0
    stopped = False
    stopwatch = _Stopwatch(precision.device)
    started = asked = time.perf_counter()
    for images, labels in islice(loader.epoch(0), iterations):
        data_time += time.perf_counter() - asked
        if stopped := should_stop():
            break
        with stopwatch.lap():
            logits = precision.logits(model, images)
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = cross_entropy(logits, labels, reduction="sum")
            hits_and_loss += torch.stack([hits[:, 0].sum(), hits.sum(), loss])
        images_seen += len(labels)
        asked = time.perf_counter()
    laps = stopwatch.laps()
    compute_time = time.perf_counter() - started - data_time
    latency = torch.tensor(laps or [0.0], dtype=torch.float64)  # a rank without a batch takes part in the sum

    own = torch.tensor([images_seen, data_time, compute_time, len(laps), stopped, 1.0], dtype=torch.float64)
    totals = sum_over_ranks(torch.cat([hits_and_loss, own.to(precision.device)]))
    top1, top5, loss_sum, count, data_time, compute_time, batches, any_stopped, world_size = totals.tolist()
    if any_stopped:
        return None
    if count == 0:
        raise ValueError("there is no validation image to score")
    return {
        "val.top1": 100 * top1 / count,
        "val.top5": 100 * top5 / count,
        "val.loss": loss_sum / count,
        "val.compute_ips": count * world_size / compute_time,
        "val.total_ips": count * world_size / (data_time + compute_time),
        "val.data_time": data_time / batches,
        "val.compute_latency": latency.mean().item(),
        "val.compute_latency_at95": latency.quantile(0.95, interpolation="higher").item(),
        "val.compute_latency_at99": latency.quantile(0.99, interpolation="higher").item(),
        "val.compute_latency_at100": latency.max().item(),
    }


class _Stopwatch:
    """Seconds that the device takes for each lap; a GPU is waited for only when they are read."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._laps: list[tuple[Any, Any]] = []

    @contextmanager
    def lap(self) -> Iterator[None]:
        start = self._now()
        yield
        self._laps.append((start, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def laps(self) -> list[float]:
        if not self._on_gpu:
            return [end - start for start, end in self._laps]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in self._laps]


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], loss: Loss, precision: Precision) -> float:
    """The loss of a model as it is, as a mean over batches, without dropout; no buffer changes.

    Batch norms take the statistics of each batch, as in training: running ones are far off where training has just
    begun, and of weights that have moved.
    """
    training = model.training
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    model.eval()
    try:
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        total = torch.stack([loss(precision.logits(model, images), labels).double() for images, labels in batches])
    finally:
        for norm in norms:
            norm.track_running_stats = True
        model.train(training)
    return float(total.mean())


@contextmanager
def averaged_batch_norm(model: nn.Module, sum_over_ranks: SumOverRanks) -> Iterator[None]:
    """Inside, running means and variances are their averages over the ranks; after it, each rank's own again.

    All ranks enter together: one collective. The counts of batches seen stay as they are.
    """
    statistics = [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    own = [buffer.clone() for buffer in statistics]
    if statistics:
        # The one at the end becomes the number of ranks.
        flat = torch.cat([*(buffer.float().flatten() for buffer in own), own[0].new_ones(1, dtype=torch.float32)])
        summed = sum_over_ranks(flat)
        averages = (summed[:-1] / summed[-1]).split([buffer.numel() for buffer in own])
        for buffer, average in zip(statistics, averages, strict=True):
            buffer.copy_(average)
    try:
        yield
    finally:
        for buffer, value in zip(statistics, own, strict=True):
            buffer.copy_(value)
