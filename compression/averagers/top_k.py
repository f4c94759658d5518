"""Averaging of a few values of each layer.

What is sent is a top-k of what a rank *owes*: its gradient, and what it has not sent yet. An accumulator says what
that is, a score which of it matters most; neither knows the network.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..codecs.sparsifiers import TopK
from ..gradients import Gradients
from ..layer_state import LayerState
from ..layers import Ints, Layer
from ..limits import LIMIT
from ..network.collectives import Collectives
from ..sparse_plans import SparsePlan
from ..streams import on_device
from .base import Averager, Plain


class Accumulator(Protocol):
    """What a rank owes, and how that changes when some of it is sent. All changes are pending until settled."""

    states: Mapping[str, LayerState]

    def accumulate(self, gradients: Gradients) -> Gradients:
        """What is owed of these layers with this step's gradients: same names, a buffer of the accumulator's."""

    def clear_sent(self, positions: Tensor) -> None:
        """The values at these positions of that buffer are sent. int64."""


class Score(Protocol):
    """What the top-k selects by."""

    states: Mapping[str, LayerState]

    def score(self, gradients: Gradients, compensated: Gradients) -> Gradients:
        """A score for each value that is owed; its magnitude counts. Same names, any buffer."""


class NoMemory:
    """Owes this step's gradients; what is not sent is lost."""

    states: Mapping[str, LayerState] = {}

    def accumulate(self, gradients: Gradients) -> Gradients:
        return gradients

    def clear_sent(self, positions: Tensor) -> None:
        pass


