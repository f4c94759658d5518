"""Compiling for CPUs.

Compiled code releases the GIL. It is cached on disk where a cache folder can be written; where none can, it is compiled
again in each process.

Where numba is `PINNED`, its compiler is changed by `numba_internals`, which knows that version's inside. Any other
numba compiles as it is: to the same bits, after one warning.
"""

import contextlib
import functools
import hashlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
from numba.core import event

PINNED = "0.68.1"

_config: Any = numba.config  # its type hints leave out what the environment sets
_log = logging.getLogger(__name__)


class _Telling(event.Listener):
    """Logs one line when the first of our kernels begins to compile, where the cache has not got it."""

    told = False

    def on_start(self, event: Any) -> None:
        kernel = event.data["dispatcher"]
        if self.told or not kernel.py_func.__module__.startswith(f"{__package__}."):
            return
        self.told = True
        once = "once on this machine"
        if kernel.stats.cache_path is None:
            once = "in every run, because no cache folder can be written; set NUMBA_CACHE_DIR to one"
        _log.info("compiling the CPU kernels takes 10 s or so, %s", once)

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Telling())


def jit(function: Callable[..., Any], makes_arrays: bool = False) -> Callable[..., Any]:
    """Compile a kernel at its first call: without the GIL, dividing as numpy does, cached on disk.

    One that makes no arrays, nor slices, counts no references.
    """
    internals, stamp = _internals(), _sources()
    if internals is not None:
        compiled: Callable[..., Any] = internals.kernel(function, makes_arrays, stamp)
        return compiled
    with _cache_folder(stamp) as writable:
        return numba.njit(nogil=True, error_model="numpy", cache=writable)(function)


def inlined(function: Callable[..., Any], once: bool = False) -> Callable[..., Any]:
    """Compile a part of kernels, with each of them and callable from nowhere else.

    One that is there `once` is not copied to where it is called: calls for a tile cost nothing, and copies make the
    code around them slower.
    """
    internals = _internals()
    if internals is not None:
        compiled: Callable[..., Any] = internals.part(function, once)
        return compiled
    return numba.njit(error_model="numpy")(function)


jit_with_arrays = functools.partial(jit, makes_arrays=True)
compiled_once = functools.partial(inlined, once=True)


@functools.cache
def _internals() -> ModuleType | None:
    """The changed compiler; None, and one warning, where this numba is not the one that it was written for."""
    try:
        if numba.__version__ != PINNED:
            raise ImportError(f"numba {numba.__version__} is installed")
        from . import numba_internals
    except ImportError as error:
        warnings.warn(
            f"CPU kernels are made for numba {PINNED}, but {error}: plain numba.njit compiles them, to the same bits, "
            f"but takes longer and makes slower code for short buckets. `pip install numba=={PINNED}` spares that.",
            RuntimeWarning,
            stacklevel=1,
        )
        return None
    return numba_internals


@functools.cache
def _sources() -> str:
    """A stamp of all that goes into kernels. Numba's own is of one file, and misses what a kernel calls."""
    kernels = Path(__file__).parents[1]
    files = [*sorted(kernels.rglob("*.py")), kernels.parent / "limits.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextlib.contextmanager
def _cache_folder(stamp: str) -> Iterator[bool]:
    """Have plain numba cache in a folder that is the sources' own; gives whether it can be written."""
    before = _config.CACHE_DIR
    folder = Path(before or Path(__file__).parent / "__pycache__") / f"kernels-{stamp[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        yield False
        return
    _config.CACHE_DIR = str(folder)
    try:
        yield True
    finally:
        _config.CACHE_DIR = before
