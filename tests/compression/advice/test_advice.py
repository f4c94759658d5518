"""Advice: the ranking, break-evens, words and files, from times that are given."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from compression import build
from compression.advice.advice import Advice, advice_on, break_even_in_words
from compression.advice.advisor import on_paper
from compression.advice.choices import Choice, choices
from compression.advice.measured import Measured
from compression.advice.plotting import draw
from compression.advice.prediction import ACCURACY, Predictor, advised
from compression.costs import Cluster, CodecCosts, Compute, Costs

SHAPES = {"stem": (64, 48), "body": (1024, 1024), "head": (256, 100), "bias": (100,)}
NAMES = [choice.codec for choice in choices()]
BFLOAT16 = Choice(build("none", dense_dtype="bfloat16"))


def measured(per_value: float = 1e-9, **link: float) -> Measured:
    """Codecs that are all as fast, and err by their number."""
    codecs = {name: CodecCosts(per_value * (name not in ("float32", "bfloat16")), 0.0) for name in NAMES}
    return Measured(
        SHAPES,
        (("bias", "head"), ("body", "stem")),
        Compute(0.01, 0.02, 0.005, {"bias": 0.001, "head": 0.002, "body": 0.015, "stem": 0.02}, contention=0.5),
        Cluster(2, 1, **(link or {"link_mbit": 1_000})),
        Costs(0.0, 1e-5, 1e-5, 1e-10, 1e-10, codecs),
        {name: 0.0 if name == "float32" else 0.001 * k for k, name in enumerate(NAMES)},
    )


def advice(found: Measured, two_levels: bool = False) -> Advice:
    return advice_on(found, found.cluster, choices(two_levels))


def test_the_fastest_comes_first() -> None:
    seconds = [each.step.seconds for each in advice(measured(link_mbit=20)).choices]
    assert seconds == sorted(seconds)
    assert len(seconds) == len(NAMES)


def test_float32_is_advised_where_nothing_is_gained() -> None:
    found = advice(measured(link_mbit=1e7))
    assert str(found.best.choice) == "float32"
    assert "send float32: codes would gain nothing" in found.in_words()


def test_codes_are_advised_on_a_slow_link() -> None:
    found = advice(measured(link_mbit=5))
    assert found.best.choice.encodes
    assert "x the steps of float32 and" in found.in_words()


def test_bfloat16_is_advised_where_codecs_cost_more_than_they_save() -> None:
    found = advice(measured(per_value=1e-6, link_mbit=1_000))
    assert str(found.best.choice) == "bfloat16"


def test_of_choices_that_are_as_fast_the_one_that_errs_least_is_advised() -> None:
    found = advice(measured(link_mbit=5)).choices
    close = [each for each in found if each.step.seconds <= found[0].step.seconds * (1 + ACCURACY)]
    assert len(close) > 1
    assert advised(found).error == min(each.error for each in close)


def test_a_break_even_is_where_the_steps_are_equal() -> None:
    predictor = Predictor(measured(), Cluster(2, 1, 1_000))
    choice = Choice(build("maxmin", bits=4, error_feedback=True))
    found = predictor.break_even(choice)
    assert found is not None
    above, link = found
    assert above == 0 < link < math.inf
    assert predictor.step(choice, link).seconds == pytest.approx(predictor.step(BFLOAT16, link).seconds, rel=1e-3)
    assert predictor.step(choice, link / 2).seconds < predictor.step(BFLOAT16, link / 2).seconds
    assert predictor.step(choice, link * 4).seconds > predictor.step(BFLOAT16, link * 4).seconds


def test_float32_is_faster_above_a_link_where_rounding_takes_time() -> None:
    """On a link that is fast enough bytes take nothing, and bfloat16 pays for its rounding: not on every link."""
    found = measured()
    codecs = {**found.costs.codecs, "bfloat16": CodecCosts(1e-9, 0.0)}
    found = replace(found, costs=replace(found.costs, codecs=codecs))
    predictor = Predictor(found, found.cluster)
    break_even = predictor.break_even(Choice(build("none")))
    assert break_even is not None
    link, below = break_even
    assert 0 < link < below == math.inf
    float32 = Choice(build("none"))
    assert predictor.step(float32, link * 2).seconds < predictor.step(BFLOAT16, link * 2).seconds
    assert predictor.step(float32, link / 2).seconds > predictor.step(BFLOAT16, link / 2).seconds
    assert break_even_in_words(break_even).startswith("above ")
    [plain] = [each for each in advice(found).to_json()["choices"] if each["name"] == "float32"]
    assert plain["break_even_mbit"] == {"above": link}


def test_a_choice_that_wins_between_two_links_has_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 30 Mbit/s to 2 Gbit/s, and far above, too: the widest range counts."""

    def step(self: Predictor, choice: Choice, link_mbit: float) -> SimpleNamespace:
        faster = choice != BFLOAT16 and (30 <= link_mbit <= 2_000 or link_mbit > 5e6)
        return SimpleNamespace(seconds=1.0 if faster else 2.0)

    monkeypatch.setattr(Predictor, "step", step)
    found = Predictor(measured(), Cluster(2, 1, 1_000)).break_even(Choice(build("none")))
    assert found == pytest.approx((30, 2_000), rel=2e-3)
    assert break_even_in_words(found) == "from 30 Mbit/s to 2 Gbit/s"


