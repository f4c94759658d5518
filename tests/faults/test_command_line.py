"""A command line that nobody means: one line, exit status 2, and the workspace is not even made."""

from pathlib import Path

import pytest

from tests.support.program import SMALL, run

BEYOND = {
    "--image-size 1000000000000": "expected an integer from 1 to 16384",
    f"--compression-type maxmin --bucket-size {10**30}": "expected an integer from 1 to 1000000000, or -1",
    f"--search --popsize {10**30}": "expected an integer from 1 to 1024",
    "--search --search-target-bits 1e300": "expected a number above 0 and at most 128",
    "--amp --static-loss-scale 1e300": "expected a number from 1e-09 to 1e+09",
}


@pytest.mark.parametrize("flags", BEYOND)
def test_a_number_beyond_all_arithmetic_is_refused(flags: str, pictures: Path, tmp_path: Path) -> None:
    *_, flag, value = flags.split()
    [rank] = run(pictures, *SMALL, "--workspace", tmp_path / "work", *flags.split())
    assert (rank.status, rank.out) == (2, "")
    assert rank.err == f"main.py: error: argument {flag}: {BEYOND[flags]}, got '{value}'\n"
    assert not (tmp_path / "work").exists()
