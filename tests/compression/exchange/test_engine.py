"""The communication thread: which job runs when."""

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from compression.exchange.engine import Engine
from compression.network.threads import ThreadCollectives, run_ranks
from compression.streams import Meanwhile, Phases, device_future
from tests.support.threads import Uncompletable, within

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


def order_of(engine: Engine, submit: Any) -> list[str]:
    """The names of jobs in the order in which they ran, all submitted while the first one runs."""
    ran: list[str] = []
    go = threading.Event()
    engine.submit(lambda: (go.wait(), ran.append("first"))[1])
    submit(lambda name: lambda: ran.append(name))
    go.set()
    engine.close()
    return ran


@pytest.mark.parametrize(("after", "expected"), [(1, "first c a b"), (2, "first a c b"), (3, "first a b c")])
def test_an_urgent_job_overtakes_all_that_wait_but_those_that_it_comes_after(after: int, expected: str) -> None:
    engine = Engine(CPU, bool)

    def submit(named: Any) -> None:
        engine.submit(named("a"))
        engine.submit(named("b"))
        engine.submit_urgent(named("c"), after)

    assert " ".join(order_of(engine, submit)) == expected


def test_all_ranks_run_jobs_in_the_order_that_rank_0_chooses() -> None:
    """Rank 1 has the urgent job from the start, rank 0 only when it has chosen the first other one."""

    def order(ranks: ThreadCollectives) -> list[str]:
        ran: list[str] = []
        engine = Engine(CPU, ranks.broadcast)
        urgent = lambda: engine.submit_urgent(lambda: ran.append("urgent"), 0)  # noqa: E731
        if ranks.rank:
            urgent()
        engine.submit(lambda: (ran.append("one"), ranks.rank or urgent())[0])
        engine.submit(lambda: ran.append("two"))
        while len(ran) < 3:
            threading.Event().wait(0.001)
        engine.close()
        return ran

    assert run_ranks(2, order) == [["one", "urgent", "two"]] * 2


def test_an_engine_ends_though_another_ranks_job_never_comes() -> None:
    engine = Engine(CPU, lambda urgent: True)
    engine.submit(lambda: pytest.fail("rank 0 chose another"))
    engine.close()


def test_a_program_that_closes_nothing_ends_once_its_jobs_have() -> None:
    """A job that is in torch when Python ends can end the process with an abort."""
    program = """
import time, torch
from compression.exchange.engine import Engine
Engine(torch.device("cpu"), bool).submit(lambda: (time.sleep(0.3), print("done"))[1])
"""
    command, environment = [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_closed_engine_takes_no_job() -> None:
    engine = Engine(CPU, bool)
    engine.close()
    for submit in (engine.submit, partial(engine.submit_urgent, after=0)):
        with pytest.raises(RuntimeError, match=r"the exchange of this model is closed, .* or build the model and its"):
            submit(lambda: pytest.fail("nobody is there to run it"))


@pytest.mark.parametrize(
    ("others_may_begin_after", "expected"),
    [(1, "a1 b1 a2 c1 b2 a3 c2 b3 c3"), (2, "a1 a2 b1 a3 b2 c1 b3 c2 c3"), (3, "a1 a2 a3 b1 b2 b3 c1 c2 c3")],
)
def test_a_job_begins_while_others_are_under_way_once_they_say_so(others_may_begin_after: int, expected: str) -> None:
    engine = Engine(CPU, bool)
    ran: list[str] = []

    def job(name: str) -> Phases:
        for phase in range(1, 4):
            ran.append(f"{name}{phase}")
            yield Meanwhile.OTHERS_BEGIN if phase >= others_may_begin_after else Meanwhile.NONE_BEGINS

    go = threading.Event()
    engine.submit(lambda: [go.wait(), None][1])
    for name in "abc":
        engine.submit(partial(job, name))
    go.set()
    engine.close()
    assert " ".join(ran) == expected


def test_the_last_phase_waits_for_no_other_job() -> None:
    engine = Engine(CPU, bool)
    done = threading.Event()

    def job() -> Phases:
        yield Meanwhile.OTHERS_BEGIN
        yield Meanwhile.OTHERS_BEGIN
        done.set()

    engine.submit(job)
    assert done.wait(900)
    engine.close()


def test_whoever_waits_for_a_job_that_raises_or_for_a_later_one_gets_the_exception() -> None:
    engine = Engine(CPU, bool)
    go = threading.Event()
    before, failing, urgent, after = (device_future(CPU) for _ in range(4))

    def job(future: Any) -> Phases:
        go.wait()
        yield Meanwhile.OTHERS_BEGIN
        future.set_result(1)

    def fail() -> None:
        raise OSError("out of order")

    engine.submit(partial(job, before), [before])
    engine.submit(fail, [failing])
    engine.submit_urgent(lambda: pytest.fail("a job has raised"), 2, [urgent])
    go.set()
    for future in (failing, urgent):
        with pytest.raises(OSError, match="out of order"):
            within(900, future.wait)
    engine.submit(lambda: pytest.fail("a job has raised"), [after])
    with pytest.raises(OSError, match="out of order"):
        within(900, after.wait)
    within(900, engine.wait)
    within(900, engine.close)
    assert before.wait() == 1


def test_a_future_that_cannot_be_completed_gets_the_exception() -> None:
    engine, future = Engine(CPU, bool), Uncompletable()
    engine.submit(lambda: future.set_result(1), [future])
    with pytest.raises(OSError, match="no event can be recorded"):
        within(900, future.wait)
    engine.close()