def test_what_is_dearer_on_every_link_breaks_even_never() -> None:
    """Float32 sends twice as much on every link, and rounding takes nothing."""
    predictor = Predictor(measured(per_value=1.0), Cluster(2, 1, 1_000))
    assert break_even_in_words(predictor.break_even(Choice(build("none")))) == "never"


def test_what_costs_nothing_breaks_even_always() -> None:
    predictor = Predictor(measured(per_value=0.0), Cluster(2, 1, 1_000))
    found = predictor.break_even(Choice(build("terngrad", error_feedback=True)))
    assert break_even_in_words(found) == "always"


def test_bfloat16_and_one_host_have_nothing_to_break_even_with() -> None:
    assert Predictor(measured(), Cluster(2, 1, 1_000)).break_even(BFLOAT16) is None
    assert Predictor(measured(), Cluster(1, 4)).break_even(Choice(build("none"))) is None
    plain = advice(replace(measured(), cluster=Cluster(1, 4))).to_json()["choices"]
    assert {each["break_even_mbit"] for each in plain} == {None}


def test_where_the_network_adds_up_no_bfloat16_choices_are_compared_with_float32() -> None:
    found = on_paper(measured(), "hosts=2 link=1gbit", all_reduces_bfloat16=False)
    codecs = {name: each for name, each in found.measured.costs.codecs.items() if name != "bfloat16"}
    found = replace(found, measured=replace(found.measured, costs=replace(found.measured.costs, codecs=codecs)))
    assert "faster than float32" in found.in_words()
    assert "bfloat16" not in found.in_words()


@pytest.mark.parametrize(("bfloat16", "sent"), [(1.06, "bfloat16"), (1.2, "maxmin, bits 8")])
def test_codes_have_to_gain_more_than_predictions_can_tell(bfloat16: float, sent: str) -> None:
    """Of codes within 5 % of the fastest those that err least; and bfloat16, where that is within 5 % of these."""
    known = {str(each.choice): each for each in advice(measured()).choices}
    seconds = {"terngrad": (1.0, 0.9), "maxmin, bits 8": (1.05, 0.01), "bfloat16": (bfloat16, 0.001)}
    forecasts = [
        known[name]._replace(step=known[name].step._replace(seconds=took), error=error)
        for name, (took, error) in seconds.items()
    ]
    assert str(advised(forecasts).choice) == sent
    within = "6%" if sent == "bfloat16" else "5%"
    words = replace(advice(measured()), choices=tuple(forecasts)).in_words()
    assert f"terngrad is as fast, within {within}" in words


def test_latency_adds_its_rounds_and_nothing_else() -> None:
    """Arithmetic alone: of the last buffer's two hops two, where nothing else waits."""
    choice = Choice(build("maxmin", bits=4, error_feedback=True))
    still, late = (Predictor(measured(), Cluster(2, 1, 1_000, latency=each)).step(choice) for each in (0.0, 1.0))
    assert late.network - still.network == pytest.approx(2 * 2 * 1.0)


def test_the_content_of_a_file_is_plain_and_gives_the_same_advice() -> None:
    found = advice(measured())
    content = json.loads(json.dumps(found.to_json()))
    assert set(content) == {"measured", "cluster", "choices", "advised"}
    for each, forecast in zip(content["choices"], found.choices, strict=True):
        assert {"flags", "seconds", "host_bytes", "error", "break_even_mbit"} <= set(each)
        assert each["seconds"] == forecast.step.seconds
        assert each["host_bytes"] == forecast.step.host_bytes
        assert (each["break_even_mbit"] is None) == (each["name"] == "bfloat16")
        if isinstance(each["break_even_mbit"], dict):
            assert all(mbit > 0 for mbit in each["break_even_mbit"].values())
        else:
            assert each["break_even_mbit"] in (None, "never", "always")
    again = Measured.from_json(content["measured"])
    assert again == found.measured
    assert advice(again).choices == found.choices
    assert on_paper(again, found.cluster).choices == found.choices


