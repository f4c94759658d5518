"""Freed memory in the C library, seen from outside: in a process of its own."""

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from image_classification.allocator import keep_freed_memory

ROOT = Path(__file__).parents[2]
PIECES, PIECE_MIB, STEPS = 3, 30, 3
COUNT_PAGE_FAULTS = f"""
import ctypes, resource, sys
from image_classification.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def step():
    pieces = [c.malloc({PIECE_MIB} * 2**20) for _ in range({PIECES})]
    for piece in pieces:
        ctypes.memset(piece, 1, {PIECE_MIB} * 2**20)
    for piece in pieces:
        c.free(piece)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
before = faults()
for _ in range({STEPS}):
    step()
print(faults() - before)
"""


def page_faults(mode: str) -> int:
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS, mode]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings; this C library has none of them")
def test_memory_that_a_step_frees_is_at_hand_for_the_next_one() -> None:
    assert page_faults("keep") < page_faults("default") / 10


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
