"""Links: what is measured of a network that takes as long as it is told to, on a clock of its own."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from compression.advice import links
from compression.advice.echo import Echo
from compression.network.arrangement import Arrangement
from compression.network.hosts import Hosts

CPU = torch.device("cpu")
COPIED = 3e-10  # seconds of a byte


class Clock:
    """Seconds that pass because somebody says so."""

    def __init__(self) -> None:
        self.seconds = self.busy = 0.0


class Throttled(Echo):
    """Ranks whose hosts put `rate` bytes a second on their links, and whose processors work `busy` seconds a byte."""

    def __init__(self, clock: Clock, hosts: Hosts, rate: float, latency: float, busy: float = 0.0) -> None:
        super().__init__(len(hosts.of))
        self.clock, self.hosts, self.rate, self.latency, self.busy = clock, hosts, rate, latency, busy
        self.largest = 0.0

    def takes(self, link: float, sent: float, rounds: int, factor: float = 1.0) -> None:
        self.clock.seconds += rounds * self.latency + factor * link / self.rate
        self.clock.busy += sent * self.busy
        self.largest = max(self.largest, link / self.rate)

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        ranks = self.hosts.sizes[0]
        crossing = ranks * (self.world_size - ranks) * sizes[0]
        self.takes(crossing, messages.nbytes, 1)
        return messages

    def sum_(self, values: Tensor) -> None:
        sent = 2 * (self.world_size - 1) / self.world_size * values.nbytes
        self.takes(sent, sent, 2 * (self.world_size - 1), 1.25)


def measured(
    monkeypatch: pytest.MonkeyPatch, hosts: Hosts, mbit: float, latency: float, busy: float = 0.0
) -> tuple[links.Cluster, links.Costs, Throttled]:
    clock = Clock()
    fake = SimpleNamespace(perf_counter=lambda: clock.seconds, process_time=lambda: clock.busy)
    monkeypatch.setattr(links, "time", fake)
    monkeypatch.setattr(links, "_seconds_of_adding", lambda dtype, device: 1e-10)
    monkeypatch.setattr(links, "seconds_of_a_copied_byte", lambda device: COPIED)
    network = Throttled(clock, hosts, mbit * 125e3, latency, busy)
    cluster, costs, _ = links.measure_links(Arrangement(network, hosts), CPU)
    return cluster, costs, network


@pytest.mark.parametrize("mbit", [50.0, 100.0, 1_000.0, 25_000.0])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_link_is_what_it_was_throttled_to(monkeypatch: pytest.MonkeyPatch, mbit: float, ranks: int) -> None:
    cluster, costs, _ = measured(monkeypatch, Hosts.separate(ranks), mbit, 1e-3, busy=1e-11)
    assert cluster.link_mbit == pytest.approx(mbit, rel=0.01)
    assert cluster.latency == pytest.approx(1e-3, rel=0.01)
    assert costs.per_byte == pytest.approx(1e-11)
    assert (cluster.hosts, cluster.ranks_per_host) == (ranks, 1)
    assert costs.per_round == pytest.approx(0, abs=1e-6)


def test_sums_take_longer_by_what_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _, costs, _ = measured(monkeypatch, Hosts.separate(4), 100.0, 0.0)
    assert costs.slower_sums == pytest.approx(1.25, rel=0.01)


def test_the_link_is_a_hosts_however_many_ranks_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, _, _ = measured(monkeypatch, Hosts((0, 0, 1, 1)), 100.0, 1e-4)
    assert cluster.link_mbit == pytest.approx(100, rel=0.01)
    assert (cluster.hosts, cluster.ranks_per_host) == (2, 2)


def test_a_slow_link_is_not_filled_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of exchanges none takes many times as long as the bound, and all together take seconds."""
    _, _, network = measured(monkeypatch, Hosts.separate(4), 50.0, 1e-3)
    assert network.largest < 8 * links.LONGEST
    assert network.clock.seconds < 20


def test_an_exchange_of_one_byte_that_takes_long_is_not_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One size has no slope."""
    cluster, _, _ = measured(monkeypatch, Hosts.separate(2), 100.0, 2 * links.LONGEST)
    assert cluster.link_mbit == pytest.approx(100, rel=0.01)
    assert cluster.latency == pytest.approx(2 * links.LONGEST, rel=0.01)


def test_hosts_that_differ_in_their_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^advice takes hosts with as many ranks each, got hosts of 3 \+ 1 ranks; "):
        measured(monkeypatch, Hosts((0, 0, 0, 1)), 100.0, 0.0)


def test_ranks_without_two_levels_know_what_copies_in_them_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a simulated cluster two levels are predicted from these ranks' costs."""
    _, costs, _ = measured(monkeypatch, Hosts.separate(2), 100.0, 0.0)
    assert costs.per_copied_byte == COPIED
    monkeypatch.undo()
    assert 0 < links.seconds_of_a_copied_byte(CPU) < 1e-6


def test_a_turn_that_is_held_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter([0.0, 0.0, 0.0, 9.0] + [float(9 + k // 2) for k in range(1, 2 * links.MOST_TURNS)])
    monkeypatch.setattr(links, "time", SimpleNamespace(perf_counter=lambda: next(turns)))
    assert links._median_seconds(lambda: None, CPU) == 1.0


def test_a_machine_alone_has_costs_above_0() -> None:
    costs, adding = links.measure_this_machine()
    assert costs.per_message > 0
    assert costs.per_byte >= 0
    assert set(adding) == {"float32", "bfloat16"}
    assert min(adding.values()) > 0
