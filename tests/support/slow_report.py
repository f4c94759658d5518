"""A plugin of pytest (`-p tests.support.slow_report`) that writes the result of a run to docs/slow.md."""

import platform
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import date, timedelta
from importlib.metadata import version

import pytest

from benchmarks.search import machine

OUTCOMES = ("passed", "failed", "error", "skipped")
PACKAGES = ("torch", "numpy", "scipy", "numba", "hypothesis", "pytest")
BEGAN = time.monotonic()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = {outcome: terminalreporter.getreports(outcome) for outcome in OUTCOMES}
    reports[""] = terminalreporter.getreports("")  # of what prepares and cleans up
    counts, seconds = defaultdict[str, Counter[str]](Counter), Counter[str]()
    for outcome, several in reports.items():
        for report in several:
            file = report.nodeid.split("::")[0]
            seconds[file] += report.duration
            counts[file][outcome] += 1
    page = "\n".join(lines(counts, seconds, time.monotonic() - BEGAN)) + "\n"
    (config.rootpath / "docs/slow.md").write_text(page, encoding="utf-8")


def lines(counts: dict[str, Counter[str]], seconds: Counter[str], whole: float) -> Iterator[str]:
    """The page: when, where, with which versions and in what time, and one row for each file, the longest first."""
    total = sum(counts.values(), Counter[str]())
    yield "# The slow tests\n"
    yield f"Written by `make slow` on {date.today()}: {machine()}."
    yield f"Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in PACKAGES)}.\n"
    told = ", ".join(f"{total[outcome]} {outcome}" for outcome in OUTCOMES if total[outcome])
    yield f"{told} in {timedelta(seconds=round(whole))}.\n"
    yield "| file | passed | failed | skipped | seconds |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for file, spent in seconds.most_common():
        of = counts[file]
        yield f"| {file} | {of['passed']} | {of['failed'] + of['error']} | {of['skipped']} | {spent:.1f} |"
