"""Averaging of codes that a network cannot add."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..codecs.quantizer import Quantizer
from ..gradients import Gradients
from ..layer_state import LayerState
from ..layers import DENSE, Ints, Layer, shard
from ..network.collectives import Collectives, PostedExchange, PostedGather, Work, part_of
from ..plans import Plan, Segment, drop_message, mask_owner, plan, split_into_chunks
from ..randomness import stream_keys
from ..streams import Phases, run_all
from .base import Begin, Plain

CHUNK_BYTES = 3 * 2**19  # of what all ranks own, where nothing follows that could be encoded meanwhile


@dataclass(frozen=True)
class _Chunk:
    """The plans of a chunk of every share.

    Of what this rank encodes, of the share that it owns, of all of them, and in these of those that others own.
    """

    sent: Plan
    owned: Plan
    whole: Plan
    others: Plan


@dataclass(frozen=True)
class _Route:
    """One group of layers."""

    chunks: tuple[_Chunk, ...]
    layers: Ints  # their indices
    encoded: tuple[str, ...]  # the names of those that do not travel as float32


class _Messages(NamedTuple):
    """A chunk whose messages of both hops may arrive: the average that this rank owns goes into `own`."""

    send_shards: PostedExchange
    own: Tensor
    send_own: PostedGather


def _keep_all(wire: Tensor) -> Work:
    """The exchange of a rank that is alone: what it encoded is what there is to add up."""
    return lambda: wire.view(1, -1)


class TwoHop(Plain):
    """Quantized averaging in two hops, at 2 (W - 1) / W x encoded bytes of N a rank.

    Hop one: every layer is cut into W shares, and each rank sends its encoding of share r to rank r, which decodes
    and adds them up in rank order. What a rank has of its own share does not travel, and is added as it is. Hop two:
    each rank encodes the average of its share, sends it to all, and decodes it for itself. All decode the same bytes,
    so that all end with the same bits. A rank that is alone encodes everything in both hops. Layers that are not
    compressed travel as float32 in the same messages. While some gradients are on their way, the next are encoded; the
    last of a step, which end with the first layer, travel in chunks instead. All messages are expected early.

    With error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847) what the first encoding
    lost is added to the next gradient, and what the second lost to the owner's next average (DoubleSqueeze, Tang
    et al. 2019, arXiv:1905.05957). The encoding is then scaled into a projection: see `kernels.reference.project`.

    `widths` gives each compressed layer its own bits; missing ones take the codec's. A dense layer is never cut
    differently when widths change, so residuals outlive a change of widths.
    """

    lossless = False

    def __init__(
        self,
        codec: Quantizer,
        layers: Sequence[Layer],
        collectives: Collectives,
        seed: int,
        error_feedback: bool = False,
    ) -> None:
        self.codec, self.collectives, self.seed = codec, collectives, seed
        self.encoded_bytes = 0
        self.layers = {layer.name: layer for layer in layers}
        self.shards = {
            layer.name: shard(layer.numel, codec.bucket_size, collectives.world_size, layer.index)
            for layer in layers
        }
        self.widths: dict[str, int] = {layer.name: codec.bits if layer.compressed else DENSE for layer in layers}
        self._routes: dict[tuple[tuple[str, ...], tuple[int, ...]], _Route] = {}
        self._step: int | None = None  # whose keys and chunks, so far, these are
        self._keys = np.empty((2, 0, 2), np.uint32)
        self._chunks_of_step = 0
        self._states: tuple[LayerState, LayerState] | None = None
        if error_feedback:
            mine = {name: shards[collectives.rank] for name, shards in self.shards.items()}
            compressed = [layer for layer in layers if layer.compressed]
            self._states = (
                LayerState({layer.name: layer.numel for layer in compressed}),
                LayerState({layer.name: mine[layer.name][1] - mine[layer.name][0] for layer in compressed}),
            )

    def set_widths(self, widths: Mapping[str, int]) -> None:
        """Bits per layer from now on; DENSE sends a layer in float32. Unnamed layers keep theirs."""
        for name, bits in widths.items():
            if name not in self.layers or not (self.layers[name].compressed or bits == DENSE):
                raise ValueError(f"{name} is not a compressed layer of this model")
            if bits != DENSE:
                self.codec.with_bits(bits)  # checks the range
        self.widths.update(widths)
        self._routes.clear()

    def average_(self, gradients: Gradients, step: int) -> None:
        run_all(self.expect(gradients, step)(gradients))

    def expect(self, gradients: Gradients, step: int) -> Begin:
        route, device = self._route(gradients), gradients.flat.device
        if self._step != step:
            self._step, self._keys, self._chunks_of_step = step, self._stream_keys(step), 0
        keys, first_number = self._keys[:, route.layers], self._chunks_of_step
        self._chunks_of_step += len(route.chunks)

        @functools.cache
        def expected() -> list[_Messages]:
            return [self._expect(chunk, first_number + k, device) for k, chunk in enumerate(route.chunks)]

        if self.collectives.matched_by_tag(device):  # else in their turn, on the thread and the stream that send
            expected()
        return lambda gradients: self._phases(gradients.flat, route, keys, expected())

    def _phases(
        self, flat: Tensor, route: _Route, keys: NDArray[np.uint32], expected: Sequence[_Messages]
    ) -> Phases:
        """Three: encode and send all shares, add up and send the own one, decode the averages."""
        network, codec = self.collectives, self.codec
        rank = None if self._alone else network.rank
        shards, averages = [], []
        for chunk, messages in zip(route.chunks, expected, strict=True):
            wire = torch.empty(chunk.sent.wire_bytes, dtype=torch.uint8, device=flat.device)
            codec.encode_plan(chunk.sent, flat, keys[0], wire, *self._memory(0, flat, route))
            self.encoded_bytes += wire.nbytes
            shards.append(messages.send_shards(wire))
        yield network.matched_by_tag(flat.device)
        for chunk, messages, received in zip(route.chunks, expected, shards, strict=True):
            summands = (received(), flat, rank, 1.0 / network.world_size)
            codec.recode_plan(chunk.owned, *summands, keys[1], messages.own, *self._memory(1, flat, route))
            averages.append(messages.send_own())
        yield True
        for chunk, received in zip(route.chunks, averages, strict=True):
            codec.decode_plan(chunk.others, received(), flat)

    def settle(self, applied: Tensor | bool) -> None:
        for memory in self._states or ():
            memory.settle(applied)

    def commit(self, finite: Mapping[str, Tensor]) -> None:
        for memory in self._states or ():
            memory.commit(finite)

    def state_dict(self) -> dict[str, Any]:
        if self._states is None:
            return {}
        residual, share_residual = self._states
        return {"residual": residual.state_dict(), "share_residual": share_residual.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._states is None:
            if state:
                raise ValueError("the checkpoint holds residuals, and `error_feedback` is off")
            return
        for memory, name in zip(self._states, ("residual", "share_residual"), strict=True):
            memory.load_state_dict(state.get(name, {}))

    @property
    def _alone(self) -> bool:
        return self.collectives.world_size == 1

    def _expect(self, chunk: _Chunk, number: int, device: torch.device) -> _Messages:
        sizes, network = chunk.whole.message_bytes, self.collectives
        messages = torch.empty(chunk.whole.wire_bytes, dtype=torch.uint8, device=device)
        return _Messages(
            _keep_all if self._alone else network.post_exchange(sizes, number, device),
            part_of(messages, sizes, network.rank),
            network.post_gather(messages, sizes, number),
        )

    def _stream_keys(self, step: int) -> NDArray[np.uint32]:
        """Of both hops and all layers: [2, layers, 2]."""
        rank, layers = self.collectives.rank, np.arange(1 + max(layer.index for layer in self.layers.values()))
        return np.stack([stream_keys(self.seed, step, layers, hop, rank) for hop in (1, 2)])

    def _memory(self, hop: int, flat: Tensor, route: _Route) -> tuple[Tensor, ...]:
        return self._states[hop].allocate(flat.device, route.encoded) if self._states is not None else ()

    def _route(self, gradients: Gradients) -> _Route:
        key = (gradients.names, gradients.offsets)
        if key not in self._routes:
            self._routes[key] = self._plan(gradients)
        return self._routes[key]

    def _plan(self, gradients: Gradients) -> _Route:
        rank = self.collectives.rank
        layers = [self.layers[name] for name in gradients.names]
        where = [memory.offsets for memory in self._states] if self._states else [{}, {}]
        segments, owned_segments = [], []
        for layer, offset in zip(layers, gradients.offsets, strict=True):
            start, _ = self.shards[layer.name][rank]
            segments.append(Segment(layer, offset, where[0].get(layer.name, 0)))
            owned_segments.append(Segment(layer, offset, where[1].get(layer.name, 0) - start))
        rules = (self.shards, self.widths, self.codec.shard_bucket_size, self.codec.record_bytes)
        all_shards = plan(segments, range(self.collectives.world_size), *rules)
        my_shard = plan(owned_segments, [rank], *rules)
        # A GPU encodes faster than it launches, and gets one launch a hop.
        in_chunks = gradients.flat.device.type == "cpu" and 0 in all_shards.layers
        count = max(1, all_shards.wire_bytes // CHUNK_BYTES) if in_chunks else 1
        parts = [
            _Chunk(whole if self._alone else drop_message(whole, rank), owned, whole, mask_owner(whole, rank))
            for whole, owned in zip(*(split_into_chunks(each, count) for each in (all_shards, my_shard)), strict=True)
            if whole.wire_bytes
        ]
        encoded = tuple(layer.name for layer in layers if self.widths[layer.name] != DENSE)
        return _Route(tuple(parts), all_shards.layers, encoded)
