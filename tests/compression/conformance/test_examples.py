"""Examples: the smallest that breaks a promise, and how it is written down."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from compression.conformance.examples import Values, World, first_broken, smallest

WORLD = World(4, (("a", (7, 5)), ("b", ()), ("c", (64,))), "heavy tails")


def test_the_smallest_values_are_few_and_plain() -> None:
    start = Values.of(torch.randn(300, generator=torch.Generator().manual_seed(0)) * 9)
    found = smallest(start, lambda each: sum(value >= 4 for value in each.values) >= 2, 1000)
    assert len(found.values) == 2
    assert all(value >= 4 and value == round(value) for value in found.values)
    assert smallest(start, lambda each: False, 1000) is start


def test_the_smallest_world_keeps_what_it_takes() -> None:
    found = smallest(WORLD, lambda each: each.ranks > 2 and any(len(shape) == 2 for _, shape in each.shapes), 1000)
    assert found == World(3, (("a", (1, 1)),), "constant")
    assert str(found) == "3 ranks, layers {'a': (1, 1)}, gradients of the kind 'constant'"


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_values_are_written_so_that_they_can_be_pasted(values: list[float]) -> None:
    example = Values.of(torch.tensor(values))
    pasted = eval(str(example), {"torch": torch, "math": math})
    assert torch.equal(pasted.view(torch.int32).isnan(), example.tensor.view(torch.int32).isnan())
    assert torch.allclose(pasted, example.tensor, rtol=0, atol=0, equal_nan=True)


def test_equal_values_are_written_once() -> None:
    example = Values((0.0,) * 9 + (1.0, math.inf) + (2.5,) * 4)
    assert str(example) == "torch.tensor([0.0] * 9 + [1.0, math.inf] + [2.5] * 4)"


@given(st.lists(st.floats(width=32), min_size=1, max_size=8))
def test_nothing_is_simpler_than_itself(values: list[float]) -> None:
    """So that the search ends."""
    example, steps = Values(tuple(values)), 0
    while (simpler := next(iter(example.simpler()), None)) is not None:
        example, steps = simpler, steps + 1
        assert steps < 100


def test_an_exception_breaks_a_promise_too() -> None:
    def measure(example: Values) -> str | None:
        if 3.0 in example.values:
            raise ZeroDivisionError("three\nof them")
        return None

    finding = first_broken([Values((1.0,)), Values((1.0, 3.0, 2.0))], measure)
    assert finding is not None
    assert (finding.measured, finding.smallest) == ("ZeroDivisionError: three", "torch.tensor([3.0])")
    assert first_broken([Values((1.0,))], measure) is None
