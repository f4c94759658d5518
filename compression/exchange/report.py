"""Reports: bytes that an exchange sent, and seconds that it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .binding import Binding
    from .pipeline import Pipeline


@dataclass(frozen=True)
class Report:
    """Bytes and seconds of a number of optimizer steps, on this rank or as the mean over ranks. `Report()` is of none.

    `bytes_dense` are those of an all-reduce in float32, or of a reduce-scatter where each rank gets the averages of its
    own shards only. `ratio` is their quotient, and at one rank, where nothing is sent, encoded bytes over 4 bytes a
    value. `host_bytes` are those that a host puts on its link, the mean over hosts, and `host_bytes_dense` those that a
    ring all-reduce in float32, over the same ranks in order, would: 0 on one host. `exposed_seconds` are those from the
    last gradient of backward to the last average: what backward did not hide of the exchange. On a GPU they are the
    host's. `gathered_bytes` and `host_gathered_bytes` are beside `bytes_sent` and `host_bytes`: a sharded model's
    parameters, gathered in codes.
    """

    steps: float = 0
    bytes_sent: float = 0.0
    bytes_dense: float = 0.0
    ratio: float = 0.0
    comm_seconds: float = 0.0
    codec_seconds: float = 0.0
    exposed_seconds: float = 0.0
    host_bytes: float = 0.0
    host_bytes_dense: float = 0.0
    gathered_bytes: float = 0.0
    host_gathered_bytes: float = 0.0

    def mean(self, sum_over_ranks: Callable[[Tensor], Tensor], world_size: int, device: torch.device) -> Report:
        """The mean over ranks, each of which calls it: one sum of a float64 tensor [11] on `device`."""
        import torch

        own = torch.tensor(self._sums(), dtype=torch.float64, device=device)
        return Report._of((sum_over_ranks(own) / world_size).tolist())

    def __add__(self, later: Report) -> Report:
        """The report of both, one after the other."""
        return Report._of([a + b for a, b in zip(self._sums(), later._sums(), strict=True)])

    def metrics(self) -> dict[str, float]:
        """Metrics by name, per step; none where there was no step."""
        if self.steps == 0:
            return {}
        gathered = {
            "comm.gathered_bytes": self.gathered_bytes / self.steps,
            "comm.host_gathered_bytes": self.host_gathered_bytes / self.steps,
        }
        host_ratio = {"comm.host_ratio": self.host_bytes / self.host_bytes_dense} if self.host_bytes_dense else {}
        return {
            "comm.bytes_sent": self.bytes_sent / self.steps,
            "comm.bytes_dense": self.bytes_dense / self.steps,
            "comm.ratio": self.bytes_sent / self.bytes_dense if self.bytes_dense else self.ratio,
            "comm.host_bytes": self.host_bytes / self.steps,
            "comm.host_bytes_dense": self.host_bytes_dense / self.steps,
            **host_ratio,
            **(gathered if self.gathered_bytes else {}),
            "comm.time": self.comm_seconds / self.steps,
            "comm.exposed_time": self.exposed_seconds / self.steps,
            "codec.time": self.codec_seconds / self.steps,
        }

    def _sums(self) -> list[float]:
        """Its fields, but with `ratio` summed over the steps: what can be added up."""
        steps, sent, dense, ratio, *seconds = astuple(self)
        return [steps, sent, dense, ratio * steps, *seconds]

    @classmethod
    def _of(cls, sums: list[float]) -> Report:
        steps, sent, dense, ratio, *seconds = sums
        return cls(steps, sent, dense, ratio / steps if steps else 0.0, *seconds)


class Meter:
    """Counts the bytes and seconds of an exchange from report to report."""

    def __init__(self, binding: Binding, pipeline: Pipeline) -> None:
        self._network, self._hosts, self._pipeline = binding.collectives, binding.hosts, pipeline
        self._dense_bytes, self._values = binding.dense_bytes, sum(layer.numel for layer in binding.layers)
        self._exposed_seconds = 0.0
        self._submitted_at: float | None = None  # the last gradients of the step under way
        self._reported: tuple[float, ...] = (0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0)

    def submitted(self) -> None:
        """Backward has handed over gradients."""
        self._submitted_at = time.perf_counter()

    def arrived(self) -> None:
        """All averages that the step waits for have arrived: a loop may say so much later, or the next step may."""
        if self._submitted_at is not None:
            self._exposed_seconds += max(0.0, self._pipeline.completed_at - self._submitted_at)
            self._submitted_at = None

    def skip(self, steps: int) -> None:
        """The total has become so many steps larger by loading a state: no report is of those."""
        reported, *sums = self._reported
        self._reported = (reported + steps, *sums)

    def encoding_anew(self, encoded_bytes: int) -> None:
        """Another averager is there now, which counts from 0; the one before it had counted so many bytes."""
        *others, encoded, comm, job, exposed = self._reported
        self._reported = (*others, encoded - encoded_bytes, comm, job, exposed)

    def report(self, steps: int) -> Report:
        """Bytes and seconds since the last report, at a total of `steps`."""
        traffic, pipeline = self._network.traffic, self._pipeline
        seconds = (traffic.seconds, pipeline.seconds, self._exposed_seconds)
        sent_so_far = (traffic.bytes_sent, traffic.bytes_between_hosts, pipeline.averager.encoded_bytes)
        now = (float(steps), *sent_so_far, *seconds)
        done, sent, between, encoded, comm, job, exposed = (b - a for a, b in zip(self._reported, now, strict=True))
        self._reported = now
        world, hosts = self._network.world_size, self._hosts
        dense = self._dense_bytes * done
        ratio = sent / dense if dense else encoded / (4 * self._values * done or 1)
        host = between * world / hosts.count
        host_dense = dense * hosts.ring_edges / hosts.count
        return Report(int(done), sent, dense, ratio, comm, max(job - comm, 0.0), exposed, host, host_dense)
