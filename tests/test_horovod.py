"""Horovod: the same program, the same compressors, the same bits as under torch.distributed."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from compression import COMPRESSORS

ROOT = Path(__file__).parents[1]
AVERAGE = ROOT / "tests" / "support" / "average_everything.py"
ADDED_IN_THE_NETWORK = ("none", "stats", "powersgd")  # by an all-reduce, in an order that is the network's
TRAINING = (
    "digits -a resnet18 --num-classes 10 --image-size 32 --data-backend pytorch -j 0 -b 8 "
    "--compression-type maxmin --error-feedback --search"
)

MIXED = (
    "digits -a resnet18 --num-classes 10 --image-size 32 --data-backend pytorch -j 0 -b 2 --training-only "
    "--optimizer-batch-size 8 --prof 4 --epochs 1 --seed 3 --amp --opt-level O2 --dynamic-loss-scale "
    "--compression-type maxmin --error-feedback"
)
"""Two optimizer steps of two micro-batches each: half precision is slow on a CPU that has none."""

needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod is not installed: make horovod"
)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


def horovodrun(ranks: int, *program: str, hosts: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    horovodrun = str(Path(sys.executable).parent / "horovodrun")
    return run([horovodrun, "-np", str(ranks), "--gloo", *hosts, sys.executable, *program])


def torchrun(ranks: int, *program: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return run([*launch, *program])


@needs_horovod
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_compressor_gives_the_same_bits_as_under_torch_distributed(ranks: int, tmp_path: Path) -> None:
    for launch, name, extra in ((horovodrun, "hvd.pt", ["hvd"]), (torchrun, "ddp.pt", [])):
        done = launch(ranks, str(AVERAGE), str(tmp_path / name), *extra)
        assert done.returncode == 0, done.stdout + done.stderr
    horovod, ddp = torch.load(tmp_path / "hvd.pt"), torch.load(tmp_path / "ddp.pt")
    assert {name.split(".")[0] for name in horovod} == set(COMPRESSORS)
    for name, expected in ddp.items():
        if name.split(".")[0] in ADDED_IN_THE_NETWORK and ranks > 2:
            if name.endswith(".0"):  # later steps build on the first one's rounding
                assert torch.allclose(horovod[name], expected, rtol=0, atol=1e-6), name
        else:
            assert torch.equal(horovod[name], expected), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same training under both launchers: name -> workspace."""
    flags = f"{TRAINING} --prof 3 --epochs 1 --seed 3".split()
    workspaces = {name: tmp_path_factory.mktemp(name) for name in ("hvd", "ddp")}
    for launch, name, extra in ((horovodrun, "hvd", ["--hvd"]), (torchrun, "ddp", [])):
        done = launch(2, "main.py", *flags, *extra, "--workspace", str(workspaces[name]))
        assert done.returncode == 0, done.stdout + done.stderr
    return workspaces


def checkpoint(workspace: Path) -> dict[str, object]:
    content: dict[str, object] = torch.load(workspace / "checkpoint.pth.tar", weights_only=True)
    return content


@needs_horovod
def test_training_gives_the_same_parameters_as_under_ddp(trained: dict[str, Path]) -> None:
    horovod, ddp = (checkpoint(trained[name]) for name in ("hvd", "ddp"))
    assert all(torch.equal(horovod["state_dict"][name], value) for name, value in ddp["state_dict"].items())
    assert horovod["widths"] == ddp["widths"]
    for mine, theirs in zip(horovod["ranks"], ddp["ranks"], strict=True):
        assert all(torch.equal(mine["buffers"][name], value) for name, value in theirs["buffers"].items())


@needs_horovod
@pytest.mark.slow
def test_accumulation_and_a_scaled_loss_in_half_precision_give_the_same_parameters_as_under_ddp(tmp_path: Path) -> None:
    for launch, name, extra in ((horovodrun, "hvd", ["--hvd"]), (torchrun, "ddp", [])):
        done = launch(2, "main.py", *MIXED.split(), *extra, "--workspace", str(tmp_path / name))
        assert done.returncode == 0, done.stdout + done.stderr
    horovod, ddp = checkpoint(tmp_path / "hvd"), checkpoint(tmp_path / "ddp")
    assert all(torch.equal(horovod["state_dict"][name], value) for name, value in ddp["state_dict"].items())


@needs_horovod
@pytest.mark.slow
def test_checkpoints_move_between_launchers(trained: dict[str, Path], tmp_path: Path) -> None:
    """From DDP to Horovod, from Horovod to DDP, and from both to a single process."""
    flags = f"{TRAINING} --prof 2 --epochs 2".split()
    after = {}
    for name, launch, extra, source in (
        ("hvd", horovodrun, ["--hvd"], "ddp"),
        ("ddp", torchrun, [], "hvd"),
    ):
        resume = ["--resume", str(trained[source] / "checkpoint.pth.tar"), "--workspace", str(tmp_path / name)]
        done = launch(2, "main.py", *flags, *extra, *resume)
        assert done.returncode == 0, done.stdout + done.stderr
        after[name] = checkpoint(tmp_path / name)
    assert all(
        torch.equal(after["hvd"]["state_dict"][name], value) for name, value in after["ddp"]["state_dict"].items()
    )
    resume = ["--resume", str(trained["hvd"] / "checkpoint.pth.tar"), "--workspace", str(tmp_path / "solo")]
    done = run([sys.executable, "main.py", *flags, *resume])
    assert done.returncode == 0, done.stderr
    assert "the checkpoint is of 2 ranks, and these are 1" in done.stderr


@needs_horovod
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os, sys; flags = ['--seed', os.environ['HOROVOD_RANK']]", "the flags must be the same on every rank"),
        ("import os, sys; flags = []; os.environ['HOROVOD_RANK'] == '1' and os._exit(3)", ""),
    ],
    ids=["started with other flags", "a rank dies"],
)
def test_all_ranks_end(program: str, words: str, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}\nimport main\n"
        f"sys.exit(main.main([*'{TRAINING} --hvd --prof 1'.split(), '--workspace', {str(tmp_path)!r}, *flags]))\n"
    )
    done = horovodrun(2, str(script))
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.tar"))
    left = subprocess.run(["pgrep", "-f", str(script)], capture_output=True, text=True, check=False)
    assert left.stdout == ""


@needs_horovod
def test_without_its_flag_one_line_says_so_for_all(tmp_path: Path) -> None:
    done = horovodrun(2, "main.py", *TRAINING.split(), "--prof", "1", "--workspace", str(tmp_path))
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert said.count("main.py: error: ") == 1
    assert "horovodrun started 2 processes, and without --hvd each would train by itself; use horovodrun -np 2" in said
    assert not list(tmp_path.iterdir())


@needs_horovod
def test_processes_that_horovod_does_not_join_are_refused(tmp_path: Path) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        command = [sys.executable, "main.py", *TRAINING.split(), "--hvd", "--prof", "1", "--workspace", str(tmp_path)]
        done = run(["env", f"SLURM_PROCID={rank}", "SLURM_STEP_NUM_TASKS=2", *command])
        assert done.returncode == 2
        assert done.stderr.count("main.py: error: srun started 2 processes") == done.stderr.count("error") == lines
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("horovod") is not None, reason="Horovod is installed")
def test_without_horovod_one_line_says_how_to_get_it() -> None:
    done = run([sys.executable, "main.py", "digits", "--hvd"])
    assert done.returncode == 2
    assert "Horovod is not installed (" in done.stderr
    assert "; install it with: make horovod" in done.stderr
    assert len(done.stderr.splitlines()) == 1
