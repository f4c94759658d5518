"""Ranks that never come: contradictions are refused at the start, a wait is told of, and its end is one line."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from compression.network import rendezvous
from tests.support.program import free_port, run
from tests.test_resume import argv

STORE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "PORT"}


def told(environment: Mapping[str, str]) -> None:
    """The variables of a launcher, and little patience before a line says who is waited for."""
    os.environ.update(environment)
    patch.object(rendezvous, "SILENT_SECONDS", 0.3).start()


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2", **STORE}, "RANK 2 does not fit WORLD_SIZE 2 in the environment"),
        ({"RANK": "-1", "WORLD_SIZE": "2", **STORE}, "RANK in the environment is an integer of at least 0, got '-1'"),
        ({"RANK": "first", "WORLD_SIZE": "2", **STORE}, "RANK in the environment is an integer of at least 0, got 'fi"),
        ({"WORLD_SIZE": "2", **STORE}, "WORLD_SIZE 2 in the environment speaks of 2 ranks, and no RANK says which one"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "0", **STORE},
            "LOCAL_WORLD_SIZE in the environment is an integer of at least 1, got '0'",
        ),
        ({"RANK": "0"}, "RANK is set in the environment, and WORLD_SIZE is not; start the ranks with torchrun"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
            "MASTER_PORT in the environment is a port from 0 to 65535, got 'http'",
        ),
    ],
    ids=["too large", "negative", "a word", "none", "no rank a host", "no size", "no port"],
)
def test_what_launchers_cannot_mean_is_refused_at_the_start(
    environment: dict[str, str], line: str, pictures: Path, tmp_path: Path
) -> None:
    [rank] = run(*argv(pictures, tmp_path / "never"), before=partial(told, environment))
    assert rank.status == 2
    [said] = rank.err.splitlines()
    assert said.startswith(f"main.py: error: {line}")
    assert not (tmp_path / "never").exists()


def test_a_rank_that_never_comes_is_waited_for_aloud_and_not_for_ever(pictures: Path, tmp_path: Path) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", **STORE, "MASTER_PORT": (port := free_port())}
    [rank] = run(*argv(pictures, tmp_path / "never"), "--timeout", 2, before=partial(told, environment))
    assert rank.status == 2
    assert rank.err.splitlines() == [
        f"waiting for 1 of 2 ranks at 127.0.0.1:{port}",
        f"main.py: error: 1 of 2 ranks did not come to 127.0.0.1:{port} within 2 s (--timeout): rank 1; start all of "
        "them, or look why they have ended",
    ]
    assert not (tmp_path / "never").exists()


def test_where_nobody_listens_there_is_no_first_rank(pictures: Path, tmp_path: Path) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", **STORE, "MASTER_PORT": (port := free_port())}
    [rank] = run(*argv(pictures, tmp_path / "never"), "--timeout", 2, before=partial(told, environment))
    assert rank.status == 2
    assert rank.err.splitlines() == [
        f"waiting for rank 0 of 2 ranks at 127.0.0.1:{port} (Connection refused)",
        f"main.py: error: rank 0 of 2 ranks has not come to 127.0.0.1:{port} within 2 s (--timeout): Connection "
        "refused; start all ranks, with MASTER_ADDR and MASTER_PORT of the first host",
    ]
