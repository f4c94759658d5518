"""The program on ranks that are processes, each of which starts in milliseconds.

Ranks are forked from a server that has imported the program once: a launcher would import it anew for each of them.
They find in their environment what torchrun would have put there. Three things differ from a real run: there is an
architecture `tiny`, each rank keeps what it ends with for the test to see, and `before` may prepare a mishap.
"""

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import main
from compression import COMPRESSORS
from image_classification import losses, models
from image_classification.interruption import Interruption

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 900

SMALL = (
    "-a", "tiny", "--num-classes", "3", "--image-size", "32", "--data-backend", "pytorch", "-j", "0", "-b", "4",
    "--seed", "1", "--lr", "0.02", "--print-freq", "1",
)  # fmt: skip
"""Flags of a run that takes a second."""

UNLISTED = {"powersgd": "--powersgd-rank 2", "dgc": "--dgc --topk-ratio 0.1"}
"""Flags of compressors that are no --compression-type."""

LOADED_ON_USE = (
    "compression.averagers",
    "compression.exchange.attachment",
    "compression.kernels.cpu",
    "compression.network.world",
    "image_classification.data.dali",
    "image_classification.data.pillow",
    "image_classification.data.synthetic",
    "image_classification.models.resnets",
    "image_classification.reproducibility",
    "image_classification.training",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "search.plotting",
    "search.report",
)
"""Modules that the program does not load before it needs them, and that every rank would else load anew."""

Before = Callable[[], None]


def every_compressor() -> dict[str, str]:
    """Flags that ask for each compressor of the registry, with error feedback where that is a choice."""
    flags = {}
    for name, row in COMPRESSORS.items():
        flags[name] = f"--compression-type {name}" if row.listed else UNLISTED[name]
        if row.listed and "error_feedback" in row.takes:
            flags[name] += " --error-feedback"
    return flags


def tiny(num_classes: int) -> nn.Module:
    """Three layers that have a bucket of 512 values, and so are compressed, and two matrices that have none."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


@dataclass(frozen=True)
class Rank:
    """The end of one rank; weights (buffers included) and bit widths are those that it ended with."""

    status: int
    out: str
    err: str
    weights: Mapping[str, Tensor]
    widths: Mapping[str, int]


def run(*argv: object, ranks: int = 1, before: Before | None = None, threads: int | None = 1) -> list[Rank]:
    """Run the program with the same flags on every rank. It leaves no process and no temporary file.

    Each rank computes in one thread, because threads that wait for one another are slow on a busy machine. None leaves
    their number to the program.
    """
    return run_each([argv if threads is None else (*argv, "--threads", threads)] * ranks, before)


def run_well(*argv: object, ranks: int = 1, before: Before | None = None, threads: int | None = 1) -> list[Rank]:
    """The same, for runs that must end well."""
    done = run(*argv, ranks=ranks, before=before, threads=threads)
    assert [rank.status for rank in done] == [0] * ranks, "\n".join(rank.err for rank in done)
    return done


def run_each(argvs: Sequence[Sequence[object]], before: Before | None = None) -> list[Rank]:
    """The same, with flags of its own for every rank."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        notes = [Path(folder, str(rank)) for rank in range(len(argvs))]
        processes = []
        for argv, note, environment in zip(argvs, notes, environments(len(argvs)), strict=True):
            note.mkdir()
            work = ([str(word) for word in argv], environment, note, before)
            processes.append(_server().Process(target=_rank_main, args=work))
            processes[-1].start()
            stack.callback(processes[-1].join)
            stack.callback(processes[-1].kill)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and (left := [each for each in processes if each.exitcode is None]):
            if all(is_stopped(process.pid) for process in left):  # by a mishap, and nobody waits for them any more
                for process in left:
                    process.kill()
            left[0].join(0.02)
        slow = [rank for rank, process in enumerate(processes) if process.exitcode is None]
        assert not slow, f"ranks {slow} of {len(processes)} not done after {PATIENCE_SECONDS} s"
        for process, note in zip(processes, notes, strict=True):
            while left := processes_of_session(process.pid):  # multiprocessing's tracker ends a moment later
                assert time.monotonic() < deadline, f"processes outlived their rank: {left}"
                time.sleep(0.01)
            assert list((note / "tmp").iterdir()) == []
        return [_rank_of(process.exitcode, note) for process, note in zip(processes, notes, strict=True)]


