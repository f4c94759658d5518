"""Launchers: how ranks are started, and how each of them learns which one it is.

Records alone. The code that joins ranks is loaded when they join: to read the environment takes no torch.
"""

import os
import pkgutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .world import World


@dataclass(frozen=True)
class Launcher:
    """One way to start ranks, and the network that comes with it.

    `rank`, `size`, `local_rank` and `local_size` name the environment variables of each process; the local ones count
    the ranks of one host. `joined_by` is the function that joins the ranks: (device, local rank, backend, ranks per
    host) -> a context manager of a `World`. `lost_peer` are words of the network's errors about a rank that is gone.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    joined_by: str
    lost_peer: tuple[str, ...]

    def started_this_process(self) -> bool:
        return self.rank in os.environ

    def rank_of_this_process(self) -> int:
        """The rank that the environment gives; 0 where the launcher did not start this process."""
        return int(os.environ.get(self.rank, 0))

    def join(
        self, device: str, local_rank: int, backend: str, ranks_per_host: int | None
    ) -> AbstractContextManager["World"]:
        """Join the other ranks, and leave them where the block ends; see `join_ranks`."""
        join = pkgutil.resolve_name(self.joined_by)
        world: AbstractContextManager[World] = join(device, local_rank, backend, ranks_per_host)
        return world

    def is_lost_peer(self, error: Exception) -> bool:
        """Whether an error says that a rank is gone. Gloo and Horovod have no type for that: words tell."""
        import torch.distributed as dist

        return isinstance(error, dist.DistError) or any(word in str(error) for word in self.lost_peer)


TORCHRUN = Launcher(
    "torchrun",
    rank="RANK",
    size="WORLD_SIZE",
    local_rank="LOCAL_RANK",
    local_size="LOCAL_WORLD_SIZE",
    joined_by=f"{__package__}.world:join_over_torch",
    lost_peer=("gloo",),
)
"""torchrun and torch.distributed.launch; without them, a process is a world of one rank."""

HOROVODRUN = Launcher(
    "horovodrun",
    rank="HOROVOD_RANK",
    size="HOROVOD_SIZE",
    local_rank="HOROVOD_LOCAL_RANK",
    local_size="HOROVOD_LOCAL_SIZE",
    joined_by=f"{__package__}.horovod:join",
    lost_peer=("gloo", "Horovod"),
)
