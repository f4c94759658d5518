"""Examples run by the commands that their README shows, beside the package as others install it.

They need an environment of their own, which `make examples` makes and names in EXAMPLES_PYTHON.
"""

import json
import math
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.wheel import build_wheel

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMMANDS = re.findall(r"^torchrun .*", (ROOT / "examples" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
PYTHON = os.environ.get("EXAMPLES_PYTHON", "")
in_their_environment = pytest.mark.skipif(not PYTHON, reason="examples have an environment of their own: make examples")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables in which `torchrun` is the environment's, and finds the package installed; offline."""
    packages = tmp_path_factory.mktemp("packages")
    wheel = build_wheel(tmp_path_factory.mktemp("sources"))
    install = [PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", packages, wheel]
    subprocess.run(install, timeout=900, check=True)
    # timm needs torchvision, which does not import beside a CPU-only torch: Python runs this before an example begins.
    (packages / "sitecustomize.py").symlink_to(ROOT / "image_classification" / "torchvision_import.py")
    path = f"{Path(PYTHON).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(command: list[str], environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@in_their_environment
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.findall(r"(\w+)\.py", command)[0])
def test_an_example_trains_equal_replicas_by_fewer_bytes(
    command: str, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    output = run(shlex.split(command, comments=True), environment, tmp_path)
    # Not lines: torchrun's ranks are unbuffered, so that a line's end is a write of its own, and others come between.
    ranks = [json.loads(found) for found in re.findall(r'\{"[^{}]*\}', output)]
    assert len(ranks) == int(re.findall(r"--nproc_per_node (\d+)", command)[0])
    assert len({rank["weights"] for rank in ranks}) == 1
    for rank in ranks:
        assert rank["loss"] < 0.75 * rank.get("first_loss", math.log(256))  # that of guessing a character
        assert 0 < rank["bytes_sent"] < 0.2 * rank["bytes_float32"]
        assert rank.get("skipped", 1) > 0, "no step overflowed, so that nothing was skipped"
    assert [path.name for path in tmp_path.iterdir()] == ["examples"], "files are left behind"


@in_their_environment
def test_what_examples_import_fits_together(environment: dict[str, str], tmp_path: Path) -> None:
    """With the package among it: its own requirements are met, too."""
    assert run([PYTHON, "-m", "pip", "check"], environment, tmp_path).startswith("No broken requirements")
    where = run([PYTHON, "-c", "import gradwire; print(gradwire.__file__)"], environment, tmp_path)
    assert Path(where.strip()) == Path(environment["PYTHONPATH"], "gradwire", "__init__.py")


def test_every_example_is_run() -> None:
    assert {re.findall(r"\w+\.py", command)[0] for command in COMMANDS} == {path.name for path in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_fits_on_a_page(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 60
