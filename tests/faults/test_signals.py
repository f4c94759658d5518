"""Signals: many of the same are one wish, a later one ends at once, one asks for a checkpoint, and none is lost."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

import main
from image_classification import interruption
from tests.support.program import ROOT, SMALL, run, run_well, send_itself, strike_in_step
from tests.test_resume import argv, checkpoint, differences

MAXMIN = "--compression-type maxmin --error-feedback"
SEARCH = f"{MAXMIN} --search --popsize 1 --search-iterations 0"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_signal_twice_is_one_wish(
    number: int, status: int, ranks: int, pictures: Path, tmp_path: Path
) -> None:
    """As a launcher and its process group send it: every rank gets it twice, and goes on to the same bits."""
    straight, stopped = (argv(pictures, tmp_path / name, MAXMIN) for name in ("straight", "stopped"))
    run_well(*straight, ranks=ranks)
    before = partial(strike_in_step, [(4, None, partial(send_itself, number, number))])
    ended = run(*stopped, ranks=ranks, before=before)
    assert [rank.status for rank in ended] == [status] * ranks, ended[0].err
    assert [rank.err for rank in ended] == [""] * ranks
    assert checkpoint(tmp_path / "stopped/checkpoint.pth.tar")["iteration"] in (1, 2)
    run_well(*stopped, "--resume", "auto", ranks=ranks)
    one, other = (checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("straight", "stopped"))
    assert differences(one, other) == []


def signals_of_somebody_in_a_hurry(number: int) -> None:
    """Once rank 0 waits for rank 1, which stands still, it gets the signal, and the same one some time later."""
    patch.object(interruption, "ONE_WISH_SECONDS", 0.2).start()
    send = "sleep 1; kill -{0} {1}; sleep 1; kill -{0} {1}".format(number, os.getpid())
    strike_in_step([
        (2, 0, lambda: subprocess.Popen(["sh", "-c", send])),
        (2, 1, partial(send_itself, signal.SIGSTOP)),
    ])  # fmt: skip


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_later_signal_ends_at_once_whatever_a_rank_waits_for(
    number: int, status: int, pictures: Path, tmp_path: Path
) -> None:
    first, _ = run(*argv(pictures, tmp_path), ranks=2, before=partial(signals_of_somebody_in_a_hurry, number))
    assert first.status == status
    assert "Traceback" not in first.err


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_asks_for_a_checkpoint_and_the_run_goes_on(ranks: int, pictures: Path, tmp_path: Path) -> None:
    """The last rank gets it. What is killed later goes on from there, to the same bits."""
    straight, killed = (argv(pictures, tmp_path / name, MAXMIN) for name in ("straight", "killed"))
    run_well(*straight, ranks=ranks)
    warn = (1, ranks - 1, partial(send_itself, signal.SIGUSR1))
    first, *_ = run_well(
        *argv(pictures, tmp_path / "warned", MAXMIN), ranks=ranks, before=partial(strike_in_step, [warn])
    )
    iteration = 1 if ranks == 1 else 2
    assert f"a signal asked for a checkpoint after iteration {iteration} of epoch 0; go on with --resume" in first.out
    kill = (3, None, partial(send_itself, signal.SIGKILL))
    ended = run(*killed, ranks=ranks, before=partial(strike_in_step, [warn, kill]))
    assert [rank.status for rank in ended] == [-signal.SIGKILL] * ranks
    saved = checkpoint(tmp_path / "killed/checkpoint.pth.tar")
    assert (saved["epoch"], saved["iteration"]) == (0, iteration)
    run_well(*killed, "--resume", "auto", ranks=ranks)
    ends = [checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("straight", "warned", "killed")]
    assert [differences(ends[0], other) for other in ends[1:]] == [[], []]


def signal_in_search(number: int, rank: int) -> None:
    """The signal reaches one rank within its first search."""
    searched = main.Run._search

    def searched_later(run: main.Run, when: int | str) -> None:
        if run.ranks.rank == rank:
            send_itself(number)
        searched(run, when)

    patch.object(main.Run, "_search", searched_later).start()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_a_search_ends_the_run_after_it(ranks: int, pictures: Path, tmp_path: Path) -> None:
    straight, stopped = (
        argv(pictures, tmp_path / name, f"{SEARCH} --training-only") for name in ("straight", "stopped")
    )
    run_well(*straight, ranks=ranks)
    ended = run(*stopped, ranks=ranks, before=partial(signal_in_search, signal.SIGTERM, ranks - 1))
    assert [rank.status for rank in ended] == [143] * ranks, ended[0].err
    assert "stopped by a signal after the search of epoch 0; go on with --resume" in ended[0].out
    run_well(*stopped, "--resume", "auto", ranks=ranks)
    one, other = (checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("straight", "stopped"))
    assert differences(one, other) == []


def test_a_signal_in_the_first_search_says_that_nothing_is_trained(pictures: Path, tmp_path: Path) -> None:
    run_well(*argv(pictures, tmp_path / "before", epochs=1))
    weights = ("--pretrained-weights", tmp_path / "before/checkpoint.pth.tar", "--search-calibration-steps", 1)
    before = partial(signal_in_search, signal.SIGTERM, 0)
    [rank] = run(*argv(pictures, tmp_path / "after", SEARCH), *weights, before=before)
    assert rank.status == 143
    assert "stopped by a signal after the first search; nothing has been trained" in rank.out
    assert not (tmp_path / "after/checkpoint.pth.tar").exists()


def test_who_stops_a_program_that_is_starting_gets_no_traceback(pictures: Path, tmp_path: Path) -> None:
    command = [sys.executable, "main.py", *map(str, (pictures, *SMALL[2:], "--workspace", tmp_path))]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as starting:
        maps = Path(f"/proc/{starting.pid}/maps")
        while "libtorch" not in maps.read_text():
            time.sleep(0.01)
        starting.send_signal(signal.SIGUSR1)
        starting.send_signal(signal.SIGINT)
        starting.send_signal(signal.SIGINT)
        _, err = starting.communicate(timeout=900)
    assert (starting.returncode, err) == (-signal.SIGINT, "")
