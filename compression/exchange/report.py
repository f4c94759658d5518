"""Reports: bytes that an exchange sent, and seconds that it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Report:
    """Bytes and seconds of a number of optimizer steps, on this rank or as the mean over ranks. `Report()` is of none.

    `bytes_dense` is what an all-reduce in float32 would have sent. `ratio` is their quotient, and at one rank, where
    nothing is sent, encoded bytes over 4 bytes a value. `exposed_seconds` are those from the last gradient of backward
    to the last average: what backward did not hide of the exchange. On a GPU they are the host's.
    """

    steps: float = 0
    bytes_sent: float = 0.0
    bytes_dense: float = 0.0
    ratio: float = 0.0
    comm_seconds: float = 0.0
    codec_seconds: float = 0.0
    exposed_seconds: float = 0.0

    def mean(self, sum_over_ranks: Callable[[Tensor], Tensor], world_size: int, device: torch.device) -> Report:
        """The mean over ranks, each of which calls it: one sum of a float64 tensor [7] on `device`."""
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
        return {
            "comm.bytes_sent": self.bytes_sent / self.steps,
            "comm.bytes_dense": self.bytes_dense / self.steps,
            "comm.ratio": self.bytes_sent / self.bytes_dense if self.bytes_dense else self.ratio,
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
