"""Replicas that drift apart in mid-run: the run ends, names the first layer that differs, and keeps its checkpoint."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import main
from tests.support.program import SMALL, own_rank, run, run_well


def flip_bit(run: main.Run) -> None:
    """The last bit of one value, as broken memory does it."""
    run.module.get_parameter("3.weight").data[0, 0, 0, :1].view(torch.int32).bitwise_xor_(1)


def lose_step(run: main.Run) -> None:
    run.exchange.step -= 1


def lose_width(run: main.Run) -> None:
    run.exchange.set_widths({"5.weight": 3})


DRIFTS: dict[str, tuple[Callable[[main.Run], None], str]] = {
    "weights": (flip_bit, "3.weight"),
    "schedule": (lose_step, "the step"),
    "widths": (lose_width, "the bits of 5.weight"),
}


def drift_after_step(step: int, drift: Callable[[main.Run], None]) -> None:
    """Rank 1 changes something at the end of a step of this run, counted from 1."""
    end_step, steps = main.Run._should_stop, itertools.count(1)

    def drift_and_end_step(run: main.Run) -> bool:
        if own_rank() == 1 and next(steps) == step:
            drift(run)
        return end_step(run)

    patch.object(main.Run, "_should_stop", drift_and_end_step).start()


CASES = [*((*drift, "--check-replicas 2") for drift in DRIFTS.values()), (*DRIFTS["weights"], "")]


@pytest.mark.parametrize(("drift", "name", "flags"), CASES, ids=[*DRIFTS, "weights, found with the next checkpoint"])
def test_replicas_that_drift_apart_end_the_run_and_leave_its_checkpoint(
    drift: Callable[[main.Run], None], name: str, flags: str, pictures: Path, tmp_path: Path
) -> None:
    argv = (pictures, *SMALL, "--workspace", tmp_path, "--epochs", 2, "--prof", 3, "--compression-type", "maxmin")
    run_well(*argv, "--run-epochs", 1, ranks=2)
    checkpoint = tmp_path / "checkpoint.pth.tar"
    whole = checkpoint.read_bytes()
    steps = 2 if flags else 3
    before = partial(drift_after_step, 1 if drift is flip_bit else steps, drift)  # else messages do not fit
    first, second = run(*argv, "--resume", "auto", *flags.split(), ranks=2, before=before)
    assert (first.status, second.status) == (1, 1), first.err
    assert first.err == (
        f"main.py: error: the ranks have drifted apart in the last {steps} steps: {name} on rank 1 is not what it is "
        "on rank 0; look for broken memory or other libraries on its host; the last checkpoint is from before: go on "
        f"with --resume {checkpoint}\n"
    )
    assert second.err == ""
    assert checkpoint.read_bytes() == whole