class Residual:
    """Owes the gradient and all that was not sent before: error feedback (Stich et al. 2018, arXiv:1809.07599)."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.memory = LayerState({layer.name: layer.numel for layer in layers if layer.compressed})
        self.states: Mapping[str, LayerState] = {"residual": self.memory}

    def accumulate(self, gradients: Gradients) -> Gradients:
        residual, pending = self.memory.allocate(gradients.flat.device, gradients.names)
        for gradient, here in spans(gradients, self.memory):
            torch.add(gradient, residual[here], out=pending[here])
        return placed(pending, gradients, self.memory)

    def clear_sent(self, positions: Tensor) -> None:
        assert self.memory.pending is not None
        self.memory.pending.index_fill_(0, positions, 0.0)


class RmsScore:
    """abs(x) / (sqrt(v) + 1e-8), v the running mean 0.99 v + 0.01 g^2 of the squared gradient, as RMSprop divides.

    x is what is owed, and g the gradient alone: what waits to be sent gains in score, and not in v. v is cut at 3.4e38,
    so that it stays finite.
    """

    DECAY = 0.99
    EPSILON = 1e-8

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.memory = LayerState({layer.name: layer.numel for layer in layers if layer.compressed})
        self.states: Mapping[str, LayerState] = {"mean_square": self.memory}

    def score(self, gradients: Gradients, compensated: Gradients) -> Gradients:
        mean_square, pending = self.memory.allocate(gradients.flat.device, gradients.names)
        scores = torch.empty_like(gradients.flat)
        places = zip(spans(gradients, self.memory), gradients.offsets, compensated.offsets, strict=True)
        for (gradient, here), at, compensated_at in places:
            score, new = scores[at : at + len(gradient)], pending[here]
            torch.mul(mean_square[here], self.DECAY, out=new)
            new.addcmul_(gradient, gradient, value=1 - self.DECAY).clamp_(max=LIMIT)
            torch.sqrt(new, out=score).add_(self.EPSILON)
            torch.div(compensated.flat[compensated_at : compensated_at + len(gradient)], score, out=score)
        return Gradients(scores, gradients.names, gradients.offsets)


class TopKAverager(Plain):
    """Sparse averaging in one gather, at (W - 1) x encoded bytes a rank.

    Each rank sends a top-k of what it owes of each layer, and all add up all messages in rank order. Layers that are
    not compressed travel as float32 in the same message. Not in two hops: the owner of a share would have to
    sparsify the mean a second time.

    `dropped` averages what the top-k leaves out, in place, and is added: an alternative to an accumulator that
    remembers it, so that the two exclude each other. With `global_top_k`, the top-k selects over all compressed layers
    of a buffer as if they were one, and they must lie side by side in it, in the model's order.
    """

    lossless = False

    def __init__(
        self,
        codec: TopK,
        layers: Sequence[Layer],
        collectives: Collectives,
        accumulator: Accumulator | None = None,
        score: Score | None = None,
        dropped: Averager | None = None,
        global_top_k: bool = False,
    ) -> None:
        if accumulator is not None and dropped is not None:
            raise ValueError("what a top-k drops is either remembered by an accumulator or averaged, not both")
        self.codec, self.collectives = codec, collectives
        self.accumulator: Accumulator = accumulator or NoMemory()
        self.score, self.dropped, self.global_top_k = score, dropped, global_top_k
        self.sizes = {layer.name: layer.numel for layer in layers}
        self.compressed = {layer.name for layer in layers if layer.compressed}
        self.states = {**self.accumulator.states, **(score.states if score else {})}
        self._encoded_bytes = 0

    @property
    def encoded_bytes(self) -> int:
        return self._encoded_bytes + (self.dropped.encoded_bytes if self.dropped is not None else 0)

    def average_(self, gradients: Gradients, step: int) -> None:
        compressed, dense = self._sort(gradients)
        layout, network = self._plan(compressed), self.collectives
        message, positions = self._encode(layout, compressed, dense)
        received = network.gather(message, [len(message)] * network.world_size).view(network.world_size, -1)
        if self.dropped is not None:
            gradients.flat.index_fill_(0, positions, 0.0)
            self.dropped.average_(compressed, step)
        else:
            for name, at in zip(compressed.names, compressed.offsets, strict=True):
                gradients.flat[at : at + self.sizes[name]].zero_()
        self._add_up(layout, received, compressed, dense)
        start = 0
        for values in self._others(gradients):
            values.copy_(dense[start : start + len(values)])
            start += len(values)

    def _encode(self, layout: SparsePlan, compressed: Gradients, dense: Tensor) -> tuple[Tensor, Tensor]:
        """What this rank sends, and the positions of the values in it, in the buffer of what is owed."""
        fast = kernels.sparse_for_device(dense.device)
        compensated = self.accumulator.accumulate(compressed)
        scores = compensated if self.score is None else self.score.score(compressed, compensated)
        indices = fast.select(layout, scores.flat, self._starts(scores))
        starts = self._starts(compensated)
        message = torch.empty(layout.wire_bytes + dense.nbytes, dtype=torch.uint8, device=dense.device)
        fast.encode(layout, compensated.flat, starts, indices, message[: layout.wire_bytes])
        message[layout.wire_bytes :] = dense.view(torch.uint8)
        self._encoded_bytes += message.nbytes
        positions = indices + on_device(np.repeat(starts, layout.kept), indices.device)
        self.accumulator.clear_sent(positions)
        return message, positions

    def _add_up(self, layout: SparsePlan, received: Tensor, compressed: Gradients, dense: Tensor) -> None:
        """Add the mean of all ranks' sparse values to what is there; set `dense` to that of the dense ones."""
        fast = kernels.sparse_for_device(dense.device)
        starts, share, floats = self._starts(compressed), 1.0 / len(received), torch.empty_like(dense)
        dense.zero_()
        for row in received:
            fast.decode(layout, row[: layout.wire_bytes], compressed.flat, starts, share)
            floats.view(torch.uint8).copy_(row[layout.wire_bytes :])
            dense += floats * share

    def settle(self, applied: Tensor | bool) -> None:
        for memory in self.states.values():
            memory.settle(applied)

    def state_dict(self) -> dict[str, Any]:
        return {name: memory.state_dict() for name, memory in self.states.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if unknown := sorted(set(state) - set(self.states)):
            raise ValueError(
                f"the checkpoint holds {unknown[0]!r}, which this compression does not remember; "
                "resume with the compression that wrote it"
            )
        for name, memory in self.states.items():
            memory.load_state_dict(state.get(name, {}))

    def _sort(self, gradients: Gradients) -> tuple[Gradients, Tensor]:
        """The compressed layers, in place, and a copy of the values of the others."""
        places = list(zip(gradients.names, gradients.offsets, strict=True))
        compressed = [place for place in places if place[0] in self.compressed]
        names, offsets = zip(*compressed, strict=True) if compressed else ((), ())
        others = self._others(gradients)
        dense = torch.cat(others) if others else gradients.flat.new_empty(0)
        return Gradients(gradients.flat, names, offsets), dense

    def _others(self, gradients: Gradients) -> list[Tensor]:
        """The values of each layer that is not compressed, in place."""
        places = zip(gradients.names, gradients.offsets, strict=True)
        return [gradients.flat[at : at + self.sizes[name]] for name, at in places if name not in self.compressed]

    def _plan(self, compressed: Gradients) -> SparsePlan:
        counts = [self.sizes[name] for name in compressed.names]
        return self.codec.plan([sum(counts)] if self.global_top_k and counts else counts)

    def _starts(self, gradients: Gradients) -> Ints:
        """Where the layers, or with `global_top_k` all of them as one, begin in the buffer."""
        starts = np.array(gradients.offsets, np.int64)
        if not self.global_top_k:
            return starts
        counts = np.array([self.sizes[name] for name in gradients.names], np.int64)
        if not np.array_equal(starts[1:], (starts + counts)[:-1]):
            raise ValueError("a top-k over the whole model needs its compressed layers side by side, in order")
        return starts[:1]


def spans(gradients: Gradients, memory: LayerState) -> Iterator[tuple[Tensor, slice]]:
    """Of each layer its gradient, flat, and where it lies in what is remembered."""
    for name, at in zip(gradients.names, gradients.offsets, strict=True):
        yield gradients.flat[at : at + memory.spans[name]], memory.span(name)


def placed(values: Tensor, gradients: Gradients, memory: LayerState) -> Gradients:
    """The same layers, in a buffer laid out as `memory` is."""
    return Gradients(values, gradients.names, tuple(memory.offsets[name] for name in gradients.names))
