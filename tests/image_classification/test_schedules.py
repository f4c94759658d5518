"""Learning-rate schedules."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classification.schedules import SCHEDULES, schedule

epochs_and_warmup = st.integers(1, 200).flatmap(lambda E: st.tuples(st.just(E), st.integers(0, E - 1)))


def test_step_divides_by_ten_at_epochs_30_60_and_80() -> None:
    rate = schedule("step", lr=2.0, epochs=90)
    changes = [epoch for epoch in range(1, 90) if rate(epoch) != rate(epoch - 1)]
    assert changes == [30, 60, 80]
    assert [rate(epoch) for epoch in (0, 30, 60, 80)] == pytest.approx([2.0, 0.2, 0.02, 0.002])


def test_a_warmup_does_not_move_the_milestones_of_step() -> None:
    assert schedule("step", lr=1.0, epochs=90, warmup=5)(29) == 1.0
    assert schedule("step", lr=1.0, epochs=90, warmup=5)(30) == pytest.approx(0.1)


@settings(deadline=None, max_examples=50)
@given(epochs_and_warmup, st.floats(1e-3, 10))
def test_linear_and_cosine_follow_their_formulas(shape: tuple[int, int], lr: float) -> None:
    E, w = shape
    for e in range(w, E):
        assert schedule("linear", lr=lr, epochs=E, warmup=w)(e) == pytest.approx(lr * (1 - (e - w) / (E - w)))
        cosine = lr / 2 * (1 + math.cos(math.pi * (e - w) / (E - w)))
        assert schedule("cosine", lr=lr, epochs=E, warmup=w)(e) == pytest.approx(cosine)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(deadline=None, max_examples=50)
@given(shape=epochs_and_warmup)
def test_every_schedule_warms_up_evenly_to_the_full_rate_and_never_rises_again(
    name: str, shape: tuple[int, int]
) -> None:
    E, w = shape
    rate = schedule(name, lr=0.4, epochs=E, warmup=w)
    assert [rate(epoch) for epoch in range(w)] == pytest.approx([0.4 * (epoch + 1) / w for epoch in range(w)])
    after = [rate(epoch) for epoch in range(w, E)]
    assert all(value > 0 for value in after)
    assert after == sorted(after, reverse=True)
    if w < 30:
        assert after[0] == 0.4


def test_a_warmup_must_leave_an_epoch() -> None:
    with pytest.raises(ValueError, match=r"^the warm-up must be shorter than the 5 epochs of training, got 5$"):
        schedule("cosine", lr=0.1, epochs=5, warmup=5)


def test_an_unknown_schedule_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown learning-rate schedule 'stair'; choose one of step, linear, cosine"):
        schedule("stair", lr=0.1, epochs=5)
