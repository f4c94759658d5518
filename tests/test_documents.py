"""The documents: prose that fits a screen, tables that fit a reader, and links that lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [path for folder in (".", "docs", "examples") for path in sorted(ROOT.glob(f"{folder}/*.md"))]
LINKED = [
    ROOT / name for name in ("README.md", "BENCHMARKS.md", "docs/LOG.md", "docs/hosts.md", "ADDING_A_COMPRESSOR.md")
]
WIDTH, WORDS = 120, 2000


def named(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def outside_code(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that are in no fenced block."""
    lines, code = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            lines.append((number, line))
    return lines


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = [re.fullmatch(r"#+ (.*)", line) for _, line in outside_code(path)]
    words = [re.sub(r"[^\w\- ]", "", heading[1].lower()) for heading in headings if heading]
    return {word.replace(" ", "-") for word in words}


def links(path: Path) -> list[str]:
    """The targets of links and pictures that lie in the repository."""
    found = [target for _, line in outside_code(path) for target in re.findall(r"\]\(([^)\s]+)\)", line)]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


@named(DOCUMENTS)
def test_prose_wraps(path: Path) -> None:
    """Rows of tables cannot wrap, nor can a link that is a line of its own."""
    prose = [(n, line) for n, line in outside_code(path) if not re.match(r"\s*\||!?\[[^]]*\]\(\S*\)$", line)]
    assert [(n, len(line)) for n, line in prose if len(line) > WIDTH] == []


def test_the_benchmarks_are_short() -> None:
    assert len((ROOT / "BENCHMARKS.md").read_text(encoding="utf-8").split()) <= WORDS, "the rest belongs in docs/LOG.md"


@named(LINKED)
def test_links_lead_to_a_file_and_a_heading(path: Path) -> None:
    dead = []
    for target in links(path):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


def test_every_picture_is_shown() -> None:
    shown = {(path.parent / target).resolve() for path in LINKED for target in links(path)}
    assert set((ROOT / "docs").glob("*.png")) <= shown
