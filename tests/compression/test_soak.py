"""Soak: over thousands of steps, what a rank holds of memory, files and threads stays what it was."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import compression
from compression.registry import COMPRESSORS

STEPS = int(os.environ.get("SOAK_STEPS", "10000"))
GROWTH_KIB = 2048
"""Of resident memory from the first half of what follows to the second: a leak of 1 KiB a step is more than twice that.
"""

OPTIONS: dict[str, dict[str, Any]] = {
    "topk": {"error_feedback": True}, "topk_rmsprop": {"error_feedback": True}, "maxmin": {"error_feedback": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPRESSORS)
def test_memory_files_and_threads_are_flat(name: str) -> None:
    first, second = soak(name)
    for rank in (first, second):
        early, late = rank["resident_kib"]
        assert late - early < GROWTH_KIB, rank
        assert len({*rank["files"]}) == 1, rank
        assert len({*rank["threads"]}) == 1, rank


def test_a_soak_finds_a_leak() -> None:
    """Of a kilobyte and of a file, in as many steps as show it."""
    rank, _ = soak("maxmin", steps=600, leak=True)
    early, late = rank["resident_kib"]
    assert late - early > 100
    assert rank["files"][0] < rank["files"][1] < rank["files"][2]


def soak(name: str, steps: int = STEPS, leak: bool = False) -> list[dict[str, Any]]:
    """What two ranks held after a twentieth of the steps: the least resident memory of each half of the others, and
    files and threads at its beginning, middle and end.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, name, str(steps), str(int(leak))],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                 "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=3600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(output) for output in outputs]


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def rank_main(name: str, steps: int, leak: bool) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    dist.init_process_group("gloo")
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))  # 100,234
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    leaked: list[Any] = []
    settled = steps // 20
    half = (steps - settled) // 2
    resident = [[resident_kib()], [resident_kib()]]
    held = {"files": [], "threads": []}  # type: dict[str, list[int]]
    with compression.attach(wrapped, name, **OPTIONS.get(name, {})):
        for step in range(steps):
            images = torch.randn(8, 64)
            nn.functional.cross_entropy(wrapped(images), torch.zeros(8, dtype=torch.long)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if leak:
                leaked += [bytearray(1024), os.open("/proc/self/statm", os.O_RDONLY)]
            if step == settled:
                resident = [[], []]
            if step >= settled and step % 10 == 0:
                resident[step - settled >= half].append(resident_kib())
            if step in (settled, settled + half, steps - 1):
                held["files"].append(len(os.listdir("/proc/self/fd")))
                held["threads"].append(threading.active_count() + len(os.listdir("/proc/self/task")))
    json.dump({"resident_kib": [min(part) for part in resident], **held}, sys.stdout)
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # gloo's threads may still hold the lock that the end of a group waits for


if __name__ == "__main__":
    rank_main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
