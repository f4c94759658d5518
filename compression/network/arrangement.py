"""Arrangements: over which networks ranks average, flat or in two levels."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .collectives import Collectives
from .hosts import Hosts, find_hosts
from .inside import Levels
from .shared_memory import inside_of
from .torch_distributed import TorchDistributed


@dataclass(frozen=True)
class Arrangement:
    """The network of all ranks, their hosts, and the two networks of this rank where they average in two levels."""

    collectives: Collectives
    hosts: Hosts
    levels: Levels | None = None
    close: Callable[[], None] = lambda: None

    @property
    def position(self) -> dict[str, int]:
        """What this rank's state depends on: its number among how many ranks; in two levels the hosts' number and size,
        its place, and its number among the ranks of that place.
        """
        if self.levels is None:
            return {"ranks": self.collectives.world_size, "rank": self.collectives.rank}
        inside, between = self.levels
        return {
            "hosts": between.world_size,
            "ranks_per_host": inside.world_size,
            "place": inside.rank,
            "number": between.rank,
        }


def in_levels(hierarchical: bool | None, hosts: Hosts, encodes: bool) -> bool:
    """Whether ranks average in two levels: as asked, or where that saves bytes (None).

    Raises ValueError where two levels are asked for and there are none.
    """
    if hierarchical is False:
        return False
    why_not = None
    if hosts.count == 1:
        why_not = (
            f"all {len(hosts.of)} ranks are on one host, and nothing crosses a link; leave it out, or give "
            "`ranks_per_host` to take one host as several"
        )
    elif hosts.ranks_per_host is None:
        why_not = f"there are {hosts}; start as many ranks on each, or average flat"
    elif hosts.ranks_per_host == 1:
        why_not = f"there are {hosts}, and nothing to add up inside; average flat"
    elif not encodes:
        why_not = (
            "this compressor encodes nothing, and two levels would only change its rounding; choose one that encodes, "
            "or average flat"
        )
    if hierarchical and why_not:
        raise ValueError(f"`hierarchical` needs several hosts with as many ranks each, two or more: {why_not}")
    return why_not is None


def hosts_of_levels(collectives: Collectives, inside: Collectives, between: Collectives) -> Hosts:
    """The hosts of all ranks, which name the groups that they were given. Every rank calls it.

    Raises ValueError, on every rank, where the groups are no two levels of these ranks.
    """
    known: Sequence[Any] = collectives.collect(
        (inside.collect(collectives.rank), inside.rank, between.collect(collectives.rank), between.rank)
    )
    hosts = Hosts.named([tuple(ranks) for ranks, *_ in known])
    fits = hosts.ranks_per_host is not None and all(
        ranks == hosts.inside[hosts.of[rank]]
        and place == hosts.place(rank)
        and others == hosts.between[place]
        and number == others.index(rank)
        for rank, (ranks, place, others, number) in enumerate(known)
    )
    if not fits:
        raise ValueError(
            f"`groups` are two levels of the same {collectives.world_size} ranks, (inside, between): every rank is in "
            "one group with the ranks of its host, and in one with the ranks of its place on each host, both in the "
            f"order of ranks; got groups of {inside.world_size} and {between.world_size}"
        )
    return hosts


def arrange(
    everyone: Collectives,
    members: Sequence[int] | None,
    device: torch.device,
    values: int,
    encodes: bool,
    *,
    hierarchical: bool | None = None,
    ranks_per_host: int | None = None,
    groups: tuple[Collectives, Collectives] | None = None,
) -> Arrangement:
    """The networks for gradients of so many `values` on `device`. Every rank of `everyone` calls it.

    `members` are the ranks of `everyone` in torch.distributed's world, where process groups of their own are to be made
    for them; else gradients travel over `everyone`, and in two levels over `groups`, (inside, between).

    Raises ValueError, on all ranks alike, where two levels are asked for and cannot be.
    """
    if groups is not None:
        hosts, hierarchical = hosts_of_levels(everyone, *groups), hierarchical is not False
    else:
        hosts = find_hosts(everyone)
        hosts = hosts.split(ranks_per_host) if ranks_per_host is not None else hosts
    two_levels = in_levels(hierarchical, hosts, encodes)
    if two_levels and groups is None and members is None:
        if hierarchical:
            raise ValueError("the `collectives` are those of all ranks; give `groups`, (inside, between), too")
        two_levels = False

    made = _Groups(members or (), device)
    network = made.network(range(everyone.world_size)) if members else everyone
    if not two_levels:
        return Arrangement(network, hosts, close=made.close)
    rank = everyone.rank
    if groups is None:
        groups = made.network(hosts.inside[hosts.of[rank]]), made.network(hosts.between[hosts.place(rank)])
    inside = inside_of(groups[0], device, values)

    def close() -> None:
        inside.close()
        made.close()

    return Arrangement(network, hosts, Levels(inside, groups[1]), close)


class _Groups:
    """Process groups that are made for gradients, and ended with them."""

    def __init__(self, members: Sequence[int], device: torch.device) -> None:
        self._members, self._device = members, device
        self._groups: list[dist.ProcessGroup] = []

    def network(self, ranks: Sequence[int]) -> TorchDistributed:
        """Groups for some of the members: for gloo, one for each direction of messages. Only these ranks call it."""
        chosen = [self._members[rank] for rank in ranks]
        count = 1 if self._device.type == "cuda" else 2
        own = [dist.new_group(chosen, use_local_synchronization=True) for _ in range(count)]
        self._groups += own
        return TorchDistributed(*own)

    def close(self) -> None:
        """End the groups. Calling it twice is harmless."""
        groups, self._groups = self._groups, []
        if groups and dist.is_initialized():
            # A thread of gloo that lets go of its last work wants Python's lock, which the end of its group holds.
            time.sleep(0.05)
            for group in groups:
                dist.destroy_process_group(group)
