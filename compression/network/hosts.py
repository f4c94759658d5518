"""Hosts: which ranks share one, found from what launchers and machines say.

Ranks of a host reach one another through its memory; those of different hosts share the hosts' links.
"""

import os
import socket
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .collectives import Collectives

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of a machine since it was started, the same in its containers


@dataclass(frozen=True)
class Hosts:
    """The host of each rank, numbered in the order of the hosts' first ranks. A rank's place is its number on its host.

    Neither follows from the rank alone: launchers may deal ranks out in any order.
    """

    of: tuple[int, ...]

    @classmethod
    def named(cls, names: Sequence[Hashable]) -> "Hosts":
        """The hosts of ranks that each name their own."""
        numbers: dict[Hashable, int] = {}
        return cls(tuple(numbers.setdefault(name, len(numbers)) for name in names))

    @classmethod
    def single(cls, world_size: int) -> "Hosts":
        """All ranks on one host."""
        return cls((0,) * world_size)

    @classmethod
    def separate(cls, world_size: int) -> "Hosts":
        """Each rank on a host of its own."""
        return cls(tuple(range(world_size)))

    @property
    def count(self) -> int:
        return 1 + max(self.of)

    @cached_property
    def inside(self) -> list[list[int]]:
        """The ranks of each host, in order."""
        ranks: list[list[int]] = [[] for _ in range(self.count)]
        for rank, host in enumerate(self.of):
            ranks[host].append(rank)
        return ranks

    @property
    def sizes(self) -> list[int]:
        """The number of ranks of each host."""
        return [len(ranks) for ranks in self.inside]

    @property
    def ranks_per_host(self) -> int | None:
        """The number of ranks of every host; None where hosts differ."""
        first, *others = self.sizes
        return first if all(size == first for size in others) else None

    @cached_property
    def between(self) -> list[list[int]]:
        """The ranks of each place, one of every host, in order. Hosts must have as many ranks each."""
        return [sorted(ranks) for ranks in zip(*self.inside, strict=True)]

    @property
    def ring_edges(self) -> int:
        """Pairs of neighbors on different hosts in a ring of all ranks in order."""
        return sum(host != following for host, following in zip(self.of, self.of[1:] + self.of[:1], strict=True))

    def place(self, rank: int) -> int:
        """A rank's number on its host."""
        return self.inside[self.of[rank]].index(rank)

    def split(self, ranks_per_host: int) -> "Hosts":
        """The hosts taken as several of so many ranks each, in rank order.

        Raises ValueError where that does not divide the ranks of every host.
        """
        if ranks_per_host < 1:
            raise ValueError(f"`ranks_per_host` counts ranks, at least 1, got {ranks_per_host}")
        if any(size % ranks_per_host for size in self.sizes):
            raise ValueError(
                f"`ranks_per_host` {ranks_per_host} does not divide the ranks of every host: there are "
                f"{' + '.join(map(str, self.sizes))}; choose a divisor, or leave it out"
            )
        return Hosts.named([(host, self.place(rank) // ranks_per_host) for rank, host in enumerate(self.of)])

    def __str__(self) -> str:
        if self.ranks_per_host is None:
            return f"hosts of {' + '.join(map(str, self.sizes))} ranks"
        return f"{self.count} {'host' if self.count == 1 else 'hosts'} x {self.ranks_per_host}"


def names_of_this_host(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What this process knows its host by, the best source first.

    Launchers know how they dealt out the ranks. A machine's boot id is the same in all of its containers, whatever
    they are called, and differs from that of another machine whose containers are called alike. Host names are the
    last resort.
    """
    names: dict[str, str] = {}
    if "LOCAL_WORLD_SIZE" in environment and "GROUP_RANK" in environment:
        names["torchrun"] = environment["GROUP_RANK"]
    if "HOROVOD_LOCAL_RANK" in environment:
        # Among hosts that differ, cross ranks count the hosts that have such a local rank: no name of a host.
        known = environment.get("HOROVOD_HOSTNAME") or environment.get("HOROVOD_CROSS_RANK")
        if known is not None:
            names["horovodrun"] = known
    if "SLURM_PROCID" in environment and "SLURM_NODEID" in environment:
        names["slurm"] = environment["SLURM_NODEID"]
    if BOOT_ID.exists():
        names["machine"] = BOOT_ID.read_text().strip()
    names["name"] = socket.gethostname()
    return names


def find_hosts(collectives: Collectives) -> Hosts:
    """The hosts of all ranks, by the best source that every rank has. Every rank calls it."""
    return Hosts.single(1) if collectives.world_size == 1 else of_names(collectives.collect(names_of_this_host()))


def of_names(known: Sequence[Mapping[str, str]]) -> Hosts:
    """The hosts of ranks, from the names that each knows its own by."""
    source = next(source for source in known[0] if all(source in names for names in known))
    return Hosts.named([names[source] for names in known])
