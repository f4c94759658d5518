"""Collectives: the few verbs by which ranks exchange bytes, over torch.distributed or alone.

The one place that calls the network, so that bytes are counted in one place too (`Metered`). Nothing here knows
what the bytes mean. Every rank makes the same calls in the same order; sizes are known to all beforehand.

W ranks. Bytes sent per rank follow from the algorithms: a ring all-reduce sends 2 (W - 1) / W of the tensor, an
exchange all messages but the rank's own, a gather the rank's message W - 1 times.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], Tensor]
"""What is under way: to be called once, it waits and returns what has arrived."""

PostedExchange = Callable[[Tensor], Work]
"""An exchange whose messages may arrive: to be called once, with this rank's own, which it begins to send."""

PostedGather = Callable[[], Work]
"""A gather likewise. This rank's message has to be in its place by then."""


class Collectives(Protocol):
    """What averagers need of a network."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum_(self, values: Tensor) -> None:
        """Add up over the ranks, in place."""

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        """Message r goes to rank r, and none to this rank itself.

        uint8 [sum of the others' sizes] -> uint8 [W - 1, sizes[rank]]: from each of the others, in rank order.
        """

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        """Everyone gets everyone's message. uint8 [sizes[rank]] -> uint8 [sum(sizes)], in rank order."""

    def post_exchange(self, sizes: Sequence[int], chunk: int, device: torch.device) -> PostedExchange:
        """An exchange in parts, of messages on `device`: say that those of the others may come, send, and wait.

        Those under way at one time have numbers of their own. Said early, it is known when the others send: before
        anything is sent, if there is time.
        """

    def post_gather(self, messages: Tensor, sizes: Sequence[int], chunk: int) -> PostedGather:
        """A gather likewise. In `messages`, uint8 [sum(sizes)], every rank has its place.

        The others' arrive there, or all in another tensor that is returned.
        """

    def matched_by_tag(self, device: torch.device) -> bool:
        """Whether ranks may send what they expect on `device` in different orders. No send waits then."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""


class AtOnce:
    """For networks that are through with a message before they return."""

    def post_exchange(self: Collectives, sizes: Sequence[int], chunk: int, device: torch.device) -> PostedExchange:
        def send(messages: Tensor) -> Work:
            received = self.exchange(messages, sizes)
            return lambda: received

        return send

    def post_gather(self: Collectives, messages: Tensor, sizes: Sequence[int], chunk: int) -> PostedGather:
        def send() -> Work:
            received = self.gather(part_of(messages, sizes, self.rank), sizes)
            return lambda: received

        return send

    def matched_by_tag(self, device: torch.device) -> bool:
        return False


def part_of(messages: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    """A rank's own message among those of all ranks, in place."""
    start = sum(sizes[:rank])
    return messages[start : start + sizes[rank]]


@dataclass(frozen=True)
class Solo(AtOnce):
    """A world of one rank: everything is already where it belongs."""

    rank: int = 0
    world_size: int = 1

    def sum_(self, values: Tensor) -> None:
        pass

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        return messages.view(0, sizes[self.rank])

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        return message

    def broadcast(self, value: Any) -> Any:
        return value

    def collect(self, value: Any) -> list[Any]:
        return [value]




@dataclass
class Traffic:
    """What a rank handed to the network, and how long it waited for it."""

    bytes_sent: float = 0.0
    seconds: float = 0.0


@dataclass
class Metered:
    """Counts what passes through another `Collectives`; results are the inner one's."""

    inner: Collectives
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def world_size(self) -> int:
        return self.inner.world_size

    def sum_(self, values: Tensor) -> None:
        start = time.perf_counter()
        self.inner.sum_(values)
        self._count(2 * values.nbytes * (self.world_size - 1) / self.world_size, start)

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        start = time.perf_counter()
        received = self.inner.exchange(messages, sizes)
        self._count(messages.nbytes, start)
        return received

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        start = time.perf_counter()
        received = self.inner.gather(message, sizes)
        self._count(message.nbytes * (self.world_size - 1), start)
        return received

    def post_exchange(self, sizes: Sequence[int], chunk: int, device: torch.device) -> PostedExchange:
        inner = self.inner.post_exchange(sizes, chunk, device)

        def send(messages: Tensor) -> Work:
            start = time.perf_counter()
            pending = inner(messages)
            self._count(messages.nbytes, start)
            return self._timed(pending)

        return send

    def post_gather(self, messages: Tensor, sizes: Sequence[int], chunk: int) -> PostedGather:
        inner = self.inner.post_gather(messages, sizes, chunk)

        def send() -> Work:
            start = time.perf_counter()
            pending = inner()
            self._count(sizes[self.rank] * (self.world_size - 1), start)
            return self._timed(pending)

        return send

    def matched_by_tag(self, device: torch.device) -> bool:
        return self.inner.matched_by_tag(device)

    def _timed(self, pending: Work) -> Work:
        def wait() -> Tensor:
            start = time.perf_counter()
            received = pending()
            self._count(0, start)
            return received

        return wait

    def broadcast(self, value: Any) -> Any:
        return self.inner.broadcast(value)

    def collect(self, value: Any) -> list[Any]:
        return self.inner.collect(value)

    def _count(self, sent: float, start: float) -> None:
        self.traffic.bytes_sent += sent
        self.traffic.seconds += time.perf_counter() - start
