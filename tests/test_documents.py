"""The documents: prose that fits a screen, tables that fit a reader, and links that lead somewhere."""

import re
from pathlib import Path

import pytest

from tests.support.markdown import DOCUMENTS, ROOT, anchors, links, outside_code

WIDTH, WORDS = 120, 2000


def named(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@named(DOCUMENTS)
def test_prose_wraps(path: Path) -> None:
    """Rows of tables cannot wrap, nor can a link that is a line of its own."""
    prose = [(n, line) for n, line in outside_code(path) if not re.match(r"\s*\||!?\[[^]]*\]\(\S*\)$", line)]
    assert [(n, len(line)) for n, line in prose if len(line) > WIDTH] == []


def test_the_benchmarks_are_short() -> None:
    assert len((ROOT / "BENCHMARKS.md").read_text(encoding="utf-8").split()) <= WORDS, "the rest belongs in docs/LOG.md"


@named(DOCUMENTS)
def test_links_lead_to_a_file_and_a_heading(path: Path) -> None:
    dead = []
    for target in links(path):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


def test_every_picture_is_shown() -> None:
    shown = {(path.parent / target).resolve() for path in DOCUMENTS for target in links(path)}
    assert set((ROOT / "docs").glob("*.png")) <= shown
