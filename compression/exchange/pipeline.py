"""The pipeline: gradients go in as flat buffers, and come out as averages over the ranks, on a thread of its own.

It joins an averager to an engine, takes out the loss scale, and knows which averages are finite. It knows no model, no
backward and no optimizer: hooks, outer steps of local SGD, benchmarks and tests submit whatever tensors they have.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ..averagers import Averager, Averaging
from ..gradients import Gradients, is_unit_scale, not_finite
from ..layers import Layer
from ..limits import LIMIT
from ..network.collectives import Collectives
from ..streams import Meanwhile, Phases, Until, device_future, record_stream
from .engine import Engine
from .flat_gradient import FlatGradient
from .recorder import Recorder

Result = TypeVar("Result")
Future = torch.futures.Future


class Pipeline:
    """Averages the buffers that are submitted, in that order, which is the same on every rank.

    `recorder` takes in the gradients before anything encodes them. With `needs_full_gradient` the buffers wait until
    all `layers` have been submitted, and are averaged as one. An averager's state is pending until the caller settles
    it (`Averager.settle`).

    Layers that no rank uses in a step (`Gradients.unused`) are left out of it, which the ranks of `network` agree on.

    Where `choose` is given, urgent buffers overtake others, and it makes the choice: see `Engine`. The averages then
    come back in float32 and without loss scale; else they do in the gradients' own type, unit and buffer.
    """

    def __init__(
        self,
        averager: Averager,
        layers: Sequence[Layer],
        device: torch.device,
        *,
        recorder: Recorder | None = None,
        needs_full_gradient: bool = False,
        choose: Callable[[bool], bool] | None = None,
        network: Collectives | None = None,
    ) -> None:
        self.averager, self.recorder = averager, recorder
        self.nonfinite: dict[str, Tensor] = {}
        """Flags of the layers that were averaged since `clear`: bool scalars on the device, not waited for."""
        self.seconds = 0.0
        """Seconds of the communication thread in jobs."""
        self.failure: BaseException | None = None
        """An exception of another thread than the caller's."""
        self.told = True
        """Whether somebody was told of it."""
        self.completed_at = 0.0
        """The time of the last buffer's end, by `time.perf_counter`."""
        self.submitted = 0
        """Buffers, or full gradients, that have been submitted and are not urgent."""
        self._sizes = {layer.name: layer.numel for layer in layers}
        self._flat_gradient = FlatGradient(layers) if needs_full_gradient else None
        self._waiting: list[tuple[Gradients, Future[Tensor]]] = []  # for the rest of the full gradient
        self._choose, self._in_order, self._network = choose, choose is None, network
        self._engine = Engine(device, self._choose_next)

    def clear(self) -> None:
        """Begin a step: no layer has been averaged, and no buffer waits for others."""
        self.nonfinite.clear()
        self._waiting.clear()

    def submit(
        self, gradients: Gradients, step: int, then: Callable[[Gradients], None] | None = None
    ) -> Future[Tensor]:
        """Queue the averaging of one flat buffer. The future's value is the buffer of the averages.

        It is completed whether that succeeds or not, which `check` tells. `then` is called with the averages, on the
        communication thread. Raises RuntimeError once closed.
        """
        future: Future[Tensor] = device_future(gradients.flat.device)
        self._waiting.append((gradients, future))
        if self._flat_gradient is not None and self._missing():
            return future
        waiting, self._waiting = self._waiting, []
        averaging: Averaging | None = None
        if self._flat_gradient is None and self._in_order and gradients.unused is None:
            with self._capturing_failure():
                averaging = self.averager.post(gradients, step)
        job = self._job([part for part, _ in waiting], [each for _, each in waiting], step, averaging, then)
        self.submitted = self._engine.submit(job, [each for _, each in waiting])
        return future

    def submit_urgent(
        self, gradients: Gradients, step: int, after: int, then: Callable[[Gradients], None] | None = None
    ) -> Future[Tensor]:
        """Likewise, of a buffer that overtakes all others but urgent ones and the first `after` of `submitted`."""
        future: Future[Tensor] = device_future(gradients.flat.device)
        self._engine.submit_urgent(self._job([gradients], [future], step, None, then), after, [future])
        return future

    def check(self) -> None:
        """Raise the exception of the communication thread, if there is one."""
        if failure := self.failure or self._engine.failure:
            self.told = True
            raise failure

    def wait(self) -> None:
        """Wait for all submitted work; on a GPU, only the caller's stream waits."""
        self._engine.wait()

    def close(self) -> None:
        """Finish submitted work and end the thread. Calling it twice is harmless."""
        self._engine.close()

    def _missing(self) -> bool:
        return sum(len(part.names) for part, _ in self._waiting) < len(self._sizes)

    def _job(
        self,
        parts: Sequence[Gradients],
        futures: Sequence[Future[Tensor]],
        step: int,
        averaging: Averaging | None,
        then: Callable[[Gradients], None] | None,
    ) -> Callable[[], Phases]:
        def job() -> Phases:
            flats = [part.flat for part in parts]
            with self._capturing_failure():
                if self.failure is None:
                    flats = yield from self._timed(self._averages(parts, step, averaging, then))
            self.completed_at = time.perf_counter()
            for flat, future in zip(flats, futures, strict=True):
                future.set_result(flat)

        return job

    @contextlib.contextmanager
    def _capturing_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.failure, self.told = error, False

    def _timed(self, phases: Generator[Meanwhile | Until, None, Result]) -> Generator[Meanwhile | Until, None, Result]:
        """The same phases, their time counted. Where something else went wrong meanwhile, that is raised."""
        while True:
            start = time.perf_counter()
            try:
                meanwhile = next(phases)
            except StopIteration as end:
                result: Result = end.value
                return result
            finally:
                self.seconds += time.perf_counter() - start
            yield meanwhile
            if self.failure is not None:
                raise self.failure

    def _averages(
        self,
        parts: Sequence[Gradients],
        step: int,
        averaging: Averaging | None,
        then: Callable[[Gradients], None] | None,
    ) -> Generator[Meanwhile | Until, None, list[Tensor]]:
        """Average one buffer, or all parts as one. Returns the buffers that hold the averages of each part."""
        gradients = parts[0] if self._flat_gradient is None else self._flat_gradient.join(parts)
        prepared = self._prepared(gradients)
        if self._in_order:
            if gradients.unused is not None:
                self._average_used(prepared, gradients.unused, step)
            else:
                yield from (averaging or self.averager.post(prepared, step))(prepared)
        else:
            self.averager.average_(prepared, step)
            yield Meanwhile.NONE_BEGINS
        averages = self._finished(gradients, prepared)
        if self._flat_gradient is not None:
            self._flat_gradient.split(averages, parts)
        if then is not None:
            then(averages)
        return [part.flat for part in parts] if self._flat_gradient is not None else [averages.flat]

    def _prepared(self, gradients: Gradients) -> Gradients:
        """The gradients to average in place: the same, or float32 and without loss scale elsewhere."""
        record_stream(gradients.flat, gradients.loss_scale)
        if not self.averager.lossless:
            gradients = gradients.unscaled()
            if self.recorder is not None:
                self.recorder.record(gradients)
        return gradients

    def _average_used(self, gradients: Gradients, unused: frozenset[str], step: int) -> None:
        """Average the layers that some rank's step uses: the others keep what is owed of them until they are used.

        One small sum over the ranks, and on a GPU a wait for it. The ranks wait for one another in it, so that no other
        job may be under way: one that has begun could need what a rank that waits here has still to do.
        """
        assert self._network is not None
        used = torch.tensor([float(name not in unused) for name in gradients.names], device=gradients.flat.device)
        self._network.sum_(used)
        layers = zip(gradients.names, gradients.offsets, used.tolist(), strict=True)
        kept = [(name, at) for name, at, count in layers if count]
        if kept:
            names, offsets = zip(*kept, strict=True)
            self.averager.average_(replace(gradients, names=names, offsets=offsets), step)

    def _finished(self, gradients: Gradients, prepared: Gradients) -> Gradients:
        """The averages in their own buffer; notes whether they are finite."""
        scale = gradients.loss_scale
        if not self._in_order:
            gradients = prepared.unscaled()
        elif prepared.flat is not gradients.flat:
            averages = prepared.flat if is_unit_scale(scale) else prepared.flat.mul_(scale)
            gradients.flat.copy_(cut_to(averages, gradients.flat.dtype))
        views = [values for _, values in gradients.layers(self._sizes)]
        self.nonfinite.update(zip(gradients.names, not_finite(gradients.flat, views), strict=True))
        return gradients

    def _choose_next(self, urgent: bool) -> bool:
        """Whether an urgent job is next; called on the communication thread."""
        if self._choose is None or self.failure is not None:
            return urgent
        start = time.perf_counter()
        with self._capturing_failure():
            urgent = self._choose(urgent)
        self.seconds += time.perf_counter() - start
        return urgent


def cut_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values with those that are finite, but too large for a type of numbers, at its limit.

    Decoded values may be larger than any gradient was. What is not finite stays so.
    """
    most = torch.finfo(dtype).max
    if most >= LIMIT:
        return values
    return torch.where(values.isfinite(), values.clamp(-most, most), values)
