"""A command line that nobody means: one line, exit status 2, and the workspace is not even made."""

import os
from pathlib import Path

import pytest

from tests.support.program import SMALL, run, run_well

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


WITHOUT_EFFECT = {
    "--resume {made}/checkpoint.pth.tar --pretrained-weights {made}/checkpoint.pth.tar": (
        "--pretrained-weights has no effect beside --resume PATH, whose checkpoint has all weights; drop one"
    ),
    "--search --search-target-bits 4 --search-alpha 1": (
        "--search-alpha has no effect beside --search-target-bits, which asks for the least error within a budget; "
        "drop one"
    ),
    "--dist-backend gloo": (
        "--dist-backend has no effect without other ranks; start some, as with torchrun --nproc_per_node 2"
    ),
}


@pytest.mark.parametrize("flags", WITHOUT_EFFECT)
def test_a_flag_without_effect_is_refused(flags: str, pictures: Path, tmp_path: Path) -> None:
    made, work = tmp_path / "made", tmp_path / "work"
    if "{made}" in flags:
        run_well(pictures, *SMALL, "--workspace", made, "--epochs", "1", "--prof", "1")
    [rank] = run(pictures, *SMALL, "--workspace", work, "--epochs", "2", *flags.format(made=made).split())
    assert (rank.status, rank.out) == (2, "")
    assert rank.err == f"main.py: error: {WITHOUT_EFFECT[flags]}\n"
    assert not work.exists()


def test_what_a_sweep_repeats_without_effect_is_said_in_one_line(pictures: Path, tmp_path: Path) -> None:
    sweep = ("--bb-ratio", 1, "--bb-num-parallel-steps", 3)
    ranks = run_well(pictures, *SMALL, "--workspace", tmp_path, "--epochs", 1, "--prof", 1, *sweep, ranks=2)
    assert [rank.err for rank in ranks] == [
        "no effect: --bb-num-parallel-steps with --bb-ratio 1, which lets nothing be late\n", "",
    ]  # fmt: skip


NAMING_FILES = (
    "--resume {0}", "--pretrained-weights {0}", "--compression-scheme {0}", "--save-weights {0}", "--raport-file {0}",
    "--tensorboard-dir {0}", "--workspace {0}", "--workspace {1} --checkpoint-filename {2}",
)  # fmt: skip


@pytest.mark.parametrize("flags", NAMING_FILES)
def test_a_pipe_given_for_a_file_is_refused(flags: str, pictures: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    words = flags.format(pipe, pipe.parent, pipe.name).split()
    [rank] = run(pictures, *SMALL, "--workspace", tmp_path / "work", *words)
    assert (rank.status, rank.out) == (2, "")
    assert rank.err == (
        f"main.py: error: {words[-2]}: {pipe} is a pipe or a socket, and whoever opens it waits; choose another name\n"
    )
    assert not (tmp_path / "work").exists()
