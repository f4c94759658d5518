"""Choices: the whole registry, at its usual settings."""

from dataclasses import replace

from compression import COMPRESSORS
from compression.advice.choices import WIDTHS, choices, settings


def test_every_compressor_that_trains_is_a_choice() -> None:
    names = {choice.compressor.name for choice in choices()}
    assert names == set(COMPRESSORS) - {"sanity", "stats"}


def test_float32_and_bfloat16_come_first() -> None:
    assert [str(choice) for choice in choices()][:2] == ["float32", "bfloat16"]
    assert "bfloat16" not in [str(choice) for choice in choices(all_reduces_bfloat16=False)]


def test_every_width_that_a_compressor_has_is_tried() -> None:
    for name, row in COMPRESSORS.items():
        own = [choice.compressor for choice in choices() if choice.compressor.name == name and row.has_bits]
        expected = [width for width in WIDTHS if row.has_bits and width >= row.min_bits]
        assert [compressor.options.bits for compressor in own] == expected


def test_two_levels_are_tried_of_all_but_float32() -> None:
    both = choices(two_levels=True)
    flat, levels = ({each.codec for each in both if each.hierarchical == it} for it in (False, True))
    assert flat - levels == {"float32"}


def test_names_are_told_apart() -> None:
    names = [str(choice) for choice in choices(two_levels=True)]
    assert len(set(names)) == len(names)


def test_error_feedback_is_on_where_it_can_be() -> None:
    for choice in choices():
        row = COMPRESSORS[choice.compressor.name]
        if "error_feedback" in row.takes and not row.needs_feedback:
            assert choice.given["error_feedback"] is True


def test_a_new_compressor_appears_by_itself() -> None:
    row = replace(COMPRESSORS["maxmin"], min_bits=3)
    assert [each["bits"] for each in settings(row)] == [3, 4, 8]
    assert {choice.compressor.name for choice in choices(rows={"maxmin": row})} == {"maxmin"}
