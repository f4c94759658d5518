"""Several hosts on one machine, joined by links of a chosen rate.

A host is a network namespace with one interface, eth0, at 10.77.0.1 and up; a bridge in a namespace of its own
joins them. tc's token bucket limits both directions of each link. The addresses exist inside these namespaces only:
labs meet neither one another nor the machine's own network.

It knows processes, links and the kernel's byte counters. What runs on the hosts is its caller's business. There is
no added latency and no loss. Needs Linux, root and iproute2; a rate holds as long as the machine's cores keep up.

A rank's number on its host is its place. Every host knows all of them by name: host0, host1 and so on.
"""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_serial = itertools.count()


@dataclass(frozen=True)
class Rank:
    """The host of a rank, and the variables that tell it who it is."""

    host: int
    environment: Mapping[str, str]


def ranks_on(hosts: Sequence[int], order: Sequence[int] | None = None) -> list[Rank]:
    """The ranks of hosts with so many each, in rank order, with the variables that torchrun sets for them.

    `order` holds the ranks host by host; None deals them out in order. Raises ValueError where it does not hold each
    rank once.
    """
    size = sum(hosts)
    order = range(size) if order is None else order
    if sorted(order) != list(range(size)):
        raise ValueError(f"`order` holds each of {size} ranks once, got {list(order)}")
    ranks, following = {}, iter(order)
    for host, local_size in enumerate(hosts):
        for place in range(local_size):
            rank = next(following)
            variables = {
                "RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_RANK": place,
                "LOCAL_WORLD_SIZE": local_size,
                "GROUP_RANK": host,
                "GROUP_WORLD_SIZE": len(hosts),
            }
            ranks[rank] = Rank(host, {name: str(value) for name, value in variables.items()})
    return [ranks[rank] for rank in range(size)]


