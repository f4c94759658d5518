"""Links, measured: latency and bandwidth of the very collectives that averagers use, without filling a slow link."""

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ..averagers.base import all_reduced
from ..costs import Cluster, CodecCosts, Costs, Load, Run
from ..layers import shard
from ..network.arrangement import Arrangement
from ..network.collectives import Collectives
from ..network.inside import Inside
from ..streams import Phases, run_all

SIZES = (1, 2**14, 2**16, 2**18, 2**20, 2**22, 2**24)
"""Bytes of a message to each of the others, tried in turn."""

MOST_BYTES = 2**25
"""Bytes of all messages of a rank in one exchange, at most."""

LONGEST = 0.25
"""Seconds of an exchange after which no larger one is tried."""

TURN_SECONDS, LEAST_TURNS, MOST_TURNS = 0.1, 3, 15  # of each size


@dataclass(frozen=True)
class Timed:
    """One exchange: seconds of the slowest rank, and seconds of the processor that a rank spent, the mean."""

    seconds: float
    processor: float


def measure_links(
    arrangement: Arrangement, device: torch.device, sharing: float = 1.0
) -> tuple[Cluster, Costs, dict[str, float]]:
    """The cluster of these ranks, the costs of messages, and what adding up costs a value, by the type's name.

    `sharing`: ranks for each core of the machine, 1 at least. Every rank calls it with the same and gets the same: it
    decides which collectives run.

    Raises ValueError where hosts differ in their ranks.
    """
    network, hosts = arrangement.collectives, arrangement.hosts
    size, ranks_per_host = network.world_size, hosts.ranks_per_host
    if ranks_per_host is None:
        raise ValueError(f"advice takes hosts with as many ranks each, got {hosts}; start as many on each")
    cluster = Cluster(hosts.count, ranks_per_host)
    times = dict(_exchanges(network, device))
    least, most = min(times), max(times)
    before = max(each for each in times if each < most)
    others = size - 1

    def slope(of: Callable[[Timed], float]) -> float:
        return max((of(times[most]) - of(times[before])) / (most - before), 1e-13)

    handling = min(sharing * times[least].processor, times[least].seconds) / others
    latency = times[least].seconds - others * handling
    per_byte = min(sharing * slope(lambda each: each.processor), slope(lambda each: each.seconds)) / others
    # In one exchange, of one byte a message:
    crossing, beside = ranks_per_host * (size - ranks_per_host), ranks_per_host * (ranks_per_host - 1)
    rate = 8e-6 / slope(lambda each: each.seconds)
    if cluster.hosts > 1:
        cluster = replace(cluster, link_mbit=crossing * rate, latency=latency)
    else:
        cluster = replace(cluster, inside_mbit=beside * rate, inside_latency=latency)
    copying = max(network.collect(seconds_of_a_copied_byte(device)))
    costs = Costs(0.0, 0.0, handling, per_byte, copying, {})

    sums = _Sums(network, device, cluster, costs)
    costs = replace(costs, per_round=sums.seconds_of_a_round())
    costs, adding = replace(sums, costs=costs).adding(per_byte * others > slope(lambda each: each.seconds) / 2)
    if arrangement.levels is not None:
        meeting, per_byte = _inside(arrangement.levels.inside, network, device)
        cluster, costs = replace(cluster, inside_latency=meeting), replace(costs, per_copied_byte=per_byte)
    return cluster, costs, adding


