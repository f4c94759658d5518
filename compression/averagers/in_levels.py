"""The base of averagers in two levels: ranks of a host add up as they are, and hosts average in codes."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..gradients import Gradients
from ..layers import Layer
from ..network.inside import Levels
from ..streams import run_all
from .base import Averager, Sent


class InLevels(Averager):
    """Averages over hosts by an `inner` averager, to which the hosts are the world: widths and state are its own."""

    def __init__(self, levels: Levels, inner: Averager) -> None:
        self.levels, self.inner = levels, inner
        self.widths, self.without_momentum, self.states = inner.widths, inner.without_momentum, inner.states

    @property
    def encoded_bytes(self) -> int:
        return self.inner.encoded_bytes

    def set_widths(self, widths: Mapping[str, int]) -> None:
        self.inner.set_widths(widths)

    def settle(self, applied: Tensor | bool, layers: Collection[str] | None = None) -> None:
        self.inner.settle(applied, layers)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        """What crosses the links, as a mean over all ranks, on hosts of as many ranks as this one."""
        by_place = self.sent_by_place(layers, world_size)
        mean = Sent(*(sum(parts) / len(by_place) for parts in zip(*by_place, strict=True)))
        return mean._replace(rounds=max(sent.rounds for sent in by_place))

    @abstractmethod
    def sent_by_place(self, layers: Sequence[Layer], world_size: int) -> list[Sent]:
        """What the owner at each place sends to those of the other hosts, [ranks a host]."""

    def average_(self, gradients: Gradients, step: int) -> None:
        run_all(self.post(gradients, step)(gradients))
