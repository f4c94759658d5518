"""Bad input: every rank ends, one line says why, and what the workspace held is still there, byte for byte."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.support.program import SMALL, Rank, infinite_loss_in_batch, run, run_each, run_well


class Bad(NamedTuple):
    """Flags, in which {work} is a workspace with a good checkpoint and {bad} holds all kinds of files, and words."""

    flags: str
    words: str
    data: str = "{data}"


CASES = {
    # checkpoints
    "missing": Bad("--resume {bad}/none", "checkpoint {bad}/none does not exist"),
    "a folder": Bad("--resume {bad}", "cannot use {bad}: Is a directory; choose another"),
    "truncated": Bad("--resume {bad}/truncated", "checkpoint {bad}/truncated is damaged (PytorchStreamReader"),
    "changed": Bad("--resume {bad}/changed", "checkpoint {bad}/changed is damaged (wrong checksum of "),
    "empty": Bad("--resume {bad}/empty", "checkpoint {bad}/empty is damaged (EOFError); choose another"),
    "weights alone": Bad(
        "--resume {bad}/weights",
        "{bad}/weights is no checkpoint of this program (no epoch, iteration, arch, num_classes, state_dict); "
        "choose another, or load it as pretrained weights",
    ),
    "of another arch": Bad(
        "--resume {work}/checkpoint.pth.tar -a resnet18",
        "checkpoint {work}/checkpoint.pth.tar has arch tiny, and this run has resnet18; choose another checkpoint or "
        "workspace, or run it as it was",
    ),
    "auto, of another arch": Bad(
        "--resume auto -a resnet18", "checkpoint {work}/checkpoint.pth.tar has arch tiny, and this run has resnet18"
    ),
    "of more classes": Bad(
        "--resume {work}/checkpoint.pth.tar --num-classes 4", "has num_classes 3, and this run has 4; choose another"
    ),
    "of earlier code, of another compressor": Bad(
        "--resume {bad}/earlier --compression-type none",
        "the checkpoint holds a residual, which this compression does not remember; resume with the compression that "
        "wrote it, and its --error-feedback",
    ),
    "of another precision": Bad(
        "--resume {work}/checkpoint.pth.tar --amp --opt-level O2",
        "the saved optimizer state has another masters than this run (0.weight is in one of them only); "
        "resume with the same --amp, --opt-level and --fp16",
    ),
    "cut at no step": Bad(
        "--resume {bad}/midway --optimizer-batch-size 16 --prof -1",
        "iteration 1 starts no optimizer step: they start at multiples of 2 below 8; resume with the batch sizes and "
        "--prof of the run that was interrupted",
    ),
    "in another order": Bad(
        "--resume {work}/checkpoint.pth.tar --memory-format nhwc",
        "the checkpoint holds values in nchw order that compression or search remember, and --memory-format is nhwc; "
        "resume with --memory-format nchw",
    ),
    # model
    "too small images": Bad(
        "-a vgg16 --image-size 16", "the model cannot take a batch of 4 images of 16 pixels (Given input size: ("
    ),
    "too small batches": Bad(
        "-a resnet18 -b 1", "the model cannot take a batch of 1 images of 32 pixels (Expected more than 1 value per "
    ),
    # weights
    "weights by number": Bad(
        "--pretrained-weights {bad}/numbered", "weights file {bad}/numbered holds something else than tensors by name"
    ),
    "a folder of weights": Bad(
        "--pretrained-weights {bad}/f.safetensors", "cannot use {bad}/f.safetensors: Is a directory; choose another"
    ),
    "no weights": Bad("--pretrained-weights {bad}/none", "weights file {bad}/none does not exist"),
    "damaged weights": Bad("--pretrained-weights {bad}/truncated", "weights file {bad}/truncated is damaged"),
    "unfit weights": Bad(
        "--pretrained-weights {bad}/weights",
        "weights {bad}/weights do not fit the model: 16 missing (0.weight, 1.weight, 1.bias, ...); 1 unknown (a); "
        "choose their --arch and --num-classes",
    ),
    # data
    "no folder": Bad(
        "", "data folder {bad}/none does not exist; expected DIR/train/CLASS/* and DIR/val/CLASS/*", data="{bad}/none"
    ),
    "no train": Bad("", "data folder {bad} has no folder train; expected DIR/train/CLASS/*", data="{bad}"),
    "other classes in val": Bad(
        "",
        "{bad}/unequal/train and {bad}/unequal/val name different classes: only train has class2, only val has none; "
        "give both the same class folders",
        data="{bad}/unequal",
    ),
    "too many classes": Bad(
        "--num-classes 2", "{data}/train holds 3 classes, more than the 2 of the model; "
        "use --num-classes 3"
    ),
    "too few images": Bad(
        "-b 40", "{data}/train holds 72 images, fewer than one global batch of 80 (40 on each of 2 ranks); "
        "use a smaller --batch-size"
    ),
    "too few for a step": Bad(
        "--optimizer-batch-size 80 --prof -1",
        "an epoch of 9 iterations is too short for one optimizer step of 10; use more images, or a smaller "
        "--batch-size or --optimizer-batch-size",
    ),
    # where to write
    "a file for a workspace": Bad("--workspace {bad}/empty", "cannot use {bad}/empty: File exists; choose another"),
    "a workspace in a file": Bad("--workspace {bad}/empty/x", "cannot use {bad}/empty/x: Not a directory"),
    "a folder for a raport": Bad("--raport-file folder", "cannot write {work}/folder: Is a directory; make room or"),
    "a file for event files": Bad("--tensorboard-dir {bad}/empty", "cannot use {bad}/empty: File exists; choose"),
    "a path for a name": Bad(
        "--checkpoint-filename new/c.pth", "--checkpoint-filename new/c.pth is a path, and a name is needed"
    ),
    # widths
    "no scheme": Bad("--compression-scheme {bad}/none", "{bad}/none: cannot read the scheme (No such file or"),
    "no such layer": Bad(
        "--compression-scheme {bad}/scheme", "{bad}/scheme: the model has no layer conv1.weight (width 4); remove it"
    ),
    "nothing to search": Bad(
        "--search --bucket-size 100000",
        "--search chooses widths of compressed layers, and no layer has a bucket of 100000 values; lower --bucket-size",
    ),
    "a budget below the least": Bad(
        "--search --search-target-bits 1.5", "a budget must hold the cheapest assignment, 2.1"
    ),
    # devices
    "no GPU to send from": Bad(
        "--dist-backend nccl",
        "--dist-backend nccl cannot send what lies on a cpu device; use gloo, or choose another --device",
    ),
    "no GPU to decode on": Bad(
        "--data-backend dali-gpu", "dali-gpu decodes on a CUDA device, and this process trains on cpu; use dali-cpu"
    ),
}


@pytest.fixture(scope="module")
def paths(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The words in braces of a case, and what they stand for."""
    work, bad = (tmp_path_factory.mktemp(name) for name in ("work", "bad"))
    run_well(
        pictures, *SMALL, "--workspace", work, "--epochs", "2", "--run-epochs", "1", "--prof", "2",
        "--compression-type", "maxmin", "--error-feedback", ranks=2,
    )  # fmt: skip
    (work / "folder").mkdir()
    whole = (work / "checkpoint.pth.tar").read_bytes()
    (bad / "truncated").write_bytes(whole[:-1000])
    (bad / "changed").write_bytes(whole[: len(whole) // 2] + b"flip" + whole[len(whole) // 2 + 4 :])
    (bad / "empty").touch()
    torch.save({"a": torch.ones(3)}, bad / "weights")
    torch.save({0: torch.ones(3)}, bad / "numbered")
    (bad / "f.safetensors").mkdir()
    content = torch.load(work / "checkpoint.pth.tar")
    torch.save(content | {"iteration": 1}, bad / "midway")
    torch.save({name: value for name, value in content.items() if name != "compressor"}, bad / "earlier")
    (bad / "scheme").write_text('{"4": ["conv1.weight"]}')
    shutil.copytree(pictures, bad / "unequal")
    shutil.rmtree(bad / "unequal/val/class2")
    return {"data": pictures, "work": work, "bad": bad}


def flags_of(case: Bad, paths: Mapping[str, Path]) -> list[str]:
    compressor = () if "--compression-type" in case.flags else ("--compression-type", "maxmin", "--error-feedback")
    flags = [case.data, *SMALL, "--workspace", "{work}", "--epochs", "2", "--prof", "2", *compressor]
    return [word.format(**paths) for word in [*flags, *case.flags.split()]]


def contents(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def error_of(rank: Rank) -> str:
    """The one line that a rank leaves on standard error."""
    assert rank.err.count("\n") == 1, rank.err
    assert rank.err.startswith("main.py: error: ")
    return rank.err.removeprefix("main.py: error: ").rstrip("\n")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input_ends_every_rank_with_one_line_and_changes_no_file(case: Bad, paths: Mapping[str, Path]) -> None:
    before = contents(paths["work"], paths["bad"])
    first, *others = ranks = run(*flags_of(case, paths), ranks=2)
    assert [rank.status for rank in ranks] == [2, 2], first.err
    assert case.words.format(**paths) in error_of(first)
    assert {rank.err for rank in others} <= {"", first.err}  # where ranks have met, one speaks for all
    assert contents(paths["work"], paths["bad"]) == before


@pytest.mark.parametrize(
    ("flag", "values", "words"),
    [
        ("--quantization-bits", ("4", "5"), "quantization_bits is 4 on rank 0 and 5 on rank 1"),
        ("--seed", ("1", "2"), "seed is 1 on rank 0 and 2 on rank 1"),
        ("--lr", ("0.1", "0.2"), "lr is 0.1 on rank 0 and 0.2 on rank 1"),
        ("--compression-type", ("maxmin", "none"), "compression_type is 'maxmin' on rank 0 and 'none' on rank 1"),
    ],
)
def test_ranks_that_were_started_with_different_flags_all_end(
    flag: str, values: tuple[str, str], words: str, pictures: Path, tmp_path: Path
) -> None:
    shared = (pictures, *SMALL, "--workspace", tmp_path / "work", "--compression-type", "maxmin")
    first, second = run_each([(*shared, flag, value) for value in values])
    assert (first.status, second.status) == (2, 2)
    assert error_of(first) == f"the flags must be the same on every rank: {words}; start all ranks alike"
    assert second.err == ""
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_only_one_rank_cannot_read_ends_all(split: str, pictures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    broken = folder / split / "class1/3.png"
    broken.write_text("no image")
    ranks = run(folder, *SMALL, "--workspace", tmp_path / "work", "--epochs", "1", ranks=2)
    reader, other = sorted(ranks, key=lambda rank: "no way to the other ranks" in rank.err)
    assert (reader.status, other.status) == (2, 1)
    assert f"{broken} is not a readable image" in error_of(reader)
    assert error_of(other).startswith("no way to the other ranks (")
    assert error_of(other).endswith("; one that has ended says why")
    if split == "train":
        assert not (tmp_path / "work/checkpoint.pth.tar").exists()
        return
    shutil.copy(pictures / "val/class1/3.png", broken)  # the epoch that was trained is not lost
    again = (*SMALL, "--epochs", "1", "--resume", "auto", "--workspace", tmp_path / "work")
    [first, _] = run_well(folder, *again, ranks=2)
    assert "epoch 0 iteration" not in first.out
    assert "epoch 0 | train.loss" in first.out
    straight = run_well(folder, *SMALL, "--workspace", tmp_path / "straight", "--epochs", "1", ranks=2)
    assert all(torch.equal(straight[0].weights[name], value) for name, value in first.weights.items())


# Gradients that are not finite


@pytest.mark.parametrize(("compressor", "rank"), [("none", 1), ("maxmin", 0), ("topk", 1)])
def test_an_infinite_loss_on_one_rank_stops_all_and_leaves_the_checkpoint(
    compressor: str, rank: int, pictures: Path, tmp_path: Path
) -> None:
    argv = (
        pictures, *SMALL, "--workspace", tmp_path, "--epochs", "2", "--prof", "2", "--compression-type", compressor,
    )  # fmt: skip
    run_well(*argv, "--run-epochs", "1", ranks=2)
    whole = (tmp_path / "checkpoint.pth.tar").read_bytes()
    ranks = run(*argv, "--resume", "auto", ranks=2, before=partial(infinite_loss_in_batch, 2, rank))
    assert [each.status for each in ranks] == [1, 1]
    assert error_of(ranks[0]) == (
        "the gradient of 0.weight was not finite in epoch 1, at or before iteration 2, with a loss scale of 1; the "
        "step was not applied; use a lower --lr, or --dynamic-loss-scale where half precision overflows"
    )
    assert ranks[1].err == ""
    assert all(torch.equal(ranks[0].weights[name], ranks[1].weights[name]) for name in parameters(ranks[0]))
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == whole
    assert run_well(*argv, "--resume", "auto", ranks=2)  # and training can go on


def parameters(rank: Rank) -> list[str]:
    """Names of what ranks agree on: all but the statistics that batch norms take of their own images."""
    return [name for name in rank.weights if name.rpartition(".")[2] in ("weight", "bias")]


def test_weights_that_are_not_finite_are_named(pictures: Path, paths: Mapping[str, Path], tmp_path: Path) -> None:
    weights = torch.load(paths["work"] / "checkpoint.pth.tar")["state_dict"]
    weights["5.weight"][0, 0, 0, 0] = float("inf")
    torch.save(weights, tmp_path / "infinite")
    argv = ("--pretrained-weights", tmp_path / "infinite", "--workspace", tmp_path / "work", "--training-only")
    [rank] = run(pictures, *SMALL, *argv)
    assert rank.status == 1
    assert error_of(rank).startswith("the gradient of 0.weight was not finite in epoch 0, at or before iteration 1")
    assert not (tmp_path / "work/checkpoint.pth.tar").exists()


def test_a_learning_rate_that_is_far_too_high_ends_in_one_line(pictures: Path, tmp_path: Path) -> None:
    [rank] = run(pictures, *SMALL, "--lr", "1e38", "--workspace", tmp_path)
    assert rank.status == 1
    assert error_of(rank).startswith("the gradient of 0.weight was not finite in epoch 0, at or before iteration 2")
