"""Runs that the benchmark of accuracy keeps: by the data that they were of, among others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was really trained, in order. The metrics tell one training from another."""
    calls: list[tuple[Any, ...]] = []

    def train(*asked: Any) -> dict[str, Any]:
        calls.append(asked)
        return {"val.top1": float(len(calls))}

    monkeypatch.setattr(accuracy, "train", train)
    accuracy.digest_of.cache_clear()
    return calls


def test_a_finished_run_is_not_run_again_on_the_same_data_wherever_it_lies(
    trained: list[tuple[Any, ...]], pictures: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "runs.jsonl"
    moved = shutil.copytree(pictures, tmp_path / "moved")
    first = accuracy.Runs(kept).get(str(pictures), ["--lr", "1"], 0)
    assert accuracy.Runs(kept).get(str(moved), ["--lr", "1"], 0) == first
    assert len(trained) == 1
    for flags, seed, ranks in ((["--lr", "2"], 0, 2), (["--lr", "1"], 1, 2), (["--lr", "1"], 0, 4)):
        accuracy.Runs(kept).get(str(pictures), flags, seed, ranks)
    assert len(trained) == 4


def test_other_data_is_another_run(trained: list[tuple[Any, ...]], pictures: Path, tmp_path: Path) -> None:
    runs = accuracy.Runs(tmp_path / "runs.jsonl")
    fewer, longer = (shutil.copytree(pictures, tmp_path / name) for name in ("fewer", "longer"))
    (fewer / "train/class0/0.png").unlink()
    with (longer / "val/class0/0.png").open("ab") as file:
        file.write(b"more")
    found = [runs.get(folder, [], 0)["val.top1"] for folder in (str(pictures), str(fewer), str(longer), "digits")]
    assert found == [1, 2, 3, 4]


def test_a_run_on_unknown_data_is_not_used(
    trained: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "runs.jsonl"
    kept.write_text(json.dumps({"flags": "", "seed": 0, "ranks": 2, "metrics": {"val.top1": 99.0}}) + "\n")
    runs = accuracy.Runs(kept)
    assert capsys.readouterr().err == f"{kept}: 1 runs on unknown data are not used\n"
    assert runs.get("digits", [], 0) == {"val.top1": 1.0}


def test_differences_are_paired_by_seed() -> None:
    first = [{"val.top1": value} for value in (40.0, 50.0, 60.0)]
    runs = [{"val.top1": value} for value in (41.0, 52.0, 63.0)]
    assert accuracy.paired(runs, first, "val.top1", 1) == "+2.0 ± 0.6"
    assert accuracy.paired(first[:1], runs[:1], "val.top1", 2) == "-1.00"
    assert accuracy.paired(first, first, "val.top1", 1) == ""
