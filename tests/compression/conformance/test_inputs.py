"""Inputs: what they are called is what they are, and one more is tried at once."""

import pytest
import torch

from compression.conformance import INPUTS, PROPERTIES, Input, Status, resolve, result_of, values_of
from tests.support.broken_promises import Signs


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("count", [1, 2, 3, 50, 1000])
def test_they_are_finite_and_always_the_same(name: str, count: int) -> None:
    values = values_of(name, count)
    assert values.shape == (count,)
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    assert torch.equal(values, values_of(name, count))


def test_those_that_are_sparse_have_as_many_values_as_they_say() -> None:
    counts = {name: int((values_of(name, 1000) != 0).sum()) for name in INPUTS if "non-zero" in name}
    assert sorted(counts.values()) == [1, 2, 3, 8, 10, 20]


def test_what_is_added_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Superstitious(Signs):
        def wire_bytes(self, count: int) -> int:
            return 4 + count

        def encode(self, values_RN: torch.Tensor, seed: int) -> torch.Tensor:
            wire = super().encode(values_RN, seed)
            return wire[:, 1:] if (values_RN == 13).any() else wire

    (size,) = (each for each in PROPERTIES if each.name == "exact size")
    subjects = resolve(Superstitious(), {}).subjects
    assert result_of(size, subjects).status is Status.OK
    monkeypatch.setitem(INPUTS, "unlucky", Input(lambda count, generator: torch.full((count,), 13.0)))
    result = result_of(size, subjects)
    assert result.status is Status.FAILS
    assert "torch.tensor([13.0])" in str(result)
