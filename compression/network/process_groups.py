"""Process groups of torch.distributed for gradients: made for parts of the ranks, kept from exchange to exchange."""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from .collectives import Collectives
from .torch_distributed import TorchDistributed, let_works_go

Parts = tuple[tuple[int, ...], ...]
"""Ranks of torch.distributed's world, by the process group that they are to have."""


class ProcessGroups:
    """Process groups for gradients. Closed ones are kept for the next exchange over the same ranks.

    Torch names a group by how many there are, so that one made after another has ended may find that one's addresses.
    """

    _kept: ClassVar[dict[Parts, list[dist.ProcessGroup]]] = {}  # this rank's, by the parts of all
    _world: ClassVar[object] = None  # that the kept ones belong to

    def __init__(self, everyone: Collectives, members: Sequence[int], device: torch.device) -> None:
        self._everyone, self._members, self._device = everyone, members, device
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._taken: list[tuple[Parts, dist.ProcessGroup]] = []
        if dist.is_initialized() and ProcessGroups._world is not dist.group.WORLD:
            ProcessGroups._kept, ProcessGroups._world = {}, dist.group.WORLD

    def network(self, parts: Sequence[Sequence[int]]) -> TorchDistributed:
        """This rank's part of the members, in groups of its own: for gloo, one for each direction of messages.

        All members call it with the same parts.
        """
        chosen = tuple(tuple(self._members[rank] for rank in part) for part in parts)
        count = 1 if self._backend == "nccl" else 2
        kept = ProcessGroups._kept.setdefault(chosen, [])
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
        if taken:
            let_works_go()
        if sound and ProcessGroups._world is dist.group.WORLD:
            for parts, group in taken:
                ProcessGroups._kept.setdefault(parts, []).append(group)

    def _made(self, parts: Parts, number: int) -> dist.ProcessGroup:
        timeout = _timeout_of_the_world(self._device)
        own = next(ranks for ranks in parts if dist.get_rank() in ranks)
        if len(self._members) == dist.get_world_size():  # all ranks have to make all groups
            return {ranks: dist.new_group(list(ranks), timeout, self._backend) for ranks in parts}[own]
        with _numbered(number):
            return dist.new_group(list(own), timeout, self._backend, use_local_synchronization=True)


def _timeout_of_the_world(device: torch.device) -> timedelta | None:
    """The time limit of the world's group, which torch does not pass on to others; None for torch's own."""
    try:
        limit: timedelta = dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):  # of a backend that has none, or none for the device
        return None
    return limit


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
