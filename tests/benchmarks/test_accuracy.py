"""Runs that the benchmark of accuracy keeps: by the data and the code that they were of, among others."""

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


def test_other_code_is_another_run(
    trained: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "runs.jsonl"
    first = accuracy.Runs(kept).get("digits", [], 0)
    with monkeypatch.context() as changed:
        changed.setattr(accuracy, "digest_of_code", lambda: "another")
        assert accuracy.Runs(kept).get("digits", [], 0) != first
    assert accuracy.Runs(kept).get("digits", [], 0) == first
    assert len(trained) == 2


def test_code_is_what_runs_and_not_what_is_said_of_it(tmp_path: Path) -> None:
    def digest(module: str) -> str:
        (tmp_path / "search").mkdir(exist_ok=True)
        (tmp_path / "search/tables.py").write_text(module)
        (tmp_path / "main.py").write_text("import search")
        accuracy.digest_of_code.cache_clear()
        return accuracy.digest_of_code(tmp_path)

    first = digest('"""One."""\n\ndef bits():\n    """Two."""\n    return "2"\n')
    assert digest('def bits():  # three\n    return "2"\n') == first
    assert digest('def bits():\n    return "3"\n') != first
    (tmp_path / "search/tables.py").rename(tmp_path / "search/widths.py")
    assert digest('def bits():\n    return "2"\n') != first


@pytest.mark.parametrize("unknown", ["data", "code"])
def test_a_run_on_unknown_data_or_code_is_not_used(
    unknown: str, trained: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "runs.jsonl"
    run = {"data": "digits", "code": accuracy.digest_of_code(), "flags": "", "seed": 0, "ranks": 2}
    del run[unknown]
    kept.write_text(json.dumps(run | {"metrics": {"val.top1": 99.0}}) + "\n")
    runs = accuracy.Runs(kept)
    assert capsys.readouterr().err == f"{kept}: 1 runs on unknown data or code are not used\n"
    assert runs.get("digits", [], 0) == {"val.top1": 1.0}


def test_differences_are_paired_by_seed() -> None:
    first = [{"val.top1": value} for value in (40.0, 50.0, 60.0)]
    runs = [{"val.top1": value} for value in (41.0, 52.0, 63.0)]
    assert accuracy.paired(runs, first, "val.top1", 1) == "+2.0 ± 0.6"
    assert accuracy.paired(first[:1], runs[:1], "val.top1", 2) == "-1.00"
    assert accuracy.paired(first, first, "val.top1", 1) == ""
    assert accuracy.paired_difference(runs, first, "val.top1") == (2.0, pytest.approx(3**-0.5))
