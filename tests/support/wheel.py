"""The package as a wheel, which is what others install."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS, FILES = ("compression", "search"), ("LICENSE", "README.md", "pyproject.toml", "setup.py")


def build_wheel(folder: Path) -> Path:
    """The wheel, built in an empty folder from a copy of the sources: a build writes beside them."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    command = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", ".")
    done = subprocess.run(
        (sys.executable, *command), cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next((folder / "wheels").glob("gradwire-*.whl"))
