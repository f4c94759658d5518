"""Loader workers: a signal to the process group is not theirs, and where they die or stand still one line says so."""

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

import main
from image_classification.data import pillow
from tests.support.program import own_rank, run, run_well, strike_in_step
from tests.test_resume import argv, checkpoint, differences

WORKERS = "-j 2"


def send_workers(number: int) -> None:
    """The signal reaches every worker of this process, of which there are some."""
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        os.kill(worker.pid or 0, number)


def signal_group(number: int) -> None:
    """The signal reaches this process and its workers, which outlive it."""
    workers = multiprocessing.active_children()
    assert workers
    os.killpg(0, number)
    workers[0].join(0.5)  # ends sooner where it dies
    assert all(worker.is_alive() for worker in workers), "the signal ended a worker"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_the_process_group_ends_the_run_after_the_step_and_loses_nothing(
    number: int, status: int, ranks: int, pictures: Path, tmp_path: Path
) -> None:
    """As `timeout`, Slurm, Docker and a terminal send it. The run that goes on ends with the same bits."""
    straight, stopped = (argv(pictures, tmp_path / name, WORKERS) for name in ("straight", "stopped"))
    run_well(*straight, ranks=ranks)
    to_group = (2, None, partial(signal_group, number))
    ended = run(*stopped, ranks=ranks, before=partial(strike_in_step, [to_group]))
    assert [(rank.status, rank.err) for rank in ended] == [(status, "")] * ranks
    run_well(*stopped, "--resume", "auto", ranks=ranks)
    one, other = (checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("straight", "stopped"))
    assert differences(one, other) == []


def kill_in_training() -> None:
    strike_in_step([(1, 0, partial(send_workers, signal.SIGKILL))])


def kill_as_validation_begins() -> None:
    """The second one, which finds workers that live since the first."""
    validate, times = main.Run._validate, itertools.count()

    def validate_later(run: main.Run) -> dict[str, float] | None:
        if own_rank() == 0 and next(times) == 1:
            send_workers(signal.SIGKILL)
        return validate(run)

    patch.object(main.Run, "_validate", validate_later).start()


def kill_between_epochs() -> None:
    strike_in_step([(3, 0, partial(send_workers, signal.SIGKILL))])  # the last step of an epoch


def stop_in_training() -> None:
    patch.object(pillow, "STANDSTILL_SECONDS", 2).start()
    strike_in_step([(1, 0, partial(send_workers, signal.SIGSTOP))])


DIED = "a data loader process died ("
STANDS_STILL = "the data loader's processes have sent nothing for 2 seconds: they were stopped"
MISHAPS: dict[str, tuple[Callable[[], None], str]] = {
    "killed in training": (kill_in_training, DIED),
    "killed between epochs": (kill_between_epochs, DIED),
    "killed as validation begins": (kill_as_validation_begins, DIED),
    "stopped in training": (stop_in_training, STANDS_STILL),
}


@pytest.mark.parametrize(("mishap", "words"), MISHAPS.values(), ids=MISHAPS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_that_die_or_stand_still_end_the_run_in_one_line(
    mishap: Callable[[], None], words: str, ranks: int, pictures: Path, tmp_path: Path
) -> None:
    first, *others = run(*argv(pictures, tmp_path, WORKERS), "-b", 1, ranks=ranks, before=mishap)
    [line] = first.err.splitlines()
    assert first.status == 2, line
    assert line.startswith(f"main.py: error: {words}"), line
    for other in others:
        assert other.status > 0, other.err
        assert len(other.err.splitlines()) == 1, other.err
