"""Files and folders that are never half written: they take their names when they are whole and on disk.

The one writer of the program. It knows nothing of the content.
"""

import errno
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from image_classification import locks


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write and read, beside `path`, that replaces `path` where the block ends without an error.

    A kill at any moment leaves `path` as it was or whole. What a killed process leaves is `.NAME.XXXXXXXX.partial`; the
    next write of the same file removes it, and an error does at once. A link keeps pointing where it points. Of several
    writers at once, the last one to end wins.

    Raises OSError where the folder is missing or read-only, the disk is full, or `path` is a device or a folder.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    _remove_remains(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with open(partial, "x+b") as file:
        try:
            with suppress(OSError):  # where there are no locks
                locks.lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    _fsync_folder(path.parent)


def _remove_remains(path: Path) -> None:
    """Remove what writers of a file left that were killed: what is still written is locked."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*partial"):
        with suppress(OSError), open(partial, "r+b") as file:
            if locks.lock(file):
                partial.unlink()


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, beside `folder`, that takes its name where the block ends without an error.

    Whoever sees `folder` sees all of it. Of several writers at once one wins, and the others' work is dropped.

    Raises OSError where the folder around it is missing or read-only, or the disk is full.
    """
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield beside
        os.sync()  # one call for all files in it, however many there are
        try:
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        _fsync_folder(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _fsync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk: a new one is not there before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
