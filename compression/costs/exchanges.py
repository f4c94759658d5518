"""One exchange of gradients on a cluster, in seconds and bytes. Arithmetic on promises; nothing is sent.

The model adds up the work of the busiest rank:

    seconds = start + rounds x (round + latency) + messages x message + bytes x byte
              + values x encoding + bytes received x decoding + bytes copied x copying

Start: until all ranks are awake and have begun, once. Rounds wait for one another, messages of one round are under way
together and cost the sender some time each, whatever their length. Rounds, messages and bytes are those that averagers
promise (`Averager.sent`), buffer by buffer; here nothing overlaps, and in `steps` it does. Bytes take as long as the
slowest of the rank's processor, the host's link and the host's inside. Where ranks share a core, all that the processor
does takes as many times as long, but for the start.

Flat, all ranks of a host share its link. In two levels (`averagers.Hierarchical`) each rank first copies its float32
gradients into the host's memory, and last all averages out of it. In between, the ranks of each place average their
slices over the hosts, all places at once.

Two hops send 2 (W - 1) messages a buffer, one to each rank and from each rank, and a ring has as many rounds. With
hundreds of ranks these take longer than the bytes, and fewer bits help no more. Cures: two levels, which divide W by
the ranks a host; fewer and larger buffers; sums and gathers over a tree, whose rounds grow with log W, which no
averager has.

W ranks. Seconds, bytes; rates of links in Mbit/s each way.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np

from ..averagers import Averager, Hierarchical
from ..averagers.base import Sent
from ..layers import Layer
from ..network.collectives import Solo
from ..network.inside import Levels, OverNetwork
from ..registry import Compressor

BUFFER_BYTES, FIRST_BUFFER_BYTES = 25 * 2**20, 2**20  # at which DDP closes a buffer
FREE = float("inf")  # Mbit/s of what never is the slowest
_SECONDS_OF_A_BYTE = 8e-6  # at 1 Mbit/s


@dataclass(frozen=True)
class Cluster:
    """Hosts with as many ranks each. `latency` is what a round takes on the way, beside what the ranks do.

    `inside_mbit` is what all ranks of a host together pass on inside, over whatever joins them. `ranks_per_core` is at
    least 1. Raises ValueError for a value out of range.
    """

    hosts: int
    ranks_per_host: int = 1
    link_mbit: float = FREE
    latency: float = 0.0
    inside_mbit: float = FREE
    inside_latency: float = 0.0
    ranks_per_core: float = 1.0

    def __post_init__(self) -> None:
        for name in ("hosts", "ranks_per_host", "ranks_per_core"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"a cluster's `{name}` is at least 1, got {getattr(self, name)}")
        for name in ("link_mbit", "inside_mbit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"a cluster's `{name}` is a rate above 0 in Mbit/s, got {getattr(self, name)}")
        for name in ("latency", "inside_latency"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"a cluster's `{name}` is in seconds, 0 or more, got {getattr(self, name)}")

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_per_host


class Load(NamedTuple):
    """The load of one exchange on its busiest rank, and on a host.

    `rounds` and `messages` are as in `Sent`, `sent` the bytes in them. A rank encodes `encoded` values, and decodes
    `decoded` bytes of other ranks. `link` and `beside` are bytes of all ranks of a host: for other hosts, and for one
    another. `meetings` and `copied` are of two levels: rounds inside a host, and bytes to and from its memory.
    `circulated` are those of `sent` that go round in all-reduces.
    """

    rounds: float
    messages: float
    sent: float
    encoded: float
    decoded: float
    link: float
    beside: float
    meetings: float = 0.0
    copied: float = 0.0
    circulated: float = 0.0


@dataclass(frozen=True)
class Run:
    """One exchange on a cluster. `codec` is the name of its speed, None where gradients travel as they are."""

    cluster: Cluster
    load: Load
    codec: str | None = None


class Parts(NamedTuple):
    """Seconds of an exchange: of work before its messages leave, of the network, and of work after they have come.

    `processor` are those of the network's seconds in which the rank's processor is busy with messages.
    """

    encoding: float
    network: float
    processor: float
    decoding: float


@dataclass(frozen=True)
class CodecCosts:
    """Seconds to encode a value, and to decode a byte of another rank."""

    per_value: float
    per_byte: float


@dataclass(frozen=True)
class Costs:
    """Seconds of a rank on a core of its own: to start, of a round, of a message, of a byte sent, of a byte copied.

    `codecs` are by name. `slower_sums`: how many times as long a link takes for a byte of an all-reduce, in which
    neighbors wait for one another, as for one of a message. `overlaps`, and `overlaps_inside` a host: whether the
    network takes several buffers at once, in different orders on the ranks, from averagers that have them so.
    """

    start: float
    per_round: float
    per_message: float
    per_byte: float
    per_copied_byte: float
    codecs: Mapping[str, CodecCosts]
    slower_sums: float = 1.0
    overlaps: bool = True
    overlaps_inside: bool = True

    @classmethod
    def fit(cls, seconds: Mapping[Run, float]) -> "Costs":
        """The least squares of relative errors, with no cost below 0. What no run can tell costs 0.

        The runs' clusters are without limits of their own, as a loopback is: ValueError for any other.
        """
        from scipy.optimize import nnls  # where it is needed only: the package works without scipy

        for run in seconds:
            cluster = run.cluster
            if min(cluster.link_mbit, cluster.inside_mbit) < FREE or cluster.latency or cluster.inside_latency:
                raise ValueError(f"costs are fitted to runs on networks without limits, got one on {cluster}")
        names = sorted({run.codec for run in seconds if run.codec is not None})
        terms = np.array([list(_terms(run, names)) for run in seconds]) / np.array([*seconds.values()])[:, None]
        scales = np.linalg.norm(terms, axis=0)
        scales[scales == 0] = 1.0
        start, *others = (nnls(terms / scales, np.ones(len(terms)))[0] / scales).tolist()
        per_round, per_message, per_byte, per_copied_byte, *speeds = others
        codecs = {name: CodecCosts(*speeds[2 * k : 2 * k + 2]) for k, name in enumerate(names)}
        return cls(start, per_round, per_message, per_byte, per_copied_byte, codecs)

    def seconds(self, run: Run) -> float:
        """The seconds of an exchange in which nothing overlaps. Raises ValueError as `parts` does."""
        parts = self.parts(run)
        return self.start + parts.encoding + parts.network + parts.decoding

    def parts(self, run: Run) -> "Parts":
        """The seconds of an exchange but for the start. Raises ValueError where its codec has no known speed."""
        cluster, load = run.cluster, run.load
        sharing, ranks = cluster.ranks_per_core, cluster.ranks_per_host
        processor = sharing * load.sent * self.per_byte
        summed = load.circulated / load.sent if load.sent else 0.0
        on_link = _SECONDS_OF_A_BYTE * (1.0 + summed * (self.slower_sums - 1.0))
        bytes_take = max(
            processor,
            load.link * on_link / cluster.link_mbit,
            load.beside * on_link / cluster.inside_mbit,
        )
        copies_take = max(
            sharing * load.copied * self.per_copied_byte,
            ranks * load.copied * _SECONDS_OF_A_BYTE / cluster.inside_mbit,
        )
        encoding, decoding = self._seconds_of_codec(run)
        return Parts(
            encoding + copies_take / 2,
            self.seconds_of_messages(run) + bytes_take,
            self._seconds_of_handling(run) + processor,
            decoding + copies_take / 2,
        )

    def seconds_of_messages(self, run: Run) -> float:
        """The part of `seconds` that grows with the rounds and messages, and not with their bytes."""
        cluster, load = run.cluster, run.load
        on_the_way = cluster.latency if cluster.hosts > 1 else cluster.inside_latency
        return self._seconds_of_handling(run) + load.rounds * on_the_way + load.meetings * cluster.inside_latency

    def _seconds_of_handling(self, run: Run) -> float:
        """The part of that which the rank's processor is busy with."""
        load = run.load
        busy = (load.rounds + load.meetings) * self.per_round + load.messages * self.per_message
        return run.cluster.ranks_per_core * busy

    def _seconds_of_codec(self, run: Run) -> tuple[float, float]:
        """Seconds before the messages of a run leave, and after they have come."""
        if run.codec is None:
            return 0.0, 0.0
        if run.codec not in self.codecs:
            raise ValueError(
                f"the speed of {run.codec!r} is not known; fit the costs to a run of it, "
                f"or take one of {', '.join(self.codecs) or 'none'}"
            )
        codec, sharing = self.codecs[run.codec], run.cluster.ranks_per_core
        return sharing * run.load.encoded * codec.per_value, sharing * run.load.decoded * codec.per_byte


