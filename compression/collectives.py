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
import torch.distributed as dist
from torch import Tensor

Pending = Callable[[], Tensor]
"""What is under way: to be called once, it waits and returns what has arrived."""

ExpectedExchange = Callable[[Tensor], Pending]
"""An exchange whose messages may arrive: to be called once, with this rank's own, which it begins to send."""

ExpectedGather = Callable[[], Pending]
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

    def expect_exchange(self, sizes: Sequence[int], chunk: int, device: torch.device) -> ExpectedExchange:
        """An exchange in parts, of messages on `device`: say that those of the others may come, send, and wait.

        Those under way at one time have numbers of their own. Said early, it is known when the others send: before
        anything is sent, if there is time.
        """

    def expect_gather(self, messages: Tensor, sizes: Sequence[int], chunk: int) -> ExpectedGather:
        """A gather likewise. In `messages`, uint8 [sum(sizes)], every rank has its place.

        The others' arrive there, or all in another tensor that is returned.
        """

    def any_order(self, device: torch.device) -> bool:
        """Whether ranks may send what they expect on `device` in different orders. No send waits then."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""


class AtOnce:
    """For networks that are through with a message before they return."""

    def expect_exchange(self: Collectives, sizes: Sequence[int], chunk: int, device: torch.device) -> ExpectedExchange:
        def send(messages: Tensor) -> Pending:
            received = self.exchange(messages, sizes)
            return lambda: received

        return send

    def expect_gather(self: Collectives, messages: Tensor, sizes: Sequence[int], chunk: int) -> ExpectedGather:
        def send() -> Pending:
            received = self.gather(part_of(messages, sizes, self.rank), sizes)
            return lambda: received

        return send

    def any_order(self, device: torch.device) -> bool:
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


class TorchDistributed:
    """Collectives over a torch process group (gloo on CPUs, NCCL on GPUs).

    `group` should be used by one thread only: gloo matches collectives by the order in which they are issued. Exchanges
    and gathers it matches by their numbers, and other threads may expect them.

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
        return self.expect_exchange(sizes, 0, messages.device)(messages)()

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        messages = message.new_empty(sum(sizes))
        part_of(messages, sizes, self.rank).copy_(message)
        return self.expect_gather(messages, sizes, 0)()()

    def expect_exchange(self, sizes: Sequence[int], chunk: int, device: torch.device) -> ExpectedExchange:
        received = torch.empty(self.world_size - 1, sizes[self.rank], dtype=torch.uint8, device=device)
        rows = received.unbind()
        send = self._expect([*rows[: self.rank], received[:0], *rows[self.rank :]], 2 * chunk, received)
        outgoing = [*sizes[: self.rank], 0, *sizes[self.rank + 1 :]]
        return lambda messages: send(messages.split_with_sizes(outgoing))

    def expect_gather(self, messages: Tensor, sizes: Sequence[int], chunk: int) -> ExpectedGather:
        parts = messages.split_with_sizes(list(sizes))
        send = self._expect(parts, 2 * chunk + 1, messages)
        return lambda: send([parts[self.rank]] * self.world_size)

    def any_order(self, device: torch.device) -> bool:
        return device.type == "cpu"  # gloo goes by numbers, NCCL by order

    def _expect(self, incoming: Sequence[Tensor], tag: int, received: Tensor) -> Callable[[Sequence[Tensor]], Pending]:
        """Fill `incoming[r]`, part of `received`, with what every other rank r sends. Returns what sends them theirs.

        Gloo begins to send when its peer says that it is ready to receive. In one group it says so on the connection
        that carries its own messages. Said after a long message it arrives after it, and one rank waits while the
        other sends: so every rank says it first. Said while the peer sends on that connection, it makes the peer's
        thread spin: the sooner, the better.
        """
        peers = [(self.rank + turn) % self.world_size for turn in range(1, self.world_size)]
        senders = [peer for peer in peers[::-1] if incoming[peer].numel()]
        on_gpus = received.device.type == "cuda"
        works: list[dist.Work] = []
        if not on_gpus:  # by the groups' own methods: checking in Python takes longer than gloo does
            works = [self._group_from(peer, self.rank).recv([incoming[peer]], peer, tag) for peer in senders]

        def send(outgoing: Sequence[Tensor]) -> Pending:
            receivers = [peer for peer in peers if outgoing[peer].numel()]
            if on_gpus:  # NCCL has to start them together
                asked = [dist.P2POp(dist.irecv, incoming[peer], None, self.group, tag, peer) for peer in senders]
                asked += [dist.P2POp(dist.isend, outgoing[peer], None, self.group, tag, peer) for peer in receivers]
                works.extend(dist.batch_isend_irecv(asked) if asked else [])
            else:
                works.extend(self._group_from(self.rank, peer).send([outgoing[peer]], peer, tag) for peer in receivers)
            return wait

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return received

        return send

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
        start = time.perf_counter()
        received = self.inner.exchange(messages, sizes)
        self._count(messages.nbytes, start)
        return received

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        start = time.perf_counter()
        received = self.inner.gather(message, sizes)
        self._count(message.nbytes * (self.world_size - 1), start)
        return received

    def expect_exchange(self, sizes: Sequence[int], chunk: int, device: torch.device) -> ExpectedExchange:
        inner = self.inner.expect_exchange(sizes, chunk, device)

        def send(messages: Tensor) -> Pending:
            start = time.perf_counter()
            pending = inner(messages)
            self._count(messages.nbytes, start)
            return self._timed(pending)

        return send

    def expect_gather(self, messages: Tensor, sizes: Sequence[int], chunk: int) -> ExpectedGather:
        inner = self.inner.expect_gather(messages, sizes, chunk)

        def send() -> Pending:
            start = time.perf_counter()
            pending = inner()
            self._count(sizes[self.rank] * (self.world_size - 1), start)
            return self._timed(pending)

        return send

    def any_order(self, device: torch.device) -> bool:
        return self.inner.any_order(device)

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
