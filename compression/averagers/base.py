"""The base of all averagers: one operation, its stages, its promise of what it sends, and the state that it settles."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from ..gradients import Gradients
from ..layer_state import LayerState
from ..layers import Layer
from ..streams import Meanwhile, Phases

Averaging = Callable[[Gradients], Phases]
"""The work of `Averager.average_`, phase by phase: to be called once, with the gradients."""


class Sent(NamedTuple):
    """Bytes and messages that a rank sends to average some layers once, the mean over ranks.

    `addressed`: bytes in messages to each of the others, of which all get as much. `circulated`: bytes in all-reduces,
    whose messages a ring passes on to one neighbor. `rounds`: the most messages of a chain in which each waits for the
    one before. Messages to all of the others are one round, an all-reduce is 2 (W - 1) of a message each.
    """

    addressed: float = 0.0
    circulated: float = 0.0
    messages: float = 0.0
    rounds: float = 0.0

    @property
    def total(self) -> float:
        return self.addressed + self.circulated

    def then(self, other: "Sent") -> "Sent":
        """Both, one after the other."""
        return Sent(*(sum(parts) for parts in zip(self, other, strict=True)))

    def from_host(self, world_size: int, ranks_per_host: int) -> float:
        """Bytes that a host of so many ranks puts on its link: what they send to those of other hosts."""
        if world_size == ranks_per_host:
            return 0.0
        elsewhere = (world_size - ranks_per_host) / (world_size - 1)
        return ranks_per_host * self.addressed * elsewhere + self.circulated


class Averager(ABC):
    """Averages gradients over the ranks, in place.

    Averagers are made of one phase, choose no widths, apply no momentum and have no state, unless they say
    otherwise.
    """

    lossless: bool = False
    """Whether it leaves the gradients' type and unit alone, and so takes them with the loss scale in."""

    overlaps: bool = False
    """Whether nothing before it lets others begin waits for another rank, on networks that match messages by tag."""

    widths: Mapping[str, int] = MappingProxyType({})
    """Bits of every layer, DENSE where it is not encoded. Layers without a choice are not among them."""

    without_momentum: frozenset[str] = frozenset()
    """Layers whose momentum it applies itself: the optimizer's must be off for them."""

    states: Mapping[str, LayerState] = MappingProxyType({})
    """State that this rank keeps of layers, by the names that checkpoints hold."""

    _encoded_bytes: int = 0

    @property
    def encoded_bytes(self) -> int:
        """Bytes made so far, counted once however often they travel."""
        return self._encoded_bytes

    @abstractmethod
    def average_(self, gradients: Gradients, step: int) -> None:
        """Replace this rank's gradients by the average over ranks. `step` counts optimizer steps."""

    @abstractmethod
    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        """The promise of bytes and messages, in one call of `average_` for these layers, warm-up aside."""

    def bytes_sent(self, layers: Sequence[Layer], world_size: int) -> float:
        """Bytes that a rank of `world_size` sends to average these layers once, the mean over ranks; warm-up aside."""
        return self.sent(layers, world_size).total

    def post(self, gradients: Gradients, step: int) -> Averaging:
        """Announce gradients that lie like these, and return their averaging.

        Of these, names, offsets and the device count; the values may come later. Every rank posts its gradients in
        the same order, on whatever thread: the sooner, the better.
        """

        def averaging(gradients: Gradients) -> Phases:
            self.average_(gradients, step)
            yield Meanwhile.NONE_BEGINS

        return averaging

    def set_widths(self, widths: Mapping[str, int]) -> None:
        """Bits per layer from now on; unnamed layers keep theirs. Raises ValueError where they misfit."""
        raise ValueError("this compressor has no bit widths to set")

    def encoded_bytes_at(self, layers: Sequence[Layer], bits: int, world_size: int) -> list[int]:
        """Bytes of one encoding of each layer at a width, or at DENSE: its messages to all owners among so many ranks.

        Each hop of the ranks together sends W - 1 of them. Raises ValueError where there are no widths to choose.
        """
        raise ValueError("this compressor has no bit widths to measure")

    def settle(self, applied: Tensor | bool, layers: Collection[str] | None = None) -> None:
        """Make the pending state of all layers, or of some, current; drop it where `applied` is false.

        A tensor is a bool scalar, and is not waited for where it lies on a GPU.
        """
        for state in self.states.values():
            state.settle(applied, layers)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, as tensors by layer name."""
        return {name: state.state_dict() for name, state in self.states.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. Raises ValueError where it does not fit."""
        if unknown := sorted(set(state) - set(self.states)):
            raise ValueError(
                f"the checkpoint holds a {unknown[0]}, which this compression does not remember; resume with the "
                "compression that wrote it, and its `error_feedback`"
            )
        for name, own in self.states.items():
            own.load_state_dict(state.get(name, {}))


def all_reduced(nbytes: float, world_size: int) -> Sent:
    """What a rank sends to all-reduce a tensor of `nbytes`: each part of it goes round twice."""
    turns = 2 * (world_size - 1)
    return Sent(circulated=turns / world_size * nbytes, messages=turns, rounds=turns)


def gathered(nbytes: float, world_size: int) -> Sent:
    """What a rank sends for all to have its message of `nbytes`: one to each of the others."""
    return Sent(addressed=(world_size - 1) * nbytes, messages=world_size - 1, rounds=int(world_size > 1))
