"""Rendezvous: how the ranks that torchrun started find the store that all share, and wait until all have come."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 900.0  # for all ranks to have come, where nobody says otherwise
SILENT_SECONDS = 10.0  # before a line says who is waited for


class Meeting(NamedTuple):
    """The store that all ranks share, this process's rank, and the number of ranks."""

    store: dist.Store  # type: ignore[name-defined]
    rank: int
    size: int


def meet(seconds: float | None = None, environment: Mapping[str, str] = os.environ) -> Meeting:
    """The meeting of all ranks, once they have come: within so many seconds, or `PATIENCE_SECONDS`.

    Each time that torchrun starts the ranks anew they find an empty store: its process outlives them, and what those
    before have left there (addresses, a stop) is not theirs.

    Raises ValueError, one line with the address, where the store's variables are missing, its port is taken, or a rank
    has not come in time.
    """
    seconds = PATIENCE_SECONDS if seconds is None else seconds
    names = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        if not environment.get(name):
            raise ValueError(f"RANK is set in the environment, and {name} is not; start the ranks with torchrun")
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    where = f"{address}:{port}"
    if not (port.isascii() and port.isdigit() and int(port) < 2**16):
        raise ValueError(f"MASTER_PORT in the environment is a port from 0 to 65535, got {port!r}")
    kept_by_torchrun = environment.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    serves = rank == 0 and not kept_by_torchrun
    waiting = _turns(seconds)
    if not serves:
        keeper = "torchrun's store" if kept_by_torchrun else f"rank 0 of {size} ranks"
        said = False
        while (reason := _nobody_at(address, int(port))) is not None:
            if (waited := next(waiting)) is None:
                raise ValueError(
                    f"{keeper} has not come to {where} within {seconds:g} s (`timeout`): {reason}; start all ranks, "
                    "with MASTER_ADDR and MASTER_PORT of the first host"
                )
            if waited > SILENT_SECONDS and not said:
                said = True
                log.warning("waiting for %s at %s (%s)", keeper, where, reason)
    try:
        kept = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            int(port),
            is_master=serves,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=not kept_by_torchrun,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[0].split())
        raise ValueError(f"no store for the ranks at {where} ({reason}); choose another MASTER_PORT") from None
    start = f"start {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.PrefixStore(start, kept)  # type: ignore[attr-defined]
    _wait_for_all(store.check, store.set, rank, size, where, seconds, waiting)
    return Meeting(store, rank, size)


def _wait_for_all(
    check: Callable[[list[str]], bool],
    put: Callable[[str, str], None],
    rank: int,
    size: int,
    where: str,
    seconds: float,
    waiting: Iterator[float | None],
) -> None:
    """Tell the others that this rank has come, and wait until all have. The first of those that wait says so."""
    keys = [f"come {each}" for each in range(size)]
    put(keys[rank], "")
    said = False
    while not check(keys):
        waited = next(waiting)
        if waited is not None and (said or waited <= SILENT_SECONDS):
            continue
        missing = [each for each, key in enumerate(keys) if not check([key])]
        if waited is None and missing:
            names = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
            raise ValueError(
                f"{len(missing)} of {size} ranks did not come to {where} within {seconds:g} s (`timeout`): rank {names}"
                "; start all of them, or look why they have ended"
            )
        said = True
        if missing and rank == min({*range(size)} - {*missing}):
            log.warning("waiting for %d of %d ranks at %s", len(missing), size, where)


def _nobody_at(address: str, port: int) -> str | None:
    """Why nobody answers at a port; None where somebody does. Torch's own waiting writes pages of its stack."""
    try:
        with socket.create_connection((address, port), timeout=5):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _turns(seconds: float) -> Iterator[float | None]:
    """Seconds since the start, after longer and longer pauses; None once it was so many seconds ago."""
    start = time.monotonic()
    pause = 0.01
    while (waited := time.monotonic() - start) < seconds:
        yield waited
        time.sleep(min(pause, seconds - waited))
        pause = min(2 * pause, 0.5)
    while True:
        yield None
