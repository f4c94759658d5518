"""Results that the benchmark of time to accuracy makes of its measurements."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.time_to_accuracy import Learned, draw, recipe, table

SECONDS = {"100 Mbit/s": {"float32": 4.0, "4 bits": 0.5}, "no limit": {"float32": 0.2, "4 bits": 0.3}}


def learned(*top1: float) -> Learned:
    return Learned(top1, 1e6, None)


@pytest.mark.parametrize(
    ("top1", "expected"), [((30, 50), 1.5), ((50,), 0.8), ((40, 20), 1.0), ((39, 20, 60), 2.5), ((39, 39.9), math.inf)]
)
def test_top1_rises_in_a_straight_line_between_two_epochs(top1: tuple[float, ...], expected: float) -> None:
    assert learned(*top1).epochs_to(40) == expected


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(1, 100), st.floats(1, 100))
def test_more_takes_no_less_time(top1: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 < learned(*top1).epochs_to(low) <= learned(*top1).epochs_to(high)


def test_a_table_gives_every_rate_seconds_and_what_is_gained() -> None:
    lines = list(table({"float32": learned(20, 40), "4 bits": learned(20, 40)}, SECONDS, 10, 40))
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| float32 | 1.00 | 40.0 | 2.00 | 40.0 | 80 | 1.00 | 2.0 | 4 | 1.00 |"
    assert lines[3] == "| 4 bits | 1.00 | 40.0 | 2.00 | 5.0 | 10 | 8.00 | 3.0 | 6 | 0.67 |"


def test_what_never_gets_there_is_said_so_and_not_drawn(tmp_path: Path) -> None:
    found = {"float32": learned(50), "4 bits": learned(30)}
    assert list(table(found, SECONDS, 10, 40))[3].count("never") == 5
    draw({2: (found, SECONDS)}, 10, 40, tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_takes_as_many_images_at_every_number_of_ranks() -> None:
    flags = {ranks: recipe("cifar10.tar.xz", ranks, 5) for ranks in (1, 2, 4, 8)}
    assert {ranks * int(words[words.index("-b") + 1]) for ranks, words in flags.items()} == {128}
