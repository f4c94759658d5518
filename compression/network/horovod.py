"""Collectives over Horovod's own verbs: the same averagers, the same bytes, another network.

Horovod is imported when ranks join, so that nothing else of the program needs it.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..streams import record_stream
from .collectives import PostedExchange, PostedGather, part_of
from .world import World, choose_device


@contextlib.contextmanager
def join(device: str, local_rank: int, backend: str) -> Iterator[World]:
    """The ranks of horovodrun; which one of its host this is, Horovod itself knows.

    Horovod has no store: rank 0 serves one of torch's. Raises ValueError where Horovod is not installed.
    """
    hvd = _initialized()
    try:
        own_device = choose_device(device, hvd.local_rank())
        control = Horovod(hvd, "control")
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        host, port = control.broadcast((os.environ.get("HOROVOD_HOSTNAME", socket.gethostname()), port))
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=control.rank == 0, wait_for_workers=False
        )
        yield World(hvd.local_rank(), hvd.local_size(), own_device, control, Horovod(hvd, "gradients"), store)
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
    from step to step, because Horovod remembers its negotiations by name.
    """

    def __init__(self, hvd: Any, prefix: str) -> None:
        self.hvd = hvd
        self.prefix = prefix
        self.rank: int = hvd.rank()
        self.world_size: int = hvd.size()

    def sum_(self, values: Tensor) -> None:
        if values.dtype == torch.bfloat16:  # which Horovod cannot add
            wide = values.float()
            self.sum_(wide)
            values.copy_(wide)
            return
        if values.numel():
            name = f"{self.prefix}.sum.{values.numel()}"
            self.wait_for(self.hvd.allreduce_async_(values, op=self.hvd.Sum, name=name))

    def exchange(self, messages: Tensor, sizes: Sequence[int]) -> Tensor:
        posted = self.post_exchange(sizes, 0, messages.device)
        posted.send(messages)
        return posted.wait()

    def gather(self, message: Tensor, sizes: Sequence[int]) -> Tensor:
        posted = _Gather(self, message, f"gather.0.{sum(sizes)}")
        posted.send()
        return posted.wait()

    def post_exchange(self, sizes: Sequence[int], tag: int, device: torch.device) -> PostedExchange:
        return _Exchange(self, sizes, f"exchange.{tag}.{sum(sizes)}")

    def post_gather(self, messages: Tensor, sizes: Sequence[int], tag: int) -> PostedGather:
        return _Gather(self, part_of(messages, sizes, self.rank), f"gather.{tag}.{sum(sizes)}")

    def matched_by_tag(self, device: torch.device) -> bool:
        return device.type == "cpu"  # it goes by names; on GPUs a message must be sent from the stream that fills it

    def broadcast(self, value: Any) -> Any:
        return self.hvd.broadcast_object(value, root_rank=0, name=f"{self.prefix}.broadcast")

    def collect(self, value: Any) -> list[Any]:
        values: list[Any] = self.hvd.allgather_object(value, name=f"{self.prefix}.collect")
        return values

    def wait_for(self, handle: Any) -> Any:
        """The result of an operation that was begun.

        Horovod's own waiting spins with Python's lock in hand, and keeps backward from going on.
        """
        while not self.hvd.poll(handle):
            time.sleep(1e-4)
        received = self.hvd.synchronize(handle)
        record_stream(*(received if isinstance(received, tuple) else (received,)))  # Horovod's own thread made it
        return received


@dataclass
class _Exchange:
    network: Horovod
    sizes: Sequence[int]
    name: str
    handle: Any = None

    def send(self, messages: Tensor) -> None:
        splits = torch.tensor(self.sizes, dtype=torch.int32)
        splits[self.network.rank] = 0
        name = f"{self.network.prefix}.{self.name}"
        self.handle = self.network.hvd.alltoall_async(messages, splits=splits, name=name)

    def wait(self) -> Tensor:
        received, _ = self.network.wait_for(self.handle)
        rows: Tensor = received.view(self.network.world_size - 1, self.sizes[self.network.rank])
        return rows


@dataclass
class _Gather:
    network: Horovod
    message: Tensor
    name: str
    handle: Any = None

    def send(self) -> None:
        name = f"{self.network.prefix}.{self.name}"
        self.handle = self.network.hvd.allgather_async(self.message, name=name)

    def wait(self) -> Tensor:
        received: Tensor = self.network.wait_for(self.handle)
        return received
