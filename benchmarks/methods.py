"""The work of one rank of a benchmark: exchanges of one gradient by several methods, timed, counted and weighed.

Each method begins with float32 gradients in buckets, as DDP makes them, and ends with their averages there; but
`bfloat16` is gloo's all-reduce alone, of gradients that are bfloat16 already. `bfloat16-hook` rounds float32 gradients
first and brings the sums back, as torch's hook does on GPUs; over gloo that one refuses. Torch's other hooks are
called as DDP calls them, without DDP's own copies; its PowerSGD hook gets all gradients in one bucket, since with
several it waits forever over gloo.

Methods of two levels have several hosts of as many ranks each: a host's ranks add up in memory that they share, the
owners of slices average over the hosts, and hand the averages out. `levels-bfloat16` is what a user would take in place
of codes: the same inside, and gloo's all-reduce of bfloat16 between hosts.

Run as a program it is a rank, and is told in its argument what to do. It imports little: many ranks start at once.
"""

import argparse
import ctypes
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
import torch.distributed as dist
from torch import Tensor

import compression
from benchmarks.ranks import kernel_bytes
from compression import TorchDistributed
from compression.costs import in_buffers
from compression.exchange.binding import Binding
from compression.exchange.pipeline import Pipeline
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.arrangement import arrange
from compression.network.hosts import Hosts, find_hosts
from image_classification.allocator import keep_freed_memory

Shapes = Mapping[str, tuple[int, ...]]

BUCKET_BYTES, FIRST_BUCKET_BYTES = 25 * 2**20, 2**20  # at which DDP closes a bucket
TINY = {"weight": (32, 64), "bias": (32,)}


class Counted(NamedTuple):
    """Bytes that a rank sends, and those of them for ranks of other hosts. None: nobody counts."""

    sent: float | None
    crossing: float | None


class Turn(NamedTuple):
    """One exchange on one rank: its bytes by our count, as in `Counted`, and its host's by the kernel's."""

    seconds: float
    sent: float | None
    crossing: float | None
    kernel: float | None


class Measured(NamedTuple):
    """One method on one rank: its turns, and the most memory that it held beside the gradients, in bytes.

    Memory that the ranks of a host share counts once a host, in equal parts.
    """

    turns: list[Turn]
    peak: float


class Workload:
    """One rank's gradients, in one flat buffer: its buckets follow one another in the order in which DDP sends them.

    `hosts`: of all ranks.
    """

    def __init__(self, shapes: Shapes, rank: int, hosts: Hosts) -> None:
        self.shapes, self.hosts = shapes, hosts
        generator = torch.Generator().manual_seed(rank)
        parts = list(bucketed(shapes))
        self._given = torch.randn(sum(map(self.numel, shapes)), generator=generator)
        self.flat = self._given.clone()
        ends = itertools.accumulate(sum(map(self.numel, names)) for names in parts)
        flats = [part for part in self.flat.tensor_split(list(ends)) if len(part)]
        self.buckets = [self._gradients(flat, names) for flat, names in zip(flats, parts, strict=True)]
        self.whole = self._gradients(self.flat, [name for names in parts for name in names])

    def restore(self) -> None:
        """The gradients as they were before any exchange."""
        self.flat.copy_(self._given)

    def numel(self, name: str) -> int:
        return torch.Size(self.shapes[name]).numel()

    def _gradients(self, flat: Tensor, names: Sequence[str]) -> Gradients:
        ends = list(itertools.accumulate(map(self.numel, names)))
        return Gradients(flat, tuple(names), (0, *ends[:-1]))


def bucketed(shapes: Shapes) -> Iterator[list[str]]:
    """Names by bucket as DDP groups them."""
    for layers in in_buffers(layers_of(shapes.items(), bucket_size=0)):
        yield [layer.name for layer in layers]


# Methods: each is bound to the gradients once, and then makes one exchange a call and counts the bytes that it sent.

Exchange = Callable[[], Counted]
Method = Callable[[Workload], Exchange]


def all_reduce(kind: torch.dtype) -> Method:
    """Gloo's own, of all buckets at once as DDP without a hook issues them."""

    def bind(work: Workload) -> Exchange:
        flats = [bucket.flat.to(kind) for bucket in work.buckets]

        def run() -> Counted:
            for pending in [dist.all_reduce(flat, async_op=True) for flat in flats]:
                pending.wait()
            return ring(work, sum(flat.nbytes for flat in flats))

        return run

    return bind


