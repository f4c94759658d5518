import math

import pytest

from search import Wish

WISHES = [Wish.objective(), Wish.objective(0.1, 7), Wish.bits(3.5), Wish.error(4), Wish.balance()]


@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_a_wish_is_read_back_from_its_json(wish):
    assert Wish.from_json(wish.to_json()) == wish


@pytest.mark.parametrize(
    "content",
    [
        *({}, {"kind": "best"}, {"kind": "bits"}, {"kind": "bits", "target": "4"}, {"kind": "bits", "target": True}),
        *({"kind": "balance", "target": 4}, {"kind": "balance", "more": 1}, {"kind": "objective", "alpha": 1}),
    ],
)
def test_what_is_no_wish_is_refused(content):
    with pytest.raises(ValueError, match="wish"):
        Wish.from_json(content)


@pytest.mark.parametrize("power", [0.0, -1.0, math.inf, math.nan])
def test_powers_are_finite_numbers_above_zero(power):
    with pytest.raises(ValueError, match=f"the search's alpha must be a finite number above 0, got {power}"):
        Wish.objective(alpha=power)
    with pytest.raises(ValueError, match=f"the search's beta must be a finite number above 0, got {power}"):
        Wish.objective(beta=power)


@pytest.mark.parametrize("target", [0, -1, math.inf, math.nan])
def test_a_number_of_bits_is_finite_and_above_zero(target):
    with pytest.raises(ValueError, match=f"a finite number of bits a value above 0, got {target}"):
        Wish.bits(target)


@pytest.mark.parametrize("uniform", [0, 9, 2.5, -3])
def test_an_error_is_that_of_a_whole_width(uniform):
    with pytest.raises(ValueError, match=f"that of a uniform width of 1 to 8 bits, got {uniform}"):
        Wish.error(uniform)


def test_an_error_is_that_of_a_width_within_the_bounds():
    Wish.error(4).check([2, 3, 4])
    with pytest.raises(ValueError, match="one of the widths 2, 3, 4, got 5; name one of them, or search among more"):
        Wish.error(5).check([2, 3, 4])


@pytest.mark.parametrize(
    ("wish", "measure", "words"),
    [
        (Wish.balance(), "root", "these errors are of measure 'root'; measure 'square'"),
        (Wish.balance(), "loss", "these errors are of measure 'loss'; measure 'square'"),
        (Wish.objective(), "loss", "changes of a loss may be; ask for a number of bits or an error instead"),
    ],
)
def test_a_wish_that_the_measure_cannot_serve_names_one_that_can(wish, measure, words):
    with pytest.raises(ValueError, match=words):
        wish.check(range(2, 9), measure)


@pytest.mark.parametrize("wish", [Wish.bits(3), Wish.error(3)], ids=str)
@pytest.mark.parametrize("measure", ["root", "square", "loss"])
def test_limits_serve_every_measure(wish, measure):
    wish.check(range(2, 9), measure)
