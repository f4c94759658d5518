"""The page on several hosts: its table is the program's arithmetic, its commands run, or are read where no host is."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import main
from benchmarks.netlab import available, host_name, lab
from compression import Solo, build
from compression.layers import layers_of
from image_classification import models
from image_classification.logs import records
from tests.support.markdown import blocks, commands
from tests.test_horovod import needs_horovod

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
BLOCKS = blocks(ROOT / "docs" / "hosts.md")
RUN = [block.text for block in BLOCKS if block.language == "bash"]
[SBATCH] = [block for block in RUN if block.startswith("#!/bin/bash\n#SBATCH")]
HERE = [block for block in RUN if block != SBATCH]
ON_A_CLUSTER = {
    command.split()[0]: command
    for block in BLOCKS if block.language == "console" for command in commands(block.text)
}
WITH_PYTHON = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
WHY_NOT = available()
LIGHT = (
    "digits -a resnet18 --num-classes 10 --image-size 32 --data-backend pytorch -j 0 -b 4 --threads 1 --training-only "
    "--prof 2 --epochs 1 --seed 3 --compression-type maxmin --quantization-bits 4"
)


def test_the_table_is_the_programs_arithmetic() -> None:
    with torch.device("meta"):
        shapes = [(name, parameter.shape) for name, parameter in models.build("resnet50").named_parameters()]
    layers = layers_of(shapes, 512)
    averager = build("maxmin", bits=4).averager(layers, Solo(), 0)
    values, hosts = sum(layer.numel for layer in layers), 4
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert [int(ranks) for ranks, _ in rows] == [1, 2, 4, 8]
    for ranks, cells in rows:
        world_size = hosts * int(ranks)
        ring = 2 * (world_size - 1) / world_size * values
        flat = averager.sent(layers, world_size).from_host(world_size, int(ranks))
        levels = averager.sent(layers, hosts).total
        megabytes = [f"{nbytes / 1e6:.0f}" for nbytes in (4 * ring, 2 * ring, flat, levels)]
        assert cells.split(" | ") == [*megabytes, *(f"{nbytes / (2 * ring):.2f}" for nbytes in (flat, levels))]


@pytest.mark.parametrize("command", HERE, ids=["one machine"])
def test_a_machine_can_be_taken_as_several_hosts(command: str, tmp_path: Path) -> None:
    (tmp_path / "main.py").symlink_to(ROOT / "main.py")
    environment = {**os.environ, "PATH": WITH_PYTHON}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_two_levels(tmp_path / "runs" / "hosts")


def check_two_levels(workspace: Path) -> None:
    """Two hosts of two ranks: each rank sends half of its host's bytes, and the dense ring leaves a host once."""
    [found] = [record["data"] for record in records(workspace / "experiment_raport.json") if len(record["step"]) == 1]
    assert 0 < found["comm.ratio"] < 0.1
    assert found["comm.host_ratio"] == pytest.approx(2 * found["comm.ratio"], rel=1e-3)  # flat: 4/3 of it


def check_flags(words: list[str], monkeypatch: pytest.MonkeyPatch, ranks: int = 32) -> None:
    """The command line is one that the program takes."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    launcher = "HOROVOD_{}" if "--hvd" in words else "{}"
    monkeypatch.setenv(launcher.format("RANK"), "0")
    monkeypatch.setenv(launcher.format("SIZE" if "--hvd" in words else "WORLD_SIZE"), str(ranks))
    flags = main.parse(words)
    assert (flags.data, flags.arch, flags.compression_type, flags.hierarchical) == (
        "/data/imagenet", "resnet50", "maxmin", "auto",
    )  # fmt: skip


def test_torchrun_takes_what_the_page_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, *words = shlex.split(ON_A_CLUSTER["torchrun"])
    launch = get_args_parser().parse_args(words)
    assert (launch.nnodes, launch.nproc_per_node, launch.training_script) == ("4", "8", "main.py")
    assert (launch.rdzv_backend, launch.rdzv_endpoint) == ("c10d", "host0:29500")
    check_flags(launch.training_script_args, monkeypatch)


@needs_horovod
def test_horovodrun_takes_what_the_page_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from horovod.runner import launch

    monkeypatch.setattr(sys, "argv", shlex.split(ON_A_CLUSTER["horovodrun"]))
    given = launch.parse_args()
    assert (given.num_proc, given.hosts) == (32, "host0:8,host1:8,host2:8,host3:8")
    assert given.command[:3] == ["python", "main.py", "--hvd"]
    check_flags(given.command[2:], monkeypatch)


def test_sbatch_passes_on_what_the_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch, script, *words = shlex.split(ON_A_CLUSTER["sbatch"])
    assert (sbatch, script) == ("sbatch", "train.sbatch")
    check_flags(words, monkeypatch)


@pytest.mark.skipif(WHY_NOT is not None, reason=f"no network namespaces here: {WHY_NOT}")
def test_the_sbatch_file_averages_in_two_levels(tmp_path: Path) -> None:
    """The file as it stands, once on each of two nodes.

    Slurm runs the file on the first node and srun a launcher on each: here the file runs on each, and `srun` in place.
    The job has more nodes than the step and other numbers of tasks, which the ranks must not take for their own.
    """
    (tmp_path / "main.py").symlink_to(ROOT / "main.py")
    (tmp_path / "train.sbatch").write_text(SBATCH)
    stand_in(tmp_path / "bin" / "scontrol", '[ "$*" = "show hostnames host[0-1]" ] && printf "host0\\nhost1\\n"')
    stand_in(tmp_path / "bin" / "srun", 'exec "$@"')

    def slurm(host: int) -> dict[str, str]:
        return {
            "PATH": f"{tmp_path / 'bin'}:{WITH_PYTHON}",
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "host[0-1]",
            "SLURM_JOB_NUM_NODES": "4",
            "SLURM_NNODES": "2",
            "SLURM_NODEID": str(host),
            "SLURMD_NODENAME": host_name(host),
            "SLURM_TASKS_PER_NODE": "2(x3),1",
            "SLURM_NTASKS": "7",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NUM_NODES": "2",
            "SLURM_PROCID": str(host),
            "SLURM_LOCALID": "0",
        }

    flags = [*LIGHT.split(), "--workspace", str(tmp_path / "run")]
    with lab(hosts=2, own_names=True) as hosts:
        words = ["bash", "-c", 'cd "$0" && exec bash train.sbatch "$@"', str(tmp_path), *flags]
        hosts.launch(words, timeout_s=900, environment=slurm)
    check_two_levels(tmp_path / "run")


def stand_in(path: Path, line: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
