"""The broken barrier in real runs: ranks stay equal, and nothing is lost where an epoch ends or a run is stopped."""

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.program import SMALL, Rank, infinite_loss_in_batch, run, run_well, signal_in_step
from tests.test_horovod import horovodrun, needs_horovod, torchrun
from tests.test_resume import checkpoint, differences

LATE = "--bb-ratio 0.5 --bb-num-parallel-steps 2"
CODED = "--compression-type maxmin --error-feedback"


def argv(pictures: Path, workspace: Path, flags: str, epochs: int = 2) -> list[object]:
    return [pictures, *SMALL, "--workspace", workspace, "--epochs", epochs, "--prof", 4, *flags.split()]


def same(first: Rank, second: Rank) -> bool:
    """Whether all weights are equal; batch-norm statistics are each rank's own."""
    return all(
        torch.equal(value, second.weights[name])
        for name, value in first.weights.items()
        if "running" not in name and "tracked" not in name
    )


def late_in(saved: dict[str, Any]) -> list[int]:
    """Number of steps whose averages are outstanding, on each rank of a checkpoint."""
    return [len(rank["exchange"]["late"]) for rank in saved["ranks"]]


def test_waiting_for_everything_is_synchronous_training_bit_for_bit(pictures: Path, tmp_path: Path) -> None:
    plain, whole, late = (
        run_well(*argv(pictures, tmp_path / name, f"{CODED} {flags}", epochs=1), ranks=2)[0]
        for name, flags in (("plain", ""), ("whole", "--bb-ratio 1"), ("late", LATE))
    )
    assert same(plain, whole)
    assert not same(plain, late)


STOPPED = {
    "none": "--nesterov",
    "warm-up": f"{CODED} --compressor-warmup-steps 2",
    "mixed precision": f"{CODED} --amp --dynamic-loss-scale --nesterov --optimizer-batch-size 16 --prof 8",
}


@pytest.mark.parametrize("flags", STOPPED.values(), ids=STOPPED)
def test_a_run_that_is_stopped_with_averages_outstanding_goes_on_with_the_same_bits(
    flags: str, pictures: Path, tmp_path: Path
) -> None:
    """Stopped after the third step of the second epoch. After an epoch nothing is outstanding."""
    straight, stopped = (argv(pictures, tmp_path / name, f"{LATE} {flags}") for name in ("straight", "stopped"))
    first, second = run_well(*straight, ranks=2)
    assert same(first, second)
    ended = run(*stopped, ranks=2, before=partial(signal_in_step, 6, signal.SIGTERM, 0))
    assert [rank.status for rank in ended] == [143, 143], ended[0].err
    assert all(late_in(checkpoint(tmp_path / "stopped/checkpoint.pth.tar")))
    run_well(*stopped, "--resume", "auto", ranks=2)
    one, other = (checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("straight", "stopped"))
    assert late_in(one) == [0, 0]
    assert differences(one, other) == []


def test_a_late_gradient_that_is_not_finite_ends_the_run_as_any_does(pictures: Path, tmp_path: Path) -> None:
    flags = argv(pictures, tmp_path, f"{LATE} {CODED}")
    first, second = run(*flags, ranks=2, before=partial(infinite_loss_in_batch, 3, 1))
    assert (first.status, second.status) == (1, 1)
    assert "was not finite in epoch 0, at or before iteration " in first.err
    assert "; the step was not applied; use a lower --lr" in first.err


def test_a_moving_loss_scale_backs_off_and_the_run_goes_on(pictures: Path, tmp_path: Path) -> None:
    flags = argv(pictures, tmp_path, f"{LATE} {CODED} --fp16 --dynamic-loss-scale")
    first, second = run_well(*flags, ranks=2, before=partial(infinite_loss_in_batch, 3, 1))
    assert same(first, second)
    saved = checkpoint(tmp_path / "checkpoint.pth.tar")
    assert saved["optimizer"]["loss_scale"]["scale"] < 2.0**16
    assert all(value.isfinite().all() for value in first.weights.values())


@needs_horovod
@pytest.mark.slow
def test_under_horovod_late_averages_give_the_same_bits_as_under_ddp(pictures: Path, tmp_path: Path) -> None:
    flags = "-a resnet18 --image-size 32 -b 2 --epochs 1 --prof 4 --training-only --num-classes 3 --seed 1 --lr 0.02"
    flags += f" --data-backend pytorch -j 0 {CODED} --bb-ratio 0.9 --bb-num-parallel-steps 2"
    for launch, name, extra in ((horovodrun, "hvd", ["--hvd"]), (torchrun, "ddp", [])):
        done = launch(2, "main.py", str(pictures), *flags.split(), "--workspace", str(tmp_path / name), *extra)
        assert done.returncode == 0, done.stdout + done.stderr
    one, other = (checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("hvd", "ddp"))
    assert differences(one["state_dict"], other["state_dict"]) == []
