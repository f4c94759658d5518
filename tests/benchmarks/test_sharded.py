"""The benchmark of sharded models: its tables and its picture, of figures that are made up."""

import argparse
from pathlib import Path

import pytest

from benchmarks.sharded import Speed, draw, last_losses, table, world_of

FLOAT32 = [Speed([2.0, 3.0, 9.0], 5e6, 2e6, None, 1.5e6), Speed([4.0, 1.0, 1.0], 5e6, 2e6, None, 1.5e6)]
CODES = [Speed([1.0, 1.0, 1.0], 2.3e6, 2e6, 0.295e6, 1.5e6), Speed([1.0, 2.0, 2.0], 2.5e6, 2e6, 0.305e6, 1.5e6)]


def test_a_step_takes_as_long_as_the_slowest_rank_and_gradients_are_what_gathers_leave() -> None:
    head, _, first, second = table(["float32", "maxmin-4"], {"100 Mbit/s": [FLOAT32, CODES]})
    assert head.split(" | ")[-2:] == ["100 Mbit/s, s", "x float32 |"]
    assert first == "| float32 | 5.000 | 2.000 | 3.000 |  | 2.000 | 4.000 | 1.00 |"
    assert second == "| maxmin-4 | 2.400 | 2.000 | 0.400 | 0.300 | 0.267 | 2.000 | 2.00 |"


def test_without_a_kernel_that_counts_there_is_what_is_reported() -> None:
    ranks = [rank._replace(on_link=None, gathers=None) for rank in CODES]
    *_, row = table(["maxmin-4"], {"no limit": [ranks]})
    assert row == "| maxmin-4 |  |  |  | 0.300 | 0.200 | 2.000 |  |"


def test_worlds_are_ranks_or_hosts_of_them() -> None:
    assert [world_of(word) for word in ("2", "4", "2x2", "3x4")] == [(2, 1), (4, 1), (4, 2), (12, 4)]
    for word in ("1", "1x2", "2x", "x2", "2x0", "two", "-2"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number of ranks"):
            world_of(word)


def test_curves_are_drawn_and_end_in_a_table(tmp_path: Path) -> None:
    curves = {"transformer": {"float32": [[4.0] * 19 + [2.0] * 2, [3.0] * 21, [1.0] * 21]}}
    *_, row = last_losses(curves)
    assert row == "| transformer | float32 | 2.0000, 3.0000, 1.0000 | 2.0000 |"
    draw(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
