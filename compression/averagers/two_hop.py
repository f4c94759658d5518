"""Averaging of codes that a network cannot add."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..codecs.base import FLOAT32, Floats
from ..codecs.quantizer import Quantizer
from ..gradients import Gradients
from ..layer_state import LayerState
from ..layers import DENSE, Ints, Layer, shard
from ..network.collectives import Collectives, PostedExchange, PostedGather, part_of
from ..plans import Plan, PlanCache, Segment, by_owner, drop_message, mask_owner, spans, split_into_chunks
from ..randomness import stream_keys
from ..streams import Meanwhile, Phases, run_all
from .base import Averaging, Sent
from .quantized import Quantized

CHUNK_BYTES = 3 * 2**19  # of all shards, where nothing follows that could be encoded meanwhile
CHUNK_RANKS = 24  # with more, chunks grow, so that no message gets shorter: each costs time, whatever its length


@dataclass(frozen=True)
class _Chunk:
    """The plans of a chunk of every shard: in hop one what all encode, what this rank sends of it, and what is added
    up here; in hop two all averages, the own one, and the others'."""

    every: Plan
    sent: Plan
    received: Plan
    averages: Plan
    owned: Plan
    others: Plan


@dataclass(frozen=True)
class _Keys:
    """The stream keys of layers that travel together: those that this rank draws from, [slots, 2] each, and where
    messages take keys to decode them, those of the others, [ranks - 1, slots, 2], and of every owner, [ranks x slots,
    2]."""

    encoding: NDArray[np.uint32]
    averages: NDArray[np.uint32]
    senders: NDArray[np.uint32] | None
    owners: NDArray[np.uint32] | None


@dataclass(frozen=True)
class _Group:
    """The plans of layers that travel together."""

    chunks: tuple[_Chunk, ...]
    layers: Ints  # their indices
    encoded: tuple[str, ...]  # their names, but for those of width DENSE


class _Messages(NamedTuple):
    """A chunk whose messages of both hops are posted: the average that this rank owns goes into `own`."""

    shards: PostedExchange
    own: Tensor
    averages: PostedGather


class _KeepAll:
    """The exchange of a rank that is alone: its own messages are all that there is to add up."""

    def send(self, messages: Tensor) -> None:
        self._messages = messages

    def wait(self) -> Tensor:
        return self._messages.view(1, -1)


