"""Averaging of some layers in one way, and of others in another."""

import itertools
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..gradients import Gradients
from ..layer_state import LayerState
from ..layers import Layer
from ..network.collectives import Around, Collectives, PostedExchange, PostedGather, Staged
from ..plans import PlanCache
from ..streams import Meanwhile, Phases, run_all
from .base import Averager, Averaging, Sent

Bind = Callable[[Sequence[Layer], Collectives], Averager]
"""(layers, collectives) -> the averager bound to them."""


@dataclass(frozen=True)
class _Part:
    """The layers of one family in a buffer, and their offsets in the buffer that the family gets.

    `pieces` are where they lie in the whole one: a single piece where nothing lies between them.
    """

    names: tuple[str, ...]
    offsets: tuple[int, ...]
    pieces: tuple[slice, ...]

    def taken(self, flat: Tensor) -> Tensor:
        """The family's buffer: the single piece in place, or a copy of several."""
        pieces = [flat[piece] for piece in self.pieces]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def put_back(self, buffer: Tensor, flat: Tensor) -> None:
        """The inverse: what is in place already stays there."""
        if len(self.pieces) > 1:
            sizes = [piece.stop - piece.start for piece in self.pieces]
            for piece, values in zip(self.pieces, buffer.split(sizes), strict=True):
                flat[piece] = values


class Routed(Averager):
    """Every layer by the averager of its family, of which there are several.

    A buffer's layers travel family by family, in the order of the families' names, and each averager gets a buffer of
    its own layers alone. First every family does all that needs an order among jobs, then those go on whose messages
    are under way. Messages of different families have tags of their own. A family's state is kept under its name.

    Buffers overlap only where all families do. Else a rank could wait in the sum of a later buffer for another one,
    which waits for what the first would send of an earlier buffer next.

    `families` maps names to what binds their averagers, `family_of` the layers to those names. Families without layers
    are not bound. `widths` are those of the layers whose family has any.
    """

    def __init__(
        self,
        families: Mapping[str, Bind],
        family_of: Mapping[str, str],
        layers: Sequence[Layer],
        collectives: Collectives,
    ) -> None:
        self.family_of = {layer.name: family_of[layer.name] for layer in layers}
        names = sorted({*self.family_of.values()})
        self.families: dict[str, Averager] = {}
        for number, name in enumerate(names):
            own = [layer for layer in layers if self.family_of[layer.name] == name]
            self.families[name] = families[name](own, _Tagged(collectives, number, len(names)))
        # A view: families change their widths in place.
        self.widths = ChainMap(*(each.widths for each in self.families.values()))  # type: ignore[arg-type]
        self.overlaps = all(each.overlaps for each in self.families.values())
        self.without_momentum = frozenset().union(*(each.without_momentum for each in self.families.values()))
        self.states = {
            f"{name}/{kind}": state for name, each in self.families.items() for kind, state in each.states.items()
        }
        self._sizes = {layer.name: layer.numel for layer in layers}
        self._parts: PlanCache[dict[str, _Part]] = PlanCache()

    @property
    def encoded_bytes(self) -> int:
        return sum(each.encoded_bytes for each in self.families.values())

    def average_(self, gradients: Gradients, step: int) -> None:
        run_all(self.post(gradients, step)(gradients))

    def post(self, gradients: Gradients, step: int) -> Averaging:
        parts = self._parts.of(gradients, self._cut)
        averagings = [
            (part, self.families[name].post(Gradients(gradients.flat[:0], part.names, part.offsets), step))
            for name, part in parts.items()
        ]
        self.overlaps = overlaps = all(each.overlaps for each in self.families.values())  # some may warm up
        return lambda gradients: self._phases(gradients.flat, averagings, overlaps)

    def _phases(self, flat: Tensor, averagings: Sequence[tuple[_Part, Averaging]], overlaps: bool) -> Phases:
        """As many as the family has that has most: in each, all go on until others may begin."""
        buffers = [part.taken(flat) for part, _ in averagings]
        under_way = [
            averaging(Gradients(buffer, part.names, part.offsets))
            for buffer, (part, averaging) in zip(buffers, averagings, strict=True)
        ]
        while under_way:
            going = []
            for phases in under_way:
                while (meanwhile := next(phases, None)) not in (None, Meanwhile.OTHERS_BEGIN):
                    yield meanwhile
                if meanwhile is not None:
                    going.append(phases)
            under_way = going
            if under_way:
                yield Meanwhile.OTHERS_BEGIN if overlaps else Meanwhile.NONE_BEGINS
        for buffer, (part, _) in zip(buffers, averagings, strict=True):
            part.put_back(buffer, flat)

    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        by_family = self._by_family(layer.name for layer in layers)
        promises = (
            self.families[name].sent([layer for layer in layers if layer.name in own], world_size)
            for name, own in by_family.items()
        )
        return reduce(Sent.then, promises, Sent())

    def set_widths(self, widths: Mapping[str, int]) -> None:
        """Likewise; layers whose family has no widths have none to set."""
        if unknown := [name for name in widths if name not in self.family_of]:
            raise ValueError(f"{unknown[0]} is not a compressed layer of this model")
        for name, own in self._by_family(widths).items():
            self.families[name].set_widths({layer: widths[layer] for layer in own})

    def encoded_bytes_at(self, layers: Sequence[Layer], bits: int, world_size: int) -> list[int]:
        return [
            self.families[self.family_of[layer.name]].encoded_bytes_at([layer], bits, world_size)[0] for layer in layers
        ]

    def settle(self, applied: Tensor | bool, layers: Collection[str] | None = None) -> None:
        for each in self.families.values():
            each.settle(applied, layers)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, by family and then as each family keeps it; of those that keep any."""
        states = {name: each.state_dict() for name, each in self.families.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if unknown := sorted(set(state) - set(self.families)):
            raise ValueError(
                f"the checkpoint holds state of {unknown[0]}, by which no layer of this model travels; resume with the "
                "routes that wrote it"
            )
        for name, each in self.families.items():
            each.load_state_dict(state.get(name, {}))

    def _by_family(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Layers' names by their families', in the order of families."""
        by_family: dict[str, list[str]] = {name: [] for name in self.families}
        for name in names:
            by_family[self.family_of[name]].append(name)
        return {name: own for name, own in by_family.items() if own}

    def _cut(self, gradients: Gradients) -> dict[str, _Part]:
        starts = dict(zip(gradients.names, gradients.offsets, strict=True))
        parts = {}
        for family, names in self._by_family(gradients.names).items():
            pieces: list[slice] = []
            for name in names:
                start, stop = starts[name], starts[name] + self._sizes[name]
                if pieces and pieces[-1].stop == start:
                    pieces[-1] = slice(pieces[-1].start, stop)
                else:
                    pieces.append(slice(start, stop))
            ends = itertools.accumulate(self._sizes[name] for name in names)
            parts[family] = _Part(tuple(names), tuple(itertools.chain([0], ends))[:-1], tuple(pieces))
        return parts