@pytest.mark.parametrize("content", [None, [], {}, {"shapes": 1}, {"shapes": {"a": [1]}, "buffers": [["a"]]}])
def test_a_file_of_something_else_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="holds no measurements of an advice"):
        Measured.from_json(content)


DAMAGED = {
    "shapes.stem": ([64, -48], "shapes are of whole numbers, got (64, -48) of 'stem'"),
    "shapes.new": ([2], "buffers hold every one of the shapes' names once"),
    "buffers": ([["bias", "head"], ["body", "stem", "body"]], "buffers hold every one of the shapes' names once"),
    "compute.ready": ({"bias": 0.001}, "ready says nothing of 'body'"),
    "compute.backward": (math.nan, "times of a step are in seconds"),
    "cluster.link_mbit": (-1.0, "a cluster's `link_mbit` is a rate above 0"),
    "costs.per_byte": (-1e-9, "got -1e-09 as per_byte"),
    "costs.per_round": (None, "holds no measurements of an advice"),
    "costs.codecs.float32": ({"per_value": math.inf, "per_byte": 0.0}, "got inf as per_value of float32"),
    "errors.float32": (math.nan, "got nan as error of float32"),
    "errors.novel": (0.1, "errors and codecs have the same names, and 'novel' is of one; measure anew"),
    "ranks_on_machine": ("two", "holds no measurements of an advice"),
    "version": (99, "measurements of version 1 are read, got 99; measure anew"),
}


@pytest.mark.parametrize("place", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(place: str) -> None:
    content = json.loads(json.dumps(measured().to_json()))
    value, message = DAMAGED[place]
    *parents, last = place.split(".")
    inner = content
    for name in parents:
        inner = inner[name]
    inner[last] = value
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Measured.from_json(content)
    assert "\n" not in str(raised.value)


def test_a_file_without_any_codec_is_refused() -> None:
    content = json.loads(json.dumps(measured().to_json()))
    content["errors"], content["costs"]["codecs"] = {}, {}
    with pytest.raises(ValueError, match="float32, which every advice is held against, is not in errors"):
        Measured.from_json(content)


def test_two_levels_are_forecast_on_hosts_of_several_ranks() -> None:
    found = replace(measured(), cluster=Cluster(4, 2, 1_000))
    names = [str(each.choice) for each in advice(found, two_levels=True).choices]
    assert {"maxmin, bits 4", "maxmin, bits 4, two levels", "bfloat16, two levels"} <= set(names)
    assert on_paper(measured(), "hosts=4 ranks=2 link=1gbit").choices == advice(found, two_levels=True).choices


def test_two_levels_can_be_left_out_on_paper() -> None:
    flat = on_paper(measured(), "hosts=4 ranks=2 link=1gbit", hierarchical=False)
    assert flat.choices
    assert not any(each.choice.hierarchical for each in flat.choices)


def test_the_table_has_a_line_for_each_choice_and_ends_with_what_to_use() -> None:
    found = advice(measured(link_mbit=5))
    lines = found.in_words(lambda choice: ["--this", str(choice)]).splitlines()
    for each in found.choices:
        assert [line for line in lines if line.startswith(f"{each.choice} ")]
    assert lines[-1] == f"use: --this {found.best.choice}"


def test_the_picture_is_a_png() -> None:
    assert advice(measured()).plot().startswith(b"\x89PNG")
    assert on_paper(measured(), "hosts=1 ranks=4").plot().startswith(b"\x89PNG")


def test_the_picture_of_one_host_is_drawn_over_the_rate_inside() -> None:
    axes = draw(on_paper(measured(), "hosts=1 ranks=4 inside=1gbit")).axes[0]
    assert axes.get_xlabel().startswith("rate inside the host")
    assert any(len(set(line.get_ydata())) > 2 for line in axes.get_lines())


def test_what_was_not_measured_is_not_advised_on() -> None:
    found = measured()
    with pytest.raises(ValueError, match="float32 was not measured"):
        advice_on(replace(found, errors={}), found.cluster, choices())
