"""Locks: one process at a time, gone with it, and no trace where it ends well."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from image_classification.locks import sole_user

HOLDER = """
import os, pathlib, signal, sys, time
from image_classification.locks import sole_user
with sole_user(pathlib.Path(sys.argv[1]), print):
    child = os.fork()
    if child == 0:
        os.close(1)
        time.sleep(900)
        os._exit(0)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def no_warning(line: str) -> None:
    raise AssertionError(line)


def test_a_second_user_is_told_of_the_first(tmp_path: Path) -> None:
    with sole_user(tmp_path, no_warning):
        words = rf"^workspace {tmp_path} is another run's, process {os.getpid()} on .*; wait for its end, or choose "
        with pytest.raises(BlockingIOError, match=words), sole_user(tmp_path, no_warning):
            pass
    with sole_user(tmp_path, no_warning):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_made_for_it_go_where_nothing_was_written(tmp_path: Path) -> None:
    with sole_user(tmp_path / "one/two", no_warning):
        (tmp_path / "one/file").touch()
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["file"]


def test_a_killed_process_holds_nothing_though_its_own_child_lives(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    holder = subprocess.run([sys.executable, "-c", HOLDER, tmp_path], cwd=root, stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout)
    try:
        assert holder.returncode == -signal.SIGKILL
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        with sole_user(tmp_path, no_warning):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    warnings: list[str] = []
    with sole_user(tmp_path, warnings.append):
        pass
    assert warnings == [
        f"workspace {tmp_path} has no locks (No locks available): nothing will keep another run from writing there, too"
    ]
