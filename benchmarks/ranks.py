"""The ranks of a benchmark: one process each, on hosts of their own or over this machine's loopback.

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

from benchmarks.netlab import lab

PATIENCE_SECONDS = 3600.0


def over_links(ranks: int, mbit: float | None, command: Sequence[str]) -> list[str]:
    """The standard output of each rank, on hosts whose links carry so many Mbit/s each way."""
    with lab(ranks, None if mbit is None else f"{mbit:g}mbit") as hosts:
        return hosts.run(command, timeout_s=PATIENCE_SECONDS)


def over_loopback(ranks: int, command: Sequence[str], ranks_per_host: int = 0) -> list[str]:
    """The same without hosts and links; with `ranks_per_host`, ranks take one another for ranks of several hosts.

    Raises ChildProcessError where a rank fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        processes = []
        for rank, output in enumerate(outputs):
            environment = os.environ | common | {"RANK": str(rank)} | _place(rank, ranks_per_host)
            processes.append(subprocess.Popen(command, env=environment, stdout=output))
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        for rank, process in enumerate(processes):
            if status := process.wait(PATIENCE_SECONDS):
                raise ChildProcessError(f"rank {rank} of {ranks} ended with status {status}: {command}")
        for output in outputs:
            output.seek(0)
        return [output.read() for output in outputs]


def _place(rank: int, ranks_per_host: int) -> dict[str, str]:
    """A rank's place on its host, as torchrun tells it."""
    if not ranks_per_host:
        return {}
    host, place = divmod(rank, ranks_per_host)
    return {"LOCAL_RANK": str(place), "LOCAL_WORLD_SIZE": str(ranks_per_host), "GROUP_RANK": str(host)}


def kernel_bytes() -> int | None:
    """Bytes that this rank's interface has sent, by the kernel's counter; None over loopback, which all ranks share."""
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    if interface == "lo":
        return None
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())
