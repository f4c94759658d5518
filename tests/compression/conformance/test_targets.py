"""Targets: names and objects that can be checked, and one clear line about those that cannot."""

from typing import Any

import pytest

from compression import build
from compression.averagers import Averager, OneHop, TwoHop
from compression.codecs.low_rank import SpectralAtoms, sides
from compression.codecs.quantizers import MaxMin
from compression.codecs.sparsifiers import TopK
from compression.conformance import UnknownTarget, resolve
from compression.layers import Layer, layers_of
from compression.network.collectives import Solo
from compression.registry import COMPRESSORS

LAYERS = layers_of([("weight", (8, 8))], 64)


def labels(target: object, **options: Any) -> list[str]:
    return [subject.label for subject in resolve(target, options).subjects]


def test_what_takes_error_feedback_is_checked_with_and_without_unless_it_is_said() -> None:
    both = ["error_feedback=false", "error_feedback=true"]
    assert labels("maxmin", bits=2) == labels(COMPRESSORS["maxmin"], bits=2) == both
    assert labels("maxmin", error_feedback=True) == labels("none") == labels("1bit") == labels("dgc") == [""]
    assert labels("topk", efx_bits=3) == ["error_feedback=false"]  # the two exclude each other


def test_a_compressor_that_was_built_is_checked_as_it_is() -> None:
    target = resolve(build("maxmin", bits=3, error_feedback=True), {})
    assert target.name == "maxmin"
    (subject,) = target.subjects
    assert subject.error_feedback
    assert subject.codec(100) == MaxMin(3)


@pytest.mark.parametrize(
    ("target", "options", "averager"),
    [
        (MaxMin, {"bits": 3}, TwoHop),
        (MaxMin(3), {}, TwoHop),
        (TopK, {"ratio": 0.5}, OneHop),
        (TopK(), {"error_feedback": False}, OneHop),
        (lambda: MaxMin(2), {}, TwoHop),
        ("compression.codecs.quantizers:MaxMin", {"bits": 3}, TwoHop),
    ],
)
def test_codecs_are_averaged_as_their_kind_is(
    target: object, options: dict[str, Any], averager: type[Averager]
) -> None:
    (subject,) = resolve(target, options).subjects
    bound = subject.bind(LAYERS, Solo(), 0)
    assert isinstance(bound, averager)
    assert bool(bound.states) == subject.error_feedback == options.get("error_feedback", True)


def test_a_function_that_asks_for_error_feedback_is_told() -> None:
    def atoms(error_feedback: bool) -> TopK:
        return TopK(0.1 if error_feedback else 0.2)

    for feedback, ratio in ((True, 0.1), (False, 0.2)):
        (subject,) = resolve(atoms, {"error_feedback": feedback}).subjects
        assert subject.codec(64) == TopK(ratio)


def test_a_function_that_asks_for_a_layer_is_called_for_each() -> None:
    def atoms(layer: Layer, rank: int = 2) -> SpectralAtoms:
        return SpectralAtoms(*sides(layer.shape), rank)

    (subject,) = resolve(atoms, {"rank": 1}).subjects
    assert subject.codec(300) == SpectralAtoms(15, 20, 1)
    assert subject.codec(7) == SpectralAtoms(1, 7, 1)


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("gzip", {}, r"no compressor is called 'gzip'; there are none, sanity, maxmin.*module:name"),
        ("maxmin", {"color": 1}, "compressor maxmin takes no option 'color'; it takes bits, second_hop_bits, "),
        ("maxmin", {"bits": 9}, "1 to 8 bits wide, got bits=9"),
        ("maxmin", {"bits": "4"}, "takes bits as int, got '4'"),
        ("no_such_module:name", {}, "no_such_module:name: no module is called 'no_such_module'"),
        ("compression.registry:Nothing", {}, "compression.registry has no 'Nothing'"),
        ("compression.codecs.quantizers:MaxMin", {}, "missing a required argument: 'bits'; name its options"),
        ("compression.codecs.quantizers:MaxMin", {"bits": 9}, "cannot be made of {'bits': 9}: ValueError: MaxMin"),
        (MaxMin, {"bits": 3, "colour": 1}, "MaxMin takes no option 'colour'; it takes bits, bucket_size"),
        (MaxMin(3), {"bits": 3}, r"MaxMin\(bits=3, .* is made already, and takes no option 'bits'; its class might"),
        (MaxMin(3), {"error_feedback": 1}, "error_feedback is true or false, got 1"),
        (build("maxmin"), {"bits": 3}, "maxmin is built already, and takes no option 'bits'"),
        (dict, {}, "dict makes nothing that can be checked: name a codec, a class or function"),
        (list, {}, "makes a list, with which nothing can be checked: name a codec, a class or function"),
        (":maxmin", {}, "':maxmin' names no object: name it as module:name"),
        ("mine.py:codec", {}, "a module is named without its folder and its .py"),
        ("tests.support.ending:codec", {}, "importing tests.support.ending raises SystemExit: usage"),
        ("math:pi", {}, "math:pi is of float, with which nothing can be checked: name a codec, a class or function"),
    ],
)
def test_what_cannot_be_checked_is_said_in_one_line(target: object, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UnknownTarget, match=words) as raised:
        resolve(target, options)
    assert "\n" not in str(raised.value)
