"""Stopping in the middle of an epoch or of a validation, the same on every rank, when a signal asks for it.

Knows signals and a key-value store that all ranks share; saving, and how the program ends, is its caller's
business.
"""

import signal
from collections.abc import Mapping
from types import FrameType
from typing import Protocol

EXIT_STATUS: Mapping[int, int] = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""Signal -> the status that a shell expects of a program that it ended."""

_KEY = "stop"


class Store(Protocol):
    """The part of torch.distributed's stores that is needed."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class Interruption:
    """Turns SIGTERM and SIGINT into a stop that all ranks make after the same step. A second signal ends at once.

    A rank that was asked to stop after step s announces step s + 1 before it begins that step. Averaging gradients
    makes every rank wait for it there, so that all see the announcement by the end of step s + 1: no collective, and
    no message between ranks but a look at the store. Ranks that average nothing (a negative control) may stop a
    step apart.
    """

    def __init__(self, store: Store | None) -> None:
        """`store` is shared by the ranks; None where there is one rank. Installs the handlers: main thread only."""
        self._store = store
        self._signal: int | None = None
        self._announced: tuple[int, int] | None = None  # the step to stop after, and the signal
        self._before = {number: signal.signal(number, self._receive) for number in EXIT_STATUS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        for asked, handler in self._before.items():
            signal.signal(asked, handler)

    def due(self, step: int) -> bool:
        """Whether to stop now that step number `step` of this process is done. Every rank asks after every step."""
        self._look(step if self._store is None else step + 1)
        return self._announced is not None and step >= self._announced[0]

    def asked(self) -> bool:
        """Whether any rank has been asked to stop, where ranks are not in step: one may know before another does."""
        self._look(0)
        return self._announced is not None

    def _look(self, last_step: int) -> None:
        """Learn of an announced stop, or announce that all stop after `last_step` where a signal asks for it."""
        if self._announced is not None:
            return
        if self._store is not None and self._store.check([_KEY]):
            text = self._store.get(_KEY).decode().split()
            self._announced = (int(text[0]), int(text[1]))
        elif self._signal is not None:
            self._announced = (last_step, self._signal)
            if self._store is not None:
                self._store.set(_KEY, f"{last_step} {self._signal}")

    @property
    def exit_status(self) -> int:
        """The exit status of the program that stops: 128 + the signal's number."""
        self._look(0)  # this rank may have learned of the stop from others, and not from the store
        assert self._announced is not None
        return EXIT_STATUS[self._announced[1]]
