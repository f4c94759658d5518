"""Arrangements: over which networks ranks average, flat or in two levels."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .collectives import Collectives
from .hosts import Hosts, find_hosts
from .inside import Inside, Levels, OverNccl, OverNetwork
from .process_groups import ProcessGroups
from .shared_memory import SharedMemory
from .torch_distributed import TorchDistributed

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrangement:
    """The network of all ranks, their hosts, and the two networks of this rank where they average in two levels."""

    collectives: Collectives
    hosts: Hosts
    levels: Levels | None = None
    close: Callable[[bool], None] = lambda sound: None
    """Ends what was made for it. Whether all collectives went well decides whether others may get its groups."""
    verify_wire: bool = False
    """Whether messages carry checksums."""

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
            f"groups are two levels of the same {collectives.world_size} ranks, (inside, between): every rank is in "
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
    verify_wire: bool = False,
) -> Arrangement:
    """The networks for gradients of so many `values` on `device`. Every rank of `everyone` calls it.

    `members` are the ranks of `everyone` in torch.distributed's world, where process groups of their own are to be made
    for them; else gradients travel over `everyone`, and in two levels over `groups`, (inside, between).

    Raises ValueError, on all ranks alike, where two levels are asked for and cannot be.
    """
    if groups is not None:
        hosts, hierarchical = hosts_of_levels(everyone, *groups), hierarchical is not False
        _warn_of_links_inside(hosts, find_hosts(everyone), everyone.rank)
    else:
        hosts = find_hosts(everyone)
        hosts = hosts.split(ranks_per_host) if ranks_per_host is not None else hosts
    two_levels = in_levels(hierarchical, hosts, encodes)
    if two_levels and groups is None and members is None:
        if hierarchical:
            raise ValueError("the collectives are those of all ranks; give groups=(inside, between), too")
        two_levels = False

    made = ProcessGroups(everyone, members or (), device)
    network = made.network([list(range(everyone.world_size))]) if members else everyone
    if not two_levels:
        return Arrangement(network, hosts, close=made.close, verify_wire=verify_wire)
    if groups is None:
        groups = made.network(hosts.inside), made.network(hosts.between)
    inside = inside_of(groups[0], device, values)

    def close(sound: bool) -> None:
        inside.close()
        made.close(sound)

    return Arrangement(network, hosts, Levels(inside, groups[1]), close, verify_wire)


def inside_of(network: Collectives, device: torch.device, values: int) -> Inside:
    """How ranks of one host add up: in shared memory on CPUs, where that can be; over NCCL on GPUs.

    `values`: of all gradients. Every rank of the host calls it.
    """
    if device.type == "cuda":
        return OverNccl(network.group) if isinstance(network, TorchDistributed) else OverNetwork(network)
    try:
        return SharedMemory(network, values)
    except OSError as error:
        if network.rank == 0:
            _log.warning("the ranks of a host share no memory (%s): they add up over its network, more slowly", error)
        return OverNetwork(network)


def _warn_of_links_inside(given: Hosts, found: Hosts, rank: int) -> None:
    """Say on rank 0 where ranks that were given as those of one host are on several."""
    for ranks in given.inside:
        if rank == 0 and len({found.of[other] for other in ranks}) > 1:
            _log.warning(
                "ranks %s were given as those of one host, and are on several: float32 crosses their links; groups are "
                "(inside, between), and a mesh is hosts x ranks",
                ", ".join(map(str, ranks)),
            )
            return
