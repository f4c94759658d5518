"""The world of ranks: how a process joins the others, whatever launched it, and how all of them fail together.

It knows launchers and networks, and nothing of what the ranks are for.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from .collectives import Collectives, Solo
from .torch_distributed import TorchDistributed


class Failure(Exception):
    """What ends the program with one line, on every rank alike: rank 0 says it. `status` is the exit status."""

    def __init__(self, words: str, status: int = 2) -> None:
        super().__init__(" ".join(words.split()))
        self.status = status


@dataclass(frozen=True)
class World:
    """This process among the ranks.

    `control` carries all but gradients, on the main thread. `gradients` carries gradients, where they have collectives
    of their own; None leaves the choice to `attach`. `store` holds small values that all ranks share; None where there
    is one rank.
    """

    local_rank: int
    device: torch.device
    control: Collectives
    gradients: Collectives | None
    store: dist.Store | None  # type: ignore[name-defined]

    @property
    def rank(self) -> int:
        return self.control.rank

    @property
    def size(self) -> int:
        return self.control.world_size

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks."""
        total = values.clone()
        self.control.sum_(total)
        return total

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """Around what can fail on one rank alone: where any rank fails, all of them end with the same line."""
        failure = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = one_line(error)
        failures = [words for words in self.control.collect(failure) if words is not None]
        if failures:
            raise Failure(failures[0])

    def check_equal_across_ranks(self, values: Mapping[str, Any], what: str) -> None:
        """Raises Failure, on every rank alike, where a value differs from rank 0's."""
        first, *others = self.control.collect(dict(values))
        for rank, theirs in enumerate(others, start=1):
            for name in first:
                if theirs.get(name) != first[name]:
                    raise Failure(
                        f"{what} must be the same on every rank: {name} is {first[name]!r} on rank 0 and "
                        f"{theirs.get(name)!r} on rank {rank}; start all ranks alike"
                    )


def one_line(error: Exception) -> str:
    """One line for what went wrong; the system's own errors name the file and the way out, too."""
    if isinstance(error, OSError) and error.filename:
        return f"cannot use {error.filename}: {error.strerror}; choose another"
    return " ".join(str(error).split())


def is_lost_peer(error: Exception) -> bool:
    """Whether this is how torch.distributed or Horovod say that a rank is gone. Gloo has no error type of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Horovod" in str(error)


@contextlib.contextmanager
def join_ranks(device: str, local_rank: int, *, backend: str = "auto", hvd: bool = False) -> Iterator[World]:
    """Join the other ranks, where a launcher started any, and leave them in order at the end.

    `device` is auto, cpu or cuda; `backend` is torch.distributed's, auto taking NCCL on GPUs and gloo on CPUs; `hvd`
    joins through Horovod instead.

    The process chooses its number of threads by itself, so that results do not depend on the launcher: the machine's
    cores divided by the ranks on it.

    Raises:
        ValueError: there is no GPU for this rank, or no Horovod, or a backend that is not for its device.
    """
    horovod: Any = None
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if hvd:
        from . import horovod as horovod_module

        horovod = horovod_module.join()
        local_rank, ranks_here = horovod.local_rank(), horovod.local_size()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    place = _device(device, local_rank)
    with contextlib.ExitStack() as stack:
        if horovod is not None:
            stack.callback(horovod.shutdown)
            world = _over_horovod(horovod, local_rank, place)
        elif "RANK" in os.environ:
            own = "nccl" if place.type == "cuda" else "gloo"
            if backend not in ("auto", own):
                raise ValueError(
                    f"--dist-backend {backend} cannot send what lies on a {place.type} device; use {own}, or choose "
                    "another --device"
                )
            store, rank, size = next(iter(rendezvous("env://")))
            dist.init_process_group(own, store=store, rank=rank, world_size=size)
            stack.callback(dist.destroy_process_group)
            # A gloo thread that is letting go of its last work wants Python's lock once more. The end of the group
            # waits for that thread with the lock in hand, so it has to be through by then.
            stack.callback(time.sleep, 0.05)
            world = World(local_rank, place, TorchDistributed(), None, store)
        else:
            world = World(local_rank, place, Solo(), None, None)
        try:
            yield world
        except Failure:
            world.control.collect(None)  # rank 0 may hold the store, and others may still look at it
            raise


def _device(device: str, local_rank: int) -> torch.device:
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind != "cuda":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"--device cuda needs a GPU for each rank of a machine: local rank {local_rank} has none, "
            f"{torch.cuda.device_count()} are visible; start fewer ranks or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _over_horovod(hvd: Any, local_rank: int, device: torch.device) -> World:
    """Horovod has no store: rank 0 serves one of torch's."""
    from .horovod import Horovod

    control = Horovod(hvd, "control")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    host, port = control.broadcast((os.environ.get("HOROVOD_HOSTNAME", socket.gethostname()), port))
    store = dist.TCPStore(host, port, is_master=control.rank == 0, wait_for_workers=False)  # type: ignore[attr-defined]
    return World(local_rank, device, control, Horovod(hvd, "gradients"), store)
