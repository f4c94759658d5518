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

import torch.distributed as dist
from torch import Tensor

Pending = Callable[[], Tensor]
"""What is under way: to be called once, it waits and returns what has arrived."""


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

    def begin_exchange(self, messages: Tensor, sizes: Sequence[int], chunk: int) -> Pending:
        """An exchange that goes on meanwhile. Those under way at one time have numbers of their own."""

    def begin_gather(self, messages: Tensor, sizes: Sequence[int], chunk: int) -> Pending:
        """A gather that goes on meanwhile, likewise. In `messages`, uint8 [sum(sizes)], this rank's is in its place.

        The others arrive there, or all in another tensor that is returned.
        """

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""


class AtOnce:
    """For networks that are through with a message before they return."""

    def begin_exchange(self: Collectives, messages: Tensor, sizes: Sequence[int], chunk: int) -> Pending:
        received = self.exchange(messages, sizes)
        return lambda: received

    def begin_gather(self: Collectives, messages: Tensor, sizes: Sequence[int], chunk: int) -> Pending:
        received = self.gather(part_of(messages, sizes, self.rank), sizes)
        return lambda: received


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


class TorchDistributed:
    """Collectives over a torch process group (gloo on CPUs, NCCL on GPUs).

    `group` should be used by one thread only: gloo matches collectives by the order in which they are issued.

    Exchange and gather are sends and receives between all pairs at once. In torch's all-to-all over gloo the two
    directions of a link take turns; gloo's all-gather wants equal sizes, and shares differ by a bucket.

    `upward`, another group over the same ranks, carries messages to ranks of higher numbers. It is there for gloo,
    which has one lock for each connection: who sends something on it keeps what arrives there waiting, and the thread
    that would receive it spins meanwhile. What lies on GPUs travels in `group` alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, upward: dist.ProcessGroup | None = None) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.group: dist.ProcessGroup = group or dist.group.WORLD  # type: ignore[assignment]  # it exists by now
        self._upward = upward or self.group

    def sum_(self, values: Tensor) -> None:
        dist.all_reduce(values, group=self.group)

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        return self.begin_exchange(messages, sizes, 0)()

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        messages = message.new_empty(sum(sizes))
        part_of(messages, sizes, self.rank).copy_(message)
        return self.begin_gather(messages, sizes, 0)()

    def begin_exchange(self, messages: Tensor, sizes: Sequence[int], chunk: int) -> Pending:
        received = messages.new_empty(self.world_size - 1, sizes[self.rank])
        rows = received.unbind()
        incoming = [*rows[: self.rank], messages[:0], *rows[self.rank :]]
        outgoing = messages.split_with_sizes([*sizes[: self.rank], 0, *sizes[self.rank + 1 :]])
        return self._swap(outgoing, incoming, 2 * chunk, received)

    def begin_gather(self, messages: Tensor, sizes: Sequence[int], chunk: int) -> Pending:
        parts = messages.split_with_sizes(list(sizes))
        return self._swap([parts[self.rank]] * self.world_size, parts, 2 * chunk + 1, messages)

    def _swap(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], tag: int, received: Tensor) -> Pending:
        """Send `outgoing[r]` to every other rank r, fill `incoming[r]`, part of `received`, with what r sends.

        Gloo begins to send when its peer says that it is ready to receive. In one group it says so on the connection
        that carries its own messages. Said after a long message it arrives after it, and one rank waits while the
        other sends: so every rank says it first.
        """
        peers = [(self.rank + turn) % self.world_size for turn in range(1, self.world_size)]
        senders = [peer for peer in peers[::-1] if incoming[peer].numel()]
        receivers = [peer for peer in peers if outgoing[peer].numel()]
        if received.device.type == "cuda":  # NCCL has to start them together
            asked = [dist.P2POp(dist.irecv, incoming[peer], None, self.group, tag, peer) for peer in senders]
            asked += [dist.P2POp(dist.isend, outgoing[peer], None, self.group, tag, peer) for peer in receivers]
            works = dist.batch_isend_irecv(asked) if asked else []
        else:  # by the groups' own methods: checking in Python takes longer than gloo does
            works = [self._group_from(peer, self.rank).recv([incoming[peer]], peer, tag) for peer in senders]
            works += [self._group_from(self.rank, peer).send([outgoing[peer]], peer, tag) for peer in receivers]

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return received

        return wait

    def _group_from(self, sender: int, receiver: int) -> dist.ProcessGroup:
        return self._upward if sender < receiver else self.group

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, group_src=0, group=self.group)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


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
        return self.begin_exchange(messages, sizes, 0)()

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        start = time.perf_counter()
        received = self.inner.gather(message, sizes)
        self._count(message.nbytes * (self.world_size - 1), start)
        return received

    def begin_exchange(self, messages: Tensor, sizes: Sequence[int], chunk: int) -> Pending:
        start = time.perf_counter()
        pending = self.inner.begin_exchange(messages, sizes, chunk)
        self._count(messages.nbytes, start)
        return self._timed(pending)

    def begin_gather(self, messages: Tensor, sizes: Sequence[int], chunk: int) -> Pending:
        start = time.perf_counter()
        pending = self.inner.begin_gather(messages, sizes, chunk)
        self._count(sizes[self.rank] * (self.world_size - 1), start)
        return self._timed(pending)

    def _timed(self, pending: Pending) -> Pending:
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
