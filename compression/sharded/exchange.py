"""The exchange of a sharded model: the protocol of a step, for ranks that hold different pieces of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..averagers import Averager
from ..exchange.binding import Bind
from ..exchange.exchange import Exchange
from ..exchange.hooks import Catch
from ..exchange.report import Report
from ..layers import DENSE
from ..registry import Compressor
from .gathering import Gathering


class Everyone(Protocol):
    """All ranks of a sharded model, as far as an exchange needs them."""

    def sum_(self, values: Tensor) -> None:
        """Add up over all ranks, in place."""

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""


class ShardedExchange(Exchange):
    """An `Exchange` whose layers are a rank's own pieces of parameters.

    Whether averages are finite is agreed on by all ranks at the end of every backward, so that the owners of all
    pieces settle alike. A backward after which the loop does not step, one of several micro-batches, is a step of its
    own: its averages add up in .grad.

    Where `gathering` is set, parameters are gathered in codes until the exchange is closed.

    States of ranks have no key in common but the step's, so that all of them are one state, too.
    """

    def __init__(
        self,
        catch: Catch,
        parameters: Mapping[str, nn.Parameter],
        compressor: Compressor,
        bind: Bind,
        device: torch.device,
        everyone: Everyone,
        key: str,
        names: Mapping[str, str],
        encoded: frozenset[str],
        ranks_per_link: int = 1,
    ) -> None:
        """`everyone`: the network of all ranks, inside hosts and between them, where each is called `key`.

        `names`: what states call each layer, so that it says which part of a parameter it is. `encoded`: the layers
        that some rank encodes. `ranks_per_link`: the ranks of a host, each of which sends as much as this one.
        """
        self._everyone, self._key, self._names, self._ranks_per_link = everyone, key, names, ranks_per_link
        self._encoded = encoded
        self._ended = False  # some backward of the step under way
        self._finite = torch.ones((), dtype=torch.bool, device=device)  # the averages of this step so far
        self.gathering: Gathering | None = None
        self._before: dict[str, Tensor | None] | None = None  # states as the step under way found them
        super().__init__(catch, parameters, compressor, bind, record=False, device=device)

    def begin_backward(self) -> None:
        if self.open and self.travelling and self._scale_declared:  # the next micro-batch of a step that the loop ends
            finite, scale, before = self._finite, self.loss_scale, self._before
            if before is None:
                states = self.averager.states
                before = {name: None if each.current is None else each.current.clone() for name, each in states.items()}
            self._before = None
            self._begin(scale)
            self._finite, self._before = finite, before
        else:
            super().begin_backward()
        self.travelling = True  # on all ranks alike, of which some may have no piece of what travels

    def _begin(self, loss_scale: float | Tensor) -> None:
        super()._begin(loss_scale)
        self._ended = False
        self._finite = torch.ones_like(self._finite)

    def end_backward(self) -> None:
        super().end_backward()
        bad = (~self.all_finite(self.pipeline.nonfinite)).to(torch.float32).view(1)
        self._everyone.sum_(bad)
        self._ended, self._finite = True, self._finite & (bad[0] == 0)

    def finish(self) -> Tensor:
        self.pipeline.check()
        self.meter.arrived()
        return self._finite

    def settle(self, applied: Tensor) -> None:
        """As `Exchange.settle`, of all of the step's backwards: those before the last have settled by themselves."""
        super().settle(applied)
        before, self._before = self._before, None
        for name, values in (before or {}).items():
            self.averager.states[name].revert(values, applied)

    def _complete(self) -> bool:
        return self._ended

    def set_widths(self, widths: Mapping[str, int]) -> None:
        """As `Exchange.set_widths`, on all ranks alike: a rank leaves out layers of which it encodes nothing."""
        if unknown := [name for name in widths if name not in self._encoded]:
            raise ValueError(f"{unknown[0]} is not a compressed layer of this model")
        for bits in widths.values():
            if bits != DENSE:
                self.compressor.codec_at(bits)  # checks the range, which a rank without pieces would not
        own = {layer.name for layer in self.layers if layer.compressed}
        super().set_widths({name: bits for name, bits in widths.items() if name in own})

    @property
    def position(self) -> dict[str, Any]:
        """The rank, as its state is called."""
        return {"rank": self._key}

    def state_dict(self) -> dict[str, Any]:
        """This rank's state between steps, complete from the start: what is not there yet is zero.

        So `torch.distributed.checkpoint` loads into it, and `load_state_dict` takes it.
        """
        self._end_step()
        with _complete(self.averager):
            state = self.averager.state_dict()
        return {"step": self.step, self._key: _renamed(state, self._names)}

    def gathered_state_dict(self) -> dict[str, Any]:
        everyone: dict[str, Any] = {}
        for state in self._everyone.collect(self.state_dict()):
            everyone |= state
        return everyone

    def load_state_dict(self, state: Mapping[str, Any], ranks_alike: bool = True) -> None:
        self._end_step()
        if ranks_alike:
            if self._key not in state:
                known = sorted(key for key in state if key != "step")
                raise ValueError(
                    f"the state is that of {', '.join(known) or 'no rank'}, and this is {self._key}: each rank "
                    "remembers what it owes of its own pieces; start as many ranks on as many hosts, or load none"
                )
            self.averager.load_state_dict(_renamed(state[self._key], {key: name for name, key in self._names.items()}))
        loaded = int(state["step"])
        self.meter.skip(loaded - self.step)
        self.step = loaded

    def report(self) -> Report:
        """Bytes sent over hosts, and seconds, since the last report; a host's are this rank's times its ranks."""
        report, ranks = super().report(), self._ranks_per_link
        gathered, on_link = self.gathering.take_bytes() if self.gathering is not None else (0.0, 0.0)
        return replace(
            report,
            host_bytes=report.host_bytes * ranks,
            host_bytes_dense=report.host_bytes_dense * ranks,
            gathered_bytes=gathered,
            host_gathered_bytes=on_link,
        )

    def close(self) -> None:
        if self.gathering is not None:
            self.gathering.close(self.pipeline.failure is None)
        super().close()


@contextmanager
def _complete(averager: Averager) -> Iterator[None]:
    """State that is still to be made as zeros, for as long as it is read: loaded as such, it is made as if new."""
    absent = [state for state in averager.states.values() if state.current is None]
    for state in absent:
        state.current = torch.zeros(state.values)
    try:
        yield
    finally:
        for state in absent:
            state.current = None


def _renamed(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A state, tensors by layers' names at some depth, with other names of these."""
    return {
        names.get(key, key) if isinstance(value, Tensor) else key: (
            _renamed(value, names) if isinstance(value, Mapping) else value
        )
        for key, value in state.items()
    }
