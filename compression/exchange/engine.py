"""One thread that does all the communication, in the order in which it is asked to.

Collectives of several phases would deadlock inside the callbacks of torch's futures, and mismatch between ranks
when two threads issue them. One thread with a queue has neither problem: as long as every rank submits the same
jobs in the same order, every collective of every job meets its peers. Meanwhile backward goes on.

A job may have phases, and says between them what may happen meanwhile (`streams.Meanwhile`), so that the network
carries the messages of one job while another computes. No job catches up with an older one: a phase waits for phases
of its own job on other ranks alone, so that whoever waits, what it waits for is never behind it.

On a GPU the thread has a stream of its own, or backward's kernels would queue behind a waiting collective. A job begins
behind the work that the submitter's stream holds when it submits. Whoever takes a job's results waits for them with a
future that the job completes (`device_future`), which orders the two streams; the host waits for neither.

A job reports what goes wrong in it itself. Where one raises all the same, no other begins, and whoever waits for a
future that is still to be completed gets the exception. One that completes no future ends the thread with it.
"""

import atexit
import contextlib
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..streams import POLL_SECONDS, Meanwhile, Phases, Until

Job = Callable[[], Phases | None]
"""Work on the thread. The phases that it returns are still to run."""

Futures = Sequence["torch.futures.Future[Any]"]
"""The futures that a job completes."""

CLOSED = (
    "the exchange of this model is closed, and averages no more gradients; close it after the last backward, or build "
    "the model and its DistributedDataParallel anew and attach to that"
)


class Engine:
    """Runs jobs one after the other on a thread of its own, and on a stream of its own where `device` is a GPU.

    Jobs run in the order in which they are submitted, but for urgent ones, which overtake all that wait. Which wait
    when an urgent one comes differs from rank to rank. So `choose` makes the choice before every job, on the thread: it
    gets whether this rank would take an urgent job, and its answer must be the same on all ranks.
    """

    def __init__(self, device: torch.device, choose: Callable[[bool], bool]) -> None:
        self._device, self._choose = device, choose
        # Ahead of backward's kernels where both are ready: the sooner something is encoded, the sooner it travels.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._changed = threading.Condition()
        self._waiting: deque[Callable[[], Phases]] = deque()
        self._urgent: deque[Callable[[], Phases]] = deque()
        self._after: deque[int] = deque()  # of each job in `_urgent`
        self._submitted = self._taken = 0  # of the jobs that are not urgent
        self._idle = False  # nothing is under way
        self._closing = False
        self.failure: BaseException | None = None  # raised by a job: none begins anymore
        self._thread = threading.Thread(target=self._run, name="communication", daemon=True)
        self._thread.start()
        _engines.add(self)

    def submit(self, job: Job, futures: Futures = ()) -> int:
        """Queue a job. Returns how many have been submitted so. Raises RuntimeError once closed."""
        job = self._behind_now(job)
        with self._queueing():
            self._waiting.append(partial(self._phases, job, futures))
            self._submitted += 1
            return self._submitted

    def submit_urgent(self, job: Job, after: int, futures: Futures = ()) -> None:
        """Queue a job that overtakes all others but the first `after` that were submitted, and those of its kind.

        Raises RuntimeError once closed.
        """
        job = self._behind_now(job)
        with self._queueing():
            self._urgent.append(partial(self._phases, job, futures))
            self._after.append(after)

    def wait(self) -> None:
        """Wait for all jobs to end; on a GPU, only the caller's stream waits for their kernels."""
        with self._changed:
            self._changed.wait_for(self._at_rest)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def close(self) -> None:
        """Finish queued jobs and end the thread. Calling it twice is harmless."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._choose = bool  # who chose may own this: with a circle its buffers would outlive it

    def _at_rest(self) -> bool:
        return (self._idle and not (self._waiting or self._urgent)) or not self._thread.is_alive()

    @contextlib.contextmanager
    def _queueing(self) -> Iterator[None]:
        with self._changed:
            if self._closing:
                raise RuntimeError(CLOSED)
            yield
            self._changed.notify_all()

    def _behind_now(self, job: Job) -> Job:
        """The same job, on a GPU behind the work that the caller's stream holds now."""
        stream = self._stream
        if stream is None:
            return job
        now = torch.cuda.current_stream(self._device).record_event()

        def behind() -> Phases | None:
            stream.wait_event(now)
            return job()

        return behind

    def _phases(self, job: Job, futures: Futures) -> Phases:
        """A job's phases. Where it raises, or one before it has, its futures get the exception."""
        if self.failure is None:
            try:
                yield from job() or ()
                return
            except BaseException as error:
                self.failure = error
                if not futures:
                    raise  # there is nobody else to tell
        for future in futures:
            if not future.done():
                future.set_exception(self.failure)

    def _run(self) -> None:
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            under_way: list[_Running] = []  # the latest first: others wait for its messages
            while (job := self._next(wait=not under_way)) is not None or under_way:
                latest = _Running(job()) if job is not None else None
                if latest is not None:
                    latest.run_phase()
                went_on = latest is not None
                for running, older in itertools.zip_longest(under_way, under_way[1:]):
                    if running.ready and (older is None or running.phases < older.phases):
                        running.run_until_others_may_begin()
                        went_on = True
                if latest is not None and latest.meanwhile is Meanwhile.NONE_BEGINS:
                    latest.run_until_others_may_begin()
                under_way = [each for each in ([latest] if latest else []) + under_way if not each.ended]
                if not went_on:
                    time.sleep(POLL_SECONDS)

    def _next(self, wait: bool) -> Callable[[], Phases] | None:
        """The next job; None where there is none now, or, if it shall wait, where there will be none anymore."""
        with self._changed:
            self._idle = wait
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._urgent or self._closing or not wait)
            if not (self._waiting or self._urgent):
                return None
            urgent = bool(self._urgent) and self._after[0] <= self._taken
        if self.failure is None:
            urgent = self._choose(urgent)
        queue = self._urgent if urgent else self._waiting
        with self._changed:
            self._changed.wait_for(lambda: queue or self._closing)  # another rank may have come here first
            if not queue:
                return None
            self._idle = False
            if urgent:
                self._after.popleft()
            else:
                self._taken += 1
            return queue.popleft()


_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()
LAST_SECONDS = 1.0  # for a job that waits for a rank that is gone


@atexit.register
def _await_the_last_jobs() -> None:
    """Let threads that nobody closed come to rest: one that comes back from torch to a Python that has ended aborts."""
    for engine in list(_engines):
        with engine._changed:
            engine._changed.wait_for(engine._at_rest, LAST_SECONDS)


class _Running:
    """A job under way: its phases, how many of them have run, and what the last one lets happen meanwhile."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self.phases = 0
        self.meanwhile: Meanwhile | Until | None = None

    @property
    def ended(self) -> bool:
        return self.meanwhile is None

    @property
    def ready(self) -> bool:
        """Whether its next phase may run."""
        return not isinstance(self.meanwhile, Until) or self.meanwhile.ready()

    def run_phase(self) -> None:
        self.meanwhile = next(self._phases, None)
        if not isinstance(self.meanwhile, Until):  # how often a job has to wait is up to others
            self.phases += 1

    def run_until_others_may_begin(self) -> None:
        """Run at least one phase, and all where none of them lets others begin."""
        self.run_phase()
        while self.meanwhile is Meanwhile.NONE_BEGINS:
            self.run_phase()
