"""Averaging of a few values of each layer.

A rank sends a top-k of its error-compensated gradient: the gradient, and all that it has not sent yet. An accumulator
keeps that, a score says which of it matters most; neither knows the network.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..codecs.base import FLOAT32, Floats
from ..codecs.sparsifiers import TopK
from ..gradients import Gradients
from ..layer_state import LayerState
from ..layers import Ints, Layer
from ..limits import LIMIT
from ..network.collectives import Collectives
from ..sparse_plans import SparsePlan
from ..streams import on_device
from .base import Averager, Sent, gathered


class Accumulator(Protocol):
    """The error-compensated gradient of a rank, and its change when some of it is sent, pending until settled."""

    states: Mapping[str, LayerState]

    def accumulate(self, gradients: Gradients) -> Gradients:
        """The compensated gradient of these layers: same names, a buffer of the accumulator's."""

    def clear_sent(self, positions: Tensor) -> None:
        """Take the values at these positions of that buffer, int64, as sent."""


class Score(Protocol):
    """The criterion that the top-k selects by."""

    states: Mapping[str, LayerState]

    def score(self, gradients: Gradients, compensated: Gradients) -> Gradients:
        """A score for each value, whose magnitude counts. Same names, any buffer."""


class NoMemory:
    """This step's gradients alone; values that are not sent are lost."""

    states: Mapping[str, LayerState] = {}

    def accumulate(self, gradients: Gradients) -> Gradients:
        return gradients

    def clear_sent(self, positions: Tensor) -> None:
        pass


