"""Hooks on a model's backward, which catch gradients and put their averages into .grad.

Through DDP's communication hook where the model is wrapped in DistributedDataParallel, through hooks on the
parameters otherwise. They know no averager and no step: gradients are submitted in flat buffers, in an order that
is the same on all ranks.
"""

import contextlib
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.parallel import DistributedDataParallel

from ..gradients import Gradients
from .engine import CLOSED
from .models import finds_unused

BUCKET_BYTES = 25 * 2**20  # of gradients that travel together where DDP does not choose

OnBackward = Callable[[], None]
"""A function that is called before the first gradients of a backward are submitted."""

OnEnd = Callable[[], None]
"""A function that is called at the end of a backward, once all averages are there; it may raise, there."""

Submit = Callable[[Gradients], "torch.futures.Future[Tensor]"]
"""A function that takes gradients of some layers. The future's value is their buffer, with the averages in it."""


Catch = Callable[[OnBackward, Submit, OnEnd], "Hooks"]
"""What hooks a model: `hook`, but for the model and its parameters."""


class Hooks(Protocol):
    """Hooks on one model, until they are removed."""

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Backward inside only accumulates on this rank."""

    def remove(self) -> None:
        """Catch no more gradients, where that can be."""


def hook(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], begin: OnBackward, submit: Submit, end: OnEnd
) -> Hooks:
    """Catch the gradients of a model's `parameters`, which are all that are averaged.

    Raises ValueError where the model has a hook already.
    """
    if isinstance(model, DistributedDataParallel):
        return DdpHooks(model, parameters, begin, submit, end)
    return ParameterHooks(parameters, begin, submit, end)


def shaped(values: Tensor, parameter: Tensor) -> Tensor:
    """A layer's values, flat in the order of memory, as a view in its parameter's shape and layout."""
    return values.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride())


def flattened(values: Tensor, parameter: Tensor) -> Tensor:
    """The inverse of `shaped`: a copy, in float32."""
    flat = torch.empty(values.numel(), device=values.device)
    shaped(flat, parameter).copy_(values)
    return flat


class DdpHooks:
    """DDP's communication hook: a buffer is a DDP bucket, whose future completes once it holds the averages.

    Where DDP expects steps that do not use all parameters, hooks on these tell which were used since the last averages:
    what DDP hands over of the others are zeros, and it throws away what it gets.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        parameters: Mapping[str, nn.Parameter],
        begin: OnBackward,
        submit: Submit,
        end: OnEnd,
    ) -> None:
        self._model = weakref.ref(model)
        self._begin, self._submit, self._end = begin, submit, end
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._futures: list[torch.futures.Future[Tensor]] = []  # of this backward
        try:
            model.register_comm_hook(None, self._hook)
        except RuntimeError as error:
            raise ValueError(
                "this DistributedDataParallel has a communication hook already, which it keeps for life, a closed "
                f"exchange's too; build it anew from the model and attach to that ({str(error).splitlines()[0]})"
            ) from error
        self._used: set[str] = set()
        self._removers = (
            [p.register_post_accumulate_grad_hook(self._mark_used) for p in parameters.values()]
            if finds_unused(model)
            else []
        )

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        model = self._model()
        assert model is not None
        return model.no_sync()

    def remove(self) -> None:
        """DDP has its hook for life, which raises RuntimeError from now on; those on parameters go.

        DDP's reference to the hook is not one that Python's collector sees: what it leads to must not lead back.
        """
        for remover in self._removers:
            remover.remove()
        self._begin = self._end = _closed
        self._submit = _closed

    def _mark_used(self, parameter: Tensor) -> None:
        self._used.add(self._names[id(parameter)])

    def _complete(self) -> None:
        """End a backward, when autograd says so."""
        futures, self._futures = self._futures, []
        for future in futures:
            future.wait()
        self._end()

    def _hook(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        flat = bucket.buffer()
        if flat.is_sparse:
            raise ValueError(
                "a gradient is sparse, which no compressor takes; make its embedding with sparse=False, or train "
                "without compression"
            )
        if bucket.index() == 0:
            self._begin()
        if bucket.is_last():  # a backward within the backward, as of a checkpoint, may have the others
            torch.autograd.Variable._execution_engine.queue_callback(self._complete)
        names = tuple(self._names[id(p)] for p in bucket.parameters())
        offsets = tuple(int(view.storage_offset() - flat.storage_offset()) for view in bucket.gradients())
        unused = frozenset(names) - self._used if self._removers else None
        self._used.difference_update(names)
        self._futures.append(self._submit(Gradients(flat, names, offsets, unused=unused)))
        return self._futures[-1]


def _closed(*_: object) -> NoReturn:
    raise RuntimeError(CLOSED)


class ParameterHooks:
    """Hooks on the parameters, for models that DDP does not wrap: a single process, or Horovod.

    Like DDP they group parameters in reverse order into buckets of about 25 MB, submit them in that order as backward
    fills them, and make backward return only when all of them hold averages.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], begin: OnBackward, submit: Submit, end: OnEnd
    ) -> None:
        self._parameters, self._begin, self._submit, self._end = parameters, begin, submit, end
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._sync = True
        self._accumulated: set[str] = set()  # layers that got a gradient and did not travel since the last averages
        self._buckets = [_Bucket(names, parameters) for names in self._grouping()]
        self._bucket_of = {name: k for k, bucket in enumerate(self._buckets) for name in bucket.views}
        self._submitted = len(self._buckets)
        self._callback: Callable[[], object] = lambda: None  # of the last backward: None once autograd lets go of it
        self._removers = [p.register_post_accumulate_grad_hook(self._arrived) for p in parameters.values()]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self._sync = False
        try:
            yield
        finally:
            self._sync = True

    def remove(self) -> None:
        for remover in self._removers:
            remover.remove()

    def _grouping(self) -> list[list[str]]:
        """Names by bucket, in the order in which backward fills them. A bucket holds one type, as in DDP."""
        full: list[list[str]] = []
        filling: dict[torch.dtype, list[str]] = {}
        size: dict[torch.dtype, int] = {}
        for name, parameter in reversed(list(self._parameters.items())):
            kind = parameter.dtype
            if kind in filling and size[kind] + parameter.nbytes > BUCKET_BYTES:
                full.append(filling.pop(kind))
            if kind not in filling:
                filling[kind], size[kind] = [], 0
            filling[kind].append(name)
            size[kind] += parameter.nbytes
        return [*full, *filling.values()]

    def _arrived(self, parameter: Tensor) -> None:
        name = self._names[id(parameter)]
        if not self._sync:
            self._accumulated.add(name)
            return
        if self._submitted == len(self._buckets) or self._callback() is None:
            self._start()
        bucket = self._buckets[self._bucket_of[name]]
        assert parameter.grad is not None
        bucket.fill(name, parameter.grad)
        while self._submitted < len(self._buckets) and not self._buckets[self._submitted].missing:
            self._launch()

    def _start(self) -> None:
        """Begin a backward with its first gradient, whatever became of the last one."""
        self._begin()
        self._submitted = 0
        for bucket in self._buckets:
            bucket.reset()
        # Nothing else may hold it: that it is gone tells that a backward raised. The number of autograd's task would
        # not: a backward within this one, as of a checkpointed module, has another.
        callback = self._complete
        self._callback = weakref.ref(callback)
        torch.autograd.Variable._execution_engine.queue_callback(callback)

    def _launch(self) -> None:
        bucket = self._buckets[self._submitted]
        self._submitted += 1
        absent = set()
        for name in tuple(bucket.missing):
            gradient, view = self._parameters[name].grad, bucket.views[name]
            # A gradient that is the view already is the last average, which nobody cleared.
            if gradient is None or (gradient.data_ptr() == view.data_ptr() and name not in self._accumulated):
                view.zero_()
                absent.add(name)
            else:
                bucket.fill(name, gradient)
        gradients = Gradients(bucket.flat, tuple(bucket.views), bucket.offsets, absent=frozenset(absent))
        bucket.done = self._submit(gradients)

    def _complete(self) -> None:
        """End a backward, when autograd says so: layers without a gradient since the last step count as zero.

        Where the first gradient came from a backward within the backward, autograd says so at the end of that one: with
        layers still missing nobody knows whether they come. Raises RuntimeError then.
        """
        if self._submitted < len(self._buckets) and _within_a_backward():
            names = [name for bucket in self._buckets for name in bucket.missing]
            raise RuntimeError(
                f"backward reached a reentrant checkpoint before any other layer, and the gradient of {names[0]} is "
                "not there at its end: what is still to come cannot be told; checkpoint with use_reentrant=False, or "
                "wrap the model in DistributedDataParallel"
            )
        while self._submitted < len(self._buckets):
            self._launch()
        for bucket in self._buckets:
            assert bucket.done is not None
            bucket.done.wait()
            for name, view in bucket.views.items():
                self._parameters[name].grad = view
        self._accumulated.clear()
        self._end()


def _within_a_backward() -> bool:
    """Whether this is called from the backward of a function written in Python, as a reentrant checkpoint is."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False


class _Bucket:
    """A flat buffer of some parameters' gradients, and which of them are still to come in this backward."""

    def __init__(self, names: Sequence[str], parameters: Mapping[str, nn.Parameter]) -> None:
        ends = list(itertools.accumulate(parameters[name].numel() for name in names))
        first = parameters[names[0]]
        self.offsets = (0, *ends[:-1])
        self.flat = torch.zeros(ends[-1], dtype=first.dtype, device=first.device)
        self.views = {
            name: shaped(self.flat[at : at + parameters[name].numel()], parameters[name])
            for name, at in zip(names, self.offsets, strict=True)
        }
        self.reset()

    def reset(self) -> None:
        self.missing = set(self.views)
        self.done: torch.futures.Future[Tensor] | None = None

    def fill(self, name: str, gradient: Tensor) -> None:
        if gradient.data_ptr() != self.views[name].data_ptr():
            self.views[name].copy_(gradient)
        self.missing.discard(name)
