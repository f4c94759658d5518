"""Collectives over Horovod's own verbs: the same averagers, the same bytes, another network.

Horovod is imported when ranks join, so that nothing else of the program needs it.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def join() -> Any:
    """Horovod's torch module, initialized. Raises ValueError where it is not installed."""
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise ValueError(f"--hvd needs Horovod ({error}); install it with: make horovod") from error
    hvd.init()
    return hvd


class Horovod:
    """Collectives over an initialized Horovod.

    `prefix` sets the instance's tensors apart from those of others: Horovod matches ranks by name, and names that it
    counts by itself would mix the calls of two threads.
    """

    def __init__(self, hvd: Any, prefix: str) -> None:
        self._hvd = hvd
        self._names = (f"{prefix}.{number}" for number in itertools.count())
        self.rank: int = hvd.rank()
        self.world_size: int = hvd.size()

    def sum_(self, values: Tensor) -> None:
        if values.dtype == torch.bfloat16:  # which Horovod cannot add
            wide = values.float()
            self.sum_(wide)
            values.copy_(wide)
            return
        self._hvd.allreduce_(values, op=self._hvd.Sum, name=next(self._names))

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        splits = torch.tensor(sizes, dtype=torch.int32)
        received, _ = self._hvd.alltoall(messages, splits=splits, name=next(self._names))
        rows: Tensor = received.view(self.world_size, sizes[self.rank])
        return rows

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        gathered: Tensor = self._hvd.allgather(message, name=next(self._names))
        return gathered

    def broadcast(self, value: Any) -> Any:
        return self._hvd.broadcast_object(value, root_rank=0, name=next(self._names))

    def collect(self, value: Any) -> list[Any]:
        values: list[Any] = self._hvd.allgather_object(value, name=next(self._names))
        return values
