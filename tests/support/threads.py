"""Threads that tests wait for, and futures that nobody can complete."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """The result of `work()`, or its exception. TimeoutError where it takes longer: waiting has no other end."""
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result(seconds)


class Uncompletable(torch.futures.Future[Any]):
    """A future that takes no result, as on a GPU where no event can be recorded."""

    def set_result(self, result: Any) -> None:
        if not isinstance(result, BaseException):
            raise OSError("no event can be recorded")
        super().set_result(result)
