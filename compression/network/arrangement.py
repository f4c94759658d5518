"""Arrangements: over which networks ranks average, flat or in two levels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .collectives import Collectives
from .hosts import Hosts
from .inside import Levels


@dataclass(frozen=True)
class Arrangement:
    """The network of all ranks, their hosts, and the two networks of this rank where they average in two levels."""

    collectives: Collectives
    hosts: Hosts
    levels: Levels | None = None
    close: Callable[[], None] = lambda: None

    @property
    def position(self) -> dict[str, int] | None:
        """What this rank's state depends on: the hosts' number and size, its place, and its number among the ranks of
        that place; None where flat.
        """
        if self.levels is None:
            return None
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
