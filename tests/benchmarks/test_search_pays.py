"""The benchmark that asks whether the search pays: equal bytes are equal, and pairs are of one seed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import compression
import main
from benchmarks import accuracy, search_pays
from benchmarks.search import BUCKET_SIZE
from benchmarks.search_pays import CASES, MARKS, bits_of_uniform, picture, settings_of, table
from image_classification.models import build

every_case = pytest.mark.parametrize("name", CASES)
LOSS = {"float32": 1.0, "bfloat16": 1.25, "uniform 3": 1.5, "uniform 2": 2.0, "evolution": 0.75}
MEGABYTES = {"float32": 8.0, "bfloat16": 4.0, "uniform 3": 0.75, "evolution": 2.0}


def metrics(name: str, seed: int) -> dict[str, float]:
    """Of a training that was none: seeds differ by more than settings do, and by more the longer a setting's name."""
    loss = LOSS.get(name, 1.75) + 10 * seed + len(name) * seed / 64
    nbytes = 1e6 * MEGABYTES.get(name, 0.5)
    return {"val.loss": loss, "val.top1": 50 - loss, "comm.bytes_sent": nbytes, "comm.ratio": nbytes / 8e6}


RESULTS = {name: [metrics(name, seed) for seed in range(3)] for name in MARKS}


@every_case
def test_the_program_takes_the_flags_of_all_settings(name: str) -> None:
    case = CASES[name]
    for words in settings_of(case).values():
        plan = main.parse(["DIR", "-a", case.arch, *case.training.split(), *words])
        assert not plan.idle
        assert plan.arch == case.arch
        assert plan.error_feedback == (case.error_feedback and plan.compression_type != "none")


@every_case
def test_searches_have_the_bytes_of_the_uniform_width_and_no_more(name: str) -> None:
    case = CASES[name]
    with torch.device("meta"):
        layers = [
            parameter.numel() for parameter in build(case.arch, num_classes=10).parameters() if parameter.dim() > 1
        ]
    codec = compression.codec(case.compressor, bits=2, bucket_size=BUCKET_SIZE)
    nbytes, values = sum(map(codec.wire_bytes, layers)), sum(layers)
    bits = bits_of_uniform(case, 2)
    assert 8 * nbytes / values <= bits < 8 * nbytes / values + 2e-6
    searches = [words for words in settings_of(case).values() if "--search-target-bits" in words]
    assert len(searches) == 3
    assert {words[words.index("--search-target-bits") + 1] for words in searches} == {str(bits)}


@every_case
def test_every_setting_has_a_mark_of_its_own(name: str) -> None:
    assert settings_of(CASES[name]).keys() == MARKS.keys()
    assert all(len(set(marks)) == len(MARKS) for marks in zip(*MARKS.values(), strict=True))


def test_differences_are_of_one_seed_and_between_named_settings() -> None:
    lines = list(table(RESULTS))
    assert len({line.count("|") for line in lines}) == 1
    rows = {cells[1]: cells[2:-1] for cells in ([cell.strip() for cell in line.split("|")] for line in lines[2:])}
    assert list(rows) == list(RESULTS)
    assert rows["float32"][2:5] == ["11.109", "", "-1.031 ± 0.018"]
    assert rows["uniform 2"][2:5] == ["12.141", "+1.031 ± 0.018", ""]
    assert rows["root"][:5] == ["0.500", "0.0625", "11.812", "+0.703 ± 0.027", "-0.328 ± 0.045"]
    assert rows["root"][6:] == ["-0.7 ± 0.0", "+0.3 ± 0.0"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_picture_has_a_panel_for_each_case_and_shows_all_of_it(seeds: int) -> None:
    results = {name: runs[:seeds] for name, runs in RESULTS.items()}
    figure = picture({"one": results, "two": results})
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]
    for axes in figure.axes:
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        points = [bars.lines[0].get_xydata()[0] for bars in axes.containers]
        bars = [end for bars in axes.containers for cap in bars.lines[1] for end in cap.get_xydata()]
        assert len(bars) == (2 * len(MARKS) if seeds > 1 else 0)
        assert all(left < x < right and low < y < high for x, y in [*points, *bars])
        places = {name: float(x) for name, (x, _) in zip(RESULTS, points, strict=True)}
        assert {name: places[name] for name in MEGABYTES} == MEGABYTES
        assert 0.5 == places["uniform 2"] < places["root"] < places["square"] < places["loss"] < places["uniform 3"]


def test_what_was_cut_off_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings that networks share are trained once for both: float32 is the same beside every compressor."""
    trained: list[tuple[str, int]] = []

    def train(folder: str, flags: list[str], seed: int, ranks: int) -> dict[str, Any]:
        if len(trained) == 10:
            raise KeyboardInterrupt
        trained.append((" ".join(flags), seed))
        return metrics("", len(trained))

    monkeypatch.setattr(accuracy, "train", train)
    command = ["search_pays.py", "digits", "--runs", str(tmp_path / "runs.jsonl"), "--seeds", "2", "--prof", "3"]
    monkeypatch.setattr(sys, "argv", [*command, "--cases", "resnet18"])
    with pytest.raises(KeyboardInterrupt):
        search_pays.main()
    kept = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(run["flags"], run["seed"]) for run in kept] == trained
    first, trained[:] = set(trained), []
    search_pays.main()
    assert len(trained) == 2 * len(MARKS) - 10
    assert not first & set(trained)
    capsys.readouterr()
    trained.clear()
    monkeypatch.setattr(sys, "argv", [*command, "--cases", "eden", "resnet18", "-o", str(tmp_path / "picture.png")])
    with pytest.raises(KeyboardInterrupt):
        search_pays.main()
    assert not any("compression-type none" in flags for flags, _ in trained)
    trained.clear()
    search_pays.main()
    assert capsys.readouterr().out.count("| float32 |") == 2
    assert (tmp_path / "picture.png").exists()
