"""Ranks that are silent: who waits for one that never came, is stopped or stands still ends in time, and names it."""

import signal
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

import main
from compression.network import heartbeat
from tests.support.program import own_rank, run, run_well, send_itself, strike_in_step
from tests.test_resume import argv

SILENT = "rank 1 has shown no sign of life since "


@pytest.mark.parametrize("flags", ["", "--compression-type maxmin --error-feedback", "--powersgd-rank 2"])
def test_a_stopped_rank_is_named_by_the_others_when_the_time_is_up(flags: str, pictures: Path, tmp_path: Path) -> None:
    stop = partial(strike_in_step, [(2, 1, partial(send_itself, signal.SIGSTOP))])
    first, _ = run(*argv(pictures, tmp_path, flags), "--timeout", 3, ranks=2, before=stop)
    assert first.status == 1
    [line] = first.err.splitlines()
    assert line.startswith(f"main.py: error: {SILENT}")
    assert line.endswith(": it is stopped, or its host or the network is gone (--timeout 3)")


def test_a_stopped_first_rank_is_named_too(pictures: Path, tmp_path: Path) -> None:
    """It keeps the store, through which all others learn of one another."""
    stop = partial(strike_in_step, [(2, 0, partial(send_itself, signal.SIGSTOP))])
    _, *others = run(*argv(pictures, tmp_path), "--timeout", 3, ranks=3, before=stop)
    assert [rank.status for rank in others] == [1, 1]
    assert others[0].err.startswith("main.py: error: rank 0 has shown no sign of life since ")
    assert len(others[0].err.splitlines()) == 1


def test_of_three_ranks_one_says_which_is_silent(pictures: Path, tmp_path: Path) -> None:
    """With loader processes, too: they end with their rank, which the helper checks."""
    stop = partial(strike_in_step, [(2, 1, partial(send_itself, signal.SIGSTOP))])
    first, _, third = run(*argv(pictures, tmp_path), "--timeout", 3, "-j", 1, ranks=3, before=stop)
    assert (first.status, third.status) == (1, 1)
    assert first.err.startswith(f"main.py: error: {SILENT}")
    assert third.err == ""


def hurried_while_one_is_stopped() -> None:
    """Rank 0 gets one signal while it waits for rank 1, which is stopped."""
    patch.object(heartbeat, "TURN_SECONDS", 0.2).start()
    patch.object(heartbeat, "HURRY_SECONDS", 2.0).start()
    strike_in_step([(2, 0, partial(send_itself, signal.SIGTERM)), (2, 1, partial(send_itself, signal.SIGSTOP))])


def test_after_a_signal_a_short_silence_is_enough(pictures: Path, tmp_path: Path) -> None:
    first, _ = run(*argv(pictures, tmp_path), ranks=2, before=hurried_while_one_is_stopped)
    assert first.status == 1
    assert first.err.startswith(f"main.py: error: {SILENT}")


def standing_still(rank: int, seconds: float) -> None:
    """One rank waits in its first validation for what does not come, as a file system that hangs."""
    validate = main.Run._validate

    def validate_late(run: main.Run) -> dict[str, float] | None:
        if own_rank() == rank:
            time.sleep(seconds)
        return validate(run)

    patch.object(main.Run, "_validate", validate_late).start()


def test_a_rank_whose_process_lives_and_whose_work_stands_still_ends_the_run(pictures: Path, tmp_path: Path) -> None:
    first, second = run(*argv(pictures, tmp_path), "--timeout", 3, ranks=2, before=partial(standing_still, 1, 900))
    assert (first.status, second.status) == (1, 1)
    assert first.err.startswith("main.py: error: no rank has been at work since ")
    assert "rank 1 is at test_silent_ranks.py:" in first.err
    assert second.err == ""


def long_search(seconds: float) -> None:
    """A search that takes rank 0 longer than ranks wait for a sign of life."""
    report = main.Run._report

    def report_late(run: main.Run, *rest: object) -> None:
        time.sleep(seconds)
        report(run, *rest)  # type: ignore[arg-type]

    patch.object(main.Run, "_report", report_late).start()


def test_a_long_search_on_one_rank_is_no_silence(pictures: Path, tmp_path: Path) -> None:
    search = "--compression-type maxmin --search --popsize 1 --search-iterations 0 --timeout 1"
    run_well(*argv(pictures, tmp_path, search, epochs=1), ranks=2, before=partial(long_search, 3.0))
