"""The exchange of one model's gradients: from what backward leaves to averages that are ready to step.

It joins a model's parameters to an averager: through a communication hook where the model is wrapped in
DistributedDataParallel, through hooks on the parameters otherwise. It counts steps and bytes, takes out the loss
scale, and knows whether every average is finite. It knows no optimizer and no training loop.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compression.averagers import Averager, Gradients
from compression.collectives import Collectives, Metered, Solo, TorchDistributed
from compression.engine import Engine
from compression.layers import Layer, layers_of
from compression.recorder import Recorder
from compression.registry import Compressor
from compression.whole import Whole

BUCKET_BYTES = 25 * 2**20  # of gradients that travel together where DDP does not choose


@dataclass(frozen=True)
class Report:
    """What a number of optimizer steps sent and waited for, on this rank.

    `bytes_dense` is what an all-reduce in float32 would have sent. `ratio` is their quotient, and at one rank, where
    nothing is sent, encoded bytes over 4 bytes a value.
    """

    steps: int
    bytes_sent: float
    bytes_dense: float
    ratio: float
    comm_seconds: float
    codec_seconds: float


class Exchange:
    """Averages the gradients of a model in every backward, on one communication thread.

    A step is: `begin_step`, backward, `finish`, the optimizer's step, `settle`. A loop that calls only backward and
    the optimizer works as well: what is open is finished and settled when the next step begins.
    """

    def __init__(self, model: nn.Module, compressor: Compressor, collectives: Collectives, seed: int) -> None:
        self.model = model
        module = model.module if isinstance(model, DistributedDataParallel) else model
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.layers: tuple[Layer, ...] = layers_of(
            ((name, p.shape) for name, p in named), compressor.bucket_size
        )
        self.collectives = Metered(collectives)
        self.averager: Averager = compressor.averager(self.layers, self.collectives, seed)
        self.device = named[0][1].device
        self.step = 0
        self._names = {id(p): name for name, p in named}
        self._parameters = dict(named)
        self._loss_scale: float | Tensor = 1.0
        self._open = False  # a step is under way
        self._travelling = False  # and some of its gradients have been submitted
        self._whole = Whole(self.layers) if compressor.at_once else None
        self._waiting: list[tuple[Gradients, Callable[[], None]]] = []  # submitted, but not yet queued
        self._bad: dict[str, Tensor] = {}  # of each average of the step under way: it is not finite
        self._suspect: tuple[tuple[str, ...], Tensor] | None = None
        self._failure: BaseException | None = None
        self._job_seconds = 0.0
        self._reported = (0, 0.0, 0.0, 0.0, 0)
        self._engine = Engine(self.device)
        self.recorder: Recorder | None = None

    # The optimizer step, as training loops see it.

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward inside only accumulates on this rank."""
        raise NotImplementedError

    def begin_step(self, loss_scale: float | Tensor = 1.0) -> None:
        """Declare the scale of the loss whose gradients travel next; the compressor sees them without it."""
        if self._open:
            self.settle(self.finish())
        self._open, self._travelling = True, False
        self._waiting.clear()
        self._bad.clear()
        self._loss_scale = loss_scale

    def finish(self) -> Tensor:
        """Wait until every gradient is the average. Bool scalar on the device: all of them are finite.

        Equal on all ranks, since the averages are. Raises what went wrong on the communication thread.
        """
        if self._failure is not None:
            raise self._failure
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
            self.averager.settle(bool(applied))
            if self.recorder is not None:
                self.recorder.memory.settle(bool(applied))
            self.step += 1

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
        if self._open:
            self.settle(self.finish())
        recorded = self.recorder.memory.state_dict() if self.recorder is not None else {}
        return {"step": self.step, "averager": self.averager.state_dict(), "recorded": recorded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.averager.load_state_dict(state["averager"])
        if self.recorder is not None:
            self.recorder.memory.load_state_dict(state["recorded"])
        self.step = int(state["step"])

    @property
    def widths(self) -> dict[str, int]:
        """Bits of every layer, DENSE where it travels as float32. Empty where the compressor has no bits."""
        return dict(getattr(self.averager, "widths", {}))

    def set_widths(self, widths: Mapping[str, int]) -> None:
        """Bits per layer from the next step on; unnamed layers keep theirs. ValueError where they do not fit."""
        if not self.widths:
            raise ValueError("this compressor has no bit widths to set")
        self.averager.set_widths(widths)  # type: ignore[attr-defined]

    def record(self) -> None:
        """Take this rank's own gradients, as they are in .grad, into the recorder; nothing else changes."""
        assert self.recorder is not None
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self.recorder.record(Gradients(parameter.grad.to(torch.float32).reshape(-1), (name,), (0,)))
        self.recorder.memory.settle(True)

    def report(self) -> Report:
        """What was sent since the last report."""
        traffic = self.collectives.traffic
        encoded = self.averager.encoded_bytes
        now = (self.step + self._open, traffic.bytes_sent, traffic.seconds, self._job_seconds, encoded)
        steps, sent, comm, job, encoded_now = (b - a for a, b in zip(self._reported, now, strict=True))
        self._reported = now
        values = sum(layer.numel for layer in self.layers)
        world = self.collectives.world_size
        dense = 2 * (world - 1) / world * 4 * values * steps
        ratio = sent / dense if dense else encoded_now / (4 * values * steps or 1)
        return Report(int(steps), sent, dense, ratio, comm, max(job - comm, 0.0))

    def close(self) -> None:
        """End the communication thread."""
        self._engine.close()

    @property
    def without_momentum(self) -> frozenset[str]:
        """Parameters whose momentum the compressor applies itself: the optimizer's must be off for them."""
        return getattr(self.averager, "without_momentum", frozenset())

    # The work itself.

    def _average(self, gradients: Gradients, step: int) -> None:
        """On the communication thread: average one flat buffer, in place, whatever its type and scale."""
        start = time.perf_counter()
        flat = gradients.flat
        if self.averager.lossless:
            self.averager.average_(replace(gradients, loss_scale=self._loss_scale), step)
        else:
            scaled = not (isinstance(self._loss_scale, float) and self._loss_scale == 1.0)
            work = flat.to(torch.float32)
            if scaled:
                work = work / self._loss_scale
            own = Gradients(work, gradients.names, gradients.offsets)
            if self.recorder is not None:
                self.recorder.record(own)
            self.averager.average_(own, step)
            if scaled:
                work *= self._loss_scale
            if work is not flat:
                flat.copy_(work)
        self._measure(gradients)
        self._job_seconds += time.perf_counter() - start

    def _submit(self, gradients: Gradients, done: Callable[[], None]) -> None:
        """Queue the averaging of one flat buffer; `done` is called whether it succeeds or not.

        Where all gradients are averaged at once, the buffers wait for the last one and then make one job.
        """
        self._travelling = True
        self._waiting.append((gradients, done))
        if self._whole is not None and sum(len(part.names) for part, _ in self._waiting) < len(self.layers):
            return
        waiting, self._waiting = self._waiting, []

        def job() -> None:
            try:
                if self._failure is None:
                    self._average_parts([part for part, _ in waiting])
            except BaseException as error:
                self._failure = error
            for _, done in waiting:
                done()

        self._engine.submit(job)

    def _average_parts(self, parts: Sequence[Gradients]) -> None:
        """On the communication thread: average one flat buffer, or all of them as one."""
        if self._whole is None:
            (part,) = parts
            self._average(part, self.step)
        else:
            joined = self._whole.join(parts)
            self._average(joined, self.step)
            self._whole.part(joined, parts)

    def _measure(self, gradients: Gradients) -> None:
        views = [
            gradients.flat[at : at + self._parameters[name].numel()]
            for name, at in zip(gradients.names, gradients.offsets, strict=True)
        ]
        self._bad.update(zip(gradients.names, _not_finite(gradients.flat, views), strict=True))


def _not_finite(flat: Tensor, views: list[Tensor]) -> list[Tensor]:
    """Whether each view of `flat` holds a NaN or an infinity: bool scalars on the device, not waited for."""
    if flat.device.type == "cuda":
        return [~torch.isfinite(largest) for largest in torch._foreach_norm(views, float("inf"))]
    found = torch.zeros(1)
    if flat.dtype == torch.float32:  # the fastest look there is at all values: it multiplies them by 1
        torch._amp_foreach_non_finite_check_and_unscale_([flat], found, torch.ones(1))
    if flat.dtype == torch.float32 and not found:
        return [found[0].bool()] * len(views)
    return [~torch.isfinite(view).all() for view in views]


class DdpExchange(Exchange):
    """Through DDP's communication hook: every DDP bucket becomes a job, and its future completes with it."""

    model: DistributedDataParallel

    def __init__(self, model: nn.Module, compressor: Compressor, collectives: Collectives, seed: int) -> None:
        super().__init__(model, compressor, collectives, seed)
        self.model.register_comm_hook(None, self._hook)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        with self.model.no_sync():
            yield

    def _hook(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        if bucket.index() == 0 and (not self._open or self._travelling):
            self.begin_step()
        flat = bucket.buffer()
        names = tuple(self._names[id(p)] for p in bucket.parameters())
        offsets = tuple(int(view.storage_offset() - flat.storage_offset()) for view in bucket.gradients())
        devices: list[Any] | None = [flat.device] if flat.device.type == "cuda" else None
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        self._submit(Gradients(flat, names, offsets), lambda: future.set_result(flat))
        return future


class HookedExchange(Exchange):
    """Through hooks on the parameters, for models that DDP does not wrap: a single process, or Horovod.

    Like DDP it groups parameters in reverse order into buckets of about 25 MB, submits them in that order as
    backward fills them, and makes backward return only when all averages are in place.
    """

    def __init__(self, model: nn.Module, compressor: Compressor, collectives: Collectives, seed: int) -> None:
        super().__init__(model, compressor, collectives, seed)
        self._sync = True
        self._buckets = [_Bucket(names, self._parameters) for names in self._grouping()]
        self._bucket_of = {name: k for k, bucket in enumerate(self._buckets) for name in bucket.views}
        self._submitted = len(self._buckets)
        self._removers = [
            p.register_post_accumulate_grad_hook(self._arrived) for p in self._parameters.values()
        ]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self._sync = False
        try:
            yield
        finally:
            self._sync = True

    def close(self) -> None:
        for remover in self._removers:
            remover.remove()
        super().close()

    def _grouping(self) -> list[list[str]]:
        """Names by bucket, in the order in which backward fills them. A bucket holds one type, as in DDP."""
        full: list[list[str]] = []
        filling: dict[torch.dtype, list[str]] = {}
        size: dict[torch.dtype, int] = {}
        for name, parameter in reversed(self._parameters.items()):
            kind = parameter.dtype
            if kind in filling and size[kind] + parameter.nbytes > BUCKET_BYTES:
                full.append(filling.pop(kind))
            if kind not in filling:
                filling[kind], size[kind] = [], 0
            filling[kind].append(name)
            size[kind] += parameter.nbytes
        return [*full, *filling.values()]

    def _arrived(self, parameter: Tensor) -> None:
        if not self._sync:
            return
        if self._submitted == len(self._buckets):  # the first gradient of this backward
            if not self._open or self._travelling:
                self.begin_step()
            self._submitted = 0
            for bucket in self._buckets:
                bucket.reset()
            torch.autograd.Variable._execution_engine.queue_callback(self._complete)
        name = self._names[id(parameter)]
        bucket = self._buckets[self._bucket_of[name]]
        assert parameter.grad is not None
        bucket.fill(name, parameter.grad)
        while self._submitted < len(self._buckets) and not self._buckets[self._submitted].missing:
            self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[self._submitted]
        self._submitted += 1
        self._submit(Gradients(bucket.flat, tuple(bucket.views), bucket.offsets), bucket.done.set)

    def _complete(self) -> None:
        """Called by autograd when backward is through: what got no gradient counts as zero."""
        while self._submitted < len(self._buckets):
            self._launch()
        for bucket in self._buckets:
            bucket.done.wait()
            for name, view in bucket.views.items():
                self._parameters[name].grad = view


class _Bucket:
    """A flat buffer of some parameters' gradients, and which of them are still to come in this backward."""

    def __init__(self, names: Sequence[str], parameters: Mapping[str, nn.Parameter]) -> None:
        ends = list(itertools.accumulate(parameters[name].numel() for name in names))
        first = parameters[names[0]]
        self.offsets = (0, *ends[:-1])
        self.flat = torch.zeros(ends[-1], dtype=first.dtype, device=first.device)
        self.views = {
            name: self.flat[at : at + parameters[name].numel()].view(parameters[name].shape)
            for name, at in zip(names, self.offsets, strict=True)
        }
        self.missing = set(names)
        self.done = threading.Event()

    def reset(self) -> None:
        self.missing = set(self.views)
        self.done.clear()

    def fill(self, name: str, gradient: Tensor) -> None:
        if gradient.data_ptr() != self.views[name].data_ptr():
            self.views[name].copy_(gradient)
        self.missing.discard(name)


def attach(
    model: nn.Module, compressor: Compressor, collectives: Collectives | None = None, seed: int = 0
) -> Exchange:
    """Average the model's gradients through a compressor, from the next backward on.

    A DDP model gets its communication hook (one per model) and, unless `collectives` are given, a process group of
    its own over the same ranks; the group's backend follows the model's device. Any other model gets hooks on its
    parameters, and is a world of one rank unless `collectives` are given. Close the exchange when done.
    `seed` must be equal on all ranks: it names the streams of random numbers, which differ by rank by themselves.
    """
    if isinstance(model, DistributedDataParallel):
        if collectives is None:
            ranks = dist.get_process_group_ranks(model.process_group)
            collectives = TorchDistributed(dist.new_group(ranks))
        return DdpExchange(model, compressor, collectives, seed)
    return HookedExchange(model, compressor, collectives or Solo(), seed)
