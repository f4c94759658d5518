"""The world of ranks: how a process joins the others, whatever launched it, and how all of them fail together.

It knows launchers and networks, and nothing of the ranks' purpose.
"""

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .collectives import Collectives, Solo
from .heartbeat import Heartbeat, Watch
from .hosts import Hosts, find_hosts
from .launchers import TORCHRUN, Launcher
from .rendezvous import meet
from .torch_distributed import TorchDistributed, let_works_go

NEVER = timedelta(days=365)
"""Limit of a process group whose ranks watch one another: what takes long on one rank is no fault."""


class Failure(Exception):
    """An error of one line that ends the program on every rank alike: rank 0 says it. `status` is the exit status."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status


@dataclass(frozen=True)
class World:
    """This process among the ranks.

    `local_rank` is its number among the `local_size` ranks of its host. `control` carries all but gradients, on the
    main thread. `gradients` carries gradients, where they have collectives of their own; None leaves the choice to
    `attach`. `store` holds small values that all ranks share; None where there is one rank. `groups` carry gradients
    inside this host and between hosts, where `gradients` are not None and hosts have as many ranks each. `heartbeat` is
    this rank's sign of life, where ranks watch one another.
    """

    local_rank: int
    local_size: int
    device: torch.device
    control: Collectives
    gradients: Collectives | None
    store: dist.Store | None  # type: ignore[name-defined]
    groups: tuple[Collectives, Collectives] | None = None
    heartbeat: Heartbeat | None = None

    @property
    def rank(self) -> int:
        return self.control.rank

    @property
    def size(self) -> int:
        return self.control.world_size

    @property
    def network(self) -> str:
        """The name of the library that carries messages."""
        return str(dist.get_backend()) if dist.is_initialized() else "Horovod"

    @property
    def computes_on(self) -> str:
        """Words for this rank's device, and for its threads."""
        kind = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        threads = torch.get_num_threads()
        return f"{kind}, {threads} {'thread' if threads == 1 else 'threads'}"

    def hosts(self, ranks_per_host: int | None = None) -> Hosts:
        """The hosts of the ranks, each taken as several of so many ranks where that is given. Every rank calls it.

        Raises ValueError as `Hosts.split` does.
        """
        hosts = find_hosts(self.control)
        return hosts if ranks_per_host is None else hosts.split(ranks_per_host)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks."""
        total = values.clone()
        self.control.sum_(total)
        return total

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model, with rank 0's parameters and buffers on every rank.

        Over torch.distributed it is wrapped in DDP, whose gradients `attach` takes over; batch norms keep statistics of
        their own on each rank.
        """
        if dist.is_initialized():
            with warnings.catch_warnings():
                # torch 2.13 renames the argument and 2.11 knows only the old name.
                warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated", FutureWarning)
                return DistributedDataParallel(model, broadcast_buffers=False)
        if self.size > 1:
            model.load_state_dict(self.control.broadcast(model.state_dict()))
        return model

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """A block that can fail on one rank alone: where any rank fails, all of them end with the same line.

        The line names the rank, and its host, where the others have not failed and it is not plain whose it is.

        It may take one rank as long as it likes, if its process lives.
        """
        failure = None
        try:
            with self.heartbeat.own_work() if self.heartbeat else contextlib.nullcontext():
                yield
        except (ValueError, OSError) as error:
            failure = one_line(error)
        ends = self.control.collect((failure, platform.node()))
        failed = [rank for rank, (message, _) in enumerate(ends) if message is not None]
        if failed:
            place = _place(failed[0], [host for _, host in ends])
            alone = len(failed) < self.size and place != "rank 0"
            raise Failure(f"{ends[failed[0]][0]} ({place})" if alone else ends[failed[0]][0])

    def check_equal_across_ranks(
        self, values: Mapping[str, Any], what: str, remedy: str = "start all ranks alike"
    ) -> None:
        """Raises Failure, on every rank alike, where a value differs from rank 0's."""
        (first, _), *others = ends = self.control.collect((dict(values), platform.node()))
        hosts = [host for _, host in ends]
        for rank, (theirs, _) in enumerate(others, start=1):
            for name in dict.fromkeys((*first, *theirs)):
                if theirs.get(name) != first.get(name):
                    raise Failure(
                        f"{what} must be the same on every rank: {name} is {first.get(name)!r} on {_place(0, hosts)} "
                        f"and {theirs.get(name)!r} on {_place(rank, hosts)}; {remedy}"
                    )