ADDED = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types of numbers that all-reduces add up."""


def _exchanges(network: Collectives, device: torch.device) -> Iterator[tuple[int, Timed]]:
    """(bytes of a message, times) of exchanges among all ranks, shorter ones first."""
    others = network.world_size - 1
    for number, nbytes in enumerate(SIZES):
        messages = torch.zeros(others * nbytes, dtype=torch.uint8, device=device)
        sizes = [nbytes] * network.world_size
        found = timed(network, device, lambda m=messages, s=sizes: network.exchange(m, s))  # type: ignore[misc]
        yield nbytes, found
        larger = SIZES[min(number + 1, len(SIZES) - 1)]
        if number > 0 and (found.seconds > LONGEST or others * larger > MOST_BYTES):  # two sizes make a slope
            return


def timed(network: Collectives, device: torch.device, exchange: Callable[[], object]) -> Timed:
    """The median of some turns of an exchange, which every rank begins at the same time."""
    turns: list[Timed] = []
    began = time.perf_counter()
    while True:
        late = time.perf_counter() - began > TURN_SECONDS
        if len(turns) >= MOST_TURNS or (any(network.collect(late)) and len(turns) >= LEAST_TURNS):
            break
        busy, start = time.process_time(), time.perf_counter()
        exchange()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        turns.append(Timed(time.perf_counter() - start, time.process_time() - busy))
    kept = turns[1:]  # the first has connections to make and memory to get
    own = Timed(
        statistics.median_low([each.seconds for each in kept]), statistics.median_low([each.processor for each in kept])
    )
    ranks: list[Timed] = network.collect(own)
    return Timed(max(each.seconds for each in ranks), statistics.fmean(each.processor for each in ranks))


@dataclass(frozen=True)
class _Sums:
    """All-reduces, against what the same bytes take as messages."""

    network: Collectives
    device: torch.device
    cluster: Cluster
    costs: Costs

    def seconds_of_a_round(self) -> float:
        """Seconds of a round of an all-reduce beyond those of a message on its way."""
        found = timed(self.network, self.device, lambda: self.network.sum_(torch.zeros(1, device=self.device)))
        rounds = 2 * (self.network.world_size - 1)
        return max(0.0, (found.seconds - self._as_messages(4)) / rounds)

    def adding(self, processor_bound: bool) -> tuple[Costs, dict[str, float]]:
        """The costs with those of sums, and seconds to add up a value, by the type's name.

        Where the processor is what limits the network, all that a sum takes beyond its bytes is adding. Where a link
        is, it hides the adding, which is then taken to be as fast as torch's own; what a sum takes beyond its bytes,
        the link takes longer for.
        """
        local = {name: _seconds_of_adding(dtype, self.device) for name, dtype in ADDED.items()}
        if processor_bound:
            return self.costs, {name: max(local[name], self._beyond(dtype)[0]) for name, dtype in ADDED.items()}
        return replace(self.costs, slower_sums=max(1.0, self._beyond(torch.float32)[1])), local

    def _beyond(self, dtype: torch.dtype) -> tuple[float, float]:
        """What a sum takes beyond the same bytes as messages: seconds a value, and how many times as long."""
        nbytes = 2**12
        while nbytes < 2**24 and self._as_messages(2 * nbytes) < LONGEST:
            nbytes *= 2
        values = torch.zeros(nbytes // dtype.itemsize, dtype=dtype, device=self.device)
        found = timed(self.network, self.device, lambda: self.network.sum_(values)).seconds
        short, long = self._as_messages(0), self._as_messages(nbytes)
        return max(0.0, found - long) / len(values), (found - short) / (long - short) if long > short else 1.0

    def _as_messages(self, nbytes: int) -> float:
        cluster = self.cluster
        sent = all_reduced(nbytes, cluster.ranks)
        link = sent.from_host(cluster.ranks, cluster.ranks_per_host)
        beside = cluster.ranks_per_host * sent.total - link
        return self.costs.seconds(Run(cluster, Load(sent.rounds, sent.messages, sent.total, 0, 0, link, beside)))


def _inside(inside: Inside, network: Collectives, device: torch.device) -> tuple[float, float]:
    """Seconds of a meeting of a host's ranks, and of a byte that each of them copies into what they share or out."""

    def times(values: int) -> float:
        flat = torch.zeros(values, device=device)
        first = shard(values, 1, inside.world_size, 0)
        posted = [[span] for span in first]

        def both() -> Phases:
            exchange = inside.post(values, posted)
            own = yield from exchange.add_up(flat)
            yield from exchange.hand_out(own, flat)

        return timed(network, device, lambda: run_all(both())).seconds

    few, many = inside.world_size, 2**21
    short, long = times(few), times(many)
    return short / 2, max(0.0, long - short) / (2 * 4 * many)


def with_codecs(costs: Costs, codecs: dict[str, CodecCosts], adding: dict[str, float]) -> Costs:
    """The costs with speeds of codecs, of which some have values to add up in the network."""
    added = {name: replace(each, per_value=each.per_value + adding.get(name, 0.0)) for name, each in codecs.items()}
    return replace(costs, codecs=added)


def _seconds_of_adding(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a value to add one tensor to another."""
    one, other = torch.ones(2**20, dtype=dtype, device=device), torch.ones(2**20, dtype=dtype, device=device)
    return _median_seconds(lambda: one.add_(other), device) / len(one)


def seconds_of_a_copied_byte(device: torch.device) -> float:
    """Seconds of a byte to copy one tensor into another."""
    one, other = torch.ones(2**21, device=device), torch.ones(2**21, device=device)
    return _median_seconds(lambda: one.copy_(other), device) / one.nbytes


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of some work on this rank alone, of a turn that nothing else held up."""
    turns = []
    for _ in range(1 + MOST_TURNS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        turns.append(time.perf_counter() - start)
    return statistics.median(turns[1:])  # the first has memory to get


def measure_this_machine() -> tuple[Costs, dict[str, float]]:
    """The costs of messages, and of adding up by the type's name, of a process that is alone: over its own loopback."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        sender = stack.enter_context(socket.create_connection(listener.getsockname()))
        receiver = stack.enter_context(listener.accept()[0])

        def takes(nbytes: int) -> float:
            """Seconds of the processor to send and receive so many bytes."""
            found, payload, into = [], bytes(nbytes), bytearray(nbytes)
            for _ in range(MOST_TURNS):
                busy = time.process_time()
                thread = threading.Thread(target=sender.sendall, args=(payload,))
                thread.start()
                left = memoryview(into)
                while left:
                    left = left[receiver.recv_into(left) :]
                thread.join()
                found.append(time.process_time() - busy)
            return statistics.median(found)

        few, many = 1, 2**23
        handling, long = takes(few), takes(many)

    adding = {name: _seconds_of_adding(dtype, torch.device("cpu")) for name, dtype in ADDED.items()}
    per_byte = max(0.0, long - handling) / many
    return Costs(0.0, 0.0, handling, per_byte, per_byte, {}), adding
