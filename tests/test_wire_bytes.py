"""Bytes on the wire: what an exchange says it sent is what the kernel's counter of the network interface saw.

Two hosts of a lab exchange the gradients of 1.6 million values over real TCP. The counter also counts headers and
acknowledgments. They stay within the tolerance because a virtual link carries up to 64 KiB under one header.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import compression
from benchmarks.netlab import available, lab

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
    """Bytes of some steps on this rank: by the report of the exchange, and by the kernel.

    The kernel also counts what TCP sends again where a busy machine is late with an acknowledgment. So the steps are
    taken several times, and the time with the least such noise counts.
    """
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
        before = kernel_counter()
        for _ in range(STEPS):
            step()
        dist.barrier()
        counted = kernel_counter() - before
        times.append({"reported": exchange.report().bytes_sent, "counted": counted})
        dist.barrier()
    exchange.close()
    return min(times, key=lambda time: time["counted"] - time["reported"])


def kernel_counter() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def rank_main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    json.dump({name: sent_by(name) for name in compression.COMPRESSORS}, sys.stdout)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sent() -> list[dict[str, dict[str, float]]]:
    """Bytes by rank and compressor."""
    if WHY_NOT is not None:
        pytest.skip(f"no network namespaces here: {WHY_NOT}")
    root = Path(__file__).parents[1]
    with lab(hosts=2) as hosts:
        environment = {"PYTHONPATH": f"{root}:{root / 'tests'}"}
        outputs = hosts.run([sys.executable, __file__], timeout_s=900, environment=environment)
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


if __name__ == "__main__":
    rank_main()