def _place(rank: int, hosts: Sequence[str]) -> str:
    """A rank in words, with its host where there are several; `hosts` holds the name of each rank's."""
    return f"rank {rank} on host {hosts[rank]}" if len({*hosts}) > 1 else f"rank {rank}"


def one_line(error: Exception) -> str:
    """The message of an error in one line; the system's own errors name the file and the way out, too."""
    if isinstance(error, OSError) and error.filename:
        return f"cannot use {error.filename}: {error.strerror}; choose another"
    return " ".join(str(error).split())


@contextlib.contextmanager
def join_ranks(
    device: str,
    local_rank: int = 0,
    *,
    launcher: Launcher = TORCHRUN,
    backend: str = "auto",
    threads: int | None = None,
    ranks_per_host: int | None = None,
    watch: Watch | None = None,
) -> Iterator[World]:
    """Join the other ranks, where a launcher started any, and leave them in order at the end.

    `device` is auto, cpu or cuda. `local_rank` is this process's on its host, unless the launcher's network knows
    better. `backend` is torch.distributed's, auto taking NCCL on GPUs and gloo on CPUs.

    `threads` compute in this process. None takes the cores that it may use, divided by the ranks on its host, under
    every launcher alike: results do not depend on who started the ranks.

    `ranks_per_host` takes a host as several of so many ranks each, in `groups`; None as one.

    `watch` bounds how long this rank waits for one that shows no sign of life, and how long for all to have come; then
    no wait ends by the network library's own limit. None leaves these as they are.

    Raises ValueError where there is no GPU for this rank, or no Horovod, the backend is not for its device, or ranks
    did not come in time.
    """
    with launcher.join(device, local_rank, backend, ranks_per_host, watch) as world:
        torch.set_num_threads(threads or max(1, usable_cores() // world.local_size))
        try:
            yield world
        except Failure:
            world.control.collect(None)  # rank 0 may hold the store, and others may still look at it
            raise


@contextlib.contextmanager
def join_over_torch(
    device: str, local_rank: int, backend: str, ranks_per_host: int | None = None, watch: Watch | None = None
) -> Iterator[World]:
    """The ranks of torchrun over torch.distributed; a world of one rank where torchrun did not start this process.

    Process groups are made when they are needed: `attach` makes those of hosts.
    """
    own_device = choose_device(device, local_rank)
    if not TORCHRUN.started_this_process():
        yield World(local_rank, 1, own_device, Solo(), None, None)
        return
    own = "nccl" if own_device.type == "cuda" else "gloo"
    if backend not in ("auto", own):
        raise ValueError(
            f"`backend` {backend} cannot send what lies on a {own_device.type} device; use {own}, or choose another "
            "`device`"
        )
    store, rank, size = meet(watch.seconds if watch else None)
    with Heartbeat(store, rank, size, watch) if watch and size > 1 else contextlib.nullcontext() as heartbeat:
        dist.init_process_group(own, timeout=NEVER if watch else None, store=store, rank=rank, world_size=size)
        try:
            local_size = int(os.environ.get(TORCHRUN.local_size, 1))
            yield World(local_rank, local_size, own_device, TorchDistributed(), None, store, heartbeat=heartbeat)
        finally:
            let_works_go()
            dist.destroy_process_group()


def usable_cores() -> int:
    """Cores that this process may use: all of the machine's where the system cannot tell, as on macOS."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_device(device: str, local_rank: int) -> torch.device:
    """The device of a rank: auto, cpu or cuda, where each rank of a host has a GPU of its own.

    Raises ValueError where this host has fewer GPUs than that.
    """
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind != "cuda":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"`device` cuda needs a GPU for each rank of a machine: local rank {local_rank} has none, "
            f"{torch.cuda.device_count()} are visible; start fewer ranks or use `device` cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
