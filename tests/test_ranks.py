"""Ranks: whatever starts them, they hold the same bits, do what a plain loop does, and leave nothing behind."""

import itertools
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import main
from compression.network.world import join_ranks
from tests.support.program import ROOT, SMALL, Rank, every_compressor, free_port, run, run_well, signal_in_step, tiny

PARAMETERS = [name for name, _ in tiny(3).named_parameters()]
TRAIN_ONLY = ("--training-only", "--no-checkpoints", "--epochs", "1")


def same_parameters(first: Rank, second: Rank) -> bool:
    return all(torch.equal(first.weights[name], second.weights[name]) for name in PARAMETERS)


@pytest.mark.parametrize("flags", every_compressor().values(), ids=every_compressor())
def test_ranks_end_with_the_same_bits_whatever_compresses(flags: str, pictures: Path, tmp_path: Path) -> None:
    first, second = run_well(
        pictures, *SMALL, *TRAIN_ONLY, "--prof", 3, "--workspace", tmp_path, *flags.split(), ranks=2
    )
    assert same_parameters(first, second)


# Without compression


def train_plainly(folder: Path) -> None:
    """In place of the program: torch's own DDP, SGD and loss in a bare loop over the program's batches."""

    def plain(argv: Sequence[str]) -> int:
        flags = main.parse(argv)
        with join_ranks(flags.device, flags.local_rank, threads=flags.threads) as ranks:
            loader, _ = main.build_data(flags, flags.seed, ranks)
            model = DistributedDataParallel(main.build_model(flags, flags.seed), broadcast_buffers=False)
            # The fused kernel, as the program: torch's others round the last values of a tensor differently.
            sgd = torch.optim.SGD(
                model.parameters(), flags.lr, flags.momentum, weight_decay=flags.weight_decay, fused=True
            )
            for epoch in range(flags.epochs):
                for images, labels in itertools.islice(loader.epoch(epoch), flags.prof):
                    sgd.zero_grad()
                    nn.functional.cross_entropy(model(images), labels).backward()
                    sgd.step()
            torch.save(model.module.state_dict(), folder / f"{ranks.rank}.pt")
        return 0

    patch.object(main, "main", plain).start()


def test_without_compression_training_is_a_plain_ddp_loop_bit_for_bit(pictures: Path, tmp_path: Path) -> None:
    argv = (
        pictures, *SMALL, "--training-only", "--epochs", 2, "--prof", 4, "--bn-weight-decay", "--workspace", tmp_path,
    )  # fmt: skip
    ranks = run_well(*argv, "--compression-type", "none", ranks=2)
    run_well(*argv, ranks=2, before=partial(train_plainly, tmp_path))
    for index, rank in enumerate(ranks):
        plain = torch.load(tmp_path / f"{index}.pt")
        assert all(torch.equal(plain[name], value) for name, value in rank.weights.items())


def test_gradients_that_are_never_sent_teach_nothing(pictures: Path, tmp_path: Path) -> None:
    argv = (pictures, *SMALL, "--wd", 0, "--prof", 3, "--workspace", tmp_path)
    [start] = run_well(*argv, "--evaluate")
    first, second = run_well(*argv, *TRAIN_ONLY, "--compression-type", "sanity", ranks=2)
    assert same_parameters(start, first)
    assert same_parameters(start, second)


# One rank


def launch_one_rank() -> None:
    """Set the variables that a launcher sets for a world of one."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


@pytest.mark.parametrize("compressor", ["none", "maxmin", "topk"])
def test_a_world_of_one_rank_is_what_a_single_process_is(compressor: str, pictures: Path, tmp_path: Path) -> None:
    argv = (
        pictures, *SMALL, *TRAIN_ONLY, "--prof", 3, "--workspace", tmp_path, "--compression-type", compressor,
    )  # fmt: skip
    [alone], [launched] = run_well(*argv), run_well(*argv, before=launch_one_rank)
    assert same_parameters(alone, launched)


# Launchers

LAUNCHERS = {
    "torch.distributed.launch": ["torch.distributed.launch"],
    "torchrun": ["torch.distributed.run"],
}
SEVERAL_BUCKETS = (
    "-a", "resnet18", "--num-classes", 3, "--image-size", 32, "--data-backend", "pytorch", "-j", 0, "-b", 2, "--seed",
    3, "--epochs", 1, "--prof", 2, "--training-only", "--compression-type", "maxmin",
)  # fmt: skip


@pytest.fixture(scope="module")
def reference(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of two ranks of resnet18, whose gradients fill several of DDP's buckets."""
    workspace = tmp_path_factory.mktemp("reference")
    argv = (pictures, *SEVERAL_BUCKETS, "--workspace", workspace)
    run_well(*argv, ranks=2, threads=None)
    return workspace / "checkpoint.pth.tar"


@pytest.mark.parametrize("module", LAUNCHERS.values(), ids=LAUNCHERS)
def test_every_launcher_trains_to_the_same_bits_and_leaves_nothing(
    module: list[str], reference: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    mark = uuid.uuid4().hex
    launch = [sys.executable, "-W", "ignore", "-m", *module, "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*launch, "main.py", *map(str, (pictures, *SEVERAL_BUCKETS, "--workspace", tmp_path / "work"))],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "STARTED_BY": mark},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, other = (torch.load(path) for path in (reference, tmp_path / "work/checkpoint.pth.tar"))
    assert all(torch.equal(one["state_dict"][name], value) for name, value in other["state_dict"].items())
    assert processes_marked(mark) == []
    own_logs_of_torchs_launcher = set((tmp_path / "tmp").glob("torchelastic_*"))
    assert set((tmp_path / "tmp").iterdir()) == own_logs_of_torchs_launcher
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"checkpoint.pth.tar", "experiment_raport.json"}


def processes_marked(mark: str) -> list[Path]:
    """Processes that have the mark in their environment."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environment.read_bytes():
                found.append(environment)
        except OSError:
            continue
    return found


# Loader processes; that no process outlives its rank is checked for every run


@pytest.mark.parametrize("before", [None, partial(signal_in_step, 2, signal.SIGTERM)], ids=["to the end", "stopped"])
def test_loader_processes_end_with_their_rank(
    before: Callable[[], None] | None, pictures: Path, tmp_path: Path
) -> None:
    ranks = run(pictures, *SMALL, "-j", 1, "--epochs", 1, "--workspace", tmp_path, ranks=2, before=before)
    assert [rank.status for rank in ranks] == [143 if before else 0] * 2
