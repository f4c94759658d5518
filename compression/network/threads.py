"""Ranks as threads of one process: a network in memory, on which many ranks average in milliseconds.

For tests and checks: Python lets one thread compute at a time.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from .collectives import Blocking
from .hosts import Hosts

Result = TypeVar("Result")
_LEFT = object()
"""The value of a rank that takes part no longer."""


class ThreadCollectives(Blocking):
    """One rank of a world whose ranks are threads of this process. Sums are taken in rank order."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    @classmethod
    def of(cls, ranks: "ThreadCollectives") -> Self:
        """In place of another network of this kind, which is no longer to be used."""
        return cls(ranks.rank, ranks._slots, ranks._barrier)

    def collect(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait()
        values = list(self._slots)
        if value is not _LEFT and (gone := [rank for rank, other in enumerate(values) if other is _LEFT]):
            raise RuntimeError(f"rank {self.rank} waits for rank {gone[0]}, which has ended")
        self._barrier.wait()
        return values

    def leave(self) -> None:
        """Wait until all ranks do so; RuntimeError on one that waits for something else instead."""
        self.collect(_LEFT)

    def broadcast(self, value: Any) -> Any:
        return self.collect(value)[0]

    def sum_(self, values: Tensor) -> None:
        total = torch.zeros_like(values)
        for other in self.collect(values.clone()):
            total += other
        values.copy_(total)

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        received = messages.new_empty(self.world_size - 1, sizes[self.rank])
        others = [other for other in range(self.world_size) if other != self.rank]
        sent = self.collect(messages.split([sizes[other] for other in others]))
        for row, other in zip(received, others, strict=True):
            row.copy_(sent[other][self.rank - (self.rank > other)])
        self.collect(None)  # nobody goes on and changes what others still read
        return received

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        if len(message) != sizes[self.rank]:
            raise ValueError(f"a message of {sizes[self.rank]} bytes was announced, and one of {len(message)} is sent")
        return torch.cat(self.collect(message.clone()))


class Counting(ThreadCollectives):
    """Counts the messages that leave this rank, and the rounds in which it waits; an all-reduce is a ring's."""

    messages = rounds = 0

    def sum_(self, values: Tensor) -> None:
        self._count([True] * 2 * (self.world_size - 1), 2 * (self.world_size - 1))
        super().sum_(values)

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        self._count([size > 0 for other, size in enumerate(sizes) if other != self.rank])
        return super().exchange(messages, sizes)

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        self._count([len(message) > 0] * (self.world_size - 1))
        return super().gather(message, sizes)

    def _count(self, sent: list[bool], rounds: int = 1) -> None:
        self.messages += sum(sent)
        self.rounds += rounds if self.world_size > 1 else 0


class ThreadLevels(NamedTuple):
    """The networks of a rank that averages in two levels: all ranks, those of its host, those of its place."""

    everyone: ThreadCollectives
    inside: ThreadCollectives
    between: ThreadCollectives


def run_ranks(world_size: int, rank_main: Callable[[ThreadCollectives], Result]) -> list[Result]:
    """Results of `rank_main(collectives)` on every rank. The first error of any rank is raised."""
    return _run([[list(range(world_size))]], lambda networks: rank_main(networks[0]))


def run_hosts(hosts: Hosts, rank_main: Callable[[ThreadLevels], Result]) -> list[Result]:
    """Likewise of `rank_main(levels)`."""
    everyone = [list(range(len(hosts.of)))]
    return _run([everyone, hosts.inside, hosts.between], lambda networks: rank_main(ThreadLevels(*networks)))


def _run(
    worlds: Sequence[Sequence[Sequence[int]]], rank_main: Callable[[list[ThreadCollectives]], Result]
) -> list[Result]:
    """Results of every rank, which is in one group of each of the worlds."""
    networks: dict[int, list[ThreadCollectives]] = {}
    barriers = []
    for groups in worlds:
        for group in groups:
            slots: list[Any] = [None] * len(group)
            barriers.append(threading.Barrier(len(group)))
            for number, rank in enumerate(group):
                networks.setdefault(rank, []).append(ThreadCollectives(number, slots, barriers[-1]))
    results: list[Any] = [None] * len(networks)
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = rank_main(networks[rank])
            for network in networks[rank]:
                network.leave()
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append(error)
            for barrier in barriers:
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in networks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
