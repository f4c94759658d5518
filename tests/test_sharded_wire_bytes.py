"""Bytes of a sharded model on the wire: gradients and parameters in codes are what the kernel's counter saw.

As in `test_wire_bytes`: the steps are taken several times, and the time with the least noise counts.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import compression
from benchmarks.netlab import available, lab
from benchmarks.ranks import kernel_bytes
from compression.exchange.report import Report

WHY_NOT = available()
STEPS, TIMES = 3, 3


def sent_by(gather_bits: int | None) -> dict[str, float]:
    """Bytes of some steps on this rank: by the report of the exchange, of each kind, and by the kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(700, 1000), nn.ReLU(), nn.Linear(1000, 900), nn.ReLU(), nn.Linear(900, 10))
    fully_shard(model[2])
    fully_shard(model)
    times: list[tuple[float, Report]] = []
    with compression.attach(model, "maxmin", bits=4, gather_bits=gather_bits) as exchange:
        for time in range(1 + TIMES):
            dist.barrier()
            before = kernel_bytes()
            for _ in range(STEPS):
                nn.functional.cross_entropy(model(torch.randn(8, 700)), torch.zeros(8, dtype=torch.long)).backward()
            dist.barrier()
            after, report = kernel_bytes(), exchange.report()
            assert before is not None
            assert after is not None
            if time:  # the first makes what later ones find made
                times.append((after - before, report))
    counted, report = min(times, key=lambda found: found[0] - found[1].bytes_sent - found[1].gathered_bytes)
    return {"counted": counted, "gradients": report.bytes_sent, "parameters": report.gathered_bytes}


@pytest.mark.skipif(WHY_NOT is not None, reason=f"no network namespaces here: {WHY_NOT}")
def test_reported_bytes_are_the_kernels() -> None:
    outer, inner = (700 + 1) * 1000 + (900 + 1) * 10, (1000 + 1) * 900
    root = str(Path(__file__).parents[1])
    with lab(hosts=2) as hosts:
        outputs = hosts.run([sys.executable, __file__], timeout_s=900, environment={"PYTHONPATH": root})
    for coded, plain in map(json.loads, outputs):
        assert coded["counted"] == pytest.approx(coded["gradients"] + coded["parameters"], rel=0.02)
        # A byte a value and 8 a block of 512: of the inner module in forward and backward, and once of the rest.
        assert coded["parameters"] == pytest.approx(STEPS * (outer + 2 * inner) / 2 * (1 + 8 / 512), rel=0.01)
        assert plain["counted"] == pytest.approx(plain["gradients"] + STEPS * 4 * (outer + 2 * inner) / 2, rel=0.02)
        assert plain["parameters"] == 0


def rank_main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    json.dump([sent_by(bits) for bits in (8, None)], sys.stdout)
    dist.destroy_process_group()


if __name__ == "__main__":
    rank_main()
