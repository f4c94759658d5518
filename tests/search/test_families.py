"""The choice among families: exact against enumeration, never worse than any family alone, told and read back."""

import json
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search import Option, OptionTables, Wish, families_as_text, option_of, options_of, search_options

COMMON: dict[str, dict[str, Any]] = {"eden": {"bucket_size": 64}, "topk": {"error_feedback": True}, "powersgd": {}}
OPTIONS = options_of(COMMON, [2, 4], [0.01, 0.1], [1])


@st.composite
def option_tables(draw, measure="square"):
    """Up to 4 layers; the first option is sent as it is, so without error."""
    layers, size = draw(st.integers(1, 4)), len(OPTIONS)
    error = draw(st.lists(st.integers(0, 6).map(float) | st.floats(1e-6, 100), min_size=layers * size,
                          max_size=layers * size))  # fmt: skip
    nbytes = draw(st.lists(st.integers(1, 400), min_size=layers * size, max_size=layers * size))
    error, nbytes = np.reshape(error, (layers, size)), np.reshape(nbytes, (layers, size))
    error[:, 0], nbytes[:, 0] = 0.0, 400
    return tables_of(error, nbytes, measure)


def tables_of(error: Any, nbytes: Any, measure: Any = "square") -> OptionTables:
    layers = len(error)
    return OptionTables(
        layers=[f"layer{row}" for row in range(layers)],
        widths=range(len(OPTIONS)),
        error=np.array(error),
        nbytes=np.array(nbytes),
        dense_bytes=7,
        values=100 * layers + 2,
        numel=[100] * layers,
        measure=measure,
        norm2=50.0,
        options=OPTIONS,
    )


def enumerated(tables: OptionTables) -> list[tuple[float, int]]:
    """Total error and bytes of every assignment."""
    rows = range(len(tables.layers))
    every = product(tables.widths, repeat=len(tables.layers))
    return [
        (math.fsum(tables.error[r, c] for r, c in zip(rows, columns, strict=True)),
         int(sum(tables.nbytes[r, c] for r, c in zip(rows, columns, strict=True))))
        for columns in every
    ]  # fmt: skip


@given(tables=option_tables(), target=st.floats(0.5, 34))
def test_no_other_assignment_within_the_budget_loses_less(tables: OptionTables, target: float) -> None:
    within = [error for error, nbytes in enumerated(tables) if 8 * nbytes / sum(tables.numel) <= target]
    if not within:
        with pytest.raises(ValueError, match="a budget must hold the cheapest assignment"):
            search_options(tables, Wish.bits(target))
        return
    found = search_options(tables, Wish.bits(target)).found
    assert tables.total_error(found.bits) == pytest.approx(min(within), abs=1e-12)
    assert tables.bits_a_value(found.bits) <= target


@given(tables=option_tables(), bits=st.sampled_from([2, 4]))
def test_no_other_assignment_within_the_error_takes_fewer_bytes(tables: OptionTables, bits: int) -> None:
    limit = tables.total_error([list(map(str, OPTIONS)).index(f"eden {bits}")] * len(tables.layers))
    found = search_options(tables, Wish.error(bits)).found
    assert tables.encoded_bytes(found.bits) == min(nbytes for error, nbytes in enumerated(tables) if error <= limit)
    assert tables.total_error(found.bits) <= limit


@given(tables=option_tables())
def test_no_other_assignment_has_a_lesser_balance(tables: OptionTables) -> None:
    found = search_options(tables, Wish.balance()).found
    worth = [(1 + error / tables.norm2) * (nbytes + tables.dense_bytes) for error, nbytes in enumerated(tables)]
    own = (1 + tables.total_error(found.bits) / tables.norm2) * (tables.encoded_bytes(found.bits) + tables.dense_bytes)
    assert own == pytest.approx(min(worth), rel=1e-12)


@given(tables=option_tables(measure="root"), target=st.floats(4, 34))
def test_a_mix_loses_no_more_than_any_family_alone(tables: OptionTables, target: float) -> None:
    try:
        result = search_options(tables, Wish.bits(target))
    except ValueError:
        return
    mixed = tables.total_error(result.found.bits)
    assert set(result.alone) == {"none", "eden", "topk", "powersgd"}
    for family, alone in result.alone.items():
        if alone is not None:
            only = tables.only(family)
            assert {option.family for option in only.options} == {family}
            assert mixed <= only.total_error(alone.bits) + 1e-9
            assert only.bits_a_value(alone.bits) <= target


def test_options_are_told_and_read_back() -> None:
    assert [str(option) for option in OPTIONS] == [
        "none", "eden 2", "eden 4", "topk 0.01", "topk 0.1", "powersgd 1",
    ]  # fmt: skip
    assert [option_of(str(option), {"none": {}, **COMMON}) for option in OPTIONS] == list(OPTIONS)
    assert OPTIONS[3].route == ("topk", {"error_feedback": True, "ratio": 0.01})


@pytest.mark.parametrize("text", ["eden", "eden x", "eden 2.5", "none 3", "svd 2", "", "topk"])
def test_what_is_no_option_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="an option is a family and its setting"):
        option_of(text, {"none": {}, **COMMON})


def test_a_result_tells_of_every_layer_and_family() -> None:
    error = [[0, 5, 2, 3, 1, 9], [0, 5, 2, 3, 1, 0.5]]
    nbytes = [[400, 25, 50, 10, 90, 30], [400, 25, 50, 10, 90, 30]]
    result = search_options(tables_of(error, nbytes), Wish.bits(4.8))  # 120 bytes
    chosen = {name: str(option) for name, option in result.option_by_layer().items()}
    assert chosen == {"layer0": "topk 0.1", "layer1": "powersgd 1"}
    assert result.error_by_layer() == {"layer0": 1.0, "layer1": 0.5}
    content = json.loads(json.dumps(result.to_json()))
    assert content["installed"]["options"] == list(chosen.values())
    assert content["installed"]["encoded_bytes"] == 120
    assert content["alone"]["none"] is None
    assert content["alone"]["eden"]["options"] == ["eden 4", "eden 4"]
    text = families_as_text(result, 3)
    assert "epoch 3: 2 layers of 200 values" in text
    assert "powersgd 1       1     100" in text
    assert "This is the optimum." in text


@pytest.mark.parametrize(
    ("wish", "error"),
    [
        (Wish.objective(), "powers of the error are least where nothing is encoded"),
        (Wish.error(3), "is that of a quantizer at 3 bits, and none of the options is"),
    ],
)
def test_wishes_that_families_cannot_serve_are_refused(wish: Wish, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        search_options(tables_of(np.ones((1, 6)), np.ones((1, 6), int)), wish)


def test_tables_of_options_are_validated() -> None:
    with pytest.raises(ValueError, match="balance weighs squared errors"):
        search_options(tables_of(np.ones((1, 6)), np.ones((1, 6), int), "root"), Wish.balance())
    with pytest.raises(ValueError, match="of measure root or square, got 'loss'"):
        tables_of(np.ones((1, 6)), np.ones((1, 6), int), "loss")
    with pytest.raises(ValueError, match="columns are numbered options"):
        OptionTables(["a"], [0, 1], np.ones((1, 2)), np.ones((1, 2), int), 0, 1, [1], options=[Option("none")] * 2)
