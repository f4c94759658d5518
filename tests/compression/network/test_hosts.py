"""Hosts: who shares one, by what launchers and machines say, and what follows from it."""

import socket
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression.network import hosts
from compression.network.arrangement import in_levels
from compression.network.hosts import Hosts, names_of_this_host, of_names


def test_hosts_are_numbered_by_their_first_ranks() -> None:
    shuffled = Hosts.named(["b", "a", "a", "b"])
    assert shuffled.of == (0, 1, 1, 0)
    assert shuffled.inside == [[0, 3], [1, 2]]
    assert shuffled.between == [[0, 1], [2, 3]]
    assert [shuffled.place(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert shuffled.ranks_per_host == 2


def test_hosts_that_differ_have_no_common_number_of_ranks() -> None:
    unequal = Hosts.named(["a", "a", "b"])
    assert (unequal.count, unequal.sizes, unequal.ranks_per_host) == (2, [2, 1], None)
    assert str(unequal) == "hosts of 2 + 1 ranks"
    assert str(Hosts.named("aabb")) == "2 hosts x 2"
    assert str(Hosts.single(3)) == "1 host x 3"


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_every_rank_has_one_host_and_one_place(names: list[int]) -> None:
    found = Hosts.named(names)
    assert sorted(rank for ranks in found.inside for rank in ranks) == list(range(len(names)))
    for rank, name in enumerate(names):
        assert found.inside[found.of[rank]][found.place(rank)] == rank
        assert [other for other in range(len(names)) if found.of[other] == found.of[rank]] == [
            other for other in range(len(names)) if names[other] == name
        ]


def test_a_ring_crosses_links_where_neighbors_are_on_different_hosts() -> None:
    assert Hosts.named("aabb").ring_edges == 2
    assert Hosts.named("abab").ring_edges == 4
    assert Hosts.single(4).ring_edges == 0
    assert Hosts.separate(4).ring_edges == 4


def test_a_host_is_taken_as_several() -> None:
    assert Hosts.single(6).split(2).of == (0, 0, 1, 1, 2, 2)
    assert Hosts.named("abababab").split(2).of == (0, 1, 0, 1, 2, 3, 2, 3)
    with pytest.raises(ValueError, match=r"`ranks_per_host` 3 does not divide .* there are 4 \+ 2"):
        Hosts.named("aaaabb").split(3)


TORCHRUN = {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("environment", "source", "name"),
    [
        (TORCHRUN | SLURM, "torchrun", "1"),  # torchrun started by Slurm: Slurm counts the agents
        ({"LOCAL_WORLD_SIZE": "2"} | SLURM, "slurm", "1"),
        ({"SLURM_NODEID": "0"}, "machine", "boot"),  # of a batch script, whose node is not that of a task
        ({"HOROVOD_LOCAL_RANK": "0", "HOROVOD_CROSS_RANK": "1", "HOROVOD_HOSTNAME": "n7"}, "horovodrun", "n7"),
        ({"HOROVOD_LOCAL_RANK": "0", "HOROVOD_CROSS_RANK": "1"}, "horovodrun", "1"),
        ({"LOCAL_WORLD_SIZE": "2"}, "machine", "boot"),
    ],
)
def test_launchers_go_before_machines(
    environment: dict[str, str], source: str, name: str, tmp_path: Path
) -> None:
    with patch.object(hosts, "BOOT_ID", tmp_path / "boot_id"):
        hosts.BOOT_ID.write_text("boot\n")
        assert next(iter(names_of_this_host(environment).items())) == (source, name)


def test_containers_are_told_apart_by_their_machines() -> None:
    """Alike in name on two machines, and under several names on one."""
    alike = [{"machine": "m1", "name": "box"}, {"machine": "m2", "name": "box"}]
    assert of_names(alike).of == (0, 1)
    several = [{"machine": "m1", "name": "box1"}, {"machine": "m1", "name": "box2"}]
    assert of_names(several).of == (0, 0)


def test_a_source_that_some_ranks_lack_is_not_used() -> None:
    known = [{"torchrun": "0", "machine": "m1", "name": "a"}, {"machine": "m1", "name": "a"}]
    assert of_names(known).of == (0, 0)


def test_host_names_are_the_last_resort(tmp_path: Path) -> None:
    with patch.object(hosts, "BOOT_ID", tmp_path / "none"), patch.object(socket, "gethostname", return_value="n3"):
        assert names_of_this_host({}) == {"name": "n3"}


TWO_BY_TWO, UNEQUAL = Hosts.named("aabb"), Hosts.named("aab")


@pytest.mark.parametrize(
    ("asked", "found", "encodes", "expected"),
    [
        (None, TWO_BY_TWO, True, True),
        (True, TWO_BY_TWO, True, True),
        (False, TWO_BY_TWO, True, False),
        (None, TWO_BY_TWO, False, False),
        (None, UNEQUAL, True, False),
        (None, Hosts.single(4), True, False),
        (None, Hosts.separate(4), True, False),
    ],
)
def test_two_levels_are_taken_where_they_save_bytes(
    asked: bool | None, found: Hosts, encodes: bool, expected: bool
) -> None:
    assert in_levels(asked, found, encodes) is expected


@pytest.mark.parametrize(
    ("found", "encodes", "reason"),
    [
        (UNEQUAL, True, r"there are hosts of 2 \+ 1 ranks; start as many ranks on each"),
        (Hosts.single(4), True, "all 4 ranks are on one host"),
        (Hosts.separate(3), True, "3 hosts x 1, and nothing to add up inside"),
        (TWO_BY_TWO, False, "encodes nothing"),
    ],
)
def test_two_levels_that_are_asked_for_and_cannot_be_are_refused(found: Hosts, encodes: bool, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        in_levels(True, found, encodes)
