"""The ranks of a benchmark: one process each, on hosts of one or more or over this machine's loopback.

It knows processes and their environment; what they measure and print is their own business. A rank finds what
torch.distributed reads in its environment, and one thread to compute with.
"""

import os
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.netlab import lab, ranks_on

PATIENCE_SECONDS = 3600.0


def over_links(ranks: int, mbit: float | None, command: Sequence[str], ranks_per_host: int = 1) -> list[str]:
    """The standard output of each rank, on hosts whose links carry so many Mbit/s each way.

    Raises ValueError where the ranks do not fill their hosts.
    """
    with lab(_hosts(ranks, ranks_per_host), None if mbit is None else f"{mbit:g}mbit") as hosts:
        return hosts.run(command, timeout_s=PATIENCE_SECONDS, ranks_per_host=ranks_per_host)


def over_loopback(ranks: int, command: Sequence[str], ranks_per_host: int = 1) -> list[str]:
    """The same without links: hosts are what the ranks are told. Raises ChildProcessError where a rank fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    placed = ranks_on([ranks_per_host] * _hosts(ranks, ranks_per_host))
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        processes = []
        for rank, output in zip(placed, outputs, strict=True):
            environment = os.environ | common | dict(rank.environment)
            processes.append(subprocess.Popen(command, env=environment, stdout=output))
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        for number, process in enumerate(processes):
            if status := process.wait(PATIENCE_SECONDS):
                raise ChildProcessError(f"rank {number} of {ranks} ended with status {status}: {command}")
        for output in outputs:
            output.seek(0)
        return [output.read() for output in outputs]


def _hosts(ranks: int, ranks_per_host: int) -> int:
    if ranks % ranks_per_host:
        raise ValueError(f"{ranks} ranks do not fill hosts of {ranks_per_host}; choose a multiple")
    return ranks // ranks_per_host


def kernel_bytes() -> int | None:
    """Bytes that this rank's host has put on its link, by the kernel's counter; None over loopback, which all share."""
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    if interface == "lo":
        return None
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())
