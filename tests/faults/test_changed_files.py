"""Files that were changed, replaced or cut: named in one line, or passed over where another can serve."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.program import SMALL, run, run_well


@pytest.fixture(scope="module")
def work(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a run of one epoch."""
    folder = tmp_path_factory.mktemp("work")
    run_well(pictures, *SMALL, "--prof", 2, "--epochs", 1, "--workspace", folder)
    return folder


def test_a_flipped_byte_in_pretrained_weights_is_noticed(pictures: Path, work: Path, tmp_path: Path) -> None:
    raw = bytearray((work / "checkpoint.pth.tar").read_bytes())
    weights = torch.load(work / "checkpoint.pth.tar", weights_only=True)["state_dict"]["5.weight"]
    raw[raw.index(weights.numpy().tobytes())] ^= 0x40
    path = tmp_path / "changed.pth.tar"
    path.write_bytes(raw)
    [rank] = run(pictures, *SMALL, "--pretrained-weights", path, "--workspace", tmp_path / "new", "--evaluate")
    assert rank.status == 2
    (line,) = [line for line in rank.err.splitlines() if not line.startswith("no effect: ")]
    assert line.startswith(f"main.py: error: weights file {path} is damaged (wrong checksum of ")


def test_a_folder_with_the_name_of_a_checkpoint_is_passed_over(pictures: Path, work: Path, tmp_path: Path) -> None:
    shutil.copy(work / "checkpoint.pth.tar", tmp_path / "model_best.pth.tar")
    (tmp_path / "checkpoint.pth.tar").mkdir()
    argv = (pictures, *SMALL, "--resume", "auto", "--workspace", tmp_path, "--prof", 2, "--no-checkpoints")
    [rank] = run_well(*argv, "--epochs", 2)
    assert rank.err == f"passed over: checkpoint {tmp_path / 'checkpoint.pth.tar'} is no file\n"
    assert "epoch 1 |" in rank.out
    assert "epoch 0 |" not in rank.out


def without(content: Any, *keys: Any) -> Any:
    """A copy of nested dictionaries and lists that lacks one place."""
    key, *rest = keys
    if isinstance(content, list):
        return [without(each, *rest) if index == key else each for index, each in enumerate(content)]
    if not rest:
        return {name: each for name, each in content.items() if name != key}
    return {name: without(each, *rest) if name == key else each for name, each in content.items()}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            ("seed",),
            "checkpoint {path} lacks seed; choose another, or load its weights alone with --pretrained-weights",
        ),
        (("ranks", 0, "random"), "something is missing in the checkpoint ('random'); choose another"),
    ],
    ids=["seed", "random states"],
)
def test_what_a_checkpoint_lacks_is_named(
    keys: tuple[Any, ...], words: str, pictures: Path, work: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c.pth.tar"
    torch.save(without(torch.load(work / "checkpoint.pth.tar", weights_only=True), *keys), path)
    [rank] = run(pictures, *SMALL, "--resume", path, "--workspace", tmp_path / "new", "--prof", 2)
    assert rank.status == 2
    assert rank.err == f"main.py: error: {words.format(path=path)}\n"
