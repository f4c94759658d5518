"""The schemes of others, by their formulas: unbiased where they are, and as wrong as a calculation by hand says."""

import math

import pytest
import torch

from benchmarks.fidelity import NORMAL, grace, in_words


def errors(values: torch.Tensor) -> dict[str, float]:
    return {name: error for name, _, error in grace({"layer": values})}


def test_errors_are_those_of_the_formulas() -> None:
    values = torch.ones(1000)
    values[::2] = -1
    found = errors(values)
    assert found["GRACE 1-bit"] == 0
    assert found["GRACE TernGrad"] == 0  # every value is the largest
    assert found["GRACE top-k, 1 %"] == pytest.approx(math.sqrt(0.99))
    position = 7 / math.sqrt(1000)  # of q |x| / |v| between 0 and 1
    variance = position * (1 - position) / position**2
    assert found["GRACE QSGD, q = 7"] == pytest.approx(math.sqrt(variance), rel=0.05)


def test_more_levels_lose_less() -> None:
    found = errors(torch.randn(5000, generator=torch.Generator().manual_seed(1)))
    assert found["GRACE QSGD, q = 127"] < found["GRACE QSGD, q = 7"]
    assert 0.5 < found["GRACE 1-bit"] < 0.7  # sqrt(1 - 2 / pi) of normal values


def test_rounding_at_random_is_independent_of_the_values() -> None:
    """The error of unbiased codes is the root of the expected one, which a correlation would raise."""
    values = NORMAL["normal"].reshape(-1)
    position = (127 * values.abs() / values.norm()).double()
    expected = float(((position - position.floor()) * (position.ceil() - position)).sum()) / float((position**2).sum())
    assert errors(values)["GRACE QSGD, q = 127"] == pytest.approx(math.sqrt(expected), rel=0.002)


def test_a_tensor_of_zeros_stays_one() -> None:
    """Beside another one, without which a relative error means nothing."""
    gradient = {"zeros": torch.zeros(200), "others": torch.ones(200)}
    assert all(math.isfinite(error) for _, _, error in grace(gradient))


def test_options_are_shown_in_words() -> None:
    assert in_words({"bits": 4, "bucket_size": -1, "error_feedback": True}) == "bits 4, whole layers, error feedback"
