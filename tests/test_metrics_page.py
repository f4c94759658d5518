"""The page on metrics: it has every metric that a run writes, no other one, and its sum is right in every record."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from image_classification.logs import METRICS, records
from tests.support.program import SMALL, run_well

PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
NAME = r"`([a-z0-9_]+\.[a-z0-9_]+|lr)`"

RUNS = {
    "with a compressor": (2, "--epochs 1 --compression-type maxmin --error-feedback"),
    "alone": (1, "--epochs 1"),
    "on two hosts": (4, "--epochs 1 --compression-type maxmin --ranks-per-host 2"),
    "with a search": (2, "--epochs 1 --search --search-target-bits 4 --popsize 1"),
    "for the scores": (2, "--evaluate"),
    "of a search on weights": (1, "--search --evaluate --popsize 1 --search-calibration-steps 1"),
    "with a broken barrier": (2, "--epochs 1 --compression-type maxmin --bb-ratio 0.5 --bb-num-parallel-steps 1"),
    "with statistics": (2, "--epochs 1 --compression-type stats"),
}


class Row(NamedTuple):
    """A row of the page's table."""

    metric: str
    unit: str
    lines: str


ROWS = [Row(*found) for found in re.findall(rf"^\| {NAME} \|\s*(\S*) \| (yes|no) \|", PAGE, re.MULTILINE)]
OF_LINES = {row.metric for row in ROWS if row.lines == "yes"}


@pytest.fixture(scope="module")
def written(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The records of each run's raport that hold metrics."""
    found = {}
    for name, (ranks, flags) in RUNS.items():
        workspace = tmp_path_factory.mktemp("run")
        run_well(pictures, *SMALL, "--prof", 2, "--workspace", workspace, *flags.split(), ranks=ranks)
        read = records(workspace / "experiment_raport.json")
        found[name] = [record for record in read if isinstance(record["step"], list)]
    return found


def test_the_page_fits_and_has_the_units_of_the_raport() -> None:
    assert len(PAGE.splitlines()) <= 100
    assert {row.metric: row.unit for row in ROWS} == {name: metric.unit for name, metric in METRICS.items()}
    assert [row.metric for row in ROWS] == list(METRICS)


def test_the_page_names_no_metric_that_does_not_exist() -> None:
    files = {"experiment_raport.json", "gradient_stats.jsonl"}
    assert {*re.findall(NAME, PAGE)} - files == METRICS.keys()


@pytest.mark.parametrize("name", RUNS)
def test_every_metric_that_a_run_writes_is_on_the_page(name: str, written: dict[str, list[dict[str, Any]]]) -> None:
    assert written[name]
    for record in written[name]:
        known = OF_LINES if len(record["step"]) == 2 else {row.metric for row in ROWS}
        assert record["data"]
        assert record["data"].keys() <= known
        assert ("best.top1" in record["data"]) == (record["step"] == [])


def test_some_run_writes_each_metric_of_the_page(written: dict[str, list[dict[str, Any]]]) -> None:
    every = [record for found in written.values() for record in found]
    assert {name for record in every for name in record["data"]} == {row.metric for row in ROWS}
    assert {name for record in every if len(record["step"]) == 2 for name in record["data"]} == OF_LINES


@pytest.mark.parametrize("name", RUNS)
def test_the_sum_on_the_page_is_that_of_every_epoch(name: str, written: dict[str, list[dict[str, Any]]]) -> None:
    [(total, terms)] = re.findall(rf"^{NAME} = (.*)$", PAGE, re.MULTILINE)
    epochs = [record["data"] for record in written[name] if record["step"] == [0]]
    assert len(epochs) == 1
    for data in epochs:
        assert (total in data) == ("train.loss" in data)
        if total in data:
            parts = [data.get(term, 0.0) for term in re.findall(NAME, terms)]
            assert data[total] == pytest.approx(sum(parts))
            assert min(parts) >= 0
