"""Ranks of one host that add up in shared memory: processes, since threads share theirs anyway."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from compression.network import shared_memory
from compression.network.arrangement import inside_of
from compression.network.inside import Inside, OverNccl, OverNetwork, Spans
from compression.network.shared_memory import SharedMemory
from compression.network.torch_distributed import TorchDistributed
from compression.streams import Until, run_all
from tests.support.gloo_ranks import PATIENCE_SECONDS, as_rank, ended, run, started

RANKS = 3
CPU = torch.device("cpu")
PIECE = 1000  # values, so that buffers come in several pieces
BUFFERS: list[tuple[int, Spans]] = [
    (9, [[(0, 3)], [(3, 6)], [(6, 9)]]),
    (5000, [[(0, 1700), (4000, 4001)], [(1700, 3000)], [(3000, 4000), (4001, 5000)]]),
    (2100, [[], [(0, 2100)], []]),  # all to one owner
    (1000, [[(0, 999)], [], [(999, 1000)]]),
]


def values(buffer: int, rank: int) -> Tensor:
    return torch.randn(BUFFERS[buffer][0], generator=torch.Generator().manual_seed(10 * buffer + rank))


def mean(buffer: int) -> Tensor:
    """As it is promised: each rank's values times 1 / R, added in order."""
    first, second, third = (values(buffer, rank) * (1.0 / RANKS) for rank in range(RANKS))
    return (first + second) + third


def phases(inside: Inside, posted: Any, buffer: int, flat: Tensor, found: list[Tensor]) -> Iterator[Any]:
    own = yield from posted.add_up(flat)
    found.append(own.clone())
    yield from posted.hand_out(own * 2, flat)


def one_after_the_other(inside: Inside) -> list[tuple[Tensor, Tensor]]:
    """(own sums, everybody's doubled) of each buffer."""
    results = []
    for buffer, (count, spans) in enumerate(BUFFERS):
        flat, found = values(buffer, inside.rank), []
        run_all(phases(inside, inside.post(count, spans), buffer, flat, found))
        results.append((found[0], flat))
    return results


def several_at_once(inside: Inside) -> list[tuple[Tensor, Tensor]]:
    """All are posted before one begins, and go on whenever they can, each rank looking in an order of its own."""
    posted = [inside.post(count, spans) for count, spans in BUFFERS]
    flats = [values(buffer, inside.rank) for buffer in range(len(BUFFERS))]
    found: list[list[Tensor]] = [[] for _ in BUFFERS]
    jobs = [phases(inside, posted[k], k, flats[k], found[k]) for k in range(len(BUFFERS))]
    waiting: dict[int, Any] = dict.fromkeys(range(len(BUFFERS)))
    order = sorted(waiting, key=lambda k: (k + inside.rank) % len(BUFFERS))
    while waiting:
        for k in [k for k in order if k in waiting]:
            if waiting[k] is None or waiting[k].ready():
                waiting[k] = next(jobs[k], "ended")
                assert waiting[k] == "ended" or isinstance(waiting[k], Until)
                if waiting[k] == "ended":
                    del waiting[k]
    return [(own[0], flat) for own, flat in zip(found, flats, strict=True)]


def work(rank: int, folder: Path, task: str) -> dict[str, Any]:
    network = TorchDistributed()
    with patch.multiple(shared_memory, PIECE=PIECE, SMALLEST_PIECE=1):
        return {"results": all_ways, "none": without_memory, "death": until_one_dies}[task](network, folder)


def all_ways(network: TorchDistributed, folder: Path) -> dict[str, Any]:
    files = len(os.listdir("/proc/self/fd"))
    memory = SharedMemory(network, 5000)
    results = {"one": one_after_the_other(memory), "several": several_at_once(memory)}
    results["network"] = one_after_the_other(OverNetwork(network))
    results["reduced"] = one_after_the_other(OverNccl(network.group))
    memory.close()
    memory.close()
    assert len(os.listdir("/proc/self/fd")) == files
    return results


def without_memory(network: TorchDistributed, folder: Path) -> dict[str, Any]:
    with patch.object(os, "memfd_create", side_effect=OSError("no memory to share")):
        inside = inside_of(network, CPU, 5000)
    assert isinstance(inside, OverNetwork)
    return {"one": one_after_the_other(inside)}


def until_one_dies(network: TorchDistributed, folder: Path) -> NoReturn:
    memory = SharedMemory(network, 5000)
    count, spans = BUFFERS[1]
    posted = memory.post(count, spans)
    if network.rank == 1:
        (folder / "ready").touch()
        time.sleep(PATIENCE_SECONDS)  # until it is killed
    with pytest.raises(RuntimeError, match="place 1 of this host has ended"):
        run_all(phases(memory, posted, 1, values(1, network.rank), []))
    os._exit(7)  # the network's own end would wait for the one that is gone


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(__file__, RANKS, tmp_path_factory.mktemp("ranks"), "results")[0]


@pytest.mark.parametrize("way", ["one", "several", "network"])
def test_owners_get_the_sum_in_the_order_of_places_and_all_get_what_owners_hand_out(
    results: list[dict[str, Any]], way: str
) -> None:
    for rank, result in enumerate(results):
        for buffer, (own, flat) in enumerate(result[way]):
            expected = mean(buffer)
            parts = [expected[start:stop] for start, stop in BUFFERS[buffer][1][rank]]
            assert torch.equal(own, torch.cat([expected[:0], *parts]))
            assert torch.equal(flat, expected * 2)


def test_owners_of_gpus_get_the_sum_in_the_order_of_the_network(results: list[dict[str, Any]]) -> None:
    """What NCCL is asked for, over gloo."""
    for rank, result in enumerate(results):
        for buffer, (own, flat) in enumerate(result["reduced"]):
            expected = mean(buffer)
            parts = [expected[start:stop] for start, stop in BUFFERS[buffer][1][rank]]
            assert torch.allclose(own, torch.cat([expected[:0], *parts]), atol=1e-6)
            assert torch.allclose(flat, expected * 2, atol=1e-6)
            assert torch.equal(flat, results[0]["reduced"][buffer][1])


def test_ranks_that_share_no_memory_say_so_once_and_use_the_network(tmp_path: Path) -> None:
    results, errors = run(__file__, RANKS, tmp_path, "none")
    for result in results:
        for buffer, (_, flat) in enumerate(result["one"]):
            assert torch.equal(flat, mean(buffer) * 2)
    assert errors[0].count("share no memory (no memory to share): they add up over its network") == 1
    assert "share no memory" not in errors[1] + errors[2]


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    with started(__file__, RANKS, tmp_path, "death") as ranks:
        while not (tmp_path / "ready").exists():
            assert ranks[1].poll() is None
            time.sleep(0.01)
        ranks[1].send_signal(signal.SIGKILL)
        statuses, errors = ended(ranks)
        assert statuses == [7, -signal.SIGKILL, 7], errors


if __name__ == "__main__":
    as_rank(work)
