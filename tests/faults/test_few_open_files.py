"""Too few open files allowed: a soft limit is raised, and of a hard one a line tells, before anything fails of it."""

import resource
from functools import partial
from pathlib import Path

import pytest

from image_classification.open_files import A_WORKER, BASE
from tests.support.program import SMALL, run, run_well


def allow(soft: int, hard: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("workers", "files"), [(4, 40), (4, 100), (0, 16)])
def test_a_limit_that_cannot_be_raised_is_told_in_one_line(
    workers: int, files: int, pictures: Path, tmp_path: Path
) -> None:
    argv = (pictures, *SMALL, "--workspace", tmp_path / "work", "-j", workers)
    [rank] = run(*argv, before=partial(allow, files, files))
    needed = BASE + A_WORKER * workers
    assert (rank.status, rank.out) == (2, "")
    assert rank.err == (
        f"main.py: error: --workers {workers} need up to {needed} open files, and this process may have {files}: Too "
        f"many open files; raise the limit (ulimit -n {needed})" + (", or use fewer --workers\n" if workers else "\n")
    )
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_limit_that_can_be_raised_is_and_what_is_asked_for_is_enough(
    ranks: int, pictures: Path, tmp_path: Path
) -> None:
    argv = (pictures, *SMALL, "--workspace", tmp_path, "--epochs", 1, "--tensorboard-dir", tmp_path / "events")
    run_well(*argv, "-j", 4, ranks=ranks, before=partial(allow, 24, BASE + 4 * A_WORKER))
