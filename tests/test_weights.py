"""Weights: those that a run starts from, whoever trained them, and those that it scores and exports."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from image_classification.checkpoints import load_weights
from image_classification.logs import records
from tests.support.program import SMALL, Rank, run, run_well, tiny

HEAD = ("12.weight", "12.bias")
NO_WEIGHTS = "random weights are scored: no --pretrained-weights were given, and no checkpoint to --resume\n"


def scores(workspace: Path) -> dict[str, float]:
    """The last validation's."""
    logged = [record["data"] for record in records(workspace / "experiment_raport.json") if record["type"] == "LOG"]
    last = next(data for data in reversed(logged) if "val.loss" in data)
    return {name: last[name] for name in ("val.top1", "val.top5", "val.loss")}


def checkpoint(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())


IDLE = "no effect: --lr, --print-freq with --evaluate\n"
"""Line about those flags of `SMALL` that an evaluation has no use for."""


def evaluated(pictures: Path, workspace: Path, *flags: object, ranks: int = 1) -> Rank:
    return run_well(pictures, *SMALL, "--workspace", workspace, "--evaluate", *flags, ranks=ranks)[0]


# To start from


def test_weights_of_a_training_script_with_other_classes_get_a_head_of_their_own(
    pictures: Path, tmp_path: Path
) -> None:
    theirs = tiny(5).state_dict()
    content = {
        "model": {f"module._orig_mod.{name}": value for name, value in theirs.items()},
        "model_ema": {"n_averaged": torch.tensor(3)} | {f"module.{name}": value for name, value in theirs.items()},
        "args": argparse.Namespace(model="tiny"),
    }
    torch.save(content, tmp_path / "w.pth")
    argv = (pictures, *SMALL, "--evaluate", "--pretrained-weights", tmp_path / "w.pth", "--workspace")
    refused, *_ = run(*argv, tmp_path / "refused", ranks=2)
    assert refused.status == 2
    assert refused.err.splitlines()[-1].endswith("choose their --num-classes, or --reset-head for a classifier that is "
                                                 "drawn anew")  # fmt: skip
    first, other, *_ = run_well(*argv, tmp_path / "reset", "--reset-head", ranks=2)
    assert same({name: value for name, value in first.weights.items() if name not in HEAD},
                {name: value for name, value in theirs.items() if name not in HEAD})  # fmt: skip
    assert first.err == (
        f"{IDLE}weights file {tmp_path / 'w.pth'} holds trained weights and a running average of them: 'model' is "
        "taken; to start from the average, save its 'model_ema' alone\n"
    )
    assert other.err == ""
    [again] = run_well(*argv, tmp_path / "again", "--reset-head")
    assert same(first.weights, again.weights)  # drawn by the seed
    [seeded] = run_well(*argv, tmp_path / "seeded", "--reset-head", "--seed", 2)
    assert not torch.equal(seeded.weights[HEAD[0]], first.weights[HEAD[0]])


@pytest.mark.parametrize("flags", [(), ("--resume", "auto")], ids=["none", "auto that finds none"])
def test_an_evaluation_of_random_weights_says_so(flags: tuple[str, ...], pictures: Path, tmp_path: Path) -> None:
    first, second = run_well(
        pictures, *SMALL, "--workspace", tmp_path, "--evaluate", "--prof", 1, *flags, ranks=2
    )
    assert (first.err, second.err) == (IDLE + NO_WEIGHTS, "")


# To score


def test_the_best_checkpoint_scores_what_it_scored_however_it_is_loaded(pictures: Path, tmp_path: Path) -> None:
    """Two ranks see other images, and so have other batch-norm statistics: validation scores their averages."""
    work = tmp_path / "work"
    run_well(pictures, *SMALL, "--workspace", work, "--epochs", 1, ranks=2)
    best = work / "model_best.pth.tar"
    saved = checkpoint(best)
    one, other = (rank["buffers"]["1.running_mean"] for rank in saved["ranks"])
    assert not torch.equal(one, other)
    assert torch.equal(saved["state_dict"]["1.running_mean"], (one + other) / 2)
    expected = scores(work)
    for flag in ("--pretrained-weights", "--resume"):
        for ranks in (1, 2):
            folder = tmp_path / f"{flag}{ranks}"
            assert evaluated(pictures, folder, flag, best, ranks=ranks).err == IDLE
            assert scores(folder) == pytest.approx(expected, rel=1e-5)