def _terms(run: Run, codecs: Sequence[str]) -> Iterator[float]:
    """The factors of all costs in the seconds of a run, on a network without limits, in the order of `Costs`."""
    load, sharing = run.load, run.cluster.ranks_per_core
    yield 1.0
    yield from (sharing * term for term in (load.rounds + load.meetings, load.messages, load.sent, load.copied))
    for name in codecs:
        yield from (sharing * term * (run.codec == name) for term in (load.encoded, load.decoded))


def bound(compressor: Compressor, layers: Sequence[Layer], cluster: Cluster, hierarchical: bool = False) -> Averager:
    """An averager that only promises, for a cluster that need not be there."""
    if not hierarchical:
        return compressor.averager(layers, Solo(), 0)
    inside = OverNetwork(Solo(world_size=cluster.ranks_per_host))  # of so many places, which never meet
    return compressor.hierarchical(layers, Levels(inside, Solo()), 0)


def load_of(averager: Averager, buffers: Sequence[Sequence[Layer]], cluster: Cluster) -> Load:
    """The load of an exchange of layers, which travel in `buffers`: flat, or in two levels where the averager is so.

    Raises ValueError where two levels are of another number of ranks a host.
    """
    if isinstance(averager, Hierarchical):
        return _load_in_levels(averager, buffers, cluster)
    sent = reduce(Sent.then, (averager.sent(buffer, cluster.ranks) for buffer in buffers), Sent())
    link = sent.from_host(cluster.ranks, cluster.ranks_per_host)
    return Load(
        rounds=sent.rounds,
        messages=sent.messages,
        sent=sent.total,
        encoded=sum(layer.numel for buffer in buffers for layer in buffer),
        decoded=sent.addressed,
        link=link,
        beside=cluster.ranks_per_host * sent.total - link,
        circulated=sent.circulated,
    )


