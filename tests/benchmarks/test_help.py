"""Every script explains itself."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "main.py", *(path for path in sorted(ROOT.glob("benchmarks/*.py")) if "__main__" in path.read_text())]


def test_scripts_are_found() -> None:
    assert {"accuracy.py", "time_to_accuracy.py", "summary.py"} < {path.name for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_is_shown_and_nothing_else_is_done(script: Path, tmp_path: Path) -> None:
    """From any folder; a bare % in a help text is an error of argparse as it shows it."""
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert not list(tmp_path.iterdir())
