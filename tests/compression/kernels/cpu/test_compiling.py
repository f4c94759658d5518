"""Compiled kernels are kept on disk, and another numba than the pinned one compiles them too, to the same bits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compression.kernels.cpu.compiling import PINNED

ROOT = Path(__file__).parents[4]

# Encodes and decodes, and says what was loaded, what was compiled, the bytes that came out, and what was logged.
WORK = """
import json
import logging
import torch
from compression import codec
from compression.kernels.cpu import buckets

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("compression").addHandler(handler)
logging.getLogger("compression").setLevel(logging.INFO)
quantizer, values = codec("maxmin"), torch.linspace(-1, 1, 2000)[None]
wire = quantizer.encode(values, 0)
quantizer.decode(wire, 2000)
stats = [kernel.stats for kernel in (buckets.recode, buckets.decode)]
hits = [sum(each.cache_hits.values()) for each in stats]
misses = [sum(each.cache_misses.values()) for each in stats]
print(json.dumps([hits, misses, wire.flatten().tolist(), said]))
"""


# Encodes and decodes with every kind of kernel, and says what bytes came out, and what was warned of.
FAMILIES = """
import json
import warnings
import torch

values, out = torch.linspace(-1, 1, 3000)[None] ** 3, {}
with warnings.catch_warnings(record=True, action="always") as heard:
    from compression import codec
    from compression.codecs.base import decoded as decoded_by

    for name, options in [
        ("maxmin", {"bits": 4}), ("maxmin", {"bits": 3}), ("exponential", {"bits": 4}), ("quantile", {"bits": 2}),
        ("terngrad", {}), ("1bit", {}), ("topk", {"ratio": 0.1}), ("eden", {"bits": 3}), ("eden", {"bits": 6}),
    ]:
        quantizer = codec(name, **options)
        wire = quantizer.encode(values, 0)
        decoded = decoded_by(quantizer, wire, 3000, 0)
        out[name + str(options)] = [wire.flatten().tolist(), decoded.view(torch.uint8).flatten().tolist()]
    out["error"] = codec("maxmin", bits=4).expected_squared_error(values)
print(json.dumps([out, [[each.category.__name__, str(each.message)] for each in heard]]))
"""

# What makes numba another one, in the eyes of whoever imports it from then on.
OTHER_VERSION = """
import numba
numba.__version__ = "0.0.1"
"""
OTHER_INTERNALS = """
import numba.core.codegen
del numba.core.codegen.JITCodeLibrary
"""


def ran(program: str, folder: Path) -> Any:
    """What a program prints, as JSON, that keeps its kernels in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def worked(folder: Path) -> list[list[Any]]:
    """Kernels loaded, kernels compiled, bytes, lines logged: of a process that keeps kernels in a folder."""
    found: list[list[Any]] = ran(WORK, folder)
    return found


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    """A folder in which a first process has kept its kernels, and what that process said."""
    folder = tmp_path_factory.mktemp("kernels") / "made"
    return folder, worked(folder)


def test_the_first_process_compiles_and_the_next_one_loads(kept: tuple[Path, list[list[Any]]]) -> None:
    folder, first = kept
    later = worked(folder)
    assert first[:2] == [[0, 0], [1, 1]]
    assert later[:2] == [[1, 1], [0, 0]]
    assert first[2] == later[2]
    assert first[3] == ["compiling the CPU kernels takes 10 s or so, once on this machine"]
    assert later[3] == []


def test_a_damaged_cache_is_none(kept: tuple[Path, list[list[Any]]]) -> None:
    folder, first = kept
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:50])
    assert worked(folder)[2] == first[2]


def test_where_no_folder_can_be_made_kernels_are_compiled(kept: tuple[Path, list[list[Any]]], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    assert worked(blocked / "kernels")[2] == kept[1][2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(OTHER_VERSION, "numba 0.0.1 is installed", marks=pytest.mark.slow),
        pytest.param(OTHER_INTERNALS, "JITCodeLibrary", marks=pytest.mark.slow),
    ],
)
def test_any_other_numba_gives_the_same_bits_and_one_warning(
    kept: tuple[Path, list[list[Any]]], tmp_path: Path, change: str, reason: str
) -> None:
    usual, quiet = ran(FAMILIES, kept[0])
    found, heard = ran(change + FAMILIES, tmp_path)
    assert quiet == []
    assert found == usual
    [[category, message]] = heard
    assert category == "RuntimeWarning"
    assert PINNED in message
    assert reason in message


def test_plain_numba_keeps_kernels_where_it_can(tmp_path: Path) -> None:
    """In a folder of the sources' own, since plain numba would not notice that a part of a kernel has changed."""
    kept_in, blocked = tmp_path / "plain", tmp_path / "file"
    kept_in.mkdir()
    first, later = ran(OTHER_VERSION + WORK, kept_in), ran(OTHER_VERSION + WORK, kept_in)
    blocked.touch()
    alone = ran(OTHER_VERSION + WORK, blocked / "kernels")
    assert later[:2] == [[1, 1], [0, 0]]
    assert alone[0] == [0, 0]
    assert first[2] == later[2] == alone[2]
    assert [len(said) for *_, said in (first, later, alone)] == [1, 0, 1]
    assert alone[3][0].endswith("in every run, because no cache folder can be written; set NUMBA_CACHE_DIR to one")
    assert all(path.name.startswith("kernels-") for path in kept_in.iterdir())


def test_the_pinned_numba_is_the_one_that_is_required() -> None:
    [required] = re.findall(r"^numba==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert required == PINNED
