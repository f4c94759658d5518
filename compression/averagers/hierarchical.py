"""Averaging in two levels: ranks of a host add up as they are, and hosts average in codes."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..gradients import Gradients
from ..layers import Layer, owned_slices
from ..network.collectives import Collectives, Solo
from ..network.inside import Levels, PostedInside, Spans
from ..plans import PlanCache
from ..streams import Meanwhile, Until
from .base import Averager, Averaging, Sent
from .in_levels import InLevels

Bind = Callable[[Sequence[Layer], Collectives, int], Averager]
"""(layers, collectives, seed) -> the averager bound to them."""


@dataclass(frozen=True)
class _Group:
    """Some layers that travel together: the slices of their buffer by owner, and this rank's own, side by side."""

    spans: Spans
    names: tuple[str, ...]
    offsets: tuple[int, ...]


class Hierarchical(InLevels):
    """What crosses the hosts' links is encoded once a host, by any averager; what does not is float32.

    The ranks of a host add up their gradients, each rank becoming the owner of slices of layers; the owners of the same
    slices average over the hosts, by the averager that `bind` makes for them, to which the hosts are the world; each
    owner hands its averages to the ranks of its host. All get the same bytes, so that all end with the same bits. The
    averager sees the mean of its host's gradients, and what it remembers is of the slices that it owns.

    Slices are cut at quantization buckets. With `ownership` "layers" they are whole layers, for what needs a matrix;
    with "one" the first rank of a host owns all, for what needs the whole gradient. Owners of different slices draw
    from different streams of random numbers.

    Two levels are as in hierarchical all-reduces (Jia et al. 2018, arXiv:1807.11205, section 3.3), where both are sums.
    """

    def __init__(
        self,
        bind: Bind,
        layers: Sequence[Layer],
        levels: Levels,
        seed: int,
        bucket_size: int,
        ownership: str = "slices",
    ) -> None:
        self._bind = bind
        self._bucket_size, self.ownership = bucket_size, ownership
        inside = levels.inside
        self.owned = owned_slices(layers, bucket_size, inside.world_size, ownership)
        own = self._of_place(layers, inside.world_size, inside.rank)
        # A seed is a stream's first name. The first owner's is the run's: one owner alone is as without hosts.
        super().__init__(levels, bind(own, levels.between, seed + 2**32 * inside.rank))
        self._groups: PlanCache[_Group] = PlanCache()

    def sent_by_place(self, layers: Sequence[Layer], world_size: int) -> list[Sent]:
        places = self.levels.inside.world_size
        sent = []
        for place in range(places):
            own = self._of_place(layers, places, place)
            owner = self._bind(own, Solo(), 0)
            if widths := {layer.name: self.widths[layer.name] for layer in layers if layer.name in self.widths}:
                owner.set_widths(widths)
            held = [layer for layer in own if layer.numel]
            sent.append(owner.sent(held, world_size // places) if held else Sent())
        return sent

    def encoded_bytes_at(self, layers: Sequence[Layer], bits: int, world_size: int) -> list[int]:
        """What a host encodes of each layer, all its owners together."""
        places = self.levels.inside.world_size
        by_place = [
            self.inner.encoded_bytes_at(self._of_place(layers, places, place), bits, world_size // places)
            for place in range(places)
        ]
        return [sum(of_layer) for of_layer in zip(*by_place, strict=True)]

    def post(self, gradients: Gradients, step: int) -> Averaging:
        group = self._groups.of(gradients, self._grouped)
        inside = self.levels.inside.post(gradients.flat.numel(), group.spans)
        averaging: Averaging | None = None
        if group.names:
            averaging = self.inner.post(Gradients(gradients.flat[:0], group.names, group.offsets), step)
        return lambda gradients: self._phases(gradients.flat, group, inside, averaging)

    def _phases(
        self, flat: Tensor, group: _Group, inside: PostedInside, averaging: Averaging | None
    ) -> Generator[Meanwhile | Until, None, None]:
        one_at_a_time = not self.levels.inside.overlaps
        own = yield from inside.add_up(flat)
        if averaging is not None:
            for meanwhile in averaging(Gradients(own, group.names, group.offsets)):
                yield Meanwhile.NONE_BEGINS if one_at_a_time else meanwhile
        yield Meanwhile.NONE_BEGINS if one_at_a_time else Meanwhile.OTHERS_BEGIN
        yield from inside.hand_out(own, flat)

    def _grouped(self, gradients: Gradients) -> _Group:
        inside = self.levels.inside
        spans: list[list[tuple[int, int]]] = [[] for _ in range(inside.world_size)]
        names, offsets, at = [], [], 0
        for name, offset in zip(gradients.names, gradients.offsets, strict=True):
            for place, (start, stop) in enumerate(self.owned[name]):
                if start == stop:
                    continue
                spans[place].append((offset + start, offset + stop))
                if place == inside.rank:
                    names.append(name)
                    offsets.append(at)
                    at += stop - start
        return _Group(spans, tuple(names), tuple(offsets))

    def _of_place(self, layers: Sequence[Layer], places: int, place: int) -> list[Layer]:
        """The layers as the owner at a place sees them: slices of them, empty where it owns nothing."""
        owned = owned_slices(layers, self._bucket_size, places, self.ownership)
        return [_sliced(layer, *owned[layer.name][place]) for layer in layers]


def _sliced(layer: Layer, start: int, stop: int) -> Layer:
    """A slice of a layer's values; the whole layer keeps its shape."""
    if stop - start == layer.numel:
        return layer
    return replace(layer, shape=(stop - start,) if stop > start else (0, 1))
