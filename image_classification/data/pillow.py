"""Backend `pytorch`: Pillow decodes, in the worker processes of torch's DataLoader."""

import gc
import mmap
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from image_classification.data.images import BadImage
from image_classification.data.loader import FolderLoader, Pixels, assemble, build_folder_loaders, stack
from image_classification.data.options import DataOptions
from image_classification.data.samples import Samples

T = TypeVar("T")

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


class _Killable(Popen):
    """A process that is ended by SIGKILL, since workers do not hear SIGTERM."""

    def terminate(self) -> None:
        self.kill()


class _Worker(ForkProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Popen:
        return _Killable(process_obj)

    def run(self) -> None:
        # What the program had let go is the program's to collect. A process group among it waits, as it is destroyed,
        # for threads that a fork does not copy: for ever.
        gc.freeze()
        super().run()


class _Forking(ForkContext):
    """The multiprocessing context that a DataLoader makes its workers of."""

    Process = _Worker

    def Event(self) -> Any:
        return Flag()


# How a DataLoader words it; a connection that breaks says the same.
_DEATH = ("exited unexpectedly", "is killed by signal")
STANDSTILL_SECONDS = 900  # without a batch

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def _deafen() -> None:
    """Let this thread, and the processes that it starts, not hear what asks the program to end.

    It comes to the whole process group, as `timeout`, Slurm, Docker and a terminal send it, and is the program's to
    answer, not the workers'.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)


@contextmanager
def _as_many_as_asked() -> Iterator[None]:
    """Keep a DataLoader from warning of more workers than cores; how many there are is the user's to say."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


class PillowReader:
    """Workers start with the first batch and live until `close`, from epoch to epoch.

    They are started, and waited for, by a thread. In the main thread a DataLoader installs a signal handler that raises
    a worker's death wherever that thread happens to be; elsewhere the error comes from the loader, within seconds. And
    where a worker was stopped it waits without a limit, of which only another thread can tell.
    """

    def __init__(self, samples: Samples, batches: int) -> None:
        self._requests = _Requests()
        self._running: Any = None
        workers = min(samples.options.workers, batches)
        self._thread = ThreadPoolExecutor(1, "loader", initializer=_deafen) if workers else None
        with _as_many_as_asked():
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
        self._running = self._waited_for(self._begin)
        while (result := self._waited_for(self._next)) is not None:
            if isinstance(result, Exception):
                raise result
            yield result

    def _begin(self) -> Iterator[Pixels | Exception]:
        with _as_many_as_asked():
            return iter(self._loader)

    def _next(self) -> Pixels | Exception | None:
        """The next result, or None after the last."""
        return next(self._running, None)

    def _waited_for(self, work: Callable[[], T]) -> T:
        """What the DataLoader gives. Raises ChildProcessError where a worker died or all stand still."""
        try:
            return work() if self._thread is None else self._thread.submit(work).result(STANDSTILL_SECONDS)
        except TimeoutError:
            self._end_workers()
            raise ChildProcessError(
                f"the data loader's processes have sent nothing for {STANDSTILL_SECONDS} seconds: they were stopped, "
                "or the disk does not answer; `workers` 0 shows where they wait"
            ) from None
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in _DEATH):
                raise
            raise ChildProcessError(
                f"a data loader process died ({' '.join(str(error).split())}), most often for want of memory or of "
                "shared memory; use fewer `workers` or a smaller `batch_size`"
            ) from error

    def _end_workers(self) -> None:
        """Kill the workers: one that was stopped hears nothing else, and who waits for it is let go."""
        for worker in getattr(self._running, "_workers", ()):
            worker.kill()

    def close(self) -> None:
        # A DataLoader ends its workers when the garbage collector finds it, which a traceback can put off.
        shut_down = getattr(self._running, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        self._end_workers()
        self._running = None
        if self._thread is not None:
            self._thread.shutdown()
