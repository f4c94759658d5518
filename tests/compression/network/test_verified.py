"""Checksums of messages: they change no result, cost four bytes a message, and find every flipped bit."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compression import build
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.collectives import Metered
from compression.network.threads import Counting, ThreadCollectives, run_ranks
from compression.network.verified import CHECKSUM_BYTES, DamagedMessage, Verified
from compression.registry import with_messages

LAYERS = layers_of([("weight", (20, 50)), ("bias", (20,))], 64)
GRADIENTS = torch.randn(3, 1020, generator=torch.Generator().manual_seed(0))


class Flipping(ThreadCollectives):
    """Flips a bit of what arrives at one rank: of its exchanges, or of its gathers."""

    verb, at, receiver = "exchange", 0, 1

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        return self._flipped("exchange", super().exchange(messages, sizes))

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        return self._flipped("gather", super().gather(message, sizes))

    def _flipped(self, verb: str, received: Tensor) -> Tensor:
        if verb == self.verb and self.rank == self.receiver:
            byte, bit = divmod(self.at % (8 * received.numel()), 8)
            received.view(-1)[byte] ^= 1 << bit
        return received


@pytest.mark.parametrize("name", with_messages())
def test_averages_are_the_same_and_each_message_is_four_bytes_longer(name: str) -> None:
    def work(ranks: ThreadCollectives) -> list[tuple[Tensor, float, int]]:
        found = []
        for wrap in (lambda network: network, Verified):
            metered, counting = Metered(counted := Counting.of(ranks)), counted
            averager = build(name).averager(LAYERS, wrap(metered), 0)
            flat = GRADIENTS[ranks.rank].clone()
            averager.average_(Gradients(flat, ("weight", "bias"), (0, 1000)), 0)
            found.append((flat, metered.traffic.bytes_sent, counting.messages))
        return found

    for (plain, nbytes, messages), (verified, more, as_many) in run_ranks(3, work):
        assert torch.equal(plain, verified)
        assert (more, as_many) == (nbytes + CHECKSUM_BYTES * messages, messages)


@given(
    verb=st.sampled_from(["exchange", "gather"]),
    at=st.integers(0, 2**20),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
)
def test_every_flipped_bit_is_found_and_its_sender_named(verb: str, at: int, sizes: tuple[int, ...]) -> None:
    """Of messages of any length, their checksums included."""

    def work(ranks: ThreadCollectives) -> str:
        flipping = Flipping.of(ranks)
        flipping.verb, flipping.at = verb, at
        network = Verified(flipping, names=(10, 11, 12))
        others = [rank for rank in range(3) if rank != ranks.rank]
        said = []
        for call in (
            lambda: network.exchange(torch.ones(sum(sizes[rank] for rank in others), dtype=torch.uint8), sizes),
            lambda: network.gather(torch.ones(sizes[ranks.rank], dtype=torch.uint8), sizes),
        ):
            try:
                call()
            except DamagedMessage as error:
                said.append(str(error))
        return " ".join(said)

    first, second, third = run_ranks(3, work)
    assert (first, third) == ("", "")
    sealed = [size + CHECKSUM_BYTES for size in sizes]
    if verb == "exchange":
        sender = (0, 2)[at % (16 * sealed[1]) // (8 * sealed[1])]
    else:
        at %= 8 * sum(sealed)
        sender = next(rank for rank in range(3) if at < 8 * sum(sealed[: rank + 1]))
    assert f"of {sizes[1] if verb == 'exchange' else sizes[sender]} bytes from rank {10 + sender} arrived" in second
    assert "damaged at rank 11" in second


def test_an_empty_message_has_no_checksum() -> None:
    def work(ranks: ThreadCollectives) -> int:
        network = Verified(ranks)
        empty = torch.empty(0, dtype=torch.uint8)
        message = torch.ones(3 * ranks.rank, dtype=torch.uint8)
        return network.exchange(empty, [0, 0]).numel() + len(network.gather(message, [0, 3]))

    assert run_ranks(2, work) == [3, 3]