def _load_in_levels(averager: Hierarchical, buffers: Sequence[Sequence[Layer]], cluster: Cluster) -> Load:
    places = averager.levels.inside.world_size
    if places != cluster.ranks_per_host:
        raise ValueError(
            f"the averager has {places} ranks a host, and the cluster {cluster.ranks_per_host}; bind it for the cluster"
        )
    by_buffer = [averager.sent_by_place(buffer, cluster.ranks) for buffer in buffers]
    by_place = [reduce(Sent.then, sent, Sent()) for sent in zip(*by_buffer, strict=True)]
    values = [layer.numel for buffer in buffers for layer in buffer]
    owned = np.array([averager.owned[layer.name] for buffer in buffers for layer in buffer])  # [layers, places, 2]
    return Load(
        rounds=max(sent.rounds for sent in by_place),
        messages=max(sent.messages for sent in by_place),
        sent=max(sent.total for sent in by_place),
        encoded=float(np.diff(owned).sum(0).max()),
        decoded=max(sent.addressed for sent in by_place),
        link=sum(sent.total for sent in by_place),
        beside=0.0,
        meetings=2 * len(buffers) if places > 1 else 0,
        copied=2 * 4 * sum(values) if places > 1 else 0,
        circulated=max(sent.circulated for sent in by_place),
    )


def in_buffers(
    layers: Sequence[Layer], limit: int = BUFFER_BYTES, first_limit: int = FIRST_BUFFER_BYTES
) -> Iterator[list[Layer]]:
    """Layers as DDP groups them: last ones first, a buffer closed at `limit` bytes, by default the first one sooner."""
    buffer: list[Layer] = []
    nbytes, closed_at = 0, first_limit
    for layer in reversed(layers):
        buffer.append(layer)
        nbytes += 4 * layer.numel
        if nbytes >= closed_at:
            yield buffer
            buffer, nbytes, closed_at = [], 0, limit
    if buffer:
        yield buffer
