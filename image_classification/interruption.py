"""Stopping, or saving, in the middle of an epoch or of a validation, the same on every rank, when a signal asks for it.

Knows signals and a key-value store that all ranks share; saving, and how the program ends, is its caller's
business.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Protocol

EXIT_STATUS: Mapping[int, int] = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""Signal -> the status that a shell expects of a program that it ended."""

SAVE = signal.SIGUSR1
"""The signal that asks for a checkpoint, as Slurm's --signal sends it ahead of a time limit."""

ONE_WISH_SECONDS = 5.0
"""Seconds within which signals are one wish: a process group and its launcher each send the same one."""


class Store(Protocol):
    """The part of torch.distributed's stores that is needed."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


def end_without_traceback() -> None:
    """Let SIGINT end this process as SIGTERM does, and `SAVE` not at all: for as long as there is nothing to save."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(SAVE, signal.SIG_IGN)


class Interruption:
    """Turns SIGTERM and SIGINT into a stop, and SIGUSR1 into a checkpoint, that all ranks make after the same step.

    Signals to stop within `ONE_WISH_SECONDS` of the first are the same wish. One that comes later ends this process at
    once, with its exit status, whatever the main thread waits for.

    A rank that was asked to stop after step s announces step s + 1 before it begins that step. Averaging gradients
    makes every rank wait for it there, so that all see the announcement by the end of step s + 1: no collective, and
    no message between ranks but a look at the store. Ranks that average nothing (a negative control) may stop a
    step apart.
    """

    def __init__(self, store: Store | None, on_stop: Callable[[], None] = lambda: None) -> None:
        """`store` is shared by the ranks; None where there is one rank. Installs the handlers: main thread only.

        `on_stop` is called, on another thread, as soon as a signal asks this rank to stop.
        """
        self._store, self._on_stop = store, on_stop
        self._stop = _Wish(store, "stop")
        self._saves = 0
        self._save = _Wish(store, "save 0")
        # What signals write into is read by a thread: handlers wait for a main thread that waits for other ranks.
        received, written = os.pipe()
        os.set_blocking(written, False)
        threading.Thread(target=self._listen, args=(received,), name="signals", daemon=True).start()
        for number in (*EXIT_STATUS, SAVE):
            signal.signal(number, self._receive)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        wish = self._save if number == SAVE else self._stop
        wish.signal = wish.signal or number

    def _listen(self, received: int) -> None:
        first: float | None = None
        while True:
            [number] = os.read(received, 1)
            if number not in EXIT_STATUS:
                continue
            if first is None:
                first = time.monotonic()
                self._on_stop()
            elif time.monotonic() - first > ONE_WISH_SECONDS:
                os._exit(EXIT_STATUS[number])

    def due(self, step: int) -> bool:
        """Whether to stop now that step number `step` of this process is done. Every rank asks after every step."""
        return self._stop.due(step)

    def save_due(self, step: int) -> bool:
        """Whether to write a checkpoint now, and go on. Every rank asks after every step after which none stops."""
        due = self._save.due(step)
        if due:
            self._saves += 1
            self._save = _Wish(self._store, f"save {self._saves}")
        return due

    def asked(self) -> bool:
        """Whether any rank has been asked to stop, where ranks are not in step: one may know before another does."""
        self._stop.look(0)
        return self._stop.announced is not None

    @property
    def exit_status(self) -> int:
        """The exit status of the program that stops: 128 + the signal's number."""
        self._stop.look(0)  # this rank may have learned of the stop from others, and not from the store
        assert self._stop.announced is not None
        return EXIT_STATUS[self._stop.announced[1]]


class _Wish:
    """Something that all ranks are to do after the same step, and its key in the store."""

    def __init__(self, store: Store | None, key: str) -> None:
        self._store, self._key = store, key
        self.signal: int | None = None  # that asks this rank for it
        self.announced: tuple[int, int] | None = None  # the step after which it is due, and the signal

    def due(self, step: int) -> bool:
        self.look(step if self._store is None else step + 1)
        return self.announced is not None and step >= self.announced[0]

    def look(self, last_step: int) -> None:
        """Learn of an announcement, or announce that `last_step` is the step where a signal asks for it."""
        if self.announced is not None:
            return
        if self._store is not None and self._store.check([self._key]):
            text = self._store.get(self._key).decode().split()
            self.announced = (int(text[0]), int(text[1]))
        elif self.signal is not None:
            self.announced = (last_step, self.signal)
            if self._store is not None:
                self._store.set(self._key, f"{last_step} {self.signal}")
