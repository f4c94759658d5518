"""Arrangements: over which networks ranks average, flat or in two levels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
    close: Callable[[bool], None] = lambda sound: None
    """Ends what was made for it. Whether all collectives went well decides whether others may get its groups."""

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
            raise ValueError("the collectives are those of all ranks; give groups=(inside, between), too")
        two_levels = False

    made = _Groups(members or (), device)
    network = made.network([list(range(everyone.world_size))]) if members else everyone
    if not two_levels:
        return Arrangement(network, hosts, close=made.close)
    if groups is None:
        groups = made.network(hosts.inside), made.network(hosts.between)
    inside = inside_of(groups[0], device, values)

    def close(sound: bool) -> None:
        inside.close()
        made.close(sound)

    return Arrangement(network, hosts, Levels(inside, groups[1]), close)


class _Groups:
    """Process groups for gradients. Closed ones are kept for the next exchange over the same ranks.

    Torch names a group by how many there are, so that one made after another has ended may find that one's addresses.
    """

    _kept: ClassVar[dict[tuple[int, ...], list[dist.ProcessGroup]]] = {}  # by ranks
    _world: ClassVar[object] = None  # that the kept ones belong to

    def __init__(self, members: Sequence[int], device: torch.device) -> None:
        self._members, self._device = members, device
        self._taken: list[tuple[tuple[int, ...], dist.ProcessGroup]] = []
        if dist.is_initialized() and _Groups._world is not dist.group.WORLD:
            _Groups._kept, _Groups._world = {}, dist.group.WORLD

    def network(self, parts: Sequence[Sequence[int]]) -> TorchDistributed:
        """This rank's part of the members, in groups of its own: for gloo, one for each direction of messages.

        All members call it with the same parts.
        """
        count = 1 if self._device.type == "cuda" else 2
        return TorchDistributed(*(self._group(parts) for _ in range(count)))

    def close(self, sound: bool) -> None:
        """Keep the groups for others, unless something went wrong in them. Calling it twice is harmless."""
        taken, self._taken = self._taken, []
        if sound and _Groups._world is dist.group.WORLD:
            for ranks, group in taken:
                _Groups._kept.setdefault(ranks, []).append(group)

    def _group(self, parts: Sequence[Sequence[int]]) -> dist.ProcessGroup:
        chosen = [tuple(self._members[rank] for rank in part) for part in parts]
        own = next(ranks for ranks in chosen if dist.get_rank() in ranks)
        kept = _Groups._kept.get(own)
        if kept:
            group = kept.pop(0)
        elif len(self._members) == dist.get_world_size():
            made = {ranks: dist.new_group(list(ranks)) for ranks in chosen}  # which all ranks have to make
            group = made[own]
        else:
            group = dist.new_group(list(own), use_local_synchronization=True)
        self._taken.append((own, group))
        return group
