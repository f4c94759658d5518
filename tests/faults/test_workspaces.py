"""A workspace is one run's: a second one is refused before it touches anything, and a dead one is in nobody's way."""

import os
import platform
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.support.program import PATIENCE_SECONDS, SMALL, pause_in_step, run, run_well, wait_for


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("flags", ["--resume auto", "--evaluate"])
def test_a_second_run_in_a_workspace_is_refused_and_the_first_goes_on(
    flags: str, pictures: Path, tmp_path: Path
) -> None:
    work, signs = tmp_path / "work", tmp_path / "signs"
    signs.mkdir()
    argv = (pictures, *SMALL, "--workspace", work, "--epochs", 2, "--prof", 2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run_well, *argv, ranks=2, before=partial(pause_in_step, 3, signs))
        try:
            wait_for(signs / "reached-0")
            before = contents(work)
            [second] = run(*argv, *flags.split())
            after = contents(work)
        finally:
            (signs / "go").touch()
        first.result(PATIENCE_SECONDS)
    assert second.status == 2
    assert second.err.splitlines()[-1].startswith(f"main.py: error: workspace {work} is another run's, process ")
    assert second.err.endswith(f" on {platform.node()}; wait for its end, or choose another --workspace\n")
    assert second.err.count("main.py: error: ") == 1
    assert after == before
    assert {path.name for path in work.iterdir()} == {
        "checkpoint.pth.tar", "experiment_raport.json", "model_best.pth.tar",
    }  # fmt: skip


def killed_in_save(save: int) -> None:
    """SIGKILL at the moment when a checkpoint would take its name, in save number `save` of a run."""
    replace, left = os.replace, [save]

    def replace_or_die(*paths: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    patch.object(os, "replace", replace_or_die).start()


def test_killed_runs_leave_a_workspace_free_and_their_partial_files_do_not_pile_up(
    pictures: Path, tmp_path: Path
) -> None:
    """Their loader's worker may outlive them for seconds, and holds nothing."""
    argv = (pictures, *SMALL, "-j", 1, "--workspace", tmp_path, "--epochs", 2, "--prof", 2, "--resume", "auto")
    for _ in range(2):
        [rank] = run(*argv, before=partial(killed_in_save, 1))
        assert rank.status == -signal.SIGKILL, rank.err
        assert len([*tmp_path.glob(".checkpoint.pth.tar.*partial")]) == 1
    run_well(*argv)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_workspace_that_a_refused_run_would_have_made_is_not_there(pictures: Path, tmp_path: Path) -> None:
    [rank] = run(pictures, *SMALL, "--workspace", tmp_path / "new/work", "--resume", tmp_path / "none")
    assert rank.status == 2
    assert not (tmp_path / "new").exists()
