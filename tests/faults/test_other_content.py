"""The same path with other content on one rank: all ranks end in one line, before the first step."""

import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

import compression
import image_classification
import main
import search
from tests.support.program import SMALL, Rank, own_rank, run, run_well

Spoil = Callable[[Path], None]


def change_class(root: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(root / split / "class0")


def remove_images(root: Path) -> None:
    for index in range(20):
        (root / "train/class2" / f"{index}.png").unlink()


def rename_image(root: Path) -> None:
    (root / "train/class1/3.png").rename(root / "train/class1/other.png")


def truncate_image(root: Path) -> None:
    path = root / "val/class1/3.png"
    path.write_bytes(path.read_bytes()[:-1])


IMAGES: dict[str, tuple[Spoil, str]] = {
    "a class less": (change_class, "the training images of data must be the same on every rank: number of classes "
                     "is 3 on rank 0 on host host0 and 2 on rank 1 on host host1"),
    "images less": (remove_images, "the training images of data must be the same on every rank: number of images is "
                    "72 on rank 0 on host host0 and 52 on rank 1 on host host1"),
    "another name": (rename_image, "the training images of data must be the same on every rank: digest of file "
                     "names is # on rank 0 on host host0 and # on rank 1 on host host1"),
    "another size": (truncate_image, "the validation images of data must be the same on every rank: digest of file "
                     "sizes is # on rank 0 on host host0 and # on rank 1 on host host1"),
}  # fmt: skip


def on_two_hosts(root: Path) -> None:
    """Each rank finds relative paths in a folder of its own, as on hosts that share no disk."""
    os.chdir(root / f"host{own_rank()}")
    patch.object(platform, "node", lambda: f"host{own_rank()}").start()


def run_on_two_hosts(root: Path, *argv: object) -> list[Rank]:
    flags = (*SMALL, "--workspace", root / "work", "--epochs", 2, "--prof", 2)
    return run(*argv, *flags, ranks=2, before=partial(on_two_hosts, root))


def assert_refused(ranks: list[Rank], line: str, root: Path) -> None:
    """One line, `line`, in which `#` stands for some digest; and no trace."""
    first, second = ranks
    assert (first.status, second.status) == (2, 2), first.err
    pattern = re.escape(f"main.py: error: {line}\n").replace(re.escape("#"), "'[0-9a-f]{16}'")
    assert re.fullmatch(pattern, first.err), first.err
    assert second.err == ""
    assert not (root / "work").exists()


@pytest.mark.parametrize(("spoil", "words"), IMAGES.values(), ids=IMAGES)
def test_images_that_differ_are_named(spoil: Spoil, words: str, pictures: Path, tmp_path: Path) -> None:
    for host in ("host0", "host1"):
        shutil.copytree(pictures, tmp_path / host / "data")
    spoil(tmp_path / "host1/data")
    line = f"{words}; give all hosts the same files, unpacked to their end"
    assert_refused(run_on_two_hosts(tmp_path, "data", "-b", 2), line, tmp_path)


def test_images_that_only_one_host_lacks_are_missed_by_name(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "host0/data")
    (tmp_path / "host1").mkdir()
    line = (
        "data folder data does not exist; expected DIR/train/CLASS/* and DIR/val/CLASS/*, or the word digits for the "
        "embedded data set (rank 1 on host host1)"
    )
    assert_refused(run_on_two_hosts(tmp_path, "data"), line, tmp_path)


@pytest.fixture(scope="module")
def checkpoints(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of two runs whose seeds differ."""
    folders = [tmp_path_factory.mktemp("run") for _ in range(2)]
    for seed, folder in enumerate(folders):
        run_well(pictures, *SMALL, "--prof", 2, "--epochs", 1, "--workspace", folder, "--seed", seed, ranks=2)
    return [folder / "checkpoint.pth.tar" for folder in folders]


@pytest.mark.parametrize("there", [True, False], ids=["of another run", "missing"])
def test_a_checkpoint_that_differs_or_that_one_host_lacks_is_named(
    there: bool, pictures: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    for host, path in enumerate(checkpoints):
        (tmp_path / f"host{host}").mkdir()
        if host == 0 or there:
            shutil.copy(path, tmp_path / f"host{host}/c.pth.tar")
    line = "checkpoint c.pth.tar does not exist (rank 1 on host host1)"
    if there:
        line = (
            "checkpoint c.pth.tar must be the same on every rank: content is # on rank 0 on host host0 and # on rank 1 "
            "on host host1; copy that of rank 0 to all hosts"
        )
    assert_refused(run_on_two_hosts(tmp_path, pictures, "--resume", "c.pth.tar"), line, tmp_path)


def test_a_scheme_that_differs_is_named(pictures: Path, tmp_path: Path) -> None:
    for host, width in enumerate((4, 8)):
        (tmp_path / f"host{host}").mkdir()
        scheme = {str(width): ["3.weight", "5.weight", "10.weight"]}
        (tmp_path / f"host{host}/scheme.json").write_text(json.dumps(scheme))
    line = (
        "the bit widths must be the same on every rank: 3.weight is 4 on rank 0 on host host0 and 8 on rank 1 on host "
        "host1; copy --compression-scheme scheme.json of rank 0 to all hosts"
    )
    scheme_flags = ("--compression-scheme", "scheme.json")
    assert_refused(run_on_two_hosts(tmp_path, pictures, "--compression-type", "maxmin", *scheme_flags), line, tmp_path)


def test_code_that_differs_is_named(pictures: Path, tmp_path: Path) -> None:
    """One rank runs from a checkout in which a file has one line more."""
    for host in ("host0", "host1"):
        (tmp_path / host).mkdir()
    line = (
        "the program must be the same on every rank: compression/layers.py is # on rank 0 and # on rank 1; install "
        "one version on all hosts"
    )
    flags = (*SMALL, "--workspace", tmp_path / "work")
    assert_refused(run(pictures, *flags, ranks=2, before=partial(of_another_checkout, tmp_path)), line, tmp_path)


def of_another_checkout(root: Path) -> None:
    """Rank 1 finds its sources in a copy that has changed since."""
    if own_rank() == 1:
        copy = root / "checkout"
        for package in (compression, image_classification, search):
            there = shutil.copytree(package.__path__[0], copy / package.__name__)
            package.__path__[:] = [str(there)]
        shutil.copy(main.__file__, copy)
        with (copy / "compression/layers.py").open("a") as file:
            file.write("# changed\n")
        main.__file__ = str(copy / "main.py")
