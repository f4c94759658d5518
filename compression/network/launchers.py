"""Launchers: how ranks are started, how each of them learns which one it is, and how it learns that it is no rank.

Records, and what the environment says. The code that joins ranks is loaded when they join: to read the environment
takes no torch.
"""

import contextlib
import json
import os
import pkgutil
import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:
    from .heartbeat import Watch
    from .world import World


class Apart(NamedTuple):
    """Processes that were started together and do not know of each other: what is wrong, and the way out.

    `message` wants the name of a command behind it, which starts `size` ranks by `launcher`. `rank` is this process's
    among them, so that one of them can speak for all.
    """

    message: str
    rank: int
    size: int
    launcher: "Launcher"


class Starter(NamedTuple):
    """A program that starts copies of a process: the variables that count them."""

    name: str
    rank: str
    size: str


STARTERS = (
    Starter("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # first: it starts its own helpers by srun
    Starter("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # a bare salloc or sbatch lacks one of them
)
"""Those that say nothing of a world to torch."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""The variable that names the file in which torchrun looks for a process's reason to end."""

PARTING_SECONDS = 3.0
"""Seconds within which a launcher has ended the other ranks of one that failed, and ranks that start together start."""

LOST_ON_HOST = "of this host has ended"
"""Words of the error about a rank that shared memory with others."""


@dataclass(frozen=True)
class Launcher:
    """One way to start ranks, and the network that comes with it.

    `rank`, `size`, `local_rank` and `local_size` name the environment variables of each process; the local ones count
    the ranks of one host. `joined_by` is the function that joins the ranks: (device, local rank, backend, ranks per
    host, watch) -> a context manager of a `World`. `lost_peer` are words of the network's errors about a rank that is
    gone.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    joined_by: str
    lost_peer: tuple[str, ...]

    def started_this_process(self) -> bool:
        return self.started_in(os.environ)

    def started_in(self, environment: Mapping[str, str]) -> bool:
        return self.rank in environment

    def apart(self, environment: Mapping[str, str] = os.environ, joined: int | None = None) -> Apart | None:
        """Why this process would be one of several that train apart; None where nothing says so.

        `joined` is the number of ranks that have joined, where that is known.
        """
        torchrun = _started(environment, TORCHRUN.name, TORCHRUN.rank, TORCHRUN.size)
        horovodrun = _started(environment, HOROVODRUN.name, HOROVODRUN.rank, HOROVODRUN.size)
        if self is HOROVODRUN:
            if horovodrun is not None:
                return None
            if torchrun is not None:
                return Apart(
                    f"torchrun started {torchrun.size} processes, and with `hvd`, which joins those of horovodrun, "
                    "each would train by itself; drop `hvd`, or use",
                    torchrun.rank,
                    torchrun.size,
                    HOROVODRUN,
                )
            return _started_without_a_world(environment) if joined == 1 else None
        if self.started_in(environment):
            return _contradiction(environment) or _torchruns_apart(environment)
        if horovodrun is not None:
            return Apart(
                f"horovodrun started {horovodrun.size} processes, and without `hvd` each would train by itself; use",
                horovodrun.rank,
                horovodrun.size,
                HOROVODRUN,
            )
        return _size_without_a_rank(environment) or _started_without_a_world(environment)

    def join(
        self, device: str, local_rank: int, backend: str, ranks_per_host: int | None, watch: "Watch | None" = None
    ) -> AbstractContextManager["World"]:
        """Join the other ranks, and leave them where the block ends; see `join_ranks`."""
        join = pkgutil.resolve_name(self.joined_by)
        world: AbstractContextManager[World] = join(device, local_rank, backend, ranks_per_host, watch)
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
    lost_peer=("gloo", LOST_ON_HOST),
)
"""torchrun and torch.distributed.launch; without them, a process is a world of one rank."""

HOROVODRUN = Launcher(
    "horovodrun",
    rank="HOROVOD_RANK",
    size="HOROVOD_SIZE",
    local_rank="HOROVOD_LOCAL_RANK",
    local_size="HOROVOD_LOCAL_SIZE",
    joined_by=f"{__package__}.horovod:join",
    lost_peer=("gloo", "Horovod", LOST_ON_HOST),
)


def speaks_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of those that share a terminal, whichever program started them."""
    local = TORCHRUN.local_rank if TORCHRUN.local_rank in environment else TORCHRUN.rank
    return not any(_number(environment, name) for name in (local, HOROVODRUN.rank, *(s.rank for s in STARTERS)))


def let_the_first_speak(status: int) -> None:
    """Wait for the launcher to end this process because another one has failed: it then ends with `status`.

    It returns where nobody else has failed, after `PARTING_SECONDS`. Called on the main thread, by a process that is
    about to end. Without this, one that ends in silence would have the launcher end the one that speaks before it does.
    """

    def end(number: int, frame: object) -> NoReturn:
        os._exit(status)

    before = signal.signal(signal.SIGTERM, end)
    try:
        time.sleep(PARTING_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, before)


def note_failure(line: str, environment: Mapping[str, str] = os.environ, *, follows: bool = False) -> None:
    """Leave the reason why this process ends to torchrun, whose summary quotes it; other launchers ask for none.

    One that `follows` from another rank's is noted as a second later: the earliest is taken for the cause of all. In
    the form of torch's own handler (torch.distributed.elastic.multiprocessing.errors.ErrorHandler), which to import
    would take seconds; of its fields, the summary shows the one for a traceback.
    """
    if path := environment.get(ERROR_FILE):
        more = {"py_callstack": line, "timestamp": str(int(time.time()) + follows)}
        with contextlib.suppress(OSError):  # it only informs, and what it informs of is worse
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": more}}), encoding="utf-8")


class _Company(NamedTuple):
    """This process among those that were started together, two or more."""

    name: str
    size: int
    rank: int


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """A variable that counts something; None where there is none, or something else."""
    value = environment.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else None


def _started(environment: Mapping[str, str], name: str, rank: str, size: str) -> _Company | None:
    place, count = _number(environment, rank), _number(environment, size)
    return _Company(name, count, place) if place is not None and count is not None and count > 1 else None


def _starter(environment: Mapping[str, str]) -> tuple[_Company, str] | None:
    """The company of this process, and the variable that counts it, where a starter made it."""
    for name, rank, size in STARTERS:
        # The first task of srun --pty is a shell, by hand, and the others have nothing to do.
        by_hand = name == "srun" and "SLURM_PTY_PORT" in environment
        if (company := _started(environment, name, rank, size)) and not by_hand:
            return company, size
    return None


def _started_without_a_world(environment: Mapping[str, str]) -> Apart | None:
    if (found := _starter(environment)) is None:
        return None
    company, counted_by = found
    return Apart(
        f"{company.name} started {company.size} processes that are told of no others, so that each would train by "
        f"itself; unset {counted_by} where that is meant, or use",
        company.rank,
        company.size,
        TORCHRUN,
    )


def _size_without_a_rank(environment: Mapping[str, str]) -> Apart | None:
    """A process that is told of others, and not which of them it is."""
    size = _number(environment, TORCHRUN.size)
    if size is None or size < 2 or HOROVODRUN.started_in(environment):
        return None
    return Apart(
        f"{TORCHRUN.size} {size} in the environment speaks of {size} ranks, and no {TORCHRUN.rank} says which one this "
        f"is, so that it would train by itself; unset {TORCHRUN.size} where that is meant, or use",
        0,
        size,
        TORCHRUN,
    )


def _torchruns_apart(environment: Mapping[str, str]) -> Apart | None:
    """Several torchruns, each of which takes itself for the only one."""
    found = _starter(environment)
    if found is None or _number(environment, "GROUP_WORLD_SIZE") != 1:
        return None
    company, counted_by = found
    return Apart(
        f"{company.name} started {company.size} torchruns that are told of one host, so that each would train by "
        f"itself; unset {counted_by} where that is meant, or use",
        company.rank + (_number(environment, TORCHRUN.local_rank) or 0),
        company.size,
        TORCHRUN,
    )


def _contradiction(environment: Mapping[str, str]) -> Apart | None:
    """Numbers of torchrun's that cannot be of one world, such as those of two hosts on one.

    A host has one rank or more, and hosts may have as many as they like: nothing else is certain.
    """
    ranks = (TORCHRUN.rank, TORCHRUN.local_rank, "GROUP_RANK")
    names = (TORCHRUN.rank, TORCHRUN.size, TORCHRUN.local_rank, TORCHRUN.local_size, "GROUP_RANK", "GROUP_WORLD_SIZE")
    for name in names:
        least = 0 if name in ranks else 1
        if name in environment and ((value := _number(environment, name)) is None or value < least):
            kind = f"an integer of at least {least}"
            return Apart(f"{name} in the environment is {kind}, got {environment[name]!r}; use", 0, 1, TORCHRUN)
    rank, size, local_rank, local_size, host, hosts = (_number(environment, name) for name in names)

    def misfit(one: str, other: str, rank: int = 0) -> Apart:
        return Apart(
            f"{one} {environment[one]} does not fit {other} {environment[other]} in the environment, so that ranks "
            "would wait for ever or train apart; use",
            rank,
            size or 1,
            TORCHRUN,
        )

    for one, position, other, count in (
        (TORCHRUN.rank, rank, TORCHRUN.size, size),
        (TORCHRUN.local_rank, local_rank, TORCHRUN.local_size, local_size),
        ("GROUP_RANK", host, "GROUP_WORLD_SIZE", hosts),
    ):
        if position is not None and count is not None and position >= count:
            return misfit(one, other)
    if size is not None and local_size is not None:
        others = (hosts or 1) - 1  # other hosts
        if local_size + others > size or (hosts == 1 and local_size != size):
            return misfit(TORCHRUN.local_size, TORCHRUN.size, rank or 0)
    return None
