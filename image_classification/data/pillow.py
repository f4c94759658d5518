"""Backend `pytorch`: Pillow decodes, in the worker processes of torch's DataLoader."""

import mmap
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkContext
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from image_classification.data.images import BadImage
from image_classification.data.loader import FolderLoader, Pixels, assemble, build_folder_loaders, stack
from image_classification.data.options import DataOptions
from image_classification.data.samples import Samples

_Request = tuple[int, np.ndarray]
"""An epoch, and the indices of one batch."""


def build(options: DataOptions) -> tuple[FolderLoader, FolderLoader]:
    return build_folder_loaders(options, PillowReader)


class _Requests(Sampler[_Request]):
    """The batches to read. It outlives the epoch, because a DataLoader keeps its sampler for life."""

    def __init__(self) -> None:
        self.pending: Iterator[_Request] = iter(())

    def __iter__(self) -> Iterator[_Request]:
        return self.pending


class _Batches(Dataset[Pixels | Exception]):
    """A worker's work: a request in, a batch out.

    An error comes back as a value. Raised in a worker, it would reach the user with that worker's traceback in
    its message.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, request: _Request) -> Pixels | Exception:
        epoch, indices = request
        try:
            rendered = [self._samples.rendered(epoch, int(index)) for index in indices]
        except (BadImage, OSError) as error:
            return error
        return assemble(rendered, stack)


class Flag:
    """A multiprocessing.Event as far as a DataLoader uses it, in a byte that forked processes share.

    An Event asks a lock that all of them share, which a worker that is killed as it holds it takes along: its
    loader would wait for ever in place of saying that it died.
    """

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._byte[0] = 1

    def is_set(self) -> bool:
        return self._byte[0] == 1


class _Forking(ForkContext):
    """The multiprocessing context that a DataLoader makes its workers of."""

    def Event(self) -> Any:
        return Flag()


# How a DataLoader words it; a connection that breaks says the same.
_DEATH = ("exited unexpectedly", "is killed by signal")


@contextmanager
def _unobtrusively() -> Iterator[None]:
    """Keep a DataLoader from reaching beyond itself when it is made and when it starts.

    It installs a signal handler that raises a worker's death wherever the main thread happens to be. Without it
    the error comes from the loader, within seconds, and can be told from others. And it warns of more workers
    than cores; how many there are is the user's to say.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGCHLD, handler)


class PillowReader:
    """Workers start with the first batch and live until `close`, from epoch to epoch."""

    def __init__(self, samples: Samples, batches: int) -> None:
        self._requests = _Requests()
        self._running: Iterator[Pixels | Exception] | None = None
        workers = min(samples.options.workers, batches)
        with _unobtrusively():
            self._loader = DataLoader(
                _Batches(samples),
                batch_size=None,  # a request is a batch already
                sampler=self._requests,
                num_workers=workers,
                persistent_workers=workers > 0,
                multiprocessing_context=_Forking() if workers else None,
                pin_memory=samples.options.device.type == "cuda",
                generator=torch.Generator(),  # else every epoch would draw from torch's global one
            )

    def read(self, epoch: int, batches: Sequence[np.ndarray]) -> Iterator[Pixels]:
        self._requests.pending = iter([(epoch, batch) for batch in batches])
        with _unobtrusively():
            self._running = iter(self._loader)
        while (result := self._next(self._running)) is not None:
            if isinstance(result, Exception):
                raise result
            yield result

    def _next(self, results: Iterator[Pixels | Exception]) -> Pixels | Exception | None:
        """The next result, or None after the last. Raises ChildProcessError where a worker died."""
        try:
            return next(results, None)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in _DEATH):
                raise
            raise ChildProcessError(
                f"a data loader process died ({' '.join(str(error).split())}), most often for want of memory or of "
                "shared memory; use fewer `workers` or a smaller `batch_size`"
            ) from error

    def close(self) -> None:
        # A DataLoader ends its workers when the garbage collector finds it, which a traceback can put off.
        shut_down = getattr(self._running, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        self._running = None
