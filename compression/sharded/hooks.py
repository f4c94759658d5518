"""Hooks on an FSDP model's backward: what each unit has reduced inside a host is submitted, and its averages awaited.

They know no averager and no step. FSDP calls a unit's hook once its reduce-scatter is through, and goes on with what
the hook leaves in the buffer; so the hook waits.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

from ..exchange.hooks import OnBackward, OnEnd, Submit
from ..gradients import Gradients
from .units import Unit, watch

_SWITCH = "set_requires_all_reduce"


class Backward:
    """The backward under way of a model, from its outputs' gradients to the last of its hooks.

    A backward within the backward, as of a reentrant checkpoint, is part of it: so its end is asked for where the
    gradients of the model's outputs arrive. Where no output is seen, as inside an object that is no container, that
    is where the first gradients are reduced.
    """

    def __init__(self, model: nn.Module, begin: OnBackward, end: OnEnd) -> None:
        self._begin, self._end = begin, end
        self._begun = False
        self._callback: Callable[[], object] = _nothing  # of the backward under way: None once autograd lets go of it
        self._handle = model.register_forward_hook(self._watch_outputs)

    def reduces(self) -> None:
        """Begin a step's backward with the first gradients that it reduces."""
        self._enter()
        if not self._begun:
            self._begun = True
            self._begin()

    def remove(self) -> None:
        self._handle.remove()

    def _watch_outputs(self, module: nn.Module, args: Any, outputs: Any) -> None:
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(self._enter)

    def _enter(self, gradient: Tensor | None = None) -> None:
        """Ask for the end of this backward, once; whatever became of the last one."""
        if self._callback() is None:
            self._begun = False
            self._queue(self._queue_again)

    def _queue(self, callback: Callable[[], None]) -> None:
        self._callback = weakref.ref(callback)  # nothing else may hold it: that it is gone tells of an end
        try:
            torch.autograd.Variable._execution_engine.queue_callback(callback)
        except RuntimeError as error:
            self._callback = _nothing
            raise RuntimeError(
                "gradients are reduced outside of a backward, as a pipeline's schedule has it, and nothing tells when "
                "all of a step are; train without compression there"
            ) from error

    def _queue_again(self) -> None:
        """Go behind the callbacks that are queued by now: in FSDP's own, the root unit may still be reduced."""
        self._queue(self._complete)

    def _complete(self) -> None:
        self._callback = _nothing
        if self._begun:
            self._begun = False
            self._end()


def _nothing() -> None:
    return None


class UnitHooks:
    """The base of hooks on a model's units: switches, the backward under way, and the gradients that arrived."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], begin: OnBackward, end: OnEnd) -> None:
        self._units = units
        self._switches = Switches(model)
        self._backward = Backward(model, begin, end)
        self._handles = watch(units)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        return unsynchronized(self._units)

    def remove(self) -> None:
        self._backward.remove()
        self._switches.restore()
        for handle in self._handles:
            handle.remove()


class ShardedHooks(UnitHooks):
    """Hooks on the units of a model whose shards are averaged over hosts: those of this rank, number `rank` of them."""

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], rank: int, begin: OnBackward, submit: Submit, end: OnEnd
    ) -> None:
        super().__init__(model, units, begin, end)
        self._rank, self._submit = rank, submit
        if unit := next((unit for unit in units if unit.group._all_reduce_hook is not None), None):
            super().remove()
            raise ValueError(
                f"{unit.title} has an all-reduce hook already, which would run no more; take it off "
                "(set_all_reduce_hook), and attach then"
            )
        for unit in units:
            unit.module.set_all_reduce_hook(partial(self._average, unit))

    def remove(self) -> None:
        super().remove()
        for unit in self._units:
            unit.module.set_all_reduce_hook(None)  # type: ignore[arg-type]  # as it was

    def _average(self, unit: Unit, values: Tensor) -> None:
        """Put the averages over hosts into a unit's reduced buffer; its padding stays zero."""
        names, offsets, at = [], [], 0
        for piece in unit.travelling(values.numel()):
            if piece.values[self._rank]:
                names.append(piece.name)
                offsets.append(at)
            at += piece.padded
        self._backward.reduces()
        if names:
            self._submit(Gradients(values, tuple(names), tuple(offsets))).wait()


@contextlib.contextmanager
def unsynchronized(units: Sequence[Unit]) -> Iterator[None]:
    """Backward inside only accumulates on this rank, in whole gradients."""
    for unit in units:
        unit.module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for unit in units:
            unit.module.set_requires_gradient_sync(True)


class Switches:
    """FSDP's switches that an attached model has no use for, replaced by refusals until they are restored.

    Raises ValueError where they are replaced already.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        if any(_SWITCH in vars(module) for module in self._modules):
            raise ValueError("this model has an exchange already, which averages its gradients; close that one first")
        for module in self._modules:
            setattr(module, _SWITCH, _refused)

    def restore(self) -> None:
        """Give back FSDP's own. Calling it twice is harmless."""
        modules, self._modules = self._modules, []
        for module in modules:
            delattr(module, _SWITCH)


def _refused(requires_all_reduce: bool, *, recurse: bool = True) -> None:
    if not requires_all_reduce:
        raise ValueError(
            f"{_SWITCH}(False) is for meshes of two dimensions, and FSDP ignores it on one; accumulate with "
            "set_requires_gradient_sync(False), or in exchange.no_sync()"
        )
