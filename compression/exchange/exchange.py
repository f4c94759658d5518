"""The exchange of one model's gradients: from what backward leaves to averages that are ready to step.

It joins the hooks on a model's backward to an averager. It counts steps and bytes, takes out the loss scale, and
knows whether every average is finite. It knows no optimizer and no training loop.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..averagers import Averager, Begin
from ..gradients import Gradients
from ..layers import Layer, layers_of
from ..network.collectives import Collectives, Metered
from ..registry import Compressor
from ..streams import Phases, record_stream
from .engine import Engine
from .flat_gradient import FlatGradient
from .hooks import flattened, hook
from .recorder import Recorder
from .report import Report


class Exchange:
    """Averages the gradients of a model in every backward, on one communication thread.

    A step is: `begin_step`, backward, `finish`, the optimizer's step, `settle`. A loop that calls only backward and
    the optimizer works as well: what is open is finished and settled when the next step begins.
    """

    def __init__(self, model: nn.Module, compressor: Compressor, collectives: Collectives, seed: int) -> None:
        module = model.module if isinstance(model, DistributedDataParallel) else model
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.layers: tuple[Layer, ...] = layers_of(
            ((name, p.shape) for name, p in named), compressor.bucket_size
        )
        self.collectives = Metered(collectives)
        self.averager: Averager = compressor.averager(self.layers, self.collectives, seed)
        self.device = named[0][1].device
        self.step = 0
        self._parameters = dict(named)
        self._loss_scale: float | Tensor = 1.0
        self._open = False  # a step is under way
        self._travelling = False  # and some of its gradients have been submitted
        self._whole = FlatGradient(self.layers) if compressor.needs_full_gradient else None
        self._waiting: list[tuple[Gradients, torch.futures.Future[Tensor]]] = []  # submitted, but not yet queued
        self._bad: dict[str, Tensor] = {}  # of each average of the step under way: it is not finite
        self._suspect: tuple[tuple[str, ...], Tensor] | None = None
        self._failure: BaseException | None = None
        self._job_seconds = 0.0
        self._exposed_seconds = 0.0
        self._submitted_at: float | None = None  # the last gradients of the step under way
        self._reported = (0, 0.0, 0, 0.0, 0.0, 0.0)
        self._engine = Engine(self.device, self._choose)
        self.recorder: Recorder | None = None
        self._hooks = hook(model, self._parameters, self._begin_backward, self._submit)

    # The optimizer step, as training loops see it.

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Backward inside only accumulates on this rank."""
        return self._hooks.no_sync()

    def begin_step(self, loss_scale: float | Tensor = 1.0) -> None:
        """Declare the scale of the loss whose gradients travel next; the compressor sees them without it."""
        self._end_step()
        self._open, self._travelling = True, False
        self._waiting.clear()
        self._bad.clear()
        self._loss_scale = loss_scale

    def finish(self) -> Tensor:
        """Wait until every gradient is the average. Bool scalar on the device: all of them are finite.

        Equal on all ranks, since the averages are. Raises what went wrong on the communication thread.
        """
        if failure := self._failure or self._engine.failure:
            raise failure
        if self._submitted_at is not None:
            self._exposed_seconds += time.perf_counter() - self._submitted_at
            self._submitted_at = None
        if not self._bad:
            return torch.ones((), dtype=torch.bool, device=self.device)
        bad = torch.stack(list(self._bad.values()))
        names = tuple(self._bad)
        seen = self._suspect
        self._suspect = (names, bad if seen is None or seen[0] != names else seen[1] | bad)
        return ~bad.any()

    def settle(self, applied: Tensor) -> None:
        """End the step: commit what the averager remembers where the step was applied, else drop it."""
        if self._open:
            self._open = False
            self._remember(applied)
            self.step += 1

    def drain(self, loss_scale: float | Tensor = 1.0) -> Tensor | None:
        """After the last step before weights are looked at: the averages that are still to be applied, if any.

        They are in .grad, times `loss_scale`; apply and settle them, and ask again. Returns what `finish` does, None
        where nothing is left.
        """
        return None

    def nonfinite_layer(self) -> str | None:
        """The first layer, in the model's order, whose average was not finite since the last call."""
        suspect, self._suspect = self._suspect, None
        if suspect is None:
            return None
        bad = {name for name, flag in zip(suspect[0], suspect[1].tolist(), strict=True) if flag}
        return next((layer.name for layer in self.layers if layer.name in bad), None)

    # What is remembered, counted, and set.

    def state_dict(self) -> dict[str, Any]:
        """This rank's state between steps: the step counter, and what averager and recorder remember."""
        self._end_step()
        recorded = self.recorder.memory.state_dict() if self.recorder is not None else {}
        return {"step": self.step, "averager": self.averager.state_dict(), "recorded": recorded}

    def load_state_dict(self, state: Mapping[str, Any], ranks_alike: bool = True) -> None:
        """The inverse of `state_dict`. ValueError where the state is not of such an exchange.

        Where the ranks are others than when it was saved, only what all of them shared is taken of any rank's state:
        the step counter, and averages that are still to be applied.
        """
        if state.get("late"):
            raise ValueError(
                "the checkpoint holds averages that a broken barrier is still to apply; resume with the "
                "`barrier_fraction` of the run that was interrupted"
            )
        if ranks_alike:
            self.averager.load_state_dict(state["averager"])
            if self.recorder is not None:
                self.recorder.memory.load_state_dict(state["recorded"])
        self.step = int(state["step"])

    @property
    def widths(self) -> dict[str, int]:
        """Bits of every layer, DENSE where it travels as float32. Empty where the compressor has no bits."""
        return dict(self.averager.widths)

    def set_widths(self, widths: Mapping[str, int]) -> None:
        """Bits per layer from the next step on; unnamed layers keep theirs. ValueError where they do not fit."""
        self.averager.set_widths(widths)

    def record(self) -> None:
        """Take this rank's own gradients, as they are in .grad, into the recorder; nothing else changes."""
        assert self.recorder is not None
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self.recorder.record(Gradients(flattened(parameter.grad, parameter), (name,), (0,)))
        self.recorder.memory.settle(True)

    def report(self) -> Report:
        """What was sent since the last report."""
        traffic = self.collectives.traffic
        encoded = self.averager.encoded_bytes
        seconds = (traffic.seconds, self._job_seconds, self._exposed_seconds)
        now = (self.step + self._open, traffic.bytes_sent, encoded, *seconds)
        steps, sent, encoded_now, comm, job, exposed = (b - a for a, b in zip(self._reported, now, strict=True))
        self._reported = now
        values = sum(layer.numel for layer in self.layers)
        world = self.collectives.world_size
        dense = 2 * (world - 1) / world * 4 * values * steps
        ratio = sent / dense if dense else encoded_now / (4 * values * steps or 1)
        return Report(int(steps), sent, dense, ratio, comm, max(job - comm, 0.0), exposed)

    def close(self) -> None:
        """Leave the model alone and end the communication thread.

        DDP keeps its hook for life: where it wraps the model, the next backward raises RuntimeError.
        """
        self._hooks.remove()
        self._engine.close()

    @property
    def without_momentum(self) -> frozenset[str]:
        """Parameters whose momentum the compressor applies itself: the optimizer's must be off for them."""
        return self.averager.without_momentum

    # The work itself.

    def _begin_backward(self) -> None:
        if not self._open or self._travelling:
            self.begin_step()

    def _end_step(self) -> None:
        """End a step whose loop did not."""
        self._engine.wait()  # where a backward raised, nobody has: its jobs still work on buffers and residuals
        if self._open:
            finite = self.finish()
            whole = len(self._bad) == len(self.layers)  # else nobody can have applied it
            self.settle(finite if whole else torch.zeros_like(finite))

    def _remember(self, applied: Tensor) -> None:
        """Commit what averager and recorder computed in the step."""
        self.averager.settle(applied)
        if self.recorder is not None:
            self.recorder.memory.settle(applied)

    def _choose(self, urgent: bool) -> bool:
        """On the communication thread: whether a job that goes ahead is next. There is none."""
        return urgent

    def _submit(self, gradients: Gradients, done: "torch.futures.Future[Tensor]") -> None:
        """Queue the averaging of one flat buffer; `done` is completed whether it succeeds or not.

        Where all gradients are averaged at once, the buffers wait for the last one and then make one job.
        """
        self._travelling, self._submitted_at = True, time.perf_counter()
        self._waiting.append((gradients, done))
        if self._whole is not None and sum(len(part.names) for part, _ in self._waiting) < len(self.layers):
            return
        waiting, self._waiting = self._waiting, []
        phases: Phases = iter(())
        with self._capturing_failure():
            phases = self._expect([part for part, _ in waiting])

        def job() -> Phases:
            with self._capturing_failure():
                yield from self._timed(phases)
            for part, done in waiting:
                done.set_result(part.flat)

        self._engine.submit(job, [done for _, done in waiting])

    @contextlib.contextmanager
    def _capturing_failure(self) -> Iterator[None]:
        """On threads that are not the loop's: what goes wrong inside is for `finish` to raise."""
        try:
            yield
        except BaseException as error:
            self._failure = error

    def _timed(self, phases: Phases) -> Phases:
        """The same phases, as long as nothing went wrong, their time counted."""
        while self._failure is None:
            start = time.perf_counter()
            try:
                others_may_begin = next(phases)
            except StopIteration:
                return
            finally:
                self._job_seconds += time.perf_counter() - start
            yield others_may_begin

    def _expect(self, parts: Sequence[Gradients]) -> Phases:
        """What averages one flat buffer, expected by then, or all of them as one."""
        if self._whole is not None:
            return self._average_whole(self._whole, parts)
        (part,) = parts
        return self._average(part, self.averager.expect(part, self.step))

    def _average_whole(self, whole: FlatGradient, parts: Sequence[Gradients]) -> Phases:
        joined = whole.join(parts)
        yield from self._average(joined, self.averager.expect(joined, self.step))
        whole.part(joined, parts)

    def _average(self, gradients: Gradients, begin: Begin) -> Phases:
        """Average one flat buffer, in place, whatever its type and scale."""
        flat, scale = gradients.flat, self._loss_scale
        prepared = self._prepared(replace(gradients, loss_scale=scale))
        yield from begin(prepared)
        if prepared.flat is not flat:
            flat.copy_(prepared.flat if is_unit_scale(scale) else prepared.flat.mul_(scale))
        self._measure(gradients)

    def _prepared(self, gradients: Gradients) -> Gradients:
        """What the averager gets, and averages in place: the same, or float32 and without loss scale elsewhere."""
        record_stream(gradients.flat, gradients.loss_scale)
        if not self.averager.lossless:
            gradients = unscaled(gradients)
            if self.recorder is not None:
                self.recorder.record(gradients)
        return gradients

    def _measure(self, gradients: Gradients) -> None:
        self._bad.update(zip(gradients.names, not_finite(gradients.flat, self._views(gradients)), strict=True))

    def _views(self, gradients: Gradients) -> list[Tensor]:
        """Each layer's values, flat."""
        places = zip(gradients.names, gradients.offsets, strict=True)
        return [gradients.flat[at : at + self._parameters[name].numel()] for name, at in places]


def unscaled(gradients: Gradients) -> Gradients:
    """The same in float32 and without loss scale; they share the buffer where it is both."""
    flat, scale = gradients.flat.to(torch.float32), gradients.loss_scale
    return Gradients(flat if is_unit_scale(scale) else flat / scale, gradients.names, gradients.offsets)


def is_unit_scale(scale: float | Tensor) -> bool:
    """Whether the loss scale is known to be 1; one on the device is not looked at."""
    return isinstance(scale, float) and scale == 1.0


def not_finite(flat: Tensor, views: list[Tensor]) -> list[Tensor]:
    """Whether each view of `flat` holds a NaN or an infinity: bool scalars on the device, not waited for."""
    if flat.device.type == "cuda":
        largest = torch.stack(torch._foreach_norm(views, float("inf")))  # a launch for each layer takes longer
        return list((~torch.isfinite(largest)).unbind())
    found = torch.zeros(1)
    if flat.dtype == torch.float32:  # the fastest look there is at all values: it multiplies them by 1
        torch._amp_foreach_non_finite_check_and_unscale_([flat], found, torch.ones(1))
    if flat.dtype == torch.float32 and not found:
        return [found[0].bool()] * len(views)
    return [~torch.isfinite(view).all() for view in views]
