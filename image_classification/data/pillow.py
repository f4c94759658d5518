"""Backend `pytorch`: Pillow decodes, in the worker processes of torch's DataLoader."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
    """What a worker runs: a request in, a batch out.

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


@contextmanager
def _signals_untouched() -> Iterator[None]:
    """A DataLoader installs a handler that raises a worker's death wherever the main thread happens to be.

    Without it the error comes from the loader, within seconds, and can be told from others.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGCHLD, before)


class PillowReader:
    """Workers start with the first batch and live until `close`, from epoch to epoch."""

    def __init__(self, samples: Samples, batches: int) -> None:
        self._requests = _Requests()
        self._running: Iterator[Pixels | Exception] | None = None
        workers = min(samples.options.workers, batches)
        self._loader = DataLoader(
            _Batches(samples),
            batch_size=None,  # a request is a batch already
            sampler=self._requests,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=samples.options.device.type == "cuda",
            generator=torch.Generator(),  # else every epoch would draw from torch's global one
        )

    def read(self, epoch: int, batches: Sequence[np.ndarray]) -> Iterator[Pixels]:
        self._requests.pending = iter([(epoch, batch) for batch in batches])
        try:
            with _signals_untouched():
                self._running = iter(self._loader)
            for result in self._running:
                if isinstance(result, Exception):
                    raise result
                yield result
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(
                f"a data loader process died ({error}), most often for want of memory or of shared memory; "
                "use fewer --workers or a smaller --batch-size"
            ) from error

    def close(self) -> None:
        # A DataLoader ends its workers when the garbage collector finds it, which a traceback can put off.
        shut_down = getattr(self._running, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        self._running = None
