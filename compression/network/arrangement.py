"""Arrangements: over which networks ranks average, flat or in two levels."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from .collectives import Collectives
from .hosts import Hosts, find_hosts
from .inside import Levels
from .shared_memory import inside_of
from .torch_distributed import TorchDistributed

Parts = tuple[tuple[int, ...], ...]
"""Ranks of torch.distributed's world, by the process group that they are to have."""

_log = logging.getLogger(__name__)


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
        _warn_of_links_inside(hosts, find_hosts(everyone), everyone.rank)
    else:
        hosts = find_hosts(everyone)
        hosts = hosts.split(ranks_per_host) if ranks_per_host is not None else hosts
    two_levels = in_levels(hierarchical, hosts, encodes)
    if two_levels and groups is None and members is None:
        if hierarchical:
            raise ValueError("the collectives are those of all ranks; give groups=(inside, between), too")
        two_levels = False

    made = _Groups(everyone, members or (), device)
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


class _Groups:
    """Process groups for gradients. Closed ones are kept for the next exchange over the same ranks.

    Torch names a group by how many there are, so that one made after another has ended may find that one's addresses.
    """

    _kept: ClassVar[dict[Parts, list[dist.ProcessGroup]]] = {}  # this rank's, by the parts of all
    _world: ClassVar[object] = None  # that the kept ones belong to

    def __init__(self, everyone: Collectives, members: Sequence[int], device: torch.device) -> None:
        self._everyone, self._members = everyone, members
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._taken: list[tuple[Parts, dist.ProcessGroup]] = []
        if dist.is_initialized() and _Groups._world is not dist.group.WORLD:
            _Groups._kept, _Groups._world = {}, dist.group.WORLD

    def network(self, parts: Sequence[Sequence[int]]) -> TorchDistributed:
        """This rank's part of the members, in groups of its own: for gloo, one for each direction of messages.

        All members call it with the same parts.
        """
        chosen = tuple(tuple(self._members[rank] for rank in part) for part in parts)
        count = 1 if self._backend == "nccl" else 2
        kept = _Groups._kept.setdefault(chosen, [])
        known = self._everyone.collect((len(kept), len(_group_names())))
        if all(held >= count for held, _ in known):
            groups = [kept.pop(0) for _ in range(count)]
        else:
            most = max(number for _, number in known)
            groups = [self._made(chosen, most + turn) for turn in range(count)]
        self._taken += [(chosen, group) for group in groups]
        return TorchDistributed(*groups)

    def close(self, sound: bool) -> None:
        """Keep the groups for others, unless something went wrong in them. Calling it twice is harmless."""
        taken, self._taken = self._taken, []
        if taken:  # a thread of gloo that lets go of its last work wants Python's lock, while there is one
            time.sleep(0.05)
        if sound and _Groups._world is dist.group.WORLD:
            for parts, group in taken:
                _Groups._kept.setdefault(parts, []).append(group)

    def _made(self, parts: Parts, number: int) -> dist.ProcessGroup:
        own = next(ranks for ranks in parts if dist.get_rank() in ranks)
        if len(self._members) == dist.get_world_size():  # all ranks have to make all groups
            return {ranks: dist.new_group(list(ranks), backend=self._backend) for ranks in parts}[own]
        with _numbered(number):
            return dist.new_group(list(own), backend=self._backend, use_local_synchronization=True)


def _group_names() -> dict[Any, Any]:
    """Torch's names of this process's groups."""
    names: dict[Any, Any] = dist.distributed_c10d._world.pg_names
    return names


@contextlib.contextmanager
def _numbered(number: int) -> Iterator[None]:
    """Let torch take the next group for the one of this number.

    It names a group that some ranks make by how many groups the process has, and ranks that have made groups with
    others do not agree on that: they would wait for one another under different names.
    """
    names = _group_names()
    missing = [object() for _ in range(number - len(names))]
    names.update(dict.fromkeys(missing, ""))
    try:
        yield
    finally:
        for each in missing:
            del names[each]
