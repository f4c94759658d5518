"""What averagers have in common: the gradients they get, the protocol they keep, what they remember."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from ..gradients import Gradients
from ..streams import Phases

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


