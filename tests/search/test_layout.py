import pytest

from search.layout import aligned, percent, size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1536, "1.536 kB"),
        (999_960, "1 MB"),
        (11_184_000, "11.18 MB"),
        (29_667_540_000, "29.67 GB"),
        (2_966_754_000_000, "2,967 GB"),
    ],
)
def test_sizes_have_a_unit_and_four_digits(nbytes, text):
    assert size(nbytes) == text


def test_numbers_stand_to_the_right_and_names_to_the_left():
    assert aligned([("", "bits"), ("a", "4"), ("long", "10")]) == ["        bits", "  a        4", "  long    10"]
    assert aligned([("layer", "bits"), ("a", "4")], left=1) == ["  layer  bits", "  a         4"]


def test_percents_have_four_digits():
    assert [percent(part) for part in (0, 0.123456, 2)] == ["0 %", "12.35 %", "200 %"]
    assert percent(float("inf")) == "over 1e308 %"
