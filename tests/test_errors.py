"""Errors: under every launcher one line, once, and torchrun's summary quotes it; a bug shows its traceback too."""

import logging
import re
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest

import main
from tests.support.program import SMALL, own_rank, run_well
from tests.test_horovod import horovodrun, needs_horovod, torchrun

LINE = "main.py: error: "

# What only some ranks of a launcher have wrong: the program, with something done before by one of them.
ALONE = """
import os, sys
sys.path.insert(0, ".")
import main
os.environ.get("LOCAL_RANK") == "1" and {mishap}
sys.exit(main.main(sys.argv[1:]))
"""


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of errors that ranks have said, without what horovodrun puts before each."""
    lines = [re.sub(r"^\[\d+\]<\w+>:", "", line) for line in (done.stdout + done.stderr).splitlines()]
    return [line for line in lines if line.startswith(LINE)]


def root_cause(done: subprocess.CompletedProcess[str]) -> str:
    """The reason that torchrun's summary gives for the first failure."""
    [cause] = re.findall(r"Root Cause.*?\n  traceback : (.*?)\n=", done.stderr, re.DOTALL)
    return str(cause)


@pytest.mark.parametrize(
    ("ranks", "flags", "words"),
    [
        (4, "--quantization-bits 9", "argument --quantization-bits: expected an integer from 1 to 8, got '9'"),
        (2, "--device cuda", "--device cuda needs a GPU for each rank of a machine: local rank 0 has none, 0 are "),
        (2, "--resume {folder}/none", "checkpoint {folder}/none does not exist"),
    ],
    ids=["before ranks start", "before they meet", "after they have met"],
)
def test_an_error_that_all_ranks_have_is_said_once_and_quoted(
    ranks: int, flags: str, words: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    argv = f"{pictures} --workspace {tmp_path}/work {flags.format(folder=tmp_path)}".split()
    done = torchrun(ranks, "main.py", *argv)
    [line] = said(done)
    assert line.startswith(LINE + words.format(folder=tmp_path))
    assert root_cause(done).startswith(LINE + words.format(folder=tmp_path).partition("local rank")[0])
    assert "To enable traceback see" not in done.stderr.partition("Root Cause")[2]
    assert done.returncode == 1
    assert not (tmp_path / "work").exists()


@needs_horovod
@pytest.mark.parametrize("flags", ["--hvd --quantization-bits 9", "--hvd --resume none", ""])
def test_horovodrun_says_it_once_too(flags: str, pictures: Path, tmp_path: Path) -> None:
    done = horovodrun(2, "main.py", str(pictures), "--workspace", str(tmp_path / "work"), *flags.split())
    assert len(said(done)) == 1, done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("mishap", "words"),
    [
        ("sys.argv.append('--warmup=90')", LINE + "--warmup 90 must be below --epochs 90"),
        ("setattr(main, 'build_data', lambda *_: 1 / 0)", "ZeroDivisionError: division by zero"),
    ],
    ids=["an error", "a bug"],
)
def test_what_one_rank_alone_has_wrong_is_said_by_that_rank(
    mishap: str, words: str, pictures: Path, tmp_path: Path
) -> None:
    """The others wait for it meanwhile, and are ended by the launcher."""
    program = tmp_path / "program.py"
    program.write_text(ALONE.format(mishap=mishap))
    flags = f"-a resnet18 --num-classes 3 --image-size 32 --data-backend pytorch -j 0 -b 4 --workspace {tmp_path}/work"
    done = torchrun(2, str(program), str(pictures), *flags.split())
    assert root_cause(done) == words
    if words.startswith(LINE):
        assert said(done) == [words]
        assert "Traceback" not in done.stderr.partition(words)[0]
    else:
        own = [line for line in done.stderr.splitlines() if line.startswith("[rank1]: ")]  # torch puts that before
        assert own[0] == "[rank1]: Traceback (most recent call last):"
        assert own[-1] == f"[rank1]: {words}"
        assert done.stderr.count(words) == 2
    assert done.returncode == 1


def log_from_a_library() -> None:
    """Every rank's run begins with two lines of a library, one of them a warning."""
    execute = main.Run.execute

    def told(run: main.Run) -> int:
        logging.getLogger("compression.somewhere").info("this takes long on rank %d", own_rank())
        logging.getLogger("compression.somewhere").warning("this is odd on rank %d", own_rank())
        return execute(run)

    patch.object(main.Run, "execute", told).start()


def test_the_first_rank_shows_what_libraries_tell_and_each_its_warnings(pictures: Path, tmp_path: Path) -> None:
    argv = (pictures, *SMALL, "--epochs", 1, "--prof", 1, "--training-only", "--workspace", tmp_path)
    first, second = run_well(*argv, ranks=2, before=log_from_a_library)
    assert first.err == "this takes long on rank 0\nthis is odd on rank 0\n"
    assert second.err == "this is odd on rank 1\n"
