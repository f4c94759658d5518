"""Collectives over Horovod's own verbs: the same averagers, the same bytes, another network.

Horovod is imported when ranks join, so that nothing else of the program needs it.
"""

import contextlib
import os
import pickle
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..streams import record_stream
from .collectives import Collectives, PostedExchange, PostedGather, part_of
from .heartbeat import Heartbeat, Watch
from .hosts import Hosts, names_of_this_host, of_names
from .world import World, choose_device

START_SECONDS = 900.0  # for all ranks to have started


@contextlib.contextmanager
def join(
    device: str, local_rank: int, backend: str, ranks_per_host: int | None = None, watch: Watch | None = None
) -> Iterator[World]:
    """The ranks of horovodrun; which one of its host this is, Horovod itself knows.

    Horovod has no store: rank 0 serves one of torch's. Its process sets have to be known when it starts, so that the
    hosts are found before. Raises ValueError where Horovod is not installed.
    """
    hosts = _hosts_before_the_start()
    if hosts is not None and ranks_per_host is not None:
        try:
            hosts = hosts.split(ranks_per_host)
        except ValueError:  # as `attach` will say, once for all ranks
            hosts = None
    sets = hosts.inside + hosts.between if hosts and hosts.count > 1 and (hosts.ranks_per_host or 1) > 1 else []
    hvd, made = _initialized(sets)
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
        groups: tuple[Collectives, Collectives] | None = None
        if made:
            inside, between = (one for one in made if control.rank in one.ranks)
            groups = Horovod(hvd, "inside", inside), Horovod(hvd, "between", between)
        gradients = Horovod(hvd, "gradients")
        watching = (
            Heartbeat(store, control.rank, control.world_size, watch) if watch and control.world_size > 1 else None
        )
        with watching or contextlib.nullcontext():
            yield World(hvd.local_rank(), hvd.local_size(), own_device, control, gradients, store, groups, watching)
    finally:
        hvd.shutdown()


def _hosts_before_the_start() -> Hosts | None:
    """The hosts of all ranks, who tell one another over the server that horovodrun keeps; None where there is none."""
    server = [os.environ.get(f"HOROVOD_GLOO_RENDEZVOUS_{part}") for part in ("ADDR", "PORT")]
    rank, size = (os.environ.get(f"HOROVOD_{part}") for part in ("RANK", "SIZE"))
    if None in (*server, rank, size):
        return None
    from horovod.runner.http import http_client

    scope = "hosts"
    http_client.put_data_into_kvstore(*server, scope, rank, names_of_this_host())
    known = []
    deadline = time.monotonic() + START_SECONDS
    for other in range(int(size or 1)):
        while True:
            try:
                known.append(http_client.read_data_from_kvstore(*server, scope, str(other)))
                break
            except RuntimeError:  # which Horovod makes of every answer but the value: it is not there yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
    return of_names(known)


def _initialized(sets: Sequence[Sequence[int]]) -> tuple[Any, list[Any]]:
    """Horovod's torch module, initialized, and its process sets of these ranks."""
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise ValueError(f"Horovod is not installed ({error}); install it with: make horovod") from error
    # Fusion would add up the ranks' values in another order than torch does, and differently from step to step.
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"
    made = [hvd.ProcessSet(list(ranks)) for ranks in sets]
    hvd.init(process_sets=made)
    return hvd, made


class Horovod:
    """Collectives over an initialized Horovod, of all ranks or of a process set. An instance is used by one thread.

    Horovod matches ranks by name; `prefix` sets the names of one thread apart from those of others. Names come back
    from step to step, because Horovod remembers its negotiations by name.
    """

    def __init__(self, hvd: Any, prefix: str, process_set: Any = None) -> None:
        self.hvd = hvd
        self.process_set = process_set or hvd.global_process_set
        self._first: int = process_set.ranks[0] if process_set else 0  # among all ranks
        self.prefix = f"{prefix}.{self._first}" if process_set else prefix
        self.rank: int = self.process_set.rank()
        self.world_size: int = self.process_set.size()

    def sum_(self, values: Tensor) -> None:
        if values.dtype == torch.bfloat16:  # of gradients in that type, which Horovod cannot add
            wide = values.float()
            self.sum_(wide)
            values.copy_(wide)
            return
        if values.numel():
            name = f"{self.prefix}.sum.{values.numel()}"
            self.wait_for(self.hvd.allreduce_async_(values, op=self.hvd.Sum, name=name, process_set=self.process_set))

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
        name = f"{self.prefix}.broadcast"
        return self.hvd.broadcast_object(value, root_rank=self._first, name=name, process_set=self.process_set)

    def collect(self, value: Any) -> list[Any]:
        message = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self._gathered(torch.tensor([len(message)]), "sizes").tolist()
        return [pickle.loads(bytes(part.numpy())) for part in self._gathered(message, "values").split(sizes)]

    def _gathered(self, values: Tensor, what: str) -> Tensor:
        name = f"{self.prefix}.collect.{what}"
        gathered: Tensor = self.hvd.allgather(values, name=name, process_set=self.process_set)
        return gathered

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
        self.handle = self.network.hvd.alltoall_async(
            messages, splits=splits, name=name, process_set=self.network.process_set
        )

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
        self.handle = self.network.hvd.allgather_async(self.message, name=name, process_set=self.network.process_set)

    def wait(self) -> Tensor:
        received: Tensor = self.network.wait_for(self.handle)
        return received
