"""Examples run as they stand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "diloco.py": ["--steps", "4", "--every", "2"],
    "diloco.py synchronous": ["--steps", "2", "--every", "1", "--bits", "32"],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_two_ranks(name: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    example = str(ROOT / "examples" / name.split()[0])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, example, *EXAMPLES[name]], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["loss"] < 5.6  # that of guessing among 256 characters
    assert result["megabytes_sent"] > 0


def test_every_example_is_run() -> None:
    assert {name.split()[0] for name in EXAMPLES} == {path.name for path in (ROOT / "examples").glob("*.py")}
