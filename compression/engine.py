"""One thread that does all the communication, in the order in which it is asked to.

Collectives of several phases would deadlock inside the callbacks of torch's futures, and mismatch between ranks
when two threads issue them. One thread with a queue has neither problem: as long as every rank submits the same
jobs in the same order, every collective of every job meets its peers. Meanwhile backward goes on.
"""

import queue
import threading
from collections.abc import Callable

import torch


class Engine:
    """Runs jobs one after the other on a thread of its own; `device` is current on it where it is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="communication", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job. It must not raise: what goes wrong in it is its own to report."""
        self._jobs.put(job)

    def close(self) -> None:
        """Finish what is queued and end the thread. Calling it twice is harmless."""
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (job := self._jobs.get()) is not None:
            job()
