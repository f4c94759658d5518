"""Inside a host: its ranks add up their gradients to owners, and the owners hand out averages.

What travels here is float32 and as it is: a host's memory is faster than any code. R ranks of a host; a rank's number
among them is its place.
"""

from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..streams import Meanwhile, Until
from .collectives import Collectives

Spans = Sequence[Sequence[tuple[int, int]]]
"""(start, stop) of the slices of a flat buffer that each place owns: [R], in the order of the buffer."""

SummedUp = Generator[Meanwhile | Until, None, Tensor]
HandedOut = Generator[Meanwhile | Until, None, None]


class PostedInside(Protocol):
    """The two exchanges of one buffer, announced on every rank of the host in the same order."""

    def add_up(self, flat: Tensor) -> SummedUp:
        """The mean over the host's ranks of the slices that this rank owns, side by side: float32, a tensor of its own.

        Each rank's values are multiplied by 1 / R and then added in the order of places, as floats.
        """

    def hand_out(self, own: Tensor, flat: Tensor) -> HandedOut:
        """Put every owner's slices, `own` on this rank, into `flat`; called after `add_up`, of all buffers or none."""


class Inside(Protocol):
    """The ranks of one host."""

    @property
    def rank(self) -> int:
        """This rank's place."""

    @property
    def world_size(self) -> int:
        """R."""

    def post(self, values: int, spans: Spans) -> PostedInside:
        """Announce a buffer of so many values, on whatever thread."""

    @property
    def overlaps(self) -> bool:
        """Whether several buffers may be under way at once, in different orders on the ranks."""

    def close(self) -> None:
        """Let go of what is shared. Calling it twice is harmless."""


class Levels(NamedTuple):
    """This rank's two networks: the ranks of its host, and the ranks of its place on all hosts."""

    inside: Inside
    between: Collectives


def length(spans: Sequence[tuple[int, int]]) -> int:
    """The number of values in slices."""
    return sum(stop - start for start, stop in spans)


def packed(flat: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """A copy of slices, side by side."""
    return torch.cat([flat[:0], *(flat[start:stop] for start, stop in spans)])


def unpack(values: Tensor, flat: Tensor, spans: Sequence[tuple[int, int]]) -> None:
    """The inverse of `packed`: put values that lie side by side into slices of `flat`."""
    at = 0
    for start, stop in spans:
        flat[start:stop].copy_(values[at : at + stop - start])
        at += stop - start


class OneAtATime:
    """Ways over a network: one buffer at a time, and nothing that is shared."""

    overlaps = False

    def close(self) -> None:
        pass


class OverNetwork(OneAtATime):
    """Ranks of a host that share no memory: messages between all pairs, over any network.

    2 (R - 1) / R x 4 N bytes a rank, as a ring all-reduce sends.
    """

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self.rank, self.world_size = collectives.rank, collectives.world_size

    def post(self, values: int, spans: Spans) -> PostedInside:
        return _OverNetwork(self.collectives, spans)

class _OverNetwork:
    def __init__(self, network: Collectives, spans: Spans) -> None:
        self._network, self._spans = network, spans
        self._bytes = [4 * length(part) for part in spans]

    def add_up(self, flat: Tensor) -> SummedUp:
        yield Meanwhile.NONE_BEGINS
        network, scale = self._network, 1.0 / self._network.world_size
        parts = [packed(flat, part).mul_(scale) for part in self._spans]
        outgoing = [part.view(torch.uint8) for place, part in enumerate(parts) if place != network.rank]
        received = network.exchange(torch.cat([flat[:0].view(torch.uint8), *outgoing]), self._bytes)
        floats = received.reshape(-1).view(torch.float32)
        rows = list(floats.view(network.world_size - 1, self._bytes[network.rank] // 4).unbind())
        rows.insert(network.rank, parts[network.rank])
        total, *others = rows
        for row in others:
            total = total + row
        return total

    def hand_out(self, own: Tensor, flat: Tensor) -> HandedOut:
        yield Meanwhile.NONE_BEGINS
        received = self._network.gather(own.view(torch.uint8), self._bytes)
        for part, values in zip(self._spans, received.split(self._bytes), strict=True):
            unpack(values.clone().view(torch.float32), flat, part)


class OverNccl(OneAtATime):
    """GPUs of one host: NCCL's own sums at owners, and broadcasts from them, on the stream of the caller.

    Owners hold different numbers of values, which NCCL's reduce-scatter does not take: each slice is a reduce of its
    own. NCCL adds up in an order of its own, the same from step to step, and its calls have to come in one order on all
    ranks. No GPU has run it yet; the tests run it over gloo.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    def post(self, values: int, spans: Spans) -> PostedInside:
        return _OverNccl(self, spans)

class _OverNccl:
    def __init__(self, inside: OverNccl, spans: Spans) -> None:
        self._inside, self._spans = inside, spans

    def add_up(self, flat: Tensor) -> SummedUp:
        yield Meanwhile.NONE_BEGINS
        inside = self._inside
        parts = [packed(flat, part).mul_(1.0 / inside.world_size) for part in self._spans]
        for place, part in enumerate(parts):
            if part.numel():
                dist.reduce(part, group_dst=place, group=inside.group)
        return parts[inside.rank]

    def hand_out(self, own: Tensor, flat: Tensor) -> HandedOut:
        yield Meanwhile.NONE_BEGINS
        inside = self._inside
        for place, part in enumerate(self._spans):
            if count := length(part):
                values = own if place == inside.rank else own.new_empty(count)
                dist.broadcast(values, group_src=place, group=inside.group)
                unpack(values, flat, part)
