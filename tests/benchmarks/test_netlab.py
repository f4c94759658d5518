"""The lab of network namespaces: what it counts, what it limits, and that it leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.netlab import available, lab, ranks_on

WHY_NOT = available()
needs_lab = pytest.mark.skipif(WHY_NOT is not None, reason=f"no network namespaces here: {WHY_NOT}")

# Rank 0 receives and prints the seconds from the first byte to the last; rank 1 sends.
TRANSFER = """
import os, socket, sys, time
if os.environ["RANK"] == "0":
    connection, _ = socket.create_server(("10.77.0.1", 5000)).accept()
    connection.recv(1)
    began = time.monotonic()
    while connection.recv(1 << 20):
        pass
    print(time.monotonic() - began)
else:
    while True:
        try:
            connection = socket.create_connection(("10.77.0.1", 5000))
            break
        except OSError:
            time.sleep(0.02)
    connection.sendall(bytes(int(sys.argv[1])))
"""


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", script, *map(str, arguments)]


def namespaces_of(name: str) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [entry for entry in [*listed, *os.listdir("/etc/netns")] if entry.startswith(f"{name}-")]


@needs_lab
def test_the_counter_moves_by_what_a_socket_sent():
    nbytes = 3_000_000
    with lab(hosts=2) as hosts:
        before = [hosts.sent_bytes(host) for host in range(2)]
        hosts.run(python(TRANSFER, nbytes), timeout_s=900)
        receiver, sender = (hosts.sent_bytes(host) - before[host] for host in range(2))
    assert nbytes <= sender <= 1.06 * nbytes  # at most one header of 66 bytes in a packet of 1,500, and the handshake
    assert receiver < 0.06 * nbytes  # acknowledgments


@needs_lab
def test_the_counter_stands_still_while_nobody_sends():
    with lab(hosts=2) as hosts:
        before = [hosts.sent_bytes(host) for host in range(2)]
        hosts.run(python("import time; time.sleep(0.5)"), timeout_s=900)
        assert [hosts.sent_bytes(host) for host in range(2)] == before


@needs_lab
def test_a_link_is_never_faster_than_its_rate():
    nbytes, bytes_per_s, burst = 1_000_000, 1_000_000, 256 * 1024
    with lab(hosts=2, rate="8mbit") as hosts:
        seconds = float(hosts.run(python(TRANSFER, nbytes), timeout_s=900)[0])
    assert seconds > (nbytes - burst) / bytes_per_s * 0.95


@needs_lab
def test_every_rank_finds_itself_in_the_environment():
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "COLOR"]
    with lab(hosts=3) as hosts:
        show = python("import os, sys; print(*[os.environ[name] for name in sys.argv[1:]])", *names)
        outputs = hosts.run(show, timeout_s=900, environment={"COLOR": "blue"})
    assert outputs == [f"{rank} 3 0 1 10.77.0.1 eth0 blue\n" for rank in range(3)]


@needs_lab
@pytest.mark.parametrize(
    ("ranks_per_host", "order", "expected"),
    [
        (2, None, ["0 4 0 2 0 2", "1 4 1 2 0 2", "2 4 0 2 1 2", "3 4 1 2 1 2"]),
        (2, [2, 0, 1, 3], ["0 4 1 2 0 2", "1 4 0 2 1 2", "2 4 0 2 0 2", "3 4 1 2 1 2"]),
        ([2, 1], None, ["0 3 0 2 0 2", "1 3 1 2 0 2", "2 3 0 1 1 2"]),
    ],
    ids=["2 hosts x 2", "shuffled", "2 + 1"],
)
def test_several_ranks_of_a_host_share_its_link(ranks_per_host: Any, order: Any, expected: list[str]):
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"]
    show = python(
        "import os, subprocess, sys; print(*[os.environ[name] for name in sys.argv[1:]]);"
        "print(subprocess.check_output(['ip', '-br', 'addr', 'show', 'eth0'], text=True).split()[2])",
        *names,
    )
    with lab(hosts=2) as hosts:
        outputs = hosts.run(show, timeout_s=900, ranks_per_host=ranks_per_host, order=order)
    assert outputs == [f"{line}\n10.77.0.{int(line.split()[4]) + 1}/24\n" for line in expected]


@needs_lab
def test_a_launcher_is_started_once_on_every_host_and_finds_no_rank():
    show = python("import os, socket; print(socket.gethostname(), os.environ.get('RANK'), os.environ['NODE'])")
    with lab(hosts=2, own_names=True) as hosts:
        outputs = hosts.launch(show, timeout_s=900, environment=lambda host: {"NODE": f"node {host}"})
    assert outputs == ["host0 None node 0\n", "host1 None node 1\n"]


@needs_lab
def test_hosts_know_one_another_by_name():
    show = python("import socket; print(socket.getfqdn(), *map(socket.gethostbyname, ('host0', 'host1')))")
    with lab(hosts=2, own_names=True) as hosts:
        assert hosts.launch(show, timeout_s=900) == [f"{own} 10.77.0.1 10.77.0.2\n" for own in ("host0", "host1")]


def test_ranks_are_where_the_order_puts_them_each_of_them_once():
    assert [rank.host for rank in ranks_on([2, 2], [3, 0, 1, 2])] == [0, 1, 1, 0]
    with pytest.raises(ValueError, match=r"^`order` holds each of 3 ranks once, got \[0, 1, 1\]$"):
        ranks_on([2, 1], [0, 1, 1])


@needs_lab
def test_the_machines_name_means_an_address_that_the_others_can_reach():
    with lab(hosts=2) as hosts:
        own = python("import socket; print(socket.gethostbyname(socket.gethostname()))")
        assert hosts.run(own, timeout_s=900) == ["10.77.0.1\n", "10.77.0.2\n"]


@needs_lab
def test_two_labs_at_once_do_not_meet():
    with lab(hosts=1) as one, lab(hosts=1) as other:
        assert one.namespace(0) != other.namespace(0)
        ping = python("import socket; socket.create_server(('10.77.0.1', 5000)).close()")
        one.run(ping, timeout_s=900)
        other.run(ping, timeout_s=900)


@needs_lab
def test_nothing_is_left_after_an_exception():
    # A grandchild in a session of its own outlives its parent, and must not outlive the lab.
    detach = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '3600'], start_new_session=True, stdout=subprocess.DEVNULL)\n"
        "print(child.pid)"
    )
    with suppress(ZeroDivisionError), lab(hosts=1) as hosts:
        [pid] = hosts.run(python(detach), timeout_s=900)
        raise ZeroDivisionError
    assert namespaces_of(hosts.name) == []
    assert not is_running(int(pid))


@needs_lab
def test_nothing_is_left_after_sigterm(tmp_path: Path):
    note = tmp_path / "pid"
    script = (
        "import sys\n"
        "from benchmarks.netlab import lab\n"
        "with lab(hosts=2, rate='1gbit') as hosts:\n"
        "    print(hosts.name, flush=True)\n"
        f"    hosts.run(['sh', '-c', 'echo $$ > {note}; exec sleep 3600'], timeout_s=900)\n"
    )
    with subprocess.Popen(
        python(script), stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        while not (note.exists() and note.read_text()):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=900) == 128 + signal.SIGTERM
    assert namespaces_of(name) == []
    assert not is_running(int(note.read_text()))


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


@needs_lab
def test_a_rank_that_fails_ends_the_run_and_is_named():
    with lab(hosts=3) as hosts, pytest.raises(ChildProcessError, match=r"^rank 1 of 3 ended with status 7: "):
        hosts.run(["sh", "-c", "[ $RANK = 1 ] && exit 7; exec sleep 3600"], timeout_s=900)


@needs_lab
def test_ranks_that_do_not_end_are_stopped_and_named():
    with lab(hosts=2) as hosts, pytest.raises(TimeoutError, match=r"^ranks \[1\] of 2 not done after 0.5 s: "):
        hosts.run(["sh", "-c", "[ $RANK = 0 ] || exec sleep 3600"], timeout_s=0.5)


@needs_lab
def test_a_launcher_that_fails_is_named_by_its_host():
    with lab(hosts=2) as hosts, pytest.raises(ChildProcessError, match=r"^host 1 of 2 ended with status 7: "):
        hosts.launch(["sh", "-c", "[ $NODE = 1 ] && exit 7; exec sleep 3600"], timeout_s=900,
                     environment=lambda host: {"NODE": str(host)})  # fmt: skip


@needs_lab
def test_ranks_are_given_for_every_host_or_for_all():
    with lab(hosts=2) as hosts, pytest.raises(ValueError, match=r"one for each of 2 hosts, got \[1, 2, 1\]$"):
        hosts.run(["true"], timeout_s=900, ranks_per_host=[1, 2, 1])


@needs_lab
def test_a_rate_that_tc_does_not_know_is_an_error_and_leaves_nothing():
    with pytest.raises(OSError, match="fast"), lab(hosts=1, rate="fast"):
        pass
    assert namespaces_of(f"netlab-{os.getpid()}") == []


@pytest.mark.parametrize("hosts", [0, 251])
def test_a_lab_has_1_to_250_hosts(hosts: int):
    with pytest.raises(ValueError, match=rf"^a lab has 1 to 250 hosts, got {hosts}$"), lab(hosts):
        pass


def test_without_root_the_reason_is_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert available() == "a lab is made of network namespaces, and making these needs root"


@pytest.mark.skipif(os.geteuid() != 0, reason="without root, root is what is missing first")
def test_without_iproute2_the_reason_is_iproute2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert available() == "a lab needs the command ip: install iproute2"


@pytest.mark.parametrize("rate", [None, pytest.param("fast", id="where the lab cannot be made")])
def test_sigterm_means_afterwards_what_it_meant_before(rate: str | None):
    before = signal.getsignal(signal.SIGTERM)
    with suppress(OSError), lab(hosts=1, rate=rate):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
