"""Bytes on the wire: what an exchange says it sent is what the kernel's counter of the network interface saw.

Two hosts of a lab exchange the gradients of 1.6 million values over real TCP, and those of ResNet-50 where hosts have
several ranks. The counter also counts headers and acknowledgments. They stay within the tolerance because a virtual
link carries up to 64 KiB under one header.

The kernel also counts what TCP sends again where a busy machine is late with an acknowledgment. So the steps are taken
several times, and the time with the least such noise counts.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import compression
from benchmarks.netlab import available, lab
from benchmarks.ranks import kernel_bytes
from image_classification import models

WHY_NOT = available()
STEPS = 3
TIMES = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "maxmin": {"bits": 4, "error_feedback": True},
    "topk": {"ratio": 0.1},
    "topk_rmsprop": {"ratio": 0.1},
    "dgc": {"ratio": 0.1},
    "svd": {"rank": 32},
    "powersgd": {"rank": 32},
}
"""Options of those compressors that would send too little, beside headers, with their defaults."""


def sent_by(name: str) -> dict[str, float]:
    """Bytes of some steps on this rank: by the report of the exchange, and by the kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(700, 1000), nn.ReLU(), nn.Linear(1000, 900), nn.ReLU(), nn.Linear(900, 10))
    wrapped = DistributedDataParallel(model)
    exchange = compression.attach(wrapped, compression.build(name, **OPTIONS.get(name, {})))

    def step() -> None:
        images = torch.randn(8, 700)
        nn.functional.cross_entropy(wrapped(images), torch.zeros(8, dtype=torch.long)).backward()
        exchange.settle(exchange.finish())

    step()  # in which DDP agrees on its buckets
    dist.barrier()
    exchange.report()
    times = []
    for _ in range(TIMES):
        before = kernel_bytes()
        for _ in range(STEPS):
            step()
        dist.barrier()
        counted = kernel_bytes() - before
        times.append({"reported": exchange.report().bytes_sent, "counted": counted})
        dist.barrier()
    exchange.close()
    return min(times, key=lambda time: time["counted"] - time["reported"])


@pytest.fixture(scope="module")
def sent() -> list[dict[str, dict[str, float]]]:
    """Bytes by rank and compressor."""
    if WHY_NOT is not None:
        pytest.skip(f"no network namespaces here: {WHY_NOT}")
    return on_two_hosts([])


def on_two_hosts(
    cases: Sequence["Case"], ranks_per_host: int | Sequence[int] = 1, order: Sequence[int] | None = None
) -> list[Any]:
    """What each rank measures of the cases, or of every compressor where there are none."""
    root = Path(__file__).parents[1]
    words = json.dumps([asdict(case) for case in cases])
    with lab(hosts=2) as hosts:
        outputs = hosts.run(
            [sys.executable, __file__, words],
            timeout_s=900,
            environment={"PYTHONPATH": f"{root}:{root / 'tests'}"},
            ranks_per_host=ranks_per_host,
            order=order,
        )
    return [json.loads(output) for output in outputs]


@pytest.mark.parametrize("name", compression.COMPRESSORS)
def test_reported_bytes_are_the_kernels(name: str, sent: list[dict[str, dict[str, float]]]) -> None:
    for rank in sent:
        reported, counted = rank[name]["reported"], rank[name]["counted"]
        if name == "sanity":
            assert reported == 0
            assert counted < 10_000  # barriers
        else:
            assert reported > 500_000
            assert counted == pytest.approx(reported, rel=0.03)


# Several ranks a host


