"""Every script explains itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "main.py", *(path for path in sorted(ROOT.glob("benchmarks/*.py")) if "__main__" in path.read_text())]

# All in one process, since most of the time is torch's import; none sees what another one imported of ours.
PROGRAM = """
import contextlib, io, json, os, runpy, sys

path, shown = list(sys.path), {}
for script in sys.argv[1:]:
    sys.path[:] = [os.path.dirname(script), *path[1:]]
    sys.argv = [script, "--help"]
    for name in list(sys.modules):
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(ROOT) and "site-packages" not in file:
            del sys.modules[name]
    output, status = io.StringIO(), None
    with contextlib.redirect_stdout(output):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ending:
            status = ending.code
        except Exception as error:
            status = repr(error)
    shown[script] = {"status": status, "output": output.getvalue()}
print(json.dumps(shown))
"""


class Shown(TypedDict):
    """What a script ended with, 0 where all was well, and what it printed."""

    status: int | str | None
    output: str


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shown]:
    """By script, from a folder that is empty and stays so."""
    folder = tmp_path_factory.mktemp("anywhere")
    command = [sys.executable, "-c", f"ROOT = {str(ROOT)!r}{PROGRAM}", *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    found: dict[str, Shown] = json.loads(done.stdout)
    return found


def test_scripts_are_found() -> None:
    assert {"accuracy.py", "time_to_accuracy.py", "summary.py"} < {path.name for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_is_shown_and_nothing_else_is_done(script: Path, shown: dict[str, Shown]) -> None:
    """From any folder; a bare % in a help text is an error of argparse as it shows it."""
    assert shown[str(script)]["status"] == 0
    assert shown[str(script)]["output"].startswith("usage: ")
