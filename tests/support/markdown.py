"""Documents in Markdown as tests read them: fenced blocks, links, and the anchors of headings."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENTS = [path for folder in (".", "docs", "examples") for path in sorted(ROOT.glob(f"{folder}/*.md"))]


class Block(NamedTuple):
    """A fenced block: the word after its fence, the number of its first line, and its text."""

    language: str
    line: int
    text: str


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^(`{3,})(.*)\n((?s:.*?))^\1$", text, re.MULTILINE)
    return [Block(block[2].strip(), text.count("\n", 0, block.start(3)) + 1, block[3]) for block in found]


def commands(text: str) -> list[str]:
    """The commands of a block, a line that goes on with the next one."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


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
    prose = "\n".join(line for _, line in outside_code(path))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"[a-z]+:", target)]
