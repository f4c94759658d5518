"""Worlds: which one a process is, in how many threads it computes, and how it tells that another is gone."""

import os

import pytest
import torch
from torch import nn

from compression.network.launchers import HOROVODRUN, TORCHRUN, Launcher
from compression.network.world import join_ranks


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch):
    """Without a launcher; torch's threads are as before afterwards."""
    for launcher in (TORCHRUN, HOROVODRUN):
        for name in (launcher.rank, launcher.size, launcher.local_rank, launcher.local_size):
            monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_process_that_nobody_launched_is_a_world_of_one_rank() -> None:
    with join_ranks("cpu") as world:
        assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
        model = nn.Linear(2, 2)
        assert world.replicate(model) is model


def test_threads_are_those_asked_for_or_all_cores_of_the_process() -> None:
    with join_ranks("cpu", threads=3):
        assert torch.get_num_threads() == 3
    with join_ranks("cpu"):
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))


def test_where_the_system_does_not_tell_the_cores_of_a_process_they_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    with join_ranks("cpu"):
        assert torch.get_num_threads() == os.cpu_count()


def test_ranks_of_one_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 10**6), ("MASTER_PORT", 0)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with join_ranks("cpu") as world:
        assert world.local_size == 10**6
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("launcher", [TORCHRUN, HOROVODRUN], ids=lambda launcher: launcher.name)
def test_a_launcher_reads_its_own_environment(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launcher.started_this_process()
    monkeypatch.setenv(launcher.rank, "3")
    assert launcher.started_this_process()


def test_a_lost_peer_is_told_by_the_type_of_an_error_or_by_its_words() -> None:
    closed = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert TORCHRUN.is_lost_peer(closed)
    assert HOROVODRUN.is_lost_peer(closed)
    assert TORCHRUN.is_lost_peer(torch.distributed.DistError("gone"))
    assert HOROVODRUN.is_lost_peer(RuntimeError("Horovod has been shut down"))
    assert not TORCHRUN.is_lost_peer(RuntimeError("Horovod has been shut down"))
    assert not HOROVODRUN.is_lost_peer(RuntimeError("shapes do not match"))


def test_what_a_device_cannot_send_is_refused_by_the_name_of_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    words = "^`backend` nccl cannot send what lies on a cpu device; use gloo, or choose another `device`$"
    with pytest.raises(ValueError, match=words), join_ranks("cpu", backend="nccl"):
        pass