class TwoHop(Quantized):
    """Quantized averaging in two hops, at 2 (W - 1) / W x encoded bytes of N a rank.

    Hop one: every layer is cut into W shards, and each rank sends its encoding of shard r to rank r, which decodes
    and adds them up in rank order. A rank's values of its own shard do not travel, and are added as they are. Hop two:
    each rank encodes the average of its shard, sends it to all, and decodes it for itself. All decode the same bytes,
    so that all end with the same bits. A rank that is alone encodes everything in both hops. Layers that are not
    compressed travel in the same messages, as float32 or as `dense` has it; they are added up in float32. While some
    gradients are on their way, the next are encoded; the last of a step, which end with the first layer, travel in
    chunks instead. All messages are posted early.

    With error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847) the error of the first
    encoding is added to the next gradient, and that of the second to the owner's next average (DoubleSqueeze, Tang
    et al. 2019, arXiv:1905.05957). The encoding is then scaled into a projection: see
    `codecs.quantizer`.

    A layer of width DENSE has no residual. It is never cut differently when widths change, so residuals outlive a
    change of widths.

    With `second_hop_bits` averages have that width in all layers that are encoded, whatever theirs is in hop one. Hop
    two adds the error of one encoding whatever the number of ranks, while that of hop one averages out over the ranks.
    """

    overlaps = True

    def __init__(
        self,
        codec: Quantizer,
        layers: Sequence[Layer],
        collectives: Collectives,
        seed: int,
        error_feedback: bool = False,
        dense: Floats = FLOAT32,
        second_hop_bits: int | None = None,
    ) -> None:
        super().__init__(codec, layers, collectives, seed, dense)
        self.second_hop_bits = second_hop_bits
        self.shards = self._shards(layers, collectives.world_size)
        self._groups: PlanCache[_Group] = PlanCache()
        self._step: int | None = None  # of the keys and of the chunks so far
        self._keys = np.empty((0, 2, 0, 2), np.uint32)
        self._chunks_of_step = 0
        if error_feedback:
            compressed = [layer for layer in layers if layer.compressed]
            own = {name: stop - start for name, (start, stop) in self._own_shards().items()}
            self.states = {
                "residual": LayerState({layer.name: layer.numel for layer in compressed}),
                "share_residual": LayerState({layer.name: own[layer.name] for layer in compressed}),
            }

    def set_widths(self, widths: Mapping[str, int]) -> None:
        super().set_widths(widths)
        self._groups.clear()

    def average_(self, gradients: Gradients, step: int) -> None:
        run_all(self.post(gradients, step)(gradients))

    def post(self, gradients: Gradients, step: int) -> Averaging:
        group, device = self._groups.of(gradients, self._planned), gradients.flat.device
        if self._step != step:
            self._step, self._keys, self._chunks_of_step = step, self._stream_keys(step), 0
        keys, first_tag = self._keys_of(group), self._chunks_of_step
        self._chunks_of_step += len(group.chunks)

        @functools.cache
        def posted() -> list[_Messages]:
            return [self._post(chunk, first_tag + k, device) for k, chunk in enumerate(group.chunks)]

        if self.collectives.matched_by_tag(device):  # else in their turn, on the thread and the stream that send
            posted()
        return lambda gradients: self._phases(gradients.flat, group, keys, posted())

    def _phases(self, flat: Tensor, group: _Group, keys: _Keys, posted: Sequence[_Messages]) -> Phases:
        """Three: encode and send all shards, add up and send the own one, decode the averages."""
        network, codec = self.collectives, self.codec
        rank = None if self._alone else network.rank
        for chunk, messages in zip(group.chunks, posted, strict=True):
            wire = torch.empty(chunk.sent.wire_bytes, dtype=torch.uint8, device=flat.device)
            codec.encode_plan(chunk.sent, flat, keys.encoding, wire, *self._residuals("residual", flat, group))
            self._encoded_bytes += wire.nbytes
            messages.shards.send(wire)
        yield Meanwhile.OTHERS_BEGIN if network.matched_by_tag(flat.device) else Meanwhile.NONE_BEGINS
        for chunk, messages in zip(group.chunks, posted, strict=True):
            received, factor = messages.shards.wait(), 1.0 / network.world_size
            residuals = self._residuals("share_residual", flat, group)
            if self.second_hop_bits is None:
                residual, pending = residuals or (None, None)
                codec.of_averages.recode_plan(
                    chunk.owned, received, flat, rank, factor,
                    keys.averages, messages.own, residual, pending, keys.senders,
                )  # fmt: skip
            else:
                self._add_up(chunk.received, received, flat, factor, keys)
                codec.of_averages.encode_plan(chunk.owned, flat, keys.averages, messages.own, *residuals)
                codec.decode_plan(chunk.owned, messages.own, flat, keys=keys.averages)
            messages.averages.send()
        yield Meanwhile.OTHERS_BEGIN
        for chunk, messages in zip(group.chunks, posted, strict=True):
            codec.decode_plan(chunk.others, messages.averages.wait(), flat, keys=keys.owners)

    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        segments = [Segment(layer, 0, 0) for layer in layers]
        encoded, averages = self._plans(segments, range(world_size), self._shards(layers, world_size))
        chunks = split_into_chunks(encoded, self._chunk_count(encoded))
        messages = sum(nbytes > 0 for chunk in chunks for nbytes in chunk.message_bytes)
        one_hop = (world_size - 1) / world_size
        return Sent(
            addressed=one_hop * (encoded.wire_bytes + averages.wire_bytes),
            messages=2 * one_hop * messages,
            rounds=2 * (world_size > 1 and messages > 0),
        )

    @property
    def _alone(self) -> bool:
        return self.collectives.world_size == 1

    def _post(self, chunk: _Chunk, tag: int, device: torch.device) -> _Messages:
        sizes, network = chunk.averages.message_bytes, self.collectives
        messages = torch.empty(chunk.averages.wire_bytes, dtype=torch.uint8, device=device)
        return _Messages(
            _KeepAll() if self._alone else network.post_exchange(chunk.every.message_bytes, tag, device),
            part_of(messages, sizes, network.rank),
            network.post_gather(messages, sizes, tag),
        )

    def _add_up(self, plan: Plan, received: Tensor, flat: Tensor, factor: float, keys: _Keys) -> None:
        """Set the own shard in `flat` to the sum of all ranks' values of it, times `factor`: this rank's first."""
        if not self._alone:
            for start, stop in spans(plan):
                flat[start:stop].mul_(factor)
        for number, message in enumerate(received):
            its_keys = None if keys.senders is None else keys.senders[number]
            self.codec.decode_plan(plan, message, flat, factor, not (self._alone and number == 0), its_keys)

    def _stream_keys(self, step: int) -> NDArray[np.uint32]:
        """Stream keys of both hops and all layers, [ranks, 2, layers, 2]: of all ranks only if decoding is keyed."""
        network, layers = self.collectives, np.arange(1 + max(layer.index for layer in self.layers.values()))
        ranks = range(network.world_size) if self.codec.keyed else [network.rank]
        return np.stack([[stream_keys(self.seed, step, layers, hop, rank) for hop in (1, 2)] for rank in ranks])

    def _keys_of(self, group: _Group) -> _Keys:
        keys, rank = self._keys[:, :, group.layers], self.collectives.rank
        if not self.codec.keyed:
            return _Keys(keys[0, 0], keys[0, 1], None, None)
        others = keys if self._alone else np.delete(keys, rank, axis=0)
        return _Keys(keys[rank, 0], keys[rank, 1], others[:, 0], keys[:, 1].reshape(-1, 2))

    def _residuals(self, name: str, flat: Tensor, group: _Group) -> tuple[Tensor, ...]:
        """(current, pending) of a hop, nothing without error feedback."""
        return self.states[name].allocate(flat.device, group.encoded) if self.states else ()

    def _shards(self, layers: Sequence[Layer], world_size: int) -> dict[str, list[tuple[int, int]]]:
        size = self.codec.bucket_size
        return {layer.name: shard(layer.numel, size, world_size, layer.index) for layer in layers}

    def _own_shards(self) -> dict[str, tuple[int, int]]:
        return {name: shards[self.collectives.rank] for name, shards in self.shards.items()}

    def _planned(self, gradients: Gradients) -> _Group:
        rank, own = self.collectives.rank, self._own_shards()
        layers = [self.layers[name] for name in gradients.names]
        residual_at, own_residual_at = (
            self.states[name].offsets if self.states else {} for name in ("residual", "share_residual")
        )
        segments, own_segments = [], []
        for layer, offset in zip(layers, gradients.offsets, strict=True):
            start, _ = own[layer.name]
            segments.append(Segment(layer, offset, residual_at.get(layer.name, 0)))
            own_segments.append(Segment(layer, offset, own_residual_at.get(layer.name, 0) - start))
        all_shards, averages = self._plans(segments, range(self.collectives.world_size), self.shards)
        received, owned = self._plans(own_segments, [rank], self.shards)
        # A GPU encodes faster than it launches, and gets one launch a hop.
        count = self._chunk_count(all_shards) if gradients.flat.device.type == "cpu" else 1
        cut = zip(*_cut(all_shards, averages, count), *_cut(received, owned, count), strict=True)
        in_pieces = self.codec.in_pieces
        chunks = [
            _Chunk(
                every,
                in_pieces(every if self._alone else drop_message(every, rank)),
                in_pieces(received),
                averages,
                in_pieces(owned),
                in_pieces(by_owner(mask_owner(averages, rank)) if self.codec.keyed else mask_owner(averages, rank)),
            )
            for every, averages, received, owned in cut
            if every.wire_bytes
        ]
        encoded = tuple(layer.name for layer in layers if self.widths[layer.name] != DENSE)
        return _Group(tuple(chunks), all_shards.layers, encoded)

    def _chunk_count(self, all_shards: Plan) -> int:
        """How many chunks a CPU sends these layers in: more than one where the first layer, a step's last, is there."""
        nbytes = CHUNK_BYTES * max(1.0, len(all_shards.message_bytes) / CHUNK_RANKS)
        return max(1, int(all_shards.wire_bytes / nbytes)) if 0 in all_shards.layers else 1

    def _plans(
        self, segments: Sequence[Segment], owners: Sequence[int], shards: Mapping[str, Sequence[tuple[int, int]]]
    ) -> tuple[Plan, Plan]:
        """The plans of both hops; one and the same where averages have no width of their own."""
        encoded = self._plan(segments, owners, shards)
        if self.second_hop_bits is None:
            return encoded, encoded
        return encoded, self._plan(segments, owners, shards, self.second_hop_bits)


def _cut(first: Plan, second: Plan, count: int) -> tuple[list[Plan], list[Plan]]:
    """The plans of both hops in chunks of the same records."""
    chunks = split_into_chunks(first, count)
    return chunks, chunks if second is first else split_into_chunks(second, count, like=first)
