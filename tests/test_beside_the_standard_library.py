"""The program beside a standard library that has a package `compression` of its own, as Python 3.14's has.

An older Python gets a copy of its standard library, made of links, with what 3.14 changed written into it: the package,
and modules that import from it.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEP = (
    "main.py digits -a resnet18 --num-classes 10 --image-size 32 --prof 1 --epochs 1 -b 4 -j 1 --training-only "
    "--compression-type maxmin --error-feedback"
)

PACKAGE = {
    "__init__.py": "",
    "_common/__init__.py": "",
    "zstd/__init__.py": "from compression._common import _streams\n\nZstdFile = _streams.BaseStream\n",
}
STREAMS = ("\nimport _compression\n", "\nfrom compression._common import _streams as _compression\n")
IMPORTS = {
    "bz2.py": STREAMS,
    "gzip.py": STREAMS,
    "lzma.py": STREAMS,
    "shutil.py": ("\nimport os\n", "\nimport os\nfrom compression import zstd\n"),
}


def with_a_package_compression(home: Path) -> dict[str, str]:
    """Variables that give Python a standard library with a package `compression`."""
    library = Path(sysconfig.get_path("stdlib"))
    if (library / "compression").exists():
        return {}
    copy = home / library.relative_to(sysconfig.get_config_var("installed_base"))
    copy.mkdir(parents=True)
    for entry in library.iterdir():
        if entry.name not in ("__pycache__", "_compression.py", *IMPORTS):
            (copy / entry.name).symlink_to(entry)
    for name, text in PACKAGE.items():
        (copy / "compression" / name).parent.mkdir(exist_ok=True)
        (copy / "compression" / name).write_text(text)
    (copy / "compression/_common/_streams.py").symlink_to(library / "_compression.py")
    for name, (old, new) in IMPORTS.items():
        text = (library / name).read_text(encoding="utf-8")
        assert old in text
        (copy / name).write_text(text.replace(old, new), encoding="utf-8")
    return {"PYTHONHOME": str(home)}


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of programs whose standard library has a package `compression`."""
    return {**os.environ, **with_a_package_compression(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module")
def behind(beside: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same, where something at Python's start has imported that package."""
    startup = tmp_path_factory.mktemp("startup")
    (startup / "sitecustomize.py").write_text("import gzip, shutil\n")
    return {**beside, "PYTHONPATH": str(startup)}


def run(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


BOTH = """
import compression, compression.zstd, bz2, gzip, lzma, shutil, tarfile, zipfile
print(compression.__file__, compression.build.__name__)
print(compression.zstd.__name__, gzip.decompress(gzip.compress(b"bytes")))
"""


def test_ours_is_found_and_the_standard_librarys_submodules_in_it(beside: dict[str, str]) -> None:
    assert run(beside, "-c", BOTH) == f"{ROOT}/compression/__init__.py build\ncompression.zstd b'bytes'\n"


def test_where_the_standard_librarys_was_imported_first_the_program_puts_ours_in_its_place(
    behind: dict[str, str],
) -> None:
    program = f"import compression; print(compression.__file__)\nimport main{BOTH}"
    theirs, *both = run(behind, "-c", program).splitlines()
    assert theirs != f"{ROOT}/compression/__init__.py"
    assert both == [f"{ROOT}/compression/__init__.py build", "compression.zstd b'bytes'"]


@pytest.mark.parametrize("environment", ["beside", "behind"])
def test_usage_is_shown(environment: str, request: pytest.FixtureRequest) -> None:
    assert "--compression-type" in run(request.getfixturevalue(environment), "main.py", "--help")


def test_one_process_takes_a_step(beside: dict[str, str], tmp_path: Path) -> None:
    run(beside, *STEP.split(), "--workspace", str(tmp_path))
    assert (tmp_path / "checkpoint.pth.tar").exists()


@pytest.mark.parametrize("environment", ["beside", "behind"])
def test_two_ranks_take_a_step(environment: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run(request.getfixturevalue(environment), *launch, *STEP.split(), "--workspace", str(tmp_path))
    assert (tmp_path / "checkpoint.pth.tar").exists()
