"""Collectives over Horovod's own verbs: the same averagers, the same bytes, another network.

Horovod is imported when ranks join, so that nothing else of the program needs it.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..streams import record_stream
from .collectives import PostedExchange, PostedGather, Work, part_of
from .world import World, choose_device


@contextlib.contextmanager
def join(device: str, local_rank: int, backend: str) -> Iterator[World]:
    """The ranks of horovodrun; which one of its host this is, Horovod itself knows.

    Horovod has no store: rank 0 serves one of torch's. Raises ValueError where Horovod is not installed.
    """
    hvd = _initialized()
    try:
        place = choose_device(device, hvd.local_rank())
        control = Horovod(hvd, "control")
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        host, port = control.broadcast((os.environ.get("HOROVOD_HOSTNAME", socket.gethostname()), port))
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=control.rank == 0, wait_for_workers=False
        )
        yield World(hvd.local_rank(), hvd.local_size(), place, control, Horovod(hvd, "gradients"), store)
    finally:
        hvd.shutdown()


def _initialized() -> Any:
    """Horovod's torch module, initialized."""
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise ValueError(f"Horovod is not installed ({error}); install it with: make horovod") from error
    # Fusion would add up the ranks' values in another order than torch does, and differently from step to step.
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"
    hvd.init()
    return hvd


class Horovod:
    """Collectives over an initialized Horovod. An instance is used by one thread.

    Horovod matches ranks by name; `prefix` sets the names of one thread apart from those of others. Names come back
    from step to step, because Horovod remembers what it negotiated under a name.
    """

    def __init__(self, hvd: Any, prefix: str) -> None:
        self._hvd = hvd
        self._prefix = prefix
        self.rank: int = hvd.rank()
        self.world_size: int = hvd.size()

    def sum_(self, values: Tensor) -> None:
        if values.dtype == torch.bfloat16:  # which Horovod cannot add
            wide = values.float()
            self.sum_(wide)
            values.copy_(wide)
            return
        if values.numel():
            name = f"{self._prefix}.sum.{values.numel()}"
            self._wait(self._hvd.allreduce_async_(values, op=self._hvd.Sum, name=name))

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        return self.post_exchange(sizes, 0, messages.device)(messages)()

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        return self._begin_gather(message, sizes, 0)()

    def post_exchange(self, sizes: Sequence[int], chunk: int, device: torch.device) -> PostedExchange:
        def send(messages: Tensor) -> Work:
            splits = torch.tensor(sizes, dtype=torch.int32)
            splits[self.rank] = 0
            name = f"{self._prefix}.exchange.{chunk}.{sum(sizes)}"
            handle = self._hvd.alltoall_async(messages, splits=splits, name=name)

            def wait() -> Tensor:
                received, _ = self._wait(handle)
                rows: Tensor = received.view(self.world_size - 1, sizes[self.rank])
                return rows

            return wait

        return send

    def post_gather(self, messages: Tensor, sizes: Sequence[int], chunk: int) -> PostedGather:
        return lambda: self._begin_gather(part_of(messages, sizes, self.rank), sizes, chunk)

    def matched_by_tag(self, device: torch.device) -> bool:
        return device.type == "cpu"  # it goes by names; on GPUs what is sent must come from the stream that fills it

    def _begin_gather(self, message: Tensor, sizes: Sequence[int], chunk: int) -> Work:
        handle = self._hvd.allgather_async(message, name=f"{self._prefix}.gather.{chunk}.{sum(sizes)}")
        return lambda: self._wait(handle)

    def broadcast(self, value: Any) -> Any:
        return self._hvd.broadcast_object(value, root_rank=0, name=f"{self._prefix}.broadcast")

    def collect(self, value: Any) -> list[Any]:
        values: list[Any] = self._hvd.allgather_object(value, name=f"{self._prefix}.collect")
        return values

    def _wait(self, handle: Any) -> Any:
        """Horovod's own waiting spins with Python's lock in hand, and keeps backward from going on."""
        while not self._hvd.poll(handle):
            time.sleep(1e-4)
        received = self._hvd.synchronize(handle)
        record_stream(*(received if isinstance(received, tuple) else (received,)))  # Horovod's own thread made it
        return received
