"""One pass over the training images, and one over the validation images.

The loop takes everything it needs as an argument and keeps nothing between calls. It knows no file, no
network and no compression: gradients are averaged by a `GradientExchange`, sums over ranks by a callable.
Losses and counts stay on the device until a line is due, so that a step neither waits for the device nor
costs a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from image_classification.precision import MixedPrecisionOptimizer, Precision

Loss = Callable[[Tensor, Tensor], Tensor]
"""(float32 logits [B, C], labels [B] or soft targets [B, C]) -> the mean over the batch."""

Mix = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
"""(images, labels, epoch, iteration) -> (images, soft targets [B, C]), a pure function."""

Log = Callable[[int, Mapping[str, float]], None]
"""(iterations done in this epoch, metrics by name)."""

SumOverRanks = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks; the identity where there is one."""


class Loader(Protocol):
    """Batches of an epoch, the same for the same (epoch, start)."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


class GradientExchange(Protocol):
    """How the gradients of one optimizer step become their average over the ranks."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch whose gradients only accumulate."""
        ...

    def begin_step(self, loss_scale: float | Tensor = 1.0) -> None:
        """Before the backward whose gradients travel; they are `loss_scale` times too large."""
        ...

    def finish(self) -> Tensor:
        """Wait until every .grad holds the average; a bool scalar on the device: all averages are finite."""
        ...

    def settle(self, applied: Tensor) -> None:
        """Commit residuals and buffers where the bool scalar `applied` is true, drop them where not."""
        ...

    def nonfinite_layer(self) -> str | None:
        """The first layer that was not finite since the last call. Synchronizes with the device."""
        ...


class NonFiniteGradientError(ValueError):
    """A step was skipped because its gradients were not finite, and no loss scale can explain it."""


@dataclass(frozen=True)
class EpochResult:
    """What a training pass did."""

    metrics: Mapping[str, float]
    """train.loss (mean over the images of all ranks), train.compute_ips, train.total_ips (images per second
    of all ranks), train.data_time, train.compute_time (seconds per iteration), lr."""
    steps: int
    """Optimizer steps of this call, skipped ones included."""
    iteration: int
    """Where to start to continue this epoch."""
    finished: bool
    """False where `should_stop` ended the pass before its last step."""


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
    memory_format: torch.memory_format = torch.contiguous_format,
    mix: Mix | None = None,
    print_freq: int = 10,
    log: Log = lambda iteration, metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    sum_over_ranks: SumOverRanks = lambda values: values,
) -> EpochResult:
    """Train on one epoch (or its first `iterations` batches), from batch `start` on."""
    raise NotImplementedError


def evaluate(
    model: nn.Module,
    loader: Loader,
    precision: Precision,
    *,
    epoch: int = 0,
    iterations: int | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    sum_over_ranks: SumOverRanks = lambda values: values,
) -> dict[str, float]:
    """Metrics val.* of the (unwrapped) model over all ranks' batches."""
    raise NotImplementedError


def averaged_batch_norm(model: nn.Module, sum_over_ranks: SumOverRanks) -> AbstractContextManager[None]:
    """Inside, running means and variances are their averages over the ranks; after it, each rank's own again."""
    raise NotImplementedError
