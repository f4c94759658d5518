"""Locks on files and folders that end with the process that took them, however it ends.

They are the kernel's (`flock`): a file that was left over by a killed process holds nothing.
"""

import errno
import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks answers."""

NAME = ".lock"


def lock(file: IO[Any]) -> bool:
    """Whether this process has locked a file now; it is unlocked when it is closed.

    Raises OSError with an error number of `_NO_LOCKS` where its file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def sole_user(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """A block in which no other process is in such a block for the same folder, on any host that shares its disk.

    The folder is made where missing, and removed again where the block leaves nothing in it. A line to `warn` says
    where its file system has no locks.

    Raises BlockingIOError where another process is in such a block, and OSError where the folder cannot be used.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _held(path, warn):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        for each in missing:
            with suppress(OSError):  # where there is something in it
                each.rmdir()


def _held(path: Path, warn: Callable[[str], None]) -> IO[str]:
    """A locked file, which says to other processes whose it is."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if not lock(file):
                file.seek(0)
                whose = file.read() or "which begins"
                raise BlockingIOError(
                    f"workspace {path.parent} is another run's, {whose}; wait for its end, or choose another "
                    "`workspace`"
                )
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            warn(
                f"workspace {path.parent} has no locks ({error.strerror}): nothing will keep another run from writing "
                "there, too"
            )
            break
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break
        file.close()  # the one before has just removed it
    os.register_at_fork(after_in_child=file.close)  # else a loader's worker that outlives a killed run would hold it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file
