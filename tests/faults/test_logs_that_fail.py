"""A log that cannot be written is named once and stops nothing; the exit status says so. A checkpoint stops the run."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import main
from image_classification.logs import Raport, TensorBoard
from tests.support.program import SMALL, own_rank, run, run_well

Mishap = Callable[[main.Run], None]


def fill_disk_of_raport(run: main.Run) -> None:
    """The kernel answers each further write with ENOSPC."""
    [raport] = [sink for sink in run.log.sinks if isinstance(sink, Raport)]
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, raport.file.fileno())
    os.close(full)


def delete_workspace(run: main.Run) -> None:
    shutil.rmtree(run.workspace)


def delete_event_files(run: main.Run) -> None:
    [sink] = [sink for sink in run.log.sinks if isinstance(sink, TensorBoard)]
    shutil.rmtree(sink.folder)


MISHAPS: dict[str, tuple[Mishap, str]] = {
    "a full disk": (fill_disk_of_raport, "cannot write {work}/experiment_raport.json: No space left on device; "
                    "make room or choose another file"),
    "no workspace": (delete_workspace, "cannot write {work}/experiment_raport.json: it was deleted; "
                     "make room or choose another file"),
    "no event files": (delete_event_files, "cannot write {events}: it was deleted; make room or choose another folder"),
}  # fmt: skip


def strike_after_step(step: int, mishap: Mishap) -> None:
    """Rank 0 meets with a mishap at the end of a step of this run, counted from 1."""
    end_step = main.Run._should_stop

    def strike_and_end_step(run: main.Run) -> bool:
        if own_rank() == 0 and run.steps + 1 == step:
            mishap(run)
        return end_step(run)

    patch.object(main.Run, "_should_stop", strike_and_end_step).start()


@pytest.mark.parametrize(("mishap", "words"), MISHAPS.values(), ids=MISHAPS)
def test_training_goes_on_where_only_a_log_fails(mishap: Mishap, words: str, pictures: Path, tmp_path: Path) -> None:
    work, events = tmp_path / "work", tmp_path / "events"
    argv = (pictures, *SMALL, "--epochs", 2, "--prof", 2)
    straight, _ = run_well(*argv, "--workspace", tmp_path / "straight", ranks=2)
    argv += ("--workspace", work, "--tensorboard-dir", events)
    first, second = run(*argv, ranks=2, before=partial(strike_after_step, 1, mishap))
    assert (first.status, second.status) == (1, 1), first.err
    error = words.format(work=work, events=events)
    assert first.err == (
        f"{error}; the run goes on without\nmain.py: error: all is done, but what it logged is incomplete: {error}\n"
    )
    assert second.err == ""
    assert all(torch.equal(value, straight.weights[name]) for name, value in first.weights.items())
    assert (work / "checkpoint.pth.tar").exists()
    [wrote] = [line for line in first.out.splitlines() if line.startswith("wrote ")]
    assert all(Path(path).exists() for path in wrote.split()[1:])
