"""Collectives over gloo: who gets what, what is said first, and what is counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from compression import Metered, TorchDistributed
from compression.network.collectives import part_of
from tests.support.gloo_ranks import as_rank, run

RANKS = 3
SIZES = ([4, 4, 4], [5, 0, 2], [0, 0, 3], [0, 0, 0], [300_000, 1, 200_000])
"""Bytes of each rank's message: alike, uneven, none at all, more than a connection holds."""


def message(rank: int, nbytes: int) -> Tensor:
    """A rank's message; no two ranks send the same."""
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(rank))


def swap(network: TorchDistributed, sizes: Sequence[int]) -> dict[str, Any]:
    """Results of one exchange and one gather, and the bytes counted for each."""
    counted = Metered(network)
    exchanged = counted.exchange(message(network.rank, sum(sizes) - sizes[network.rank]), sizes)
    sent = counted.traffic.bytes_sent
    gathered = counted.gather(message(network.rank, sizes[network.rank]), sizes)
    return {
        "exchanged": exchanged, "gathered": gathered, "sent": (sent, counted.traffic.bytes_sent - sent)
    }  # fmt: skip


def several_at_once(network: TorchDistributed) -> dict[str, list[Tensor]]:
    """Exchanges and gathers of all sizes: all are expected before one is sent, in an order of this rank's own, and
    waited for the last one first."""
    assert network.matched_by_tag(torch.device("cpu"))
    expected = []
    for chunk, sizes in enumerate(SIZES):
        messages = torch.zeros(sum(sizes), dtype=torch.uint8)
        part_of(messages, sizes, network.rank).copy_(message(network.rank, sizes[network.rank]))
        exchange = network.post_exchange(sizes, chunk, messages.device)
        expected.append((sizes, exchange, network.post_gather(messages, sizes, chunk)))
    exchanges, gathers = {}, {}
    for turn in range(len(SIZES)):
        chunk = (turn + network.rank) % len(SIZES)
        sizes, exchange, gather = expected[chunk]
        exchange.send(message(network.rank, sum(sizes) - sizes[network.rank]))
        gather.send()
        exchanges[chunk], gathers[chunk] = exchange, gather
    received = [(exchanges[chunk].wait(), gathers[chunk].wait()) for chunk in reversed(range(len(SIZES)))][::-1]
    return {"exchanged": [pair[0] for pair in received], "gathered": [pair[1] for pair in received]}


@dataclass
class Noting:
    """A group that notes what is asked of it: which way, with whom, and its own name."""

    group: Any
    name: str
    asked: list[tuple[str, int, str]]

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        self.asked.append(("recv", peer, self.name))
        return self.group.recv(tensors, peer, tag)

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        self.asked.append(("send", peer, self.name))
        return self.group.send(tensors, peer, tag)


def posted(down: dist.ProcessGroup | None, up: dist.ProcessGroup | None) -> list[list[tuple[str, int, str]]]:
    """Calls that one exchange makes on these groups, in order: until it is posted, and until it has arrived."""
    asked: list[tuple[str, int, str]] = []
    network = TorchDistributed(down, up)
    network.group, network._upward = Noting(network.group, "down", asked), Noting(network._upward, "up", asked)
    exchange = network.post_exchange([1, 1, 1], 0, torch.device("cpu"))
    expected = list(asked)
    exchange.send(message(network.rank, 2))
    exchange.wait()
    return [expected, asked]


def trial(network: TorchDistributed) -> dict[str, Any]:
    return {"swaps": [swap(network, sizes) for sizes in SIZES], "at once": several_at_once(network)}