TRAININGS = {
    "residuals": "--compression-type maxmin --error-feedback",
    "buckets": "--compression-type quantile --bucket-size 100 --quantization-bits 3 --error-feedback",
    "momentum of its own": "--dgc --topk-ratio 0.1",
    "factors": "--powersgd-rank 2",
    "late averages": "--compression-type maxmin --error-feedback --bb-ratio 0.2 --bb-num-parallel-steps 2",
    "a search": "--search --popsize 1 --search-iterations 0",
    "autocast": "--amp",
    "master weights": "--fp16",
    "a moving loss scale": "--amp --opt-level O2 --dynamic-loss-scale --compression-type maxmin --error-feedback",
    "no master weights": "--amp --opt-level O3",
}


@pytest.mark.parametrize("flags", TRAININGS.values(), ids=TRAININGS)
def test_a_checkpoint_is_evaluated_without_the_flags_of_its_training(
    flags: str, pictures: Path, tmp_path: Path
) -> None:
    """With the training's own precision the scores are the run's own; without, those of its weights in float32."""
    work, exported, again = tmp_path / "work", tmp_path / "w.safetensors", tmp_path / "again.safetensors"
    argv = (pictures, *SMALL, "--workspace", work, "--epochs", 1, "--prof", 3, *flags.split())
    run_well(*argv, "--save-weights", exported)
    path = work / "checkpoint.pth.tar"
    rank = evaluated(pictures, tmp_path / "plain", "--resume", path, "--prof", 3, "--save-weights", again)
    assert rank.err == IDLE
    saved = checkpoint(path)
    weights = saved["state_dict"] | saved["optimizer"]["masters"]
    assert all(torch.equal(rank.weights[name], value.to(rank.weights[name].dtype)) for name, value in weights.items())
    assert {value.dtype for value in rank.weights.values()} == {torch.float32, torch.int64}
    if "--amp" not in flags and "--fp16" not in flags:
        assert scores(tmp_path / "plain") == scores(work)
        return
    assert scores(tmp_path / "plain")["val.loss"] == pytest.approx(scores(work)["val.loss"], rel=0.02)
    precision = " ".join(word for word in flags.split() if word in ("--fp16", "--amp", "--opt-level", "O2", "O3"))
    evaluated(pictures, tmp_path / "half", "--resume", path, "--prof", 3, *precision.split())
    assert scores(tmp_path / "half") == scores(work)
    assert "O3" in flags or same(load_weights(again), load_weights(exported))


# To export


@pytest.mark.parametrize("flags", ["--fp16", "--amp --opt-level O2"])
def test_exported_weights_are_the_masters_that_half_precision_rounds(
    flags: str, pictures: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "w.safetensors"
    work = tmp_path / "work"
    argv = (pictures, *SMALL, "--workspace", work, "--epochs", 1, "--prof", 3, *flags.split())
    [rank] = run_well(*argv, "--save-weights", exported)
    masters, weights = checkpoint(work / "checkpoint.pth.tar")["optimizer"]["masters"], load_weights(exported)
    assert masters
    assert all(torch.equal(weights[name], value) for name, value in masters.items())
    assert any(not torch.equal(value, value.to(torch.bfloat16).float()) for value in masters.values())
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}
    assert same(load_weights(work / "checkpoint.pth.tar"), weights)
    for source in (exported, work / "checkpoint.pth.tar"):  # what is exported rounds to what was scored
        half = evaluated(pictures, tmp_path / "half", "--pretrained-weights", source, "--prof", 3, *flags.split())
        assert same(half.weights, rank.weights)
        assert scores(tmp_path / "half") == scores(work)
    evaluated(pictures, tmp_path / "resumed", "--resume", work / "checkpoint.pth.tar", "--prof", 3, *flags.split(),
              "--save-weights", tmp_path / "again.safetensors")  # fmt: skip
    assert same(load_weights(tmp_path / "again.safetensors"), weights)
