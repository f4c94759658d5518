"""Collectives over torch.distributed: gloo on CPUs, NCCL on GPUs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import PostedExchange, PostedGather, Staged


def let_works_go(seconds: float = 0.05) -> None:
    """Wait until gloo's threads have let go of their last works: to be called before groups, or Python, end.

    Letting go takes Python's lock. The end of a group waits for the thread with that lock in hand; where Python has
    ended, the thread ends the process with an abort. Nothing tells when it is through.
    """
    time.sleep(seconds)


class TorchDistributed(Staged):
    """Collectives over a torch process group (gloo on CPUs, NCCL on GPUs).

    `group` should be used by one thread only: gloo matches collectives by the order in which they are issued. Exchanges
    and gathers it matches by their tags, and other threads may post them.

    Exchange and gather are sends and receives between all pairs at once. In torch's all-to-all over gloo the two
    directions of a link take turns; gloo's all-gather wants equal sizes, and shards differ by a bucket.

    `upward`, another group over the same ranks, carries messages to ranks of higher numbers. It is there for gloo,
    which has one lock for each connection: who sends something on it keeps what arrives there waiting, and the thread
    that would receive it spins meanwhile. Tensors on GPUs travel in `group` alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, upward: dist.ProcessGroup | None = None) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.group: dist.ProcessGroup = group or dist.group.WORLD  # type: ignore[assignment]  # it exists by now
        self._upward = upward or self.group

    def sum_(self, values: Tensor) -> None:
        dist.all_reduce(values, group=self.group)

    def post_exchange(self, sizes: Sequence[int], tag: int, device: torch.device) -> PostedExchange:
        received = torch.empty(self.world_size - 1, sizes[self.rank], dtype=torch.uint8, device=device)
        rows = received.unbind()
        incoming = [*rows[: self.rank], received[:0], *rows[self.rank :]]
        outgoing = [*sizes[: self.rank], 0, *sizes[self.rank + 1 :]]
        return _Exchange(_Messages(self, incoming, 2 * tag, received), outgoing)

    def post_gather(self, messages: Tensor, sizes: Sequence[int], tag: int) -> PostedGather:
        parts = messages.split_with_sizes(list(sizes))
        return _Gather(_Messages(self, parts, 2 * tag + 1, messages), [parts[self.rank]] * self.world_size)

    def matched_by_tag(self, device: torch.device) -> bool:
        return device.type == "cpu"  # gloo goes by tags, NCCL by order

    def group_from(self, sender: int, receiver: int) -> dist.ProcessGroup:
        """The group that carries messages from one rank to another."""
        return self._upward if sender < receiver else self.group

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, group_src=0, group=self.group)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


class _Messages:
    """Messages between this rank and every other one: the others' may come, then its own go, then all have come.

    `incoming[r]`, part of `received`, is filled with the message of rank r.

    Gloo begins to send when its peer says that it is ready to receive. In one group it says so on the connection that
    carries its own messages. Said after a long message it arrives after it, and one rank waits while the other sends:
    so every rank says it first. Said while the peer sends on that connection, it makes the peer's thread spin: the
    sooner, the better.
    """

    def __init__(self, network: TorchDistributed, incoming: Sequence[Tensor], tag: int, received: Tensor) -> None:
        self._network, self._incoming, self._tag, self._received = network, incoming, tag, received
        rank, size = network.rank, network.world_size
        self._peers = [(rank + turn) % size for turn in range(1, size)]
        self._senders = [peer for peer in self._peers[::-1] if incoming[peer].numel()]
        self._on_gpus = received.device.type == "cuda"
        self._works: list[dist.Work] = []
        if not self._on_gpus:  # by the groups' own methods: checking in Python takes longer than gloo does
            self._works = [network.group_from(peer, rank).recv([incoming[peer]], peer, tag) for peer in self._senders]

    def send(self, outgoing: Sequence[Tensor]) -> None:
        network, tag = self._network, self._tag
        receivers = [peer for peer in self._peers if outgoing[peer].numel()]
        if self._on_gpus:  # NCCL has to start them together
            group = network.group
            asked = [dist.P2POp(dist.irecv, self._incoming[peer], None, group, tag, peer) for peer in self._senders]
            asked += [dist.P2POp(dist.isend, outgoing[peer], None, group, tag, peer) for peer in receivers]
            self._works.extend(dist.batch_isend_irecv(asked) if asked else [])
        else:
            for peer in receivers:
                self._works.append(network.group_from(network.rank, peer).send([outgoing[peer]], peer, tag))

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received


@dataclass
class _Exchange:
    messages: _Messages
    outgoing: list[int]  # bytes to each rank

    def send(self, messages: Tensor) -> None:
        self.messages.send(messages.split_with_sizes(self.outgoing))

    def wait(self) -> Tensor:
        return self.messages.wait()


@dataclass
class _Gather:
    messages: _Messages
    outgoing: list[Tensor]  # the message for each rank

    def send(self) -> None:
        self.messages.send(self.outgoing)

    def wait(self) -> Tensor:
        return self.messages.wait()