def bfloat16_hook(work: Workload) -> Exchange:
    """The bfloat16 that a user of float32 gradients has: each bucket rounded, summed up, and copied back."""

    def run() -> Counted:
        flats, sums = [bucket.flat for bucket in work.buckets], []
        for flat in flats:
            rounded = flat.to(torch.bfloat16).div_(dist.get_world_size())
            sums.append((rounded, dist.all_reduce(rounded, async_op=True)))
        for flat, (rounded, pending) in zip(flats, sums, strict=True):
            pending.wait()
            flat.copy_(rounded)
        return ring(work, work.flat.nbytes / 2)

    return run


def ours(name: str, *, hierarchical: bool = False, **options: Any) -> Method:
    """One of this program's compressors, bucket by bucket; in two levels where `hierarchical`."""

    def bind(work: Workload) -> Exchange:
        compressor = compression.build(name, **options)
        layers = layers_of(work.shapes.items(), compressor.bucket_size)
        everyone, members, flat = TorchDistributed(), range(dist.get_world_size()), work.flat
        arrangement = arrange(everyone, members, flat.device, flat.numel(), True, hierarchical=hierarchical)
        binding = Binding(compressor, layers, arrangement, seed=0)
        pipeline, traffic = Pipeline(binding.averager, layers, flat.device), binding.collectives.traffic
        steps = itertools.count()

        def run() -> Counted:
            sent, crossing, step = traffic.bytes_sent, traffic.bytes_between_hosts, next(steps)
            pipeline.clear()
            for average in [pipeline.submit(bucket, step) for bucket in work.buckets]:
                average.wait()
            pipeline.check()
            binding.averager.settle(True)
            return Counted(traffic.bytes_sent - sent, traffic.bytes_between_hosts - crossing)

        return run

    return bind


@dataclass(frozen=True)
class Bucket:
    """The part of a `dist.GradBucket` that torch's hooks need, which DDP alone can make."""

    content: Gradients
    shapes: Shapes

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def buffer(self) -> Tensor:
        return self.content.flat

    def gradients(self) -> list[Tensor]:
        flat, names, offsets = self.content.flat, self.content.names, self.content.offsets
        shapes = [torch.Size(self.shapes[name]) for name in names]
        return [flat[at : at + shape.numel()].view(shape) for at, shape in zip(offsets, shapes, strict=True)]


def torch_fp16(work: Workload) -> Exchange:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    buckets = [Bucket(bucket, work.shapes) for bucket in work.buckets]

    def run() -> Counted:
        for future in [default_hooks.fp16_compress_hook(dist.group.WORLD, bucket) for bucket in buckets]:  # type: ignore
            future.wait()
        return ring(work, work.flat.nbytes / 2)

    return run


def torch_powersgd(work: Workload) -> Exchange:
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    state = PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    state.iter = state.start_powerSGD_iter  # the steps before it are plain all-reduces
    bucket = Bucket(work.whole, work.shapes)

    def run() -> Counted:
        powerSGD_hook(state, bucket).wait()
        return Counted(None, None)

    return run


