"""Restarts: torchrun starts all ranks anew where one is killed, and they end as if nothing had happened."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.support.program import ROOT, free_port, run_well
from tests.test_ranks import processes_marked
from tests.test_resume import argv, checkpoint, differences

FLAGS = "--compression-type maxmin --error-feedback"
FIVE = "rendezvous:1,joined:0,step:0,save:0,validation:1"


@pytest.mark.parametrize(
    "shared",
    [pytest.param("0", marks=pytest.mark.slow), "1"],
    ids=["torchrun keeps the store", "rank 0 keeps the store"],
)
@pytest.mark.parametrize("moments", ["step:1", pytest.param(FIVE, marks=pytest.mark.slow)], ids=["once", "five times"])
def test_a_run_whose_ranks_are_killed_and_started_anew_ends_with_the_same_bits(
    moments: str, shared: str, pictures: Path, tmp_path: Path
) -> None:
    straight, restarted = (argv(pictures, tmp_path / name, FLAGS) for name in ("straight", "restarted"))
    run_well(*straight, ranks=2)
    mark = uuid.uuid4().hex
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "5", "--master_port", free_port()]
    words = ["-m", "tests.support.restartable", moments, *map(str, restarted), "--resume", "auto", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *launch, *words],
        cwd=ROOT,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": shared, "STARTED_BY": mark},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert processes_marked(mark) == []
    one, other = (checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("straight", "restarted"))
    assert differences(one, other) == []
