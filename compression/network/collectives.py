"""Collectives: the few verbs by which ranks exchange bytes, over torch.distributed or alone.

The one place that calls the network, so that bytes are counted in one place too (`Metered`). Nothing here knows
what the bytes mean. Every rank makes the same calls in the same order; sizes are known to all beforehand.

W ranks. Bytes sent per rank follow from the algorithms: a ring all-reduce sends 2 (W - 1) / W of the tensor, an
exchange all messages but the rank's own, a gather the rank's message W - 1 times.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class PostedExchange(Protocol):
    """An exchange whose messages from others may arrive."""

    def send(self, messages: Tensor) -> None:
        """Begin to send this rank's own messages; called once."""

    def wait(self) -> Tensor:
        """The others' messages, as `Collectives.exchange` returns them; called once, after `send`."""


class PostedGather(Protocol):
    """A gather whose messages from others may arrive."""

    def send(self) -> None:
        """Begin to send this rank's message, which is in its place by now; called once."""

    def wait(self) -> Tensor:
        """All messages, as `Collectives.gather` returns them; called once, after `send`."""


class Collectives(Protocol):
    """The verbs that averagers need of a network."""

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

    def post_exchange(self, sizes: Sequence[int], tag: int, device: torch.device) -> PostedExchange:
        """An exchange in stages, of messages on `device`: the others' may come from now on.

        Those under way at one time have tags of their own. Posted early, it is known when the others send: before
        anything is sent, if there is time.
        """

    def post_gather(self, messages: Tensor, sizes: Sequence[int], tag: int) -> PostedGather:
        """A gather likewise. In `messages`, uint8 [sum(sizes)], every rank has its place.

        The others' arrive there, or all in another tensor that `wait` returns.
        """

    def matched_by_tag(self, device: torch.device) -> bool:
        """Whether ranks may send messages posted on `device` in different orders. No send waits then."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""


@dataclass
class _BlockingExchange:
    network: Collectives
    sizes: Sequence[int]
    received: Tensor | None = None

    def send(self, messages: Tensor) -> None:
        self.received = self.network.exchange(messages, self.sizes)

    def wait(self) -> Tensor:
        assert self.received is not None
        return self.received


@dataclass
class _BlockingGather:
    network: Collectives
    message: Tensor
    sizes: Sequence[int]
    received: Tensor | None = None

    def send(self) -> None:
        self.received = self.network.gather(self.message, self.sizes)

    def wait(self) -> Tensor:
        assert self.received is not None
        return self.received


class Staged:
    """Whole exchanges and gathers of networks that have them in stages."""

    def exchange(self: Collectives, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        posted = self.post_exchange(sizes, 0, messages.device)
        posted.send(messages)
        return posted.wait()

    def gather(self: Collectives, message: Tensor, sizes: Sequence[int]) -> Tensor:
        messages = message.new_empty(sum(sizes))
        part_of(messages, sizes, self.rank).copy_(message)
        posted = self.post_gather(messages, sizes, 0)
        posted.send()
        return posted.wait()


class Blocking:
    """Stages of networks that are through with a message before they return: all of them happen in `send`."""

    def post_exchange(self: Collectives, sizes: Sequence[int], tag: int, device: torch.device) -> PostedExchange:
        return _BlockingExchange(self, sizes)

    def post_gather(self: Collectives, messages: Tensor, sizes: Sequence[int], tag: int) -> PostedGather:
        return _BlockingGather(self, part_of(messages, sizes, self.rank), sizes)

    def matched_by_tag(self, device: torch.device) -> bool:
        return False


def part_of(messages: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    """A rank's own message among those of all ranks, in place."""
    start = sum(sizes[:rank])
    return messages[start : start + sizes[rank]]


@dataclass(frozen=True)
class Solo(Blocking):
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
    """Bytes that a rank handed to the network, those of them for other hosts, and seconds that it waited for it."""

    bytes_sent: float = 0.0
    bytes_between_hosts: float = 0.0
    seconds: float = 0.0


class Around:
    """What networks around another one, `inner`, leave to it."""

    inner: Collectives

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def world_size(self) -> int:
        return self.inner.world_size

    def matched_by_tag(self, device: torch.device) -> bool:
        return self.inner.matched_by_tag(device)

    def broadcast(self, value: Any) -> Any:
        return self.inner.broadcast(value)

    def collect(self, value: Any) -> list[Any]:
        return self.inner.collect(value)


@dataclass
class Metered(Around):
    """Counts what passes through another `Collectives`; results are the inner one's.

    `hosts` holds the number of each rank's host; where it is empty, each rank has one of its own.
    """

    inner: Collectives
    traffic: Traffic = field(default_factory=Traffic)
    hosts: Sequence[int] = ()

    def __post_init__(self) -> None:
        rank, size = self.inner.rank, self.inner.world_size
        hosts = self.hosts or range(size)
        self._elsewhere = [other for other in range(size) if hosts[other] != hosts[rank]]
        self._passes_on = (rank + 1) % size in self._elsewhere  # its neighbor in a ring is on another host

    def sum_(self, values: Tensor) -> None:
        start = time.perf_counter()
        self.inner.sum_(values)
        sent = 2 * values.nbytes * (self.world_size - 1) / self.world_size
        self.count(sent, sent if self._passes_on else 0, start)

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        start = time.perf_counter()
        received = self.inner.exchange(messages, sizes)
        self.count_exchange(sizes, start)
        return received

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        start = time.perf_counter()
        received = self.inner.gather(message, sizes)
        self.count_gather(message.nbytes, start)
        return received

    def post_exchange(self, sizes: Sequence[int], tag: int, device: torch.device) -> PostedExchange:
        return _MeteredExchange(self, self.inner.post_exchange(sizes, tag, device), sizes)

    def post_gather(self, messages: Tensor, sizes: Sequence[int], tag: int) -> PostedGather:
        return _MeteredGather(self, self.inner.post_gather(messages, sizes, tag), sizes[self.rank])

    def count_exchange(self, sizes: Sequence[int], start: float) -> None:
        """Count messages of these sizes to the other ranks."""
        between = sum(sizes[rank] for rank in self._elsewhere)
        self.count(sum(sizes) - sizes[self.rank], between, start)

    def count_gather(self, nbytes: int, start: float) -> None:
        """Count a message of so many bytes to each of the other ranks."""
        self.count(nbytes * (self.world_size - 1), nbytes * len(self._elsewhere), start)

    def count(self, sent: float, between: float, start: float) -> None:
        """Add bytes, those of them for other hosts, and the seconds since `start`."""
        self.traffic.bytes_sent += sent
        self.traffic.bytes_between_hosts += between
        self.traffic.seconds += time.perf_counter() - start


@dataclass
class _MeteredExchange:
    meter: Metered
    inner: PostedExchange
    sizes: Sequence[int]

    def send(self, messages: Tensor) -> None:
        start = time.perf_counter()
        self.inner.send(messages)
        self.meter.count_exchange(self.sizes, start)

    def wait(self) -> Tensor:
        start = time.perf_counter()
        received = self.inner.wait()
        self.meter.count(0, 0, start)
        return received


@dataclass
class _MeteredGather:
    meter: Metered
    inner: PostedGather
    nbytes: int  # of this rank's message

    def send(self) -> None:
        start = time.perf_counter()
        self.inner.send()
        self.meter.count_gather(self.nbytes, start)

    def wait(self) -> Tensor:
        start = time.perf_counter()
        received = self.inner.wait()
        self.meter.count(0, 0, start)
        return received
