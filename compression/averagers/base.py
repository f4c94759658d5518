"""What averagers have in common: the gradients they get, the protocol they keep, what they remember."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from compression.engine import Phases


@dataclass(frozen=True)
class Gradients:
    """Gradients of some layers in one flat buffer: layer `names[i]` begins at `offsets[i]`.

    `flat` is contiguous, float32 and without the loss scale; those that lossless averagers get may have any
    floating-point type, and `loss_scale` in them.
    """

    flat: Tensor
    names: tuple[str, ...]
    offsets: tuple[int, ...]
    loss_scale: float | Tensor = 1.0


Begin = Callable[[Gradients], Phases]
"""What `Averager.average_` does, phase by phase, as a `compression.engine.Job` has them."""


class Averager(Protocol):
    """Averages gradients over the ranks, in place."""

    @property
    def lossless(self) -> bool:
        """Whether it leaves the gradients' type and unit alone, and so takes them with the loss scale in."""

    @property
    def encoded_bytes(self) -> int:
        """Bytes made so far, counted once however often they travel."""

    @property
    def widths(self) -> Mapping[str, int]:
        """Bits of every layer, DENSE where it travels as float32. Empty where there are none to choose."""

    def set_widths(self, widths: Mapping[str, int]) -> None:
        """Bits per layer from now on; unnamed layers keep theirs. ValueError where they do not fit."""

    @property
    def without_momentum(self) -> frozenset[str]:
        """Layers whose momentum it applies itself: the optimizer's must be off for them."""

    def average_(self, gradients: Gradients, step: int) -> None:
        """Replace this rank's gradients by the average over ranks. `step` counts optimizer steps."""

    def expect(self, gradients: Gradients, step: int) -> Begin:
        """Say that gradients will be averaged that lie like these; what begins to do it is to be called once.

        Of these, names, offsets and the device count; the values may come later. Every rank expects its gradients in
        the same order, on whatever thread: the sooner, the better.
        """

    def settle(self, applied: Tensor | bool) -> None:
        """Keep what the step computed to remember, or forget it where the step was not applied.

        A tensor is a bool scalar, and is not waited for where it lies on a GPU.
        """

    def commit(self, finite: Mapping[str, Tensor]) -> None:
        """In place of `settle`, right after `average_` of these layers: keep what it computed to remember of each, or
        forget it where the layer's bool scalar is false. For averages that last longer than their step."""

    def state_dict(self) -> dict[str, Any]:
        """What this rank remembers, as tensors by layer name."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; ValueError where it does not fit the layers."""


class Plain(ABC):
    """What averagers are unless they say otherwise: of one phase, without widths, without momentum, settled by step."""

    widths: Mapping[str, int] = MappingProxyType({})
    without_momentum: frozenset[str] = frozenset()

    @abstractmethod
    def average_(self, gradients: Gradients, step: int) -> None:
        """As `Averager.average_`."""

    def expect(self, gradients: Gradients, step: int) -> Begin:
        def begin(gradients: Gradients) -> Phases:
            self.average_(gradients, step)
            yield False

        return begin

    def set_widths(self, widths: Mapping[str, int]) -> None:
        raise ValueError("this compressor has no bit widths to set")

    def commit(self, finite: Mapping[str, Tensor]) -> None:
        raise ValueError("this compressor settles whole steps, and so no average of it can be late")


class Stateless(Plain):
    """Averagers that remember nothing."""

    def settle(self, applied: Tensor | bool) -> None:
        pass

    def commit(self, finite: Mapping[str, Tensor]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"this compression remembers nothing, but the checkpoint holds {sorted(state)}")


class Memory:
    """Values remembered from step to step for some layers, float32, and their pending successors.

    `spans` maps a layer's name to how many values are kept of it. What is remembered of a layer that a step computes
    nothing of, as it travels dense or not at all, stays as it is.
    """

    def __init__(self, spans: Mapping[str, int]) -> None:
        self.offsets: dict[str, int] = {}
        self.values = 0
        for name, count in spans.items():
            self.offsets[name] = self.values
            self.values += count
        self.spans = dict(spans)
        self.current: Tensor | None = None
        self.pending: Tensor | None = None
        self._computed: set[str] = set()  # the layers of which what is pending is of this step

    def allocate(self, device: torch.device, names: Iterable[str]) -> tuple[Tensor, Tensor]:
        """(current, pending) on a device, zeros at first use: to compute what is pending of `names`, and only that."""
        self._computed.update(names)
        if self.current is None:
            self.current = torch.zeros(self.values, device=device)
        if self.pending is None:
            self.current = self.current.to(device)
            self.pending = torch.zeros(self.values, device=device)
        return self.current, self.pending

    def settle(self, applied: Tensor | bool) -> None:
        """Make everything that was computed since the last time current, if `applied`."""
        computed, self._computed = self._computed, set()
        if self.current is None or self.pending is None or not computed:
            return
        for name in self.spans.keys() - computed:
            here = self.span(name)
            self.pending[here] = self.current[here]
        if isinstance(applied, Tensor) and applied.device.type == "cuda":
            torch.where(applied, self.pending, self.current, out=self.current)  # the host does not wait
        elif applied:
            self.current, self.pending = self.pending, self.current

    def commit(self, finite: Mapping[str, Tensor]) -> None:
        """Make what was computed of some layers current, of each where its bool scalar is true."""
        if self.current is None or self.pending is None:
            return
        computed = finite.keys() & self._computed
        self._computed -= computed
        for name in computed:
            here = self.span(name)
            torch.where(finite[name], self.pending[here], self.current[here], out=self.current[here])

    def state_dict(self) -> dict[str, Tensor]:
        if self.current is None:
            return {}
        return {
            name: self.current[self.span(name)].clone().cpu()
            for name in self.offsets
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        sizes = {name: values.numel() for name, values in state.items()}
        if sizes and sizes != self.spans:
            differing = sorted(
                name for name in {*sizes, *self.spans} if sizes.get(name) != self.spans.get(name)
            )
            raise ValueError(
                f"the residuals in the checkpoint do not fit the layers: {differing[0]} has "
                f"{sizes.get(differing[0], 0)} values there and {self.spans.get(differing[0], 0)} here"
            )
        self.current = self.pending = None
        self._computed.clear()
        if sizes:
            self.current = torch.cat([state[name].to(torch.float32).reshape(-1) for name in self.offsets])

    def span(self, name: str) -> slice:
        """Where a layer lies in what is remembered."""
        return slice(self.offsets[name], self.offsets[name] + self.spans[name])
