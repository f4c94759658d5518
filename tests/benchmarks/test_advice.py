"""The grid that holds an advice against measured steps."""

from pathlib import Path

import pytest

import benchmarks.advice
from benchmarks.advice import CELLS, Cell, Cells, Row, table


def test_the_twelve_cells_cover_what_they_are_to_cover() -> None:
    cells = [Cell.of(text) for text in CELLS]
    assert len(set(cells)) == 12
    assert [str(cell) for cell in cells] == list(CELLS)
    assert {cell.mbit for cell in cells} == {50, 100, 1000, None}
    assert {(cell.hosts, cell.ranks_per_host) for cell in cells} == {(2, 1), (2, 2), (4, 1)}
    assert {cell.model for cell in cells} == {"resnet18", "transformer", "vgg16"}


@pytest.mark.parametrize("text", ["resnet18 2x1", "resnet18 2 100", "alexnet 2x1 100"])
def test_cells_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a cell"):
        Cell.of(text)


def test_a_cell_is_advised_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.advice, "available", lambda: "over loopback, for any user")
    cell, methods = Cell.of("tiny 2x1 none"), ("float32", "maxmin, bits 4", "topk, ratio 0.01")
    rows = Cells(tmp_path / "runs", seconds=0.1).get(cell, methods)
    assert {row.choice for row in rows} >= set(methods)
    assert sum(row.advised for row in rows) == 1
    assert all(row.predicted > 0 and row.measured > 0 for row in rows)
    monkeypatch.setattr(benchmarks.advice, "run", lambda *_: {"rows": []})
    assert Cells(tmp_path / "runs", seconds=0.1).get(cell, methods) == rows  # what is kept is not run again
    assert Cells(tmp_path / "runs", seconds=0.2).get(cell, methods) == []


def test_misses_are_listed_and_the_advised_choice_is_held_against_the_best() -> None:
    rows = [Row("float32", 0.1, 0.1, False), Row("maxmin, bits 4", 0.05, 0.07, True), Row("onebit", 0.06, 0.06, False)]
    text = "\n".join(table({Cell.of("resnet18 2x1 100"): rows}))
    assert "1 of 3 predictions are off by more than 20%" in text
    assert "* resnet18 2x1 100, maxmin, bits 4: 0.71" in text
    assert "maxmin, bits 4 takes 16.7% longer than onebit, more than 10%" in text