def ring(work: Workload, nbytes: float) -> Counted:
    """The count of a ring all-reduce of so many bytes: a rank sends to the next one alone."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sent = 2 * (world - 1) / world * nbytes
    return Counted(sent, sent if work.hosts.of[rank] != work.hosts.of[(rank + 1) % world] else 0.0)


METHODS: dict[str, Method] = {
    "float32": all_reduce(torch.float32),
    "bfloat16": all_reduce(torch.bfloat16),
    "bfloat16-hook": bfloat16_hook,
    "torch-fp16": torch_fp16,
    "torch-powersgd-4": torch_powersgd,
    "none": ours("none"),
    "maxmin-8": ours("maxmin", bits=8),
    "maxmin-4": ours("maxmin", bits=4),
    "maxmin-4-feedback": ours("maxmin", bits=4, error_feedback=True),
    "maxmin-2": ours("maxmin", bits=2),
    "eden-4": ours("eden", bits=4),
    "eden-2": ours("eden", bits=2),
    "eden-1": ours("eden", bits=1),
    "eden-1-feedback": ours("eden", bits=1, error_feedback=True),
    "norm_uniform-4": ours("norm_uniform", bits=4),
    "exponential-4": ours("exponential", bits=4),
    "1bit": ours("1bit"),
    "terngrad": ours("terngrad"),
    "topk-0.01": ours("topk", ratio=0.01),
    "powersgd-4": ours("powersgd", rank=4),
}

OF_LEVELS = "levels-"
"""The beginning of the names of methods of two levels; what follows names the method between hosts."""

METHODS_IN_LEVELS: dict[str, Method] = {
    f"{OF_LEVELS}bfloat16": ours("none", hierarchical=True, dense_dtype="bfloat16"),
    f"{OF_LEVELS}maxmin-4": ours("maxmin", hierarchical=True, bits=4),
    f"{OF_LEVELS}eden-2": ours("eden", hierarchical=True, bits=2),
    f"{OF_LEVELS}topk-0.01": ours("topk", hierarchical=True, ratio=0.01),
    f"{OF_LEVELS}powersgd-4": ours("powersgd", hierarchical=True, rank=4),
}


# Measuring


def measure(shapes: Shapes, methods: Sequence[str], repeat: int, hosts: Hosts) -> dict[str, Measured]:
    """Every method's exchanges on this rank, all methods in each turn, after a first one that is not timed.

    Memory is that first one's, with what stays in it, once a tiny exchange has compiled what there is to compile.
    """
    tiny, work = (Workload(gradient, dist.get_rank(), hosts) for gradient in (TINY, shapes))
    exchanges, peaks = {}, {}
    for name in methods:
        method = (METHODS | METHODS_IN_LEVELS)[name]
        method(tiny)()
        before = start_of_peak()
        exchanges[name] = method(work)
        exchanges[name]()
        peaks[name] = peak_since(before)
    turns: dict[str, list[Turn]] = {name: [] for name in methods}
    for _ in range(repeat):
        for name, exchange in exchanges.items():
            work.restore()
            turns[name].append(timed(exchange))
    return {name: Measured(turns[name], peaks[name]) for name in methods}


def timed(exchange: Exchange) -> Turn:
    """One exchange. The ranks of a host read one counter: nobody sends before all have read it."""
    dist.barrier()
    before = kernel_bytes()
    dist.barrier()
    start = time.perf_counter()
    counted = exchange()
    seconds = time.perf_counter() - start
    dist.barrier()  # by now all bytes have arrived
    after = kernel_bytes()
    return Turn(seconds, *counted, None if before is None or after is None else after - before)


class Memory(NamedTuple):
    """Bytes of this process in memory: all of them, those that others may share, and its part of those.

    The part is a page's size over the number of processes that have it (Pss): over the ranks of a host the parts add up
    to the memory that they share, counted once.
    """

    resident: int
    shared: int
    part: int

    @classmethod
    def now(cls, resident: str) -> "Memory":
        """`resident` is VmRSS for what is there now, VmHWM for the most that was."""
        shared = memory("status", "RssShmem")
        return cls(memory("status", resident), shared, memory("smaps_rollup", "Pss_Shmem"))


def start_of_peak() -> Memory:
    """The memory now, all that is free given back; from here on the kernel looks for the most."""
    dist.barrier()  # what ranks share is divided by those that have it
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = Memory.now("VmRSS")
    dist.barrier()
    return before


def peak_since(before: Memory) -> float:
    """The most bytes in memory since then, beyond those before; of shared ones, which stay, this rank's part."""
    dist.barrier()
    resident, shared, part = (a - b for a, b in zip(Memory.now("VmHWM"), before, strict=True))
    return resident - shared + part


def memory(file: str, name: str) -> int:
    """A number of a file of /proc/self, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self", file).read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def command(gradients: Sequence[Shapes], methods: Sequence[str], repeat: int) -> list[str]:
    """The command that starts a rank; it prints a list with a `Measured` by method for each of the gradients."""
    return [sys.executable, __file__, json.dumps([gradients, methods, repeat])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", help="JSON: [shapes of each gradient, methods, turns]")
    gradients, methods, repeat = json.loads(parser.parse_args().work)
    torch.set_num_threads(1)
    keep_freed_memory()  # as the program does
    dist.init_process_group("gloo")
    hosts = find_hosts(TorchDistributed())
    json.dump([measure(shapes, methods, repeat, hosts) for shapes in gradients], sys.stdout)
    dist.destroy_process_group()


def parse(outputs: Sequence[str]) -> list[dict[str, list[Measured]]]:
    """The output of all ranks: for each of the gradients, by method, each rank's `Measured`."""
    ranks = [json.loads(output) for output in outputs]
    return [
        {
            name: [Measured([Turn(*turn) for turn in turns], peak) for turns, peak in (rank[k][name] for rank in ranks)]
            for name in ranks[0][k]
        }
        for k in range(len(ranks[0]))
    ]


if __name__ == "__main__":
    main()
