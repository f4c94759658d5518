"""One training step: how much of an exchange its backward hides.

Backward hands over gradients buffer by buffer, each once the gradients of all of its layers are there. One thread
exchanges the buffers in order, while backward goes on. With r_k the second at which backward alone would hand over
buffer k, and w_k the seconds of its exchange, the last average is there at

    max over k of  r_k + h x (processor's seconds of the exchanges before k) + (w_k + ... + w_last)

since from some buffer on the thread has never waited for backward. Where no core is idle while backward runs, the
exchange's processor work delays backward by as much: the contention h is 1 there, 0 where a core is to spare, and
measured. Backward's own end is a buffer that takes no time.

Where an averager lets buffers overlap, one is encoded or decoded while another travels: w_k is a sum along the slowest
chain through encoding, network and decoding, none of which takes two buffers at once, and coding is one processor's
work in any case.

A step never takes less than its own work, and what is added is never more than the exchange by itself. More bandwidth
is never slower, and the seconds are convex in those of each exchange.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..averagers import Averager, Hierarchical
from ..layers import Layer
from .exchanges import Cluster, Costs, Load, Parts, Run, load_of


@dataclass(frozen=True)
class Compute:
    """A rank's own work in a step, in seconds, as measured while all ranks of its machine do theirs.

    `before`: data and forward. `backward`: until its end, and `ready` until the gradient of each layer is there, by
    name. `after`: the optimizer and what else a loop does. `contention`: seconds by which a second of the communication
    thread's work delays backward, from 0 to 1.

    Raises ValueError for a time that is none, and a contention out of range.
    """

    before: float
    backward: float
    after: float
    ready: Mapping[str, float]
    contention: float = 1.0

    def __post_init__(self) -> None:
        for seconds in (self.before, self.backward, self.after, *self.ready.values()):
            if not 0 <= seconds < float("inf"):
                raise ValueError(f"times of a step are in seconds, 0 or more, got {seconds}")
        if not 0 <= self.contention <= 1:
            raise ValueError(f"a contention is a fraction from 0 to 1, got {self.contention}")

    @property
    def seconds(self) -> float:
        """A step in which nothing is exchanged."""
        return self.before + self.backward + self.after

    def release(self, layers: Sequence[Layer]) -> float:
        """The seconds from backward's begin until the gradients of all of these layers are there."""
        return min(self.backward, max((self.ready[layer.name] for layer in layers), default=0.0))


class Transfer(NamedTuple):
    """The exchange of one buffer: when backward alone hands it over, in seconds since its begin, and what it takes."""

    release: float
    parts: Parts


class Prediction(NamedTuple):
    """A step in seconds. `exposed`: what the exchange adds to the rank's own work. `codec`, `network`: seconds of the
    exchange, hidden or not. `host_bytes`: bytes that a host puts on its link."""

    seconds: float
    exposed: float
    codec: float
    network: float
    host_bytes: float


class Promise(NamedTuple):
    """What an averager promises to send of a step: the load of each buffer, in order, and whether buffers overlap.

    It holds for clusters of as many ranks on as many hosts, whatever joins them.
    """

    loads: tuple[Load, ...]
    overlaps: bool


@dataclass(frozen=True)
class StepModel:
    """Predicted steps of one model on a cluster. `buffers`: its layers as they travel together, in order."""

    costs: Costs
    compute: Compute
    cluster: Cluster
    buffers: Sequence[Sequence[Layer]]

    def on(self, cluster: Cluster) -> "StepModel":
        """The same on another cluster."""
        return replace(self, cluster=cluster)

    def promise(self, averager: Averager) -> Promise:
        """The loads of all buffers, flat or in two levels. They overlap where averager and network let them."""
        loads = tuple(load_of(averager, [buffer], self.cluster) for buffer in self.buffers)
        if isinstance(averager, Hierarchical):
            return Promise(loads, averager.inner.overlaps and self.costs.overlaps and self.costs.overlaps_inside)
        return Promise(loads, averager.overlaps and self.costs.overlaps)

    def predict(self, promised: Averager | Promise, codec: str | None) -> Prediction:
        """The step with an averager, whose codec has one of the costs' speeds, or none.

        A promise, which takes longer to make than what it is asked here, can be used again.
        """
        promise = promised if isinstance(promised, Promise) else self.promise(promised)
        transfers = self.transfers(promise, codec)
        exposed = self.exposed(transfers, promise.overlaps)
        return Prediction(
            self.compute.seconds + exposed,
            exposed,
            sum(each.parts.encoding + each.parts.decoding for each in transfers),
            sum(each.parts.network for each in transfers),
            sum(load.link for load in promise.loads),
        )

    def transfers(self, promise: Promise, codec: str | None) -> list[Transfer]:
        """The exchange of each buffer, in order."""
        return [
            Transfer(self.compute.release(buffer), self.costs.parts(Run(self.cluster, load, codec)))
            for buffer, load in zip(self.buffers, promise.loads, strict=True)
        ]

    def exposed(self, transfers: Sequence[Transfer], overlaps: bool) -> float:
        """Seconds that exchanges add to a step's own work. `overlaps`: whether they overlap one another."""
        backward, contention = self.compute.backward, self.compute.contention
        if not transfers:
            return 0.0
        paid = 0.0  # by backward, for the exchanges so far
        thread = encoded = arrived = decoded = 0.0  # when each is through with the buffers so far
        for release, parts in transfers:
            handed_over = release + paid
            if overlaps:
                encoded = max(handed_over, encoded) + parts.encoding
                arrived = max(encoded, arrived) + parts.network
                decoded = max(arrived, decoded) + parts.decoding
                coding = parts.encoding + parts.decoding + contention * parts.processor
                thread = max(handed_over, thread) + coding
            else:
                thread = max(handed_over, thread) + parts.encoding + parts.network + parts.decoding
            paid += contention * (parts.encoding + parts.processor + parts.decoding)
        return self.costs.start + max(thread, decoded, backward + paid) - backward
