"""Collectives over torch.distributed: gloo on CPUs, NCCL on GPUs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import PostedExchange, PostedGather, Work, part_of


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
        return self.post_exchange(sizes, 0, messages.device)(messages)()

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        messages = message.new_empty(sum(sizes))
        part_of(messages, sizes, self.rank).copy_(message)
        return self.post_gather(messages, sizes, 0)()()

    def post_exchange(self, sizes: Sequence[int], chunk: int, device: torch.device) -> PostedExchange:
        received = torch.empty(self.world_size - 1, sizes[self.rank], dtype=torch.uint8, device=device)
        rows = received.unbind()
        send = self._expect([*rows[: self.rank], received[:0], *rows[self.rank :]], 2 * chunk, received)
        outgoing = [*sizes[: self.rank], 0, *sizes[self.rank + 1 :]]
        return lambda messages: send(messages.split_with_sizes(outgoing))

    def post_gather(self, messages: Tensor, sizes: Sequence[int], chunk: int) -> PostedGather:
        parts = messages.split_with_sizes(list(sizes))
        send = self._expect(parts, 2 * chunk + 1, messages)
        return lambda: send([parts[self.rank]] * self.world_size)

    def matched_by_tag(self, device: torch.device) -> bool:
        return device.type == "cpu"  # gloo goes by numbers, NCCL by order

    def _expect(self, incoming: Sequence[Tensor], tag: int, received: Tensor) -> Callable[[Sequence[Tensor]], Work]:
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

        def send(outgoing: Sequence[Tensor]) -> Work:
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
