"""Replicas: the first value that differs on some rank is found, whatever its type, shape and order in memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compression.network.threads import ThreadCollectives, run_ranks
from compression.replicas import first_difference

TENSORS = {
    "matrix": torch.randn(7, 5),
    "scalar": torch.tensor(1.5),
    "half": torch.randn(9).to(torch.bfloat16),
    "images": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "double": torch.randn(3, dtype=torch.float64),
    "part": torch.randn(11)[3:],
    "rows": torch.randn(4, 6)[:, 1:4],
    "nothing": torch.empty(0),
    "flags": torch.tensor([True, False, True]),
}
NUMBERS = {"width": 4, "step": 12}


def found(ranks: int, changed: dict[int, str]) -> list[tuple[str, int] | None]:
    """What ranks find, of which some have one value, by rank, that is the next larger one."""

    def one(network: ThreadCollectives) -> tuple[str, int] | None:
        name = changed.get(network.rank)
        tensors = {each: nudged(tensor) if each == name else tensor for each, tensor in TENSORS.items()}
        return first_difference(tensors, {each: n + (each == name) for each, n in NUMBERS.items()}, network)

    return run_ranks(ranks, one)


def nudged(tensor: Tensor) -> Tensor:
    """The same, in the same order in memory, but for the last bit of its last value."""
    changed = tensor.clone(memory_format=torch.preserve_format)
    last = changed[(-1,) * changed.dim()]
    last.copy_(last.logical_not() if tensor.dtype == torch.bool else last.nextafter(torch.full_like(last, 1e9)))
    return changed


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equal_replicas_are_equal(ranks: int) -> None:
    assert found(ranks, {}) == [None] * ranks


@given(st.dictionaries(st.integers(1, 3), st.sampled_from([*(TENSORS.keys() - {"nothing"}), *NUMBERS]), min_size=1))
def test_every_rank_finds_the_first_that_differs(changed: dict[int, str]) -> None:
    order = [*TENSORS, *NUMBERS]
    first = min(changed.values(), key=order.index)
    rank = min(rank for rank, name in changed.items() if name == first)
    assert found(4, changed) == [(first, rank)] * 4


def test_where_rank_0_is_alone_with_its_value_the_first_other_rank_is_named() -> None:
    assert found(3, {0: "half"}) == [("half", 1)] * 3
