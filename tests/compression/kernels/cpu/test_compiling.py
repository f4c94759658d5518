"""Compiled kernels are kept on disk: later processes load them, and where nothing can be kept they compile again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]

# Encodes and decodes, and says what of that was loaded, what was compiled, and the bytes that came out.
WORK = """
import json
import torch
from compression import codec
from compression.kernels.cpu import buckets

quantizer, values = codec("maxmin"), torch.linspace(-1, 1, 2000)[None]
wire = quantizer.encode(values, 0)
quantizer.decode(wire, 2000)
stats = [kernel.stats for kernel in (buckets.recode, buckets.decode)]
hits = [sum(each.cache_hits.values()) for each in stats]
misses = [sum(each.cache_misses.values()) for each in stats]
print(json.dumps([hits, misses, wire.flatten().tolist()]))
"""


def worked(folder: Path) -> list[list[int]]:
    """Kernels loaded, kernels compiled, bytes: of a process that keeps kernels in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", WORK],
        cwd=ROOT,
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[list[int]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A folder in which a first process has kept its kernels, and what that process said."""
    folder = tmp_path_factory.mktemp("kernels") / "made"
    return folder, worked(folder)


def test_the_first_process_compiles_and_the_next_one_loads(kept: tuple[Path, list[list[int]]]) -> None:
    folder, first = kept
    later = worked(folder)
    assert first[:2] == [[0, 0], [1, 1]]
    assert later[:2] == [[1, 1], [0, 0]]
    assert first[2] == later[2]


def test_a_damaged_cache_is_none(kept: tuple[Path, list[list[int]]]) -> None:
    folder, first = kept
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:50])
    assert worked(folder)[2] == first[2]


def test_where_no_folder_can_be_made_kernels_are_compiled(kept: tuple[Path, list[list[int]]], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    assert worked(blocked / "kernels")[2] == kept[1][2]
