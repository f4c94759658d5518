"""Docstrings for autodoc, which reads another dialect than the one here: plain sentences with code in backticks.

An indented block is code, and lines of a name, two spaces and what it is are a list. Sphinx would take single
backticks, asterisks and bars for signs of its own.
"""

import re
from collections.abc import Iterator
from typing import Any


def literal(line: str) -> str:
    """A line in reStructuredText: code in two backticks, and no sign that means anything else."""
    words = re.split(r"(`[^`]*`)", line)
    return "".join(f"`{word}`" if word.startswith("`") else re.sub(r"([\\*|_])", r"\\\1", word) for word in words)


def rewritten(lines: list[str]) -> Iterator[str]:
    """The lines of a docstring in reStructuredText."""
    within = ""  # what the line before belongs to: a list, code, or neither
    for line in lines:
        item = re.match(r"(\w[\w, ]*?)  +(\S.*)$", line)
        indented = line.startswith("    ")
        if item:
            if within != "list":
                yield ""
            within = "list"
            yield f"* ``{item[1]}``: {literal(item[2])}"
        elif indented and within == "list":
            yield f"  {literal(line.strip())}"
        elif indented:
            if within != "code":
                yield from ("::", "")
            within = "code"
            yield line
        else:
            if within == "list" and line:
                yield ""
            within = "code" if within == "code" and not line else ""
            yield literal(line)


def read(app: Any, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    lines[:] = rewritten(list(lines))


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