def environments(ranks: int) -> list[dict[str, str]]:
    """Variables that torchrun sets for each rank; none for a process that it did not start."""
    if ranks == 1:
        return [{}]
    port = free_port()
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(ranks)
    ]


def free_port() -> str:
    """A port that nobody listens on, as a word of an environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def is_stopped(process: int) -> bool:
    """Whether a process stands still by SIGSTOP."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def processes_of_session(session: int) -> list[str]:
    """The kernel's record of each living process of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = stat.read_text()
            state, _, _, its_session = text.rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(text)
    return found


@cache
def _server() -> Any:
    """A starter of processes: a server that forks them, with the program imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *LOADED_ON_USE])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        forkserver.ensure_running()
    return context


def _rank_main(argv: list[str], environment: dict[str, str], note: Path, before: Before | None) -> None:
    os.setsid()
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(note / name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    (note / "tmp").mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(note / "tmp")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    models.ARCHITECTURES["tiny"] = tiny
    logging.getLogger("compression.kernels").setLevel(logging.WARNING)  # what compiles is up to what ran before
    close = main.Run.close

    def keep_and_close(run: main.Run) -> None:
        torch.save({"weights": run.module.state_dict(), "widths": run.exchange.widths}, note / "kept")
        close(run)

    patch.object(main.Run, "close", keep_and_close).start()
    if before is not None:
        before()
    sys.exit(main.main(argv))


def _rank_of(status: int, note: Path) -> Rank:
    kept = torch.load(note / "kept") if (note / "kept").exists() else {"weights": {}, "widths": {}}
    return Rank(status, (note / "out").read_text(), (note / "err").read_text(), **kept)


# Mishaps


def own_rank() -> int:
    return int(os.environ.get("RANK", 0))


def signal_in_step(step: int, number: int, rank: int | None = None) -> None:
    """The signal reaches one rank, or all, at the end of optimizer step `step` of this run, counted from 1."""
    due = Interruption.due

    def due_later(interruption: Interruption, done: int) -> bool:
        if done == step and rank in (None, own_rank()):
            signal.raise_signal(number)
        return due(interruption, done)

    patch.object(Interruption, "due", due_later).start()


def pause_in_step(step: int, folder: Path) -> None:
    """Each rank notes in `folder` that it is in optimizer step `step`, and waits there for a file `go`."""
    due = Interruption.due

    def due_later(interruption: Interruption, done: int) -> bool:
        if done == step:
            (folder / f"reached-{own_rank()}").touch()
            wait_for(folder / "go")
        return due(interruption, done)

    patch.object(Interruption, "due", due_later).start()


def wait_for(path: Path) -> None:
    """Return as soon as a file is there."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path} after {PATIENCE_SECONDS} s"
        time.sleep(0.01)


def strike_in_step(strikes: Sequence[tuple[int, int | None, Callable[[], object]]]) -> None:
    """Call something at the end of an optimizer step of this run, on one rank or all: (step, rank, what)."""
    due = Interruption.due

    def due_later(interruption: Interruption, done: int) -> bool:
        for step, rank, strike in strikes:
            if done == step and rank in (None, own_rank()):
                strike()
        return due(interruption, done)

    patch.object(Interruption, "due", due_later).start()


def send_itself(*numbers: int) -> None:
    """The signals reach this process, one right after the other."""
    for number in numbers:
        os.kill(os.getpid(), number)


def signal_in_validation(number: int, rank: int) -> None:
    """The signal reaches one rank before the first batch of its first validation."""
    validate = main.Run._validate
    times = itertools.count()

    def validate_later(run: main.Run) -> dict[str, float] | None:
        if rank == own_rank() and next(times) == 0:
            signal.raise_signal(number)
        return validate(run)

    patch.object(main.Run, "_validate", validate_later).start()


def compiled_code_goes_to(folder: Path) -> None:
    """torch.compile leaves nothing outside the folder."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def infinite_loss_in_batch(batch: int, rank: int) -> None:
    """One rank's loss is infinite in one training batch of this run, counted from 1."""
    build = losses.training_loss
    batches = itertools.count(1)

    def spoiled(label_smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
        loss = build(label_smoothing)

        def spoil(logits: Tensor, targets: Tensor) -> Tensor:
            strikes = next(batches) == batch and own_rank() == rank
            return loss(logits, targets) * (float("inf") if strikes else 1.0)

        return spoil

    patch.object(losses, "training_loss", spoiled).start()