def work(rank: int, folder: Path) -> dict[str, Any]:
    down, up = dist.new_group(), dist.new_group()
    results: dict[str, Any] = {"one": trial(TorchDistributed()), "two": trial(TorchDistributed(down, up))}
    results["posted"] = posted(None, None)
    results["posted to two"] = posted(down, up)
    few = dist.new_group([1, 2])
    results["of a group"] = swap(TorchDistributed(few), [3, 2]) if rank else None
    alone = [dist.new_group([other]) for other in range(RANKS)][rank]
    results["alone"] = swap(TorchDistributed(alone), [7])
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The result of every rank."""
    return run(__file__, RANKS, tmp_path_factory.mktemp("ranks"))[0]


def exchanged(rank: int, members: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The messages that the rank must get: of each of the others, the part for this rank."""
    rows = torch.empty(len(members) - 1, sizes[rank], dtype=torch.uint8)
    for row, other in zip(rows, (other for other in members if other != rank), strict=True):
        receivers = [member for member in members if member != other]
        parts = message(other, sum(sizes) - sizes[other]).split([sizes[receiver] for receiver in receivers])
        row.copy_(parts[receivers.index(rank)])
    return rows


def gathered(members: Sequence[int], sizes: Sequence[int]) -> Tensor:
    return torch.cat([message(other, nbytes) for other, nbytes in zip(members, sizes, strict=True)])


@pytest.mark.parametrize("groups", ["one", "two"])
@pytest.mark.parametrize("case", range(len(SIZES)), ids=map(str, SIZES))
def test_an_exchange_brings_every_rank_what_each_addressed_to_it(case: int, groups: str, results: list[Any]) -> None:
    for rank, result in enumerate(results):
        assert torch.equal(result[groups]["swaps"][case]["exchanged"], exchanged(rank, range(RANKS), SIZES[case]))


@pytest.mark.parametrize("groups", ["one", "two"])
@pytest.mark.parametrize("case", range(len(SIZES)), ids=map(str, SIZES))
def test_a_gather_brings_everyone_all_messages_in_rank_order(case: int, groups: str, results: list[Any]) -> None:
    for result in results:
        assert torch.equal(result[groups]["swaps"][case]["gathered"], gathered(range(RANKS), SIZES[case]))


@pytest.mark.parametrize("groups", ["one", "two"])
@pytest.mark.parametrize("case", range(len(SIZES)), ids=map(str, SIZES))
def test_messages_that_are_under_way_at_once_do_not_meet(case: int, groups: str, results: list[Any]) -> None:
    for rank, result in enumerate(results):
        assert torch.equal(result[groups]["at once"]["exchanged"][case], exchanged(rank, range(RANKS), SIZES[case]))
        assert torch.equal(result[groups]["at once"]["gathered"][case], gathered(range(RANKS), SIZES[case]))


@pytest.mark.parametrize("groups", ["one", "two"])
@pytest.mark.parametrize("case", range(len(SIZES)), ids=map(str, SIZES))
def test_a_rank_counts_what_it_sends_and_not_what_it_keeps(case: int, groups: str, results: list[Any]) -> None:
    sizes = SIZES[case]
    for rank, result in enumerate(results):
        assert result[groups]["swaps"][case]["sent"] == (sum(sizes) - sizes[rank], (RANKS - 1) * sizes[rank])


def test_a_group_of_some_ranks_counts_them_from_zero(results: list[Any]) -> None:
    for rank, result in enumerate(results[1:]):
        assert torch.equal(result["of a group"]["exchanged"], exchanged(rank, range(2), [3, 2]))
        assert torch.equal(result["of a group"]["gathered"], gathered(range(2), [3, 2]))


def test_a_rank_alone_sends_and_gets_nothing_but_its_own(results: list[Any]) -> None:
    for result in results:
        assert result["alone"]["exchanged"].shape == (0, 7)
        assert torch.equal(result["alone"]["gathered"], message(0, 7))
        assert result["alone"]["sent"] == (0, 0)


def test_every_rank_is_ready_to_receive_before_it_sends(results: list[Any]) -> None:
    """Else the two directions of a link take turns, where a message is longer than what a connection holds."""
    for result in results:
        for groups in ("posted", "posted to two"):
            expected, all_asked = ([way for way, _, _ in asked] for asked in result[groups])
            assert expected == ["recv"] * (RANKS - 1)
            assert all_asked == expected + ["send"] * (RANKS - 1)


def test_of_two_groups_each_carries_one_direction(results: list[Any]) -> None:
    for rank, result in enumerate(results):
        for way, peer, group in result["posted to two"][1]:
            assert group == ("up" if (peer > rank) == (way == "send") else "down")


if __name__ == "__main__":
    as_rank(work)
