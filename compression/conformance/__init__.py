"""Conformance: holds anybody's codec or averager to what this package promises of its own.

    python -m PACKAGE.conformance NAME_or_module:name [option=value ...]

In tests: `assert_conforms("mine:Codec", levels=3)`, or `check(Codec(3))`, which returns a verdict that prints itself.
"""

from typing import Any

from .inputs import INPUTS, Input, values_of
from .properties import PROPERTIES, Property
from .targets import Subject, Target, UnknownTarget, resolve
from .verdict import Result, Status, Verdict, judge, result_of

__all__ = [
    "INPUTS",
    "PROPERTIES",
    "Input",
    "Property",
    "Result",
    "Status",
    "Subject",
    "Target",
    "UnknownTarget",
    "Verdict",
    "assert_conforms",
    "check",
    "judge",
    "resolve",
    "result_of",
    "values_of",
]


def check(target: object, **options: Any) -> Verdict:
    """Hold a compressor to all properties: a name of the registry, a `module:name`, or an object.

    Objects are codecs, classes and functions that make them, rows of a registry, and compressors that were built.
    `options` are its own; a codec is used with error feedback unless `error_feedback` is false.

    Raises UnknownTarget, a ValueError, for what cannot be checked, and for an option that is not taken.
    """
    found = resolve(target, options)
    return Verdict(found.name, tuple(judge(found)))


def assert_conforms(target: object, **options: Any) -> None:
    """Raise AssertionError with the verdict where a property fails; arguments are those of `check`."""
    verdict = check(target, **options)
    if not verdict.ok:
        raise AssertionError(str(verdict))
