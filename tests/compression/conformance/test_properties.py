"""Every property: what breaks it breaks nothing else, and what the package has keeps them all."""

import itertools
from typing import Any

import pytest
import torch

from compression import COMPRESSORS
from compression.codecs.low_rank import SpectralAtoms
from compression.codecs.quantizers import MaxMin
from compression.conformance import PROPERTIES, Status, assert_conforms, check, resolve, result_of
from compression.registry import Row
from tests.support.broken_promises import (
    BROKEN,
    ROW,
    WRONG_LATER,
    WRONG_SOMEWHERE,
    Biased,
    Kept,
    Signs,
    StochasticSign,
    WrongWhere,
    row_of,
)
from tests.support.quantizers import ROW as MID_RISE

NAMES = [each.name for each in PROPERTIES]


def with_feedback(target: object) -> dict[str, Any]:
    """Options of a check that takes half the time: the other half is among the slow ones."""
    return {"error_feedback": True, "bucket_size": 64} if isinstance(target, Row) else {}


def test_every_property_has_something_that_breaks_it() -> None:
    assert sorted(BROKEN) == sorted(NAMES)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("broken", NAMES)
def test_what_breaks_a_promise_keeps_all_others(broken: str) -> None:
    target = BROKEN[broken]
    verdict = check(target, **with_feedback(target))
    assert [result.property.name for result in verdict.failures] == [broken], str(verdict)
    (result,) = verdict.failures
    assert result.finding is not None
    assert result.property.rule in str(verdict)
    assert result.finding.measured in str(verdict)
    assert len(result.finding.smallest) < 200, "it was not made smaller"


@pytest.mark.parametrize("target", [Signs(), ROW], ids=["codec", "row"])
def test_what_they_are_made_of_keeps_all(target: object) -> None:
    assert_conforms(target, **with_feedback(target))


@pytest.mark.parametrize("where", WRONG_SOMEWHERE)
def test_what_is_wrong_somewhere_fails(where: str) -> None:
    assert not check(WRONG_SOMEWHERE[where], error_feedback=False).ok


@pytest.mark.parametrize("broken", WRONG_LATER)
def test_what_is_wrong_in_later_steps_fails(broken: str) -> None:
    verdict = check(row_of(WRONG_LATER[broken]), error_feedback=False)
    assert broken in [result.property.name for result in verdict.failures], str(verdict)


def test_a_contraction_in_the_mean_and_an_unbiased_code_of_much_noise_conform() -> None:
    assert_conforms(Kept(lambda values: False))
    assert_conforms(Kept(lambda values: False, scaled=True), error_feedback=False)


def test_what_breaks_now_and_then_is_told_so() -> None:
    calls = itertools.count(1)
    verdict = check(WrongWhere(lambda values: next(calls) % 50 == 0), error_feedback=False)
    assert not verdict.ok
    assert "measured: None" not in str(verdict)
    assert "not every time" in str(verdict)


# The registry

AT_ALL_WIDTHS = [
    (name, {"bits": bits})
    for name, row in COMPRESSORS.items()
    if row.has_bits
    for bits in range(row.min_bits, 9)
    if bits != 4  # the default
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("maxmin", {"bucket_size": -1}),
    ("maxmin", {"big_grad": True}),
    ("maxmin", {"warmup_steps": 2, "dense_dtype": "bfloat16"}),
    ("svd", {"dense_dtype": "bfloat16"}),
    ("topk", {"efx_bits": 3}),
    ("topk", {"efx_randk": 0.1}),
    ("topk", {"big_grad": True}),
    ("dgc", {"warmup_steps": 2, "nesterov": True}),
    ("none", {"dense_dtype": "bfloat16"}),
]
NO_CODEC = ("exact size", "purity", "independent rows")
NO_FEEDBACK = ("telescoping", "bounded residual")
NOT_APPLICABLE: dict[str, tuple[str, ...]] = {
    "none": (*NO_CODEC, *NO_FEEDBACK),
    "stats": (*NO_CODEC, *NO_FEEDBACK),
    "sanity": (*NO_CODEC, "bias or contraction", "not finite", "mean", *NO_FEEDBACK),
    "powersgd": NO_CODEC,
    "dgc": NO_FEEDBACK,
}


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["feedback", "both ways"])
def test_ours_keep_all_promises_that_they_can_make(name: str, both: bool) -> None:
    feedback = {"error_feedback": True} if "error_feedback" in COMPRESSORS[name].takes and not both else {}
    verdict = check(name, **feedback)
    assert verdict.ok, str(verdict)
    skipped = {result.property.name for result in verdict.results if result.status is Status.NOT_APPLICABLE}
    assert skipped == set(NOT_APPLICABLE.get(name, ()))
    assert all(result.reason for result in verdict.results if result.status is Status.NOT_APPLICABLE)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [*AT_ALL_WIDTHS, *OTHERS], ids=str)
def test_so_they_do_at_every_width_and_with_other_options(name: str, options: dict[str, Any]) -> None:
    assert_conforms(name, **options)


@pytest.mark.slow
def test_a_quantizer_that_no_kernel_knows_keeps_them_too() -> None:
    assert_conforms(MID_RISE, error_feedback=True)


# What is special


def failures(target: object, **options: Any) -> list[str]:
    return [result.property.name for result in check(target, **options).failures]


def test_a_code_that_is_not_meant_for_error_feedback_is_judged_without() -> None:
    assert failures(StochasticSign, error_feedback=False) == []  # with it, its residual is not bounded


def test_the_options_of_a_class_are_its_arguments() -> None:
    """Signs of twice the largest magnitude overflow."""
    assert failures(StochasticSign, stretch=2.0, error_feedback=False) == ["finite"]


def test_a_quantizer_is_projected_with_error_feedback_as_the_registry_has_it() -> None:
    assert_conforms(MaxMin, bits=1)


def test_a_codec_of_one_size_alone_is_no_codec_of_layers() -> None:
    verdict = check(SpectralAtoms(8, 8, 2))
    assert "this codec is for 8 x 8 values, got " in str(verdict)


def test_a_bias_that_a_codec_states_is_no_fault_unless_it_is_larger() -> None:
    class Stating(Biased):
        share = 0.2

        def bias_bound(self, values_RN: torch.Tensor) -> torch.Tensor:
            return self.share * values_RN.abs().amax(1, keepdim=True).expand_as(values_RN)

    class Shy(Stating):
        share = 0.1

    (bias,) = (each for each in PROPERTIES if each.name == "bias or contraction")
    for codec, status in ((Stating(), Status.OK), (Shy(), Status.FAILS), (Biased(), Status.FAILS)):
        assert result_of(bias, resolve(codec, {}).subjects).status is status


def test_a_code_that_raises_breaks_its_promises_and_not_the_check() -> None:
    class Absent(Signs):
        def decode(self, wire_RB: torch.Tensor, count: int) -> torch.Tensor:
            raise NotImplementedError("later\nor never")

    verdict = check(Absent())
    assert [result.property.name for result in verdict.results if result.status is Status.OK] == ["exact size"]
    assert "NotImplementedError: later\n" in str(verdict)


def test_global_random_states_and_threads_are_as_before() -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    check("none")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
