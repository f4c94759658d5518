"""The command: options as they are typed, a verdict, and an exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compression.conformance.__main__ import main

ROOT = Path(__file__).parents[3]
CODECS = '''
from tests.support.broken_promises import WrongSize

broken = WrongSize()
'''


def command(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command, run in a folder that is not the checkout."""
    line = [sys.executable, "-m", "compression.conformance", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False)


def test_it_exits_with_what_it_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODECS)
    holds = command(tmp_path, "none", "big_grad=true")
    assert holds.returncode == 0, holds.stderr
    assert holds.stdout.startswith("none big_grad=true\nnot applicable  exact size: ")
    assert "\nok              agreement\n" in holds.stdout
    fails = command(tmp_path, "mine:broken", "error_feedback=false")
    assert fails.returncode == 1, fails.stderr
    assert "\nFAILS           exact size\n" in fails.stdout
    assert "smallest: torch.tensor([0.0] * 13)\n" in fails.stdout
    unknown = command(tmp_path, "mine:nothing")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "compression.conformance: mine:nothing: mine has no 'nothing'\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gzip"], "no compressor is called 'gzip'"),
        (["maxmin", "bits"], "an option is name=value, got 'bits'"),
        (["maxmin", "bits=9"], "1 to 8 bits wide, got bits=9"),
        (["maxmin", "bits=[1"], "bits is a Python literal or a word, got '[1'"),
        (["maxmin", "color=red"], "compressor maxmin takes no option 'color'"),
        (["maxmin", "dense_dtype=float16"], "dense_dtype is float32 or bfloat16, got 'float16'"),
        (["maxmin", "error_feedback=1"], "takes error_feedback as bool, got 1"),
        (["topk", "efx_bits=none", "ratio=two"], "takes ratio as float or int, got 'two'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert words in told.err


def test_without_a_name_it_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: python -m compression.conformance NAME")
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: ")
