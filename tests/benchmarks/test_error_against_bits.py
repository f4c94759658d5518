"""The picture of error against bits: every compressor is in it, or one of the lines at its edges is."""

from pathlib import Path

import pytest
import torch

from benchmarks import error_against_bits
from benchmarks.error_against_bits import Points
from compression import COMPRESSORS


@pytest.fixture(scope="module")
def points() -> Points:
    return error_against_bits.measure({"weight": torch.randn(32, 64, generator=torch.Generator().manual_seed(0))})


def test_all_compressors_are_drawn_but_those_that_send_everything_or_nothing(points: Points, tmp_path: Path) -> None:
    assert COMPRESSORS.keys() - points.keys() == {"sanity", "stats"}
    error_against_bits.draw({"noise": points}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["maxmin", "topk", "powersgd"])
def test_more_bits_err_less(name: str, points: Points) -> None:
    bits, errors = zip(*points[name], strict=True)
    assert len(bits) > 3
    assert list(bits) == sorted(bits)
    assert list(errors) == sorted(errors, reverse=True)


def test_no_two_compressors_share_a_mark() -> None:
    assert len(error_against_bits.drawn()) <= len(set(error_against_bits.MARKERS))
