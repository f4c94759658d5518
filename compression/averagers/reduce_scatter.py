"""Averaging of shards: each rank gets the mean of the values that it owns, and of no others."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..codecs.base import FLOAT32, Floats
from ..codecs.quantizer import Quantizer
from ..gradients import Gradients
from ..layer_state import LayerState
from ..layers import DENSE, Layer, Pieces, bucket_length
from ..network.collectives import Collectives, PostedExchange, Solo
from ..network.inside import Levels, PostedInside, Spans
from ..plans import Plan, PlanCache, Segment, drop_message, joined, spans
from ..randomness import stream_keys
from ..streams import Meanwhile, Phases, Until, run_all
from .base import Averager, Averaging, Sent
from .in_levels import InLevels
from .quantized import Quantized, Shards

_HOP = 1  # of the streams of random numbers

BindPieces = Callable[[Sequence[Layer], Mapping[str, Pieces], Collectives, int], Averager]
"""(layers, pieces, collectives, seed) -> the averager bound to them."""


@dataclass(frozen=True)
class _Group:
    """The plans of pieces that travel together: the messages of all owners, those that this rank sends, and what each
    of the others sends it."""

    every: Plan
    sent: Plan
    received: Plan
    encoded: tuple[str, ...]  # names of layers whose width is not DENSE


class ReduceScatter(Quantized):
    """Quantized reduce-scatter, at (W - 1) / W x encoded bytes of N a rank: the first hop of two.

    Gradients are a buffer [W, S]: row r holds the piece of every layer that rank r owns, one after the other, each
    padded to the longest piece of any rank. `Gradients.offsets` say where this rank's own pieces begin, and only those
    become means. Each rank sends its encoding of row r to rank r, which decodes and adds up in float32, in rank order;
    its own values are added as they are. Layers that are not compressed travel in the same messages, as float32 or as
    `dense` has it.

    `layers` are the own pieces, compressed where the whole parameter is; `pieces` are the values of every rank's. A
    piece is cut into buckets from its own first value on, and draws random numbers that no other piece draws.

    With error feedback the error of an encoding is added to the next gradient (Karimireddy et al. 2019,
    arXiv:1901.09847), for N (W - 1) / W floats of residuals a rank.
    """

    overlaps = True

    def __init__(
        self,
        codec: Quantizer,
        layers: Sequence[Layer],
        pieces: Mapping[str, Pieces],
        collectives: Collectives,
        seed: int,
        error_feedback: bool = False,
        dense: Floats = FLOAT32,
    ) -> None:
        whole = [replace(layer, shape=(sum(pieces[layer.name].values),)) for layer in layers]
        super().__init__(codec, whole, collectives, seed, dense)
        self.pieces = {layer.name: pieces[layer.name] for layer in layers}
        self._groups: PlanCache[_Group] = PlanCache()
        self._step: int | None = None  # of the exchanges so far
        self._exchanges_of_step = 0
        if error_feedback:
            owed = {layer.name: layer.numel - pieces[layer.name].values[collectives.rank] for layer in whole}
            self.states = {"residual": LayerState({each.name: owed[each.name] for each in whole if each.compressed})}

    def set_widths(self, widths: Mapping[str, int]) -> None:
        super().set_widths(widths)
        self._groups.clear()

    def average_(self, gradients: Gradients, step: int) -> None:
        run_all(self.post(gradients, step)(gradients))

    def post(self, gradients: Gradients, step: int) -> Averaging:
        group, device = self._groups.of(gradients, self._planned), gradients.flat.device
        if self._step != step:
            self._step, self._exchanges_of_step = step, 0
        tag = self._exchanges_of_step
        self._exchanges_of_step += 1
        network = self.collectives

        def announced() -> PostedExchange:
            return network.post_exchange(group.every.message_bytes, tag, device)

        early = announced() if network.matched_by_tag(device) else None  # else in its turn, on the thread that sends
        return lambda gradients: self._phases(gradients.flat, group, step, early or announced())

    def _phases(self, flat: Tensor, group: _Group, step: int, messages: PostedExchange) -> Phases:
        """Two: encode and send the rows of others, add up the own one."""
        network = self.collectives
        residuals = self.states["residual"].allocate(flat.device, group.encoded) if self.states else ()
        wire = torch.empty(group.sent.wire_bytes, dtype=torch.uint8, device=flat.device)
        self.codec.encode_plan(group.sent, flat, self._keys(group, step, network.rank), wire, *residuals)
        self._encoded_bytes += wire.nbytes
        messages.send(wire)
        yield Meanwhile.OTHERS_BEGIN if network.matched_by_tag(flat.device) else Meanwhile.NONE_BEGINS
        self._add_up(flat, group, step, messages.wait())

    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        """As the base; `layers` are pieces of these names. Raises ValueError for another number of ranks."""
        messages = self._every([self.layers[layer.name] for layer in layers], world_size).message_bytes
        one_hop, count = (world_size - 1) / world_size, sum(nbytes > 0 for nbytes in messages)
        return Sent(one_hop * sum(messages), messages=one_hop * count, rounds=int(world_size > 1 and count > 0))

    def _add_up(self, flat: Tensor, group: _Group, step: int, received: Tensor) -> None:
        """Set the own row to the mean over all ranks, added up in their order."""
        network, factor = self.collectives, 1.0 / self.collectives.world_size
        own = [(start, stop, flat[start:stop] * factor) for start, stop in spans(group.received)]
        messages = iter(received)
        for rank in range(network.world_size):
            if rank != network.rank:
                keys = self._keys(group, step, rank) if self.codec.keyed else None
                self.codec.decode_plan(group.received, next(messages), flat, factor, rank > 0, keys)
                continue
            for start, stop, values in own:
                flat[start:stop].copy_(values) if rank == 0 else flat[start:stop].add_(values)

    def _keys(self, group: _Group, step: int, sender: int) -> NDArray[np.uint32]:
        return stream_keys(self.seed, step, group.every.layers, _HOP, sender)

    def _planned(self, gradients: Gradients) -> _Group:
        rank, ranks = self.collectives.rank, self.collectives.world_size
        layers = [self.layers[name] for name in gradients.names]
        row = sum(self.pieces[layer.name].padded for layer in layers)
        offsets = [offset - rank * row for offset in gradients.offsets]
        every = self._every(layers, ranks, offsets, row)
        return _Group(
            every,
            self.codec.in_pieces(drop_message(every, rank)),
            self.codec.in_pieces(self._of_owner(layers, rank, self._shards(layers, ranks), offsets, row)),
            tuple(layer.name for layer in layers if self.widths[layer.name] != DENSE),
        )

    def _every(self, layers: Sequence[Layer], ranks: int, offsets: Sequence[int] = (), row: int = 0) -> Plan:
        """The messages of all owners. `offsets` are the layers' in a `row` of so many values; bytes need neither."""
        shards, offsets = self._shards(layers, ranks), offsets or [0] * len(layers)
        return joined([self._of_owner(layers, owner, shards, offsets, row) for owner in range(ranks)])

    def _of_owner(
        self, layers: Sequence[Layer], owner: int, shards: Shards, offsets: Sequence[int], row: int
    ) -> Plan:
        segments = []
        for layer, offset in zip(layers, offsets, strict=True):
            first, _ = shards[layer.name][owner]
            segments.append(Segment(layer, owner * row + offset - first, self._state_offset(layer, owner) - first))
        return self._plan(segments, [owner], shards)

    def _state_offset(self, layer: Layer, owner: int) -> int:
        """Where what is owed of another rank's piece begins: those of all others are side by side."""
        if not self.states or not layer.compressed:
            return 0
        values = self.pieces[layer.name].values
        before = sum(values[rank] for rank in range(owner) if rank != self.collectives.rank)
        return self.states["residual"].offsets[layer.name] + before

    def _shards(self, layers: Sequence[Layer], world_size: int) -> Shards:
        """Every rank's piece, as indices of random numbers: each begins a whole number of buckets after the last."""
        shards = {}
        for layer in layers:
            pieces = self.pieces[layer.name]
            if len(pieces.values) != world_size:
                raise ValueError(f"these layers are in pieces among {len(pieces.values)} ranks, got {world_size}")
            length = bucket_length(pieces.padded, self.codec.bucket_size)
            apart = -(-pieces.padded // length) * length
            shards[layer.name] = [(rank * apart, rank * apart + count) for rank, count in enumerate(pieces.values)]
        return shards


@dataclass(frozen=True)
class _Rows:
    """A buffer's rows by place; the own row, there and among those of this place; the own pieces in the latter."""

    values: int
    spans: Spans
    own: slice
    own_of_place: slice
    offsets: tuple[int, ...]


class ReduceScatterInLevels(InLevels):
    """What crosses the hosts' links is encoded once a host, by `ReduceScatter`; what does not is float32.

    Place p of every host adds up, over its host, the rows of all ranks at place p; those ranks then reduce-scatter over
    the hosts, by the averager that `bind` makes for them. So the ranks of a host together send (H - 1) / H x encoded
    bytes of N. The averager sees the mean of its host's gradients, and what it remembers is of that.

    `places` are the ranks of each place, in order. Gradients lie as `ReduceScatter` has them.
    """

    def __init__(
        self,
        bind: BindPieces,
        layers: Sequence[Layer],
        pieces: Mapping[str, Pieces],
        places: Sequence[Sequence[int]],
        levels: Levels,
        seed: int,
    ) -> None:
        self.places, self._bind, self._pieces = places, bind, pieces
        own = self._of_place(levels.inside.rank)
        # A seed is a stream's first name: places draw from different streams.
        super().__init__(levels, bind(layers, own, levels.between, seed + 2**32 * levels.inside.rank))
        self._groups: PlanCache[_Rows] = PlanCache()

    def sent_by_place(self, layers: Sequence[Layer], world_size: int) -> list[Sent]:
        return [owner.sent(layers, world_size // len(self.places)) for owner in self._owners(layers)]

    def encoded_bytes_at(self, layers: Sequence[Layer], bits: int, world_size: int) -> list[int]:
        """What a host encodes of each layer, all its ranks together."""
        hosts = world_size // len(self.places)
        by_place = [owner.encoded_bytes_at(layers, bits, hosts) for owner in self._owners(layers)]
        return [sum(of_layer) for of_layer in zip(*by_place, strict=True)]

    def post(self, gradients: Gradients, step: int) -> Averaging:
        rows = self._groups.of(gradients, self._grouped)
        inside = self.levels.inside.post(rows.values, rows.spans)
        averaging = self.inner.post(Gradients(gradients.flat[:0], gradients.names, rows.offsets), step)
        return lambda gradients: self._phases(gradients, rows, inside, averaging)

    def _phases(
        self, gradients: Gradients, rows: _Rows, inside: PostedInside, averaging: Averaging
    ) -> Generator[Meanwhile | Until, None, None]:
        means = yield from inside.add_up(gradients.flat)
        for meanwhile in averaging(Gradients(means, gradients.names, rows.offsets)):
            yield meanwhile if self.levels.inside.overlaps else Meanwhile.NONE_BEGINS
        gradients.flat[rows.own].copy_(means[rows.own_of_place])

    def _grouped(self, gradients: Gradients) -> _Rows:
        row = sum(self._pieces[name].padded for name in gradients.names)
        place, number = self.levels.inside.rank, self.levels.between.rank
        rank = self.places[place][number]
        return _Rows(
            row * sum(map(len, self.places)),
            [[(each * row, (each + 1) * row) for each in ranks] for ranks in self.places],
            slice(rank * row, (rank + 1) * row),
            slice(number * row, (number + 1) * row),
            tuple(offset + (number - rank) * row for offset in gradients.offsets),
        )

    def _of_place(self, place: int) -> dict[str, Pieces]:
        return {name: pieces.of(self.places[place]) for name, pieces in self._pieces.items()}

    def _owners(self, layers: Sequence[Layer]) -> list[Averager]:
        """The averager at each place, with this one's widths, to ask what it would send."""
        widths = {layer.name: self.widths[layer.name] for layer in layers if layer.name in self.widths}
        owners = [self._bind(layers, self._of_place(place), Solo(), 0) for place in range(len(self.places))]
        for owner in owners if widths else ():
            owner.set_widths(widths)
        return owners