@dataclass(frozen=True)
class Case:
    """A compressor, flat or in two levels, and the sizes of the gradients; `messages` as the tests say.

    `sharded` by FSDP2: over the ranks of a host ("inside"), or over all ("everywhere").
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    hierarchical: bool = False
    arch: str | None = "resnet18"
    messages: int = 0
    sharded: str = ""

    def __str__(self) -> str:
        return f"{self.name} {'in two levels' if self.hierarchical else 'flat'}"


class Parameters(nn.Module):
    """Parameters whose gradients are their own values, so that backward takes no time."""

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.parts = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)

    def forward(self) -> torch.Tensor:
        return torch.stack([part.square().sum() / 2 for part in self.parts]).sum()


FEW_SHAPES = [torch.Size(shape) for shape in ((64, 3, 3, 3), (64,), (128, 64, 3, 3), (128,), (10, 128))]


def host_bytes_of(case: Case) -> dict[str, float]:
    """Bytes of one step: those of the rank's host by report and promise, a dense ring's, and the link's by the kernel.

    The ranks of a host read one counter. So nobody sends before all have read it.
    """
    if case.arch is None:
        shapes = FEW_SHAPES
    else:
        with torch.device("meta"):
            shapes = [parameter.shape for parameter in models.build(case.arch).parameters()]
    compressor = compression.build(case.name, **case.options)
    world_size = dist.get_world_size()
    wrapped: nn.Module
    if case.sharded == "inside":
        mesh = DeviceMesh("cpu", torch.arange(world_size).view(2, -1), mesh_dim_names=("hosts", "ranks"))
        wrapped = fully_shard(Parameters(shapes), mesh=mesh["ranks"])
        exchange = compression.attach(wrapped, compressor, mesh=mesh)
        promised = 2 * (exchange.averager.sent(exchange.layers, 2).total + 4)  # and whether all are finite
    else:
        whole = Parameters(shapes)
        wrapped = fully_shard(whole) if case.sharded else DistributedDataParallel(whole)
        exchange = compression.attach(wrapped, compressor, hierarchical=case.hierarchical)
        if isinstance(wrapped, FSDPModule):  # what is gathered once is kept
            wrapped.set_reshard_after_forward(False)
            wrapped.set_reshard_after_backward(False)
        sent, ranks = exchange.averager.sent(exchange.layers, world_size), world_size / exchange.hosts.count
        promised = ranks * sent.total if case.hierarchical else sent.from_host(world_size, ranks)
    steps = 1 if case.arch else 10

    def step() -> None:
        wrapped().backward()
        exchange.settle(exchange.finish())
        wrapped.zero_grad()

    step()  # in which DDP agrees on its buckets
    exchange.report()
    times = []
    for _ in range(TIMES):
        dist.barrier()
        before = kernel_bytes()
        dist.barrier()
        for _ in range(steps):
            step()
        dist.barrier()
        counted = (kernel_bytes() - before) / steps
        report = exchange.report()
        times.append({"reported": report.host_bytes / steps, "dense": report.host_bytes_dense / steps,
                      "promised": promised, "counted": counted})  # fmt: skip
        dist.barrier()
    exchange.close()
    return min(times, key=lambda time: time["counted"])


QUANTIZED, SPARSE, DENSE = ("maxmin", {"bits": 4}), ("topk", {"ratio": 0.01}), ("none", {})
LARGE = [Case(*kind, hierarchical=levels) for kind in (QUANTIZED, SPARSE) for levels in (False, True)] + [Case(*DENSE)]
SMALL = [
    # From each of 2 ranks, or owners, to those of the other host: 2 hops, one gather.
    Case(*QUANTIZED, False, None, messages=2 * 2 * 2),
    Case(*QUANTIZED, True, None, messages=2 * 2),
    Case(*SPARSE, False, None, messages=2 * 2),
    Case(*SPARSE, True, None, messages=2),
    # 3 all-reduces: what travels dense, and two factors. In a ring of W each has 2 parts of 2 (W - 1) messages.
    Case("powersgd", {"rank": 4}, False, None, messages=3 * 2 * 2 * 3),
    Case("powersgd", {"rank": 4}, True, None, messages=2 * 3 * 2 * 2 * 1),
]


@pytest.fixture(scope="module")
def on_hosts_of_two() -> list[list[dict[str, float]]]:
    """By rank and case, `LARGE` and then `SMALL`; ranks 0 and 1 share a host."""
    if WHY_NOT is not None:
        pytest.skip(f"no network namespaces here: {WHY_NOT}")
    return on_two_hosts([*LARGE, *SMALL], ranks_per_host=2)


def check_against_the_kernel(hosts: Sequence[Sequence[int]], ranks: Sequence[dict[str, float]]) -> None:
    """Each host's bytes are the kernel's. A rank reports its part of the mean over hosts, times the ranks."""
    for members in hosts:
        reported = sum(ranks[rank]["reported"] for rank in members) * len(hosts) / len(ranks)
        assert max(ranks[rank]["counted"] for rank in members) == pytest.approx(reported, rel=0.01)


@pytest.mark.parametrize("number", range(len(LARGE)), ids=[str(case) for case in LARGE])
def test_the_bytes_of_a_host_are_those_on_its_link(
    number: int, on_hosts_of_two: list[list[dict[str, float]]]
) -> None:
    ranks = [rank[number] for rank in on_hosts_of_two]
    check_against_the_kernel([[0, 1], [2, 3]], ranks)
    assert sum(rank["reported"] for rank in ranks) / 4 == pytest.approx(ranks[0]["promised"])


@pytest.mark.parametrize("number", range(len(SMALL)), ids=[str(case) for case in SMALL])
def test_small_messages_are_counted_exactly_and_the_network_adds_its_own(
    number: int, on_hosts_of_two: list[list[dict[str, float]]]
) -> None:
    """To a message come headers, acknowledgments and what gloo says beside it: some 500 bytes, 270 in a ring."""
    ranks = [rank[len(LARGE) + number] for rank in on_hosts_of_two]
    reported = sum(rank["reported"] for rank in ranks) / 4
    assert reported == pytest.approx(ranks[0]["promised"], rel=1e-9)
    for rank in ranks:
        assert 0 < rank["counted"] - reported < 1000 * SMALL[number].messages


@pytest.mark.skipif(WHY_NOT is not None, reason=f"no network namespaces here: {WHY_NOT}")
@pytest.mark.parametrize(
    ("ranks_per_host", "order", "edges"),
    [(2, [0, 2, 1, 3], 4), ([2, 1], None, 2)],
    ids=["2 hosts x 2 in another order", "2 + 1"],
)
def test_the_bytes_of_a_host_follow_from_where_the_ranks_are(ranks_per_host: Any, order: Any, edges: int) -> None:
    """A dense ring in the order of ranks crosses the links at every pair of neighbors on different hosts."""
    cases = [Case(*QUANTIZED), Case(*DENSE)]
    measured = on_two_hosts(cases, ranks_per_host, order)
    hosts = [[0, 2], [1, 3]] if order else [[0, 1], [2]]
    world_size = len(measured)
    for number in range(len(cases)):
        check_against_the_kernel(hosts, [rank[number] for rank in measured])
    values = sum(parameter.numel() for parameter in models.build("resnet18").parameters())
    ring = 2 * (world_size - 1) / world_size * 4 * values
    for rank in measured:
        assert rank[1]["dense"] == pytest.approx(ring * edges / 2)
    assert sum(rank[1]["reported"] for rank in measured) / world_size == pytest.approx(ring * edges / 2)


@pytest.mark.skipif(WHY_NOT is not None, reason=f"no network namespaces here: {WHY_NOT}")
def test_what_hosts_of_shards_send_is_their_averages() -> None:
    """What FSDP sends stays inside a host."""
    cases = [Case(*QUANTIZED, sharded="inside"), Case(*DENSE, sharded="inside")]
    measured = on_two_hosts(cases, ranks_per_host=2)
    for number in range(len(cases)):
        ranks = [rank[number] for rank in measured]
        check_against_the_kernel([[0, 1], [2, 3]], ranks)
        assert sum(rank["reported"] for rank in ranks) == pytest.approx(sum(rank["promised"] for rank in ranks))
    quantized, dense = (measured[0][number]["reported"] for number in range(2))
    assert dense == pytest.approx(measured[0][1]["dense"], rel=1e-3)
    assert quantized < 0.14 * dense


@pytest.mark.skipif(WHY_NOT is not None, reason=f"no network namespaces here: {WHY_NOT}")
def test_reduce_scatters_send_what_they_promise() -> None:
    """In float32 a value once, where gloo's own sends it twice; in two levels once a host."""
    cases = [
        Case(*kind, levels, sharded="everywhere")
        for kind in (QUANTIZED, DENSE) for levels in (False, True)
    ]  # fmt: skip
    measured = on_two_hosts(cases, ranks_per_host=2)
    for number in range(len(cases)):
        ranks = [rank[number] for rank in measured]
        check_against_the_kernel([[0, 1], [2, 3]], ranks)
        reported = sum(rank["reported"] for rank in ranks) / 4
        assert reported == pytest.approx(ranks[0]["promised"], rel=1e-4)  # and whether all are finite
    flat, in_levels, dense_flat, dense_in_levels = (measured[0][number]["promised"] for number in range(4))
    values = sum(parameter.numel() for parameter in models.build("resnet18").parameters())
    assert in_levels == pytest.approx(flat / 2, rel=1e-3)
    assert dense_in_levels == pytest.approx(4 * values / 2)
    assert dense_flat == pytest.approx(4 * values)
    assert flat < 0.14 * dense_flat


def rank_main() -> None:
    cases = [Case(**case) for case in json.loads(sys.argv[1])]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured: Any = [host_bytes_of(case) for case in cases] or {name: sent_by(name) for name in compression.COMPRESSORS}
    json.dump(measured, sys.stdout)
    dist.destroy_process_group()


if __name__ == "__main__":
    rank_main()