class Residual:
    """The gradient and all that was not sent before: error feedback (Stich et al. 2018, arXiv:1809.07599)."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.state = LayerState({layer.name: layer.numel for layer in layers if layer.compressed})
        self.states: Mapping[str, LayerState] = {"residual": self.state}

    def accumulate(self, gradients: Gradients) -> Gradients:
        residual, pending = self.state.allocate(gradients.flat.device, gradients.names)
        for gradient, span in spans(gradients, self.state):
            torch.add(gradient, residual[span], out=pending[span])
        return placed(pending, gradients, self.state)

    def clear_sent(self, positions: Tensor) -> None:
        assert self.state.pending is not None
        self.state.pending.index_fill_(0, positions, 0.0)


class RmsScore:
    """abs(x) / (sqrt(v) + 1e-8), v the running mean 0.99 v + 0.01 g^2 of the squared gradient, as RMSprop divides.

    x is the compensated gradient, and g the gradient alone: values not sent yet gain in score, and not in v. v is
    cut at 3.4e38, so that it stays finite.
    """

    DECAY = 0.99
    EPSILON = 1e-8

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.state = LayerState({layer.name: layer.numel for layer in layers if layer.compressed})
        self.states: Mapping[str, LayerState] = {"mean_square": self.state}

    def score(self, gradients: Gradients, compensated: Gradients) -> Gradients:
        mean_square, pending = self.state.allocate(gradients.flat.device, gradients.names)
        scores = torch.empty_like(gradients.flat)
        layers = zip(spans(gradients, self.state), gradients.offsets, compensated.offsets, strict=True)
        for (gradient, span), at, compensated_at in layers:
            score, new = scores[at : at + len(gradient)], pending[span]
            torch.mul(mean_square[span], self.DECAY, out=new)
            new.addcmul_(gradient, gradient, value=1 - self.DECAY).clamp_(max=LIMIT)
            torch.sqrt(new, out=score).add_(self.EPSILON)
            torch.div(compensated.flat[compensated_at : compensated_at + len(gradient)], score, out=score)
        return Gradients(scores, gradients.names, gradients.offsets)


class TopKAverager(Averager):
    """Sparse averaging in one gather, at (W - 1) x encoded bytes a rank.

    Each rank sends a top-k of each layer's compensated gradient, and all add up all messages in rank order. Layers that
    are not compressed travel in the same message, as float32 or as `dense` has it. Not in two hops: the owner of a
    shard would have to sparsify the mean a second time.

    `dropped` averages the values that the top-k leaves out, in place, and is added: an alternative to an accumulator
    that remembers them, so that the two exclude each other. With `global_top_k`, the top-k selects over all compressed
    layers of a buffer as if they were one, and they must lie side by side in it, in the model's order.
    """

    def __init__(
        self,
        codec: TopK,
        layers: Sequence[Layer],
        collectives: Collectives,
        accumulator: Accumulator | None = None,
        score: Score | None = None,
        dropped: Averager | None = None,
        global_top_k: bool = False,
        dense: Floats = FLOAT32,
    ) -> None:
        if accumulator is not None and dropped is not None:
            raise ValueError("what a top-k drops is either remembered by an accumulator or averaged, not both")
        self.codec, self.collectives, self.dense = codec, collectives, dense
        self.accumulator: Accumulator = accumulator or NoMemory()
        self.score, self.dropped, self.global_top_k = score, dropped, global_top_k
        self.sizes = {layer.name: layer.numel for layer in layers}
        self.compressed = {layer.name for layer in layers if layer.compressed}
        self.states = {**self.accumulator.states, **(score.states if score else {})}

    @property
    def encoded_bytes(self) -> int:
        return super().encoded_bytes + (self.dropped.encoded_bytes if self.dropped is not None else 0)

    def codec_at(self, step: int) -> TopK:
        """The top-k of a step."""
        return self.codec

    def average_(self, gradients: Gradients, step: int) -> None:
        compressed, dense = self._sort(gradients)
        codec, network = self.codec_at(step), self.collectives
        plan = self._plan(codec, [self.sizes[name] for name in compressed.names])
        message, positions = self._encode(codec, plan, compressed, dense)
        received = network.gather(message, [len(message)] * network.world_size).view(network.world_size, -1)
        if self.dropped is not None:
            gradients.flat.index_fill_(0, positions, 0.0)
            self.dropped.average_(compressed, step)
        else:
            for _, values in compressed.layers(self.sizes):
                values.zero_()
        self._add_up(codec, plan, received, compressed, dense)
        start = 0
        for values in self._others(gradients):
            values.copy_(dense[start : start + len(values)])
            start += len(values)

    def _encode(
        self, codec: TopK, plan: SparsePlan, compressed: Gradients, dense: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This rank's message, and the positions of its values in the compensated gradient's buffer."""
        compensated = self.accumulator.accumulate(compressed)
        scores = compensated if self.score is None else self.score.score(compressed, compensated)
        indices = codec.select(plan, scores.flat, self._starts(scores))
        starts = self._starts(compensated)
        floats = self.dense.encode(dense[None])[0]
        message = torch.empty(plan.wire_bytes + floats.nbytes, dtype=torch.uint8, device=dense.device)
        codec.encode_plan(plan, compensated.flat, starts, indices, message[: plan.wire_bytes])
        message[plan.wire_bytes :] = floats
        self._encoded_bytes += message.nbytes
        positions = indices + on_device(np.repeat(starts, plan.kept), indices.device)
        self.accumulator.clear_sent(positions)
        return message, positions

    def _add_up(
        self, codec: TopK, plan: SparsePlan, received: Tensor, compressed: Gradients, dense: Tensor
    ) -> None:
        """Add the mean of all ranks' sparse values to the gradients; set `dense` to that of the dense ones."""
        starts, inverse_world_size = self._starts(compressed), 1.0 / len(received)
        dense.zero_()
        for row in received:
            codec.decode_plan(plan, row[: plan.wire_bytes], compressed.flat, starts, inverse_world_size)
            own = row[plan.wire_bytes :].clone()  # where it lies, its floats may not be aligned
            dense += self.dense.decode(own[None], len(dense))[0] * inverse_world_size

    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        compressed = [layer for layer in layers if layer.compressed]
        counts = [layer.numel for layer in compressed]
        dense = sum(layer.numel for layer in layers) - sum(counts)
        kept = gathered(self._plan(self.codec, counts).wire_bytes + self.dense.wire_bytes(dense), world_size)
        return kept if self.dropped is None else kept.then(self.dropped.sent(compressed, world_size))

    def _sort(self, gradients: Gradients) -> tuple[Gradients, Tensor]:
        """The compressed layers, in place, and a copy of the values of the others."""
        layers = zip(gradients.names, gradients.offsets, strict=True)
        compressed = [(name, at) for name, at in layers if name in self.compressed]
        names, offsets = zip(*compressed, strict=True) if compressed else ((), ())
        others = self._others(gradients)
        dense = torch.cat(others) if others else gradients.flat.new_empty(0)
        return Gradients(gradients.flat, names, offsets), dense

    def _others(self, gradients: Gradients) -> list[Tensor]:
        """The values of each layer that is not compressed, in place."""
        return [values for name, values in gradients.layers(self.sizes) if name not in self.compressed]

    def _plan(self, codec: TopK, counts: Sequence[int]) -> SparsePlan:
        """The message of compressed layers of `counts` values, or with `global_top_k` of all of them as one."""
        return codec.plan([sum(counts)] if self.global_top_k and counts else counts)

    def _starts(self, gradients: Gradients) -> Ints:
        """Offsets in the buffer of the layers, or with `global_top_k` of all of them as one."""
        starts = np.array(gradients.offsets, np.int64)
        if not self.global_top_k:
            return starts
        counts = np.array([self.sizes[name] for name in gradients.names], np.int64)
        if not np.array_equal(starts[1:], (starts + counts)[:-1]):
            raise ValueError("a top-k over the whole model needs its compressed layers side by side, in order")
        return starts[:1]


def spans(gradients: Gradients, state: LayerState) -> Iterator[tuple[Tensor, slice]]:
    """(gradient, flat; its slice of the state) of each layer."""
    for name, at in zip(gradients.names, gradients.offsets, strict=True):
        yield gradients.flat[at : at + state.spans[name]], state.span(name)


def placed(values: Tensor, gradients: Gradients, state: LayerState) -> Gradients:
    """The same layers, in a buffer laid out as `state` is."""
    return Gradients(values, gradients.names, tuple(state.offsets[name] for name in gradients.names))
