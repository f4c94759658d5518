"""Ranks that are processes over gloo, and run a function of the test's own file, which they start as a program.

A test file calls `run`, and ends with `if __name__ == "__main__": as_rank(work)`.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from compression.network.torch_distributed import let_works_go

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 900


@contextmanager
def started(
    program: str, ranks: int, folder: Path, *words: str, environments: Sequence[Mapping[str, str]] = ()
) -> Iterator[list["subprocess.Popen[str]"]]:
    """The processes of all ranks, whose standard error is piped; none outlives the block."""
    with ExitStack() as stack:
        processes = []
        for rank in range(ranks):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
            environment |= environments[rank] if environments else {}
            command = [sys.executable, program, str(rank), str(ranks), str(folder), *words]
            processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        yield processes


def ended(processes: Sequence["subprocess.Popen[str]"]) -> tuple[list[int], list[str]]:
    """The exit status and standard error of each rank, once all have ended."""
    errors = [process.communicate(timeout=PATIENCE_SECONDS)[1] for process in processes]
    return [process.returncode for process in processes], errors


def run(
    program: str, ranks: int, folder: Path, *words: str, environments: Sequence[Mapping[str, str]] = ()
) -> tuple[list[Any], list[str]]:
    """The result and standard error of every rank, which must end well."""
    with started(program, ranks, folder, *words, environments=environments) as processes:
        statuses, errors = ended(processes)
    assert statuses == [0] * ranks, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)], errors


def as_rank(work: Callable[..., Any]) -> None:
    """What a process does: join the others, and save the result of `work(rank, folder, *words)`."""
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    patience = timedelta(seconds=PATIENCE_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=patience)
    torch.save(work(rank, folder, *sys.argv[4:]), folder / f"{rank}.pt")
    let_works_go(0.5)
    dist.destroy_process_group()
