"""The page of the command line, written from the program's parser whenever the pages are built."""

import argparse
import re
from collections.abc import Iterator
from typing import Any

import main

MARK = "<!-- every flag of main.py -->"
"""The line of a page that the flags replace."""


def escaped(text: str) -> str:
    """Plain text in Markdown, with flags as links to where they stand."""
    text = re.sub(r"([\\`*_<>\[\]{}|$])", r"\\\1", text)
    return re.sub(r"(?<![\w-])--?[a-zA-Z][\w-]*", lambda flag: f"{{option}}`{flag[0]}`", text)


def flag(formatter: Any, action: argparse.Action) -> Iterator[str]:
    """The lines of a flag's entry: how it is spelled, what `--help` says, and the values that it may have."""
    spelled = formatter._format_action_invocation(action) if action.option_strings else action.metavar
    yield f"````{{option}} {spelled}"
    yield ""
    yield escaped(" ".join(formatter._expand_help(action).split()))
    yield "````"
    yield ""


def flags(parser: argparse.ArgumentParser) -> str:
    """Every flag in Markdown, a section for each of the parser's groups, those without a topic of their own first."""
    formatter = parser._get_formatter()
    groups = [(group.title or "", group._group_actions) for group in parser._action_groups]
    plain = [action for _, actions in groups[:2] for action in actions]  # argparse's own two
    lines = ["```{program} main.py", "```", ""]
    for title, actions in [("data, and help", plain), *groups[2:]]:
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        for action in actions:
            lines += flag(formatter, action)
    return "\n".join(lines)


def write(app: Any, page: str, source: list[str]) -> None:
    if MARK in source[0]:
        source[0] = source[0].replace(MARK, flags(main.build_parser()))


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