def carried_over(state: Mapping[str, Any], states: Mapping[str, LayerState]) -> dict[str, Any]:
    """The state of a `Routed`, whose `states` these are, that goes on from the `state_dict` of one with other routes.

    All that a layer's family keeps of it, where the layer stays with the family. Else what is owed of it, where as many
    values are: each rank's own, and between two quantizers each owner's. The rest begins anew, with zeros.
    """
    owed: dict[str, dict[str, Tensor]] = {"residual": {}, "share_residual": {}}
    for kinds in state.values():
        for kind, values in owed.items():
            values.update(kinds.get(kind, {}))
    carried: dict[str, Any] = {}
    for key, kept in states.items():
        family, _, kind = key.rpartition("/")
        before = owed.get(kind, {}) | state.get(family, {}).get(kind, {})
        layers = {
            name: before[name] if name in before and before[name].numel() == count else torch.zeros(count)
            for name, count in kept.spans.items()
        }
        if any(values.any() for values in layers.values()):
            carried.setdefault(family, {})[kind] = layers
    return carried


@dataclass
class _Tagged(Staged, Around):
    """Another `Collectives` for one of `count` users at a time, each of which has tags of its own."""

    inner: Collectives
    number: int
    count: int

    def sum_(self, values: Tensor) -> None:
        self.inner.sum_(values)

    def post_exchange(self, sizes: Sequence[int], tag: int, device: torch.device) -> PostedExchange:
        return self.inner.post_exchange(sizes, tag * self.count + self.number, device)

    def post_gather(self, messages: Tensor, sizes: Sequence[int], tag: int) -> PostedGather:
        return self.inner.post_gather(messages, sizes, tag * self.count + self.number)
