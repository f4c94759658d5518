"""The profile of a step: when each layer's gradient is there, and what a busy communication thread costs it."""

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..costs import Compute
from ..exchange.hooks import flattened
from ..network.collectives import Collectives

Step = Callable[[], object]
"""One forward and backward of the model on a batch of its own."""

STEP = "a step of this model"
WARM_UP = 2  # steps before those that count
LEAST_STEPS, MOST_STEPS = 3, 20


Result = TypeVar("Result")


class StepError(ValueError):
    """A step of the model, or what is measured of it, that failed on some rank."""


def together(network: Collectives, what: str, work: Callable[[], Result]) -> list[Result]:
    """The results of some work of every rank, which calls nothing of the network; in rank order, on every rank.

    Raises StepError, on all ranks alike, where it fails on one of them: none waits for one that gave up.
    """
    result, failure = None, None
    try:
        result = work()
    except StepError as error:
        failure = str(error)
    except Exception as error:  # whatever a user's step may raise
        failure = f"{what} fails: {type(error).__name__}: {' '.join(str(error).split())}; run it without advice first"
    ends = network.collect((failure, result))
    if failures := [each for each, _ in ends if each is not None]:
        raise StepError(failures[0])
    return [each for _, each in ends]


@dataclass
class Profile:
    """The profile of a model's steps, taken by `run` on every rank at the same time, in a block of `as_it_was`.

    Nothing is averaged, and no weight changes.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    network: Collectives
    no_sync: Callable[[], contextlib.AbstractContextManager[None]]

    def run(self, step: Step, seconds: float) -> Compute:
        """The medians of as many steps as fit into so many seconds, three at least; the slowest rank's.

        Raises StepError, on all ranks alike, where a step fails on one of them.
        """
        laps: list[_Lap] = []
        began = time.perf_counter()

        def is_late() -> bool:
            laps.append(self.lap(step))
            return time.perf_counter() - began > seconds

        while len(laps) < WARM_UP + MOST_STEPS:
            late = together(self.network, STEP, is_late)
            if len(laps) >= WARM_UP + LEAST_STEPS and any(late):
                break
        del laps[:WARM_UP]
        own = Compute(
            before=statistics.median(lap.before for lap in laps),
            backward=statistics.median(lap.backward for lap in laps),
            after=0.0,
            ready={name: statistics.median(lap.ready[name] for lap in laps) for name in self.parameters},
        )
        return slowest(self.network.collect(own))

    def gradient(self) -> dict[str, Tensor]:
        """The gradients that the last step left, float32 and flat, in the order of memory, by name.

        Raises StepError, on all ranks alike, where one of them is not finite: no codec's time or error would be.
        """

        def check() -> None:
            for name, values in self._gradient.items():
                if not values.isfinite().all():
                    raise StepError(
                        f"a step of this model fails: its gradient is not finite, first that of {name}; lower the loss "
                        "scale or the learning rate"
                    )

        together(self.network, STEP, check)
        return self._gradient

    def lap(self, step: Step) -> "_Lap":
        """The times of one step; its gradients are kept, and .grad is cleared."""
        clock, marks = _Clock(next(iter(self.parameters.values())).device), dict[str, Any]()

        def forward_ended(*_: object) -> None:
            marks.setdefault("forward", clock.mark())

        handles = [self.model.register_forward_hook(forward_ended)]
        for name, parameter in self.parameters.items():
            handles.append(parameter.register_post_accumulate_grad_hook(self._marking(clock, marks, name)))
        try:
            start = clock.mark()
            with self.no_sync():
                step()
            end = clock.mark()
        finally:
            for handle in handles:
                handle.remove()
        begin = marks.pop("forward", start)
        if not marks:
            raise ValueError("it left no gradient; a step is one forward and backward of the model that is given")
        lap = _Lap(
            clock.between(start, begin),
            clock.between(begin, end),
            {name: clock.between(begin, marks.get(f".{name}", end)) for name in self.parameters},
        )
        self._gradient = {
            name: flattened(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, parameter)
            for name, parameter in self.parameters.items()
        }
        for parameter in self.parameters.values():
            parameter.grad = None
        return lap

    @staticmethod
    def _marking(clock: "_Clock", marks: dict[str, Any], name: str) -> Callable[[Tensor], None]:
        def mark(_: Tensor) -> None:
            marks[f".{name}"] = clock.mark()  # the last time, where a parameter is used more than once

        return mark

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        """A block after which gradients, buffers and torch's random numbers are what they were."""
        gradients = {name: parameter.grad for name, parameter in self.parameters.items()}
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        for parameter in self.parameters.values():
            parameter.grad = None
        device = next(iter(self.parameters.values())).device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.grad = gradients[name]
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def contention(self, step: Step, work: Callable[[], object], alone: Compute, steps: int = 3) -> float:
        """Seconds by which a second of work on another thread delays a step: 0 where it has a core to itself, 1 where
        all are taken. Every rank measures at the same time; the largest of them.

        Raises StepError, on all ranks alike, where a step or the work fails on one of them.
        """
        piece = 0.0
        done, stop = 0, threading.Event()
        found: list[float] = []

        def work_alone() -> None:
            nonlocal piece
            work()
            start = time.perf_counter()
            for _ in range(steps):
                work()
            piece = (time.perf_counter() - start) / steps

        def go_on() -> None:
            nonlocal done
            while not stop.is_set():
                work()
                done += 1

        def lap() -> None:
            before, start = done, time.perf_counter()
            self.lap(step)
            took = time.perf_counter() - start
            found.append((took - alone.before - alone.backward) / max(piece, (done - before) * piece))

        self.network.collect(None)
        together(self.network, "a codec", work_alone)
        thread = threading.Thread(target=go_on, name="communication")
        thread.start()
        try:
            for _ in range(steps):
                together(self.network, STEP, lap)
        finally:
            stop.set()
            thread.join()
        own = min(1.0, max(0.0, statistics.median(found)))
        return float(max(self.network.collect(own)))


@dataclass(frozen=True)
class _Lap:
    before: float
    backward: float
    ready: dict[str, float]


class _Clock:
    """Moments on a device: of the host where it is a CPU, events of the stream where it is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        """Seconds from one moment to another, 0 at least; waits for both."""
        if not self._on_gpu:
            return max(0.0, float(second - first))
        second.synchronize()
        return max(0.0, float(first.elapsed_time(second)) / 1e3)


def slowest(ranks: list[Compute]) -> Compute:
    """The profile of the rank whose forward and backward take longest: the others wait for it."""
    return max(ranks, key=lambda each: each.before + each.backward)


def with_copies(compute: Compute, seconds: float) -> Compute:
    """The profile with one more pass over all gradients during backward, and one after it, of so many seconds each.

    DDP copies gradients into its buffers, and averages back.
    """
    stretch = (compute.backward + seconds) / compute.backward if compute.backward else 1.0
    ready = {name: at * stretch for name, at in compute.ready.items()}
    return replace(compute, backward=compute.backward + seconds, ready=ready, after=compute.after + seconds)
