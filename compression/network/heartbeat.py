"""Signs of life: every rank tells a store that it lives, and who waits for one that does not learns which it is.

A rank that is stopped, or whose host or link is gone, closes no connection: its peers wait for as long as the network
library lets them, and in the meantime hear no signal. Two threads of each rank know more. One writes a counter, and
reads those of others, from a connection of its own; the other one watches the first, which waits for ever where the
store's host is gone.

Rank 0 reads all counters, and what it finds out it writes beside its own, which all others read: the work at the store
grows with the number of ranks, not with its square.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .launchers import speaks_first

TURN_SECONDS = 2.0  # between signs of life, or a fifth of what is waited for
HURRY_SECONDS = 10.0  # of silence that are enough once a signal has asked a rank to stop
PARTING_SECONDS = 1.0  # for the threads to end
STANDING_STILL = 1e-3  # of a core's time, below which the main thread is not at work


@dataclass(frozen=True)
class Watch:
    """How long ranks wait for a sign of life of another one, and what a rank does then.

    `on_silence(line, aloud)` gets the reason on a thread of its own, while the main thread still waits; it should end
    the process. `aloud` says whether this rank is the one to tell the user.
    """

    seconds: float
    on_silence: Callable[[str, bool], None]


@dataclass
class _Sign:
    """What a rank tells of itself: a number that grows, and what others may want to know."""

    number: int = 0
    still: float = 0.0  # seconds for which its main thread has not been at work
    at: str = ""  # where that thread is
    hurried: bool = False
    left: bool = False
    verdict: str = ""  # of rank 0: why all have to end

    def text(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def of(cls, text: bytes) -> Self:
        return cls(**json.loads(text))


class Heartbeat:
    """The signs of life of this rank, and its look at those of others; a context manager.

    A rank lives while its process runs and its host answers. That alone would hide a main thread that waits for
    something that does not come, while its peers wait for it: where no rank's main thread has been at work for as long
    as a silence may last, the run is over, too. Time in `own_work` does not count, and neither does time in which this
    process itself was stopped.
    """

    def __init__(self, store: Any, rank: int, size: int, watch: Watch) -> None:
        """Every one of two ranks or more makes one, before it waits for others.

        `store` is one of torch.distributed's.
        """
        self._store, self._rank, self._watch = store.clone(), rank, watch
        self._turn = min(TURN_SECONDS, watch.seconds / 5)
        self._watched = list(range(1, size)) if rank == 0 else [0]
        self._own, self._others = _Sign(), {other: _Sign() for other in self._watched}
        self._silence = dict.fromkeys(self._watched, 0.0)  # seconds
        self._store_silence = 0.0
        self._at_own_work = 0
        self._main_thread = threading.main_thread()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._look)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave the others, who wait for this rank no longer."""
        self._ended.set()
        for thread in self._threads:
            thread.join(PARTING_SECONDS)  # the store may be gone

    def hurry(self) -> None:
        """Let `HURRY_SECONDS` of silence be enough from now on, on all ranks."""
        self._own.hurried = True

    @contextlib.contextmanager
    def own_work(self) -> Iterator[None]:
        """A block in which this rank may stand still: others wait for it as long as its process lives."""
        self._at_own_work += 1
        try:
            yield
        finally:
            self._at_own_work -= 1

    def _talk(self) -> None:
        """Tell that this rank lives, and read who else does, turn by turn."""
        with contextlib.suppress(RuntimeError):  # the store has gone: others are silent from now on
            self._store.set(_key(self._rank), self._own.text())
            while not self._ended.wait(self._turn):
                self._own.number += 1
                self._store.set(_key(self._rank), self._own.text())
                known = [
                    other for other in self._watched if self._others[other].number or self._store.check([_key(other)])
                ]
                signs = self._store.multi_get([_key(other) for other in known]) if known else []
                self._store_silence = 0.0
                for other, text in zip(known, signs, strict=True):
                    sign = _Sign.of(text)
                    if sign.number != self._others[other].number or sign.left:
                        self._silence[other] = 0.0
                    self._others[other] = sign
            self._own.left = True
            self._store.set(_key(self._rank), self._own.text())

    def _look(self) -> None:
        """Count the seconds of silence, and end them where they are too many."""
        before, at_work = time.monotonic(), self._main_threads_seconds()
        while not self._ended.wait(self._turn):
            now, worked = time.monotonic(), self._main_threads_seconds()
            passed = min(now - before, 2 * self._turn)  # more have passed where this process was stopped
            self._store_silence += passed
            for other in self._watched:
                self._silence[other] += passed
            idle = worked is not None and at_work is not None and worked - at_work < STANDING_STILL * (now - before)
            still = self._own.still + passed if idle and not self._at_own_work else 0.0
            self._own.still, self._own.at = still, self._place() if still else ""
            before, at_work = now, worked
            if line := self._verdict():
                self._end(line)
                return

    def _verdict(self) -> str:
        """Why this rank has to end: a line that names who was silent; empty where nobody was for too long."""
        signs = [self._own, *self._others.values()]
        if self._rank != 0 and self._others[0].verdict:
            return self._others[0].verdict
        if self._rank != 0 and self._others[0].left:
            return ""
        limit = self._watch.seconds
        if any(sign.hurried for sign in signs):
            limit = min(limit, HURRY_SECONDS)
        if self._store_silence > limit:
            since = _since(self._store_silence)
            if self._rank == 0:
                return f"the store that torchrun keeps for all ranks has not answered {since}; start all ranks anew"
            return (
                f"rank 0 has shown no sign of life {since}, and nor has the store on its host: it is stopped, or its "
                f"host or the network between it and rank {self._rank} is gone"
            )
        silent = max(self._watched, key=lambda other: self._silence[other])
        if self._silence[silent] > limit:
            return (
                f"rank {silent} has shown no sign of life {_since(self._silence[silent])}: it is stopped, or its host "
                "or the network is gone"
            )
        still = min(sign.still for sign in signs)
        if self._rank == 0 and still > self._watch.seconds and not any(sign.left for sign in signs):
            places = ", ".join(f"rank {rank} is at {sign.at}" for rank, sign in enumerate(signs[:8]))
            return f"no rank has been at work {_since(still)}, and none is stopped: {places}"
        return ""

    def _end(self, line: str) -> None:
        """End this rank, and before rank 0 let the others read why."""
        heard = self._rank != 0 and self._others[0].verdict
        if self._rank == 0:
            self._own.verdict = line
            time.sleep(2 * self._turn)
        self._watch.on_silence(
            f"{line} (`timeout` {self._watch.seconds:g})", not heard and (self._rank < 2 or speaks_first())
        )

    def _main_threads_seconds(self) -> float | None:
        """Seconds for which the main thread has computed; None where the system does not tell, as on macOS."""
        if not hasattr(time, "pthread_getcpuclockid") or self._main_thread.ident is None:
            return None
        return time.clock_gettime(time.pthread_getcpuclockid(self._main_thread.ident))

    def _place(self) -> str:
        """File and line at which the main thread is."""
        frame = sys._current_frames().get(self._main_thread.ident or 0)
        return (
            "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
        )


def _key(rank: int) -> str:
    return f"alive {rank}"


def _since(seconds: float) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))
    return f"since {when}, for {seconds:.0f} s"
