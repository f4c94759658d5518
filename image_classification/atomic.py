"""A file that is never half written: it takes its name when it is whole and on disk.

Knows nothing of what it writes. One writer per file.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write and read, beside `path`, that replaces `path` where the block ends without an error.

    A kill at any moment leaves `path` as it was or whole. What a killed process leaves behind has a fixed name,
    `.NAME.partial`, so the next write of the same file takes it over; an error removes it. A link keeps pointing
    where it points.

    Raises:
        OSError: the folder is missing or read-only, the disk is full, or `path` is a device or a folder.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w+b") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)  # the new name itself is on disk only after this
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