@dataclass(frozen=True)
class Lab:
    """The hosts of one lab, numbered from 0; made by `lab()`, which also removes them."""

    hosts: int
    own_names: bool = False
    name: str = field(default_factory=lambda: f"netlab-{os.getpid()}-{next(_serial)}")

    def namespace(self, host: int) -> str:
        """The host's name for `ip netns`."""
        return f"{self.name}-{host}"

    def sent_bytes(self, host: int) -> int:
        """Bytes that the host has put on its link so far, headers included, by the kernel's counter."""
        counter = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(_call("ip", "netns", "exec", self.namespace(host), "cat", counter))

    def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        ranks_per_host: int | Sequence[int] = 1,
        order: Sequence[int] | None = None,
    ) -> list[str]:
        """Run the command as every rank, and return what each wrote to its standard output, in rank order.

        There are as many ranks on every host, or as many as are given for each; rank r is at place r % R of host r // R
        unless `order` holds the ranks host by host. RANK, WORLD_SIZE and the other variables that torch.distributed
        reads are set; `environment` comes on top. Standard error goes to the caller's. Raises ChildProcessError as soon
        as one rank fails, and TimeoutError after `timeout_s`. No process outlives the call.
        """
        sizes = [ranks_per_host] * self.hosts if isinstance(ranks_per_host, int) else list(ranks_per_host)
        if len(sizes) != self.hosts:
            raise ValueError(f"`ranks_per_host` is one number, or one for each of {self.hosts} hosts, got {sizes}")
        common = {
            "MASTER_ADDR": address(0),
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        given = dict(environment or {})
        ranks = [Rank(rank.host, common | dict(rank.environment) | given) for rank in ranks_on(sizes, order)]
        return self._run("rank", ranks, command, timeout_s)

    def launch(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        environment: Callable[[int], Mapping[str, str]] = lambda _: {},
    ) -> list[str]:
        """Run the command once on every host, as a launcher of ranks is, and return the standard outputs by host.

        No variable of ranks is set; `environment` of a host comes on top. Ends and raises as `run` does.
        """
        return self._run("host", [Rank(host, environment(host)) for host in range(self.hosts)], command, timeout_s)

    def _run(self, what: str, ranks: Sequence[Rank], command: Sequence[str], timeout_s: float) -> list[str]:
        """Run the command in an environment for each; `what` the errors call one of them."""
        deadline = time.monotonic() + timeout_s
        with ExitStack() as stack:
            outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in ranks]
            stack.callback(self._stop)
            processes = []
            for rank, output in zip(ranks, outputs, strict=True):
                processes.append(
                    subprocess.Popen(
                        [*self._on(rank.host), *command],
                        env=os.environ | dict(rank.environment),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                    )
                )
                stack.callback(processes[-1].wait)
                stack.callback(processes[-1].kill)
            count = len(processes)
            while None in (statuses := [process.poll() for process in processes]) and not any(statuses):
                if time.monotonic() > deadline:
                    slow = [number for number, status in enumerate(statuses) if status is None]
                    raise TimeoutError(f"{what}s {slow} of {count} not done after {timeout_s:g} s: {command}")
                time.sleep(0.02)
            for number, status in enumerate(statuses):
                if status:
                    raise ChildProcessError(f"{what} {number} of {count} ended with status {status}: {command}")
            for output in outputs:
                output.seek(0)
            return [output.read() for output in outputs]

    def _on(self, host: int) -> list[str]:
        """The beginning of a command that runs on a host."""
        words = ["ip", "netns", "exec", self.namespace(host)]
        if self.own_names:
            words += ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host_name(host)]
        return words

    def _build(self, rate: str | None) -> None:
        switch = f"{self.name}-switch"
        _call("ip", "netns", "add", switch)
        _call("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _call("ip", "-n", switch, "link", "set", "bridge", "up")
        for host in range(self.hosts):
            namespace, port = self.namespace(host), f"port{host}"
            _call("ip", "netns", "add", namespace)
            # `ip netns exec` shows this as /etc/hosts. Horovod asks it for the address that others are to reach.
            settings = _settings(namespace)
            settings.mkdir(parents=True)
            # An address is looked up too, and means its first name.
            known = [f"{address(other)} {host_name(other)}" for other in range(self.hosts)]
            if not self.own_names:
                known.insert(0, f"{address(host)} {socket.gethostname()}")
            known.append("127.0.0.1 localhost")
            (settings / "hosts").write_text("\n".join(known) + "\n")
            _call("ip", "-n", namespace, "link", "set", "lo", "up")
            peer = ("peer", "name", port, "netns", switch)
            _call("ip", "link", "add", "eth0", "netns", namespace, "type", "veth", *peer)
            # Without an IPv6 address the kernel sends nothing of its own: the counter counts what the ranks send.
            _call("ip", "-n", namespace, "link", "set", "eth0", "addrgenmode", "none")
            _call("ip", "-n", namespace, "addr", "add", f"{address(host)}/24", "dev", "eth0")
            _call("ip", "-n", namespace, "link", "set", "eth0", "up")
            _call("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            if rate is not None:
                # A burst holds a few of the 64 KiB segments that the kernel hands down in one piece.
                bucket = ("tbf", "rate", rate, "burst", "256kb", "latency", "100ms")
                _call("tc", "-n", namespace, "qdisc", "add", "dev", "eth0", "root", *bucket)
                _call("tc", "-n", switch, "qdisc", "add", "dev", port, "root", *bucket)

    def _namespaces(self) -> list[str]:
        names = [line.split()[0] for line in _call("ip", "netns", "list").splitlines()]
        return [name for name in names if name.startswith(f"{self.name}-")]

    def _stop(self) -> None:
        """Kill whatever runs on the hosts, also what has left its parent or session."""
        for namespace in self._namespaces():
            while pids := _call("ip", "netns", "pids", namespace).split():
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)

    def _remove(self) -> None:
        self._stop()
        for namespace in self._namespaces():
            _call("ip", "netns", "del", namespace)
            shutil.rmtree(_settings(namespace), ignore_errors=True)


def address(host: int) -> str:
    """The host's address, within its lab."""
    return f"10.77.0.{host + 1}"


def host_name(host: int) -> str:
    """The name by which all hosts of its lab know the host."""
    return f"host{host}"


@contextmanager
def lab(hosts: int, rate: str | None = None, *, own_names: bool = False) -> Iterator[Lab]:
    """A lab of 1 to 250 hosts whose links carry `rate` each way, in tc's words ("100mbit", "1gbit"); None for no limit.

    With `own_names` a host also calls itself as the others do (util-linux's unshare); else all have the machine's name.

    On the way out everything that still runs on the hosts is killed and the namespaces are removed: after an
    exception and after SIGTERM too, which is why it has to be entered in the main thread. After SIGKILL the
    namespaces stay, with the process id in their names. Raises OSError where the machine cannot have such a lab;
    `available()` asks beforehand.
    """
    if not 1 <= hosts <= 250:
        raise ValueError(f"a lab has 1 to 250 hosts, got {hosts}")
    if os.geteuid() != 0:
        raise PermissionError("a lab is made of network namespaces, and making these needs root")
    made = Lab(hosts, own_names)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        try:
            made._build(rate)
            yield made
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            made._remove()
    finally:
        signal.signal(signal.SIGTERM, before)


def available() -> str | None:
    """None where a lab can be made here, else the reason why not."""
    try:
        with lab(hosts=1, rate="1gbit"):
            return None
    except OSError as error:
        return str(error)


def _settings(namespace: str) -> Path:
    """The folder of the namespace's own files of /etc, for `ip netns exec`."""
    return Path("/etc/netns", namespace)


def _call(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise OSError(f"a lab needs the command {words[0]}: install iproute2") from None
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
