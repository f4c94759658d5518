"""The commands that the README shows are run as they stand there, in its order; those for a cluster are read only."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import main
from compression import COMPRESSORS
from tests.support.markdown import blocks, commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks(ROOT / "README.md")
SHOWN = [line for block in BLOCKS if block.language == "bash" for line in commands(block.text)]
COMMANDS = [line for line in SHOWN if not line.startswith("make ")]
# Blocks of `console` need machines that the tests have not.
ON_A_CLUSTER = [line for block in BLOCKS if block.language == "console" for line in commands(block.text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the commands to run in: their output goes here, their input is the checkout's."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("main.py", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_the_readme_shows_every_way_in() -> None:
    shown = " ".join(COMMANDS)
    assert all(word in shown for word in ("torchrun", "horovodrun", "--search", "plot_run.py"))
    assert "`python -m torch.distributed.launch` works as well" in README


@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_readme_says_what_every_compressor_is(name: str) -> None:
    [section] = re.findall(r"### Choose what travels\n(.*?)\n###", README, re.DOTALL)
    assert name in re.findall(r"[a-z_0-9]+", section)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split(" digits")[0])
def test_every_command_works_as_shown(command: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if command.startswith("horovodrun") and shutil.which("horovodrun", path=path) is None:
        pytest.skip("Horovod is not installed: make horovod")
    done = subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_imagenet_trains_by_flags_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    [command] = ON_A_CLUSTER
    launcher, *words = shlex.split(command)
    launch = get_args_parser().parse_args(words)
    assert (launcher, launch.training_script) == ("torchrun", "main.py")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", launch.nproc_per_node)
    monkeypatch.setenv("RANK", "0")
    flags = main.parse(launch.training_script_args)
    assert (flags.data, flags.arch, flags.num_classes, flags.epochs) == ("/data/imagenet", "resnet50", 1000, 90)
    assert flags.lr == 0.256 * int(launch.nproc_per_node) * flags.batch_size / 256, "the rate that the text gives"
