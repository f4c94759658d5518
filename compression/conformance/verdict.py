"""Verdicts: which promises a compressor keeps, in words."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from .examples import Finding, in_a_line
from .properties import PROPERTIES, Property
from .targets import Subject, Target


class Status(Enum):
    """Whether a promise is kept, as a verdict prints it."""

    OK = "ok"
    FAILS = "FAILS"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Result:
    """What was found of one property: a finding where it fails, a reason where it is not applicable.

    `label`: the way of using the compressor in which it was found, empty where there is one.
    """

    property: Property
    status: Status
    label: str = ""
    finding: Finding | None = None
    reason: str = ""

    def __str__(self) -> str:
        line = f"{self.status.value:14}  {self.property.name}"
        if self.finding is not None:
            line += f" ({self.label})" if self.label else ""
            line += f"\n{'rule:':>28} {self.property.rule}\n{'measured:':>28} {self.finding.measured}"
            line += f"\n{'smallest:':>28} {self.finding.smallest}"
        return line + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Verdict:
    """The results of all properties of one compressor."""

    name: str
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether no property fails."""
        return not self.failures

    @property
    def failures(self) -> list[Result]:
        """The properties that fail."""
        return [result for result in self.results if result.status is Status.FAILS]

    def __str__(self) -> str:
        counts = [f"{sum(result.status is each for result in self.results)} {each.value}" for each in Status]
        return "\n".join([self.name, *map(str, self.results), ", ".join(counts)])


def judge(target: Target) -> Iterator[Result]:
    """The result of every property, one after the other."""
    for each in PROPERTIES:
        yield result_of(each, target.subjects)


def result_of(each: Property, subjects: Sequence[Subject]) -> Result:
    """What is found of a property in all ways of using a compressor: it fails where it fails in one."""
    reasons, holds = [], False
    codecs: list[object] = []
    for subject in subjects:
        if each.of_codec and (codec := subject.codec(64)) is not None:
            if codec in codecs:
                continue
            codecs.append(codec)
        with _one_thread():
            try:
                outcome = each.check(subject)
            except Exception as error:
                outcome = Finding(in_a_line(error), "any: it is raised before an example is chosen")
        if isinstance(outcome, Finding):
            return Result(each, Status.FAILS, subject.label, outcome)
        if outcome is None:
            holds = True
        else:
            reasons.append(outcome)
    if holds:
        return Result(each, Status.OK)
    return Result(each, Status.NOT_APPLICABLE, reason="; ".join(dict.fromkeys(reasons)))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A single thread of torch: examples are small, and threads that wait for one another cost more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
