"""The command: prints a verdict. It exits with 0 where all holds, 1 where a property fails, 2 for bad input."""

import ast
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import UnknownTarget, Verdict, judge, resolve

USAGE = f"""usage: python -m {__package__} NAME_or_module:name [option=value ...]

Holds a compressor of the registry, or a codec, a Row or what makes one, to what it promises. Values are Python's, and
true, false, none. error_feedback=false judges a codec that is not meant for error feedback."""
WORDS = {"true": True, "false": False, "none": None}


def main(arguments: Sequence[str]) -> int:
    """The exit code for these arguments."""
    if not arguments or arguments[0].lstrip("-") in ("h", "help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    name, *pairs = arguments
    try:
        options = list(map(_option, pairs))
        if twice := {option for option, _ in options if [other for other, _ in options].count(option) > 1}:
            raise UnknownTarget(f"{min(twice)} is given twice; give it once")
        target = resolve(name, dict(options))
    except UnknownTarget as error:
        print(f"{__package__}: {error}", file=sys.stderr)
        return 2
    results = []
    print(" ".join(arguments))
    for result in judge(target):
        results.append(result)
        print(result, flush=True)
    verdict = Verdict(target.name, tuple(results))
    print(str(verdict).splitlines()[-1])
    return 0 if verdict.ok else 1


def _option(pair: str) -> tuple[str, Any]:
    name, equals, text = pair.partition("=")
    if not equals or not name.isidentifier():
        raise UnknownTarget(f"an option is name=value, got {pair!r}")
    if text.lower() in WORDS:
        return name, WORDS[text.lower()]
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text.isidentifier():  # a word, whose quotes a shell has taken
            return name, text
        raise UnknownTarget(f"{name} is a Python literal or a word, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
