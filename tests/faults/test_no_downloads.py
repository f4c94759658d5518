"""Nothing is fetched at run time: a run goes well where every connection but those among its ranks is refused."""

import socket
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.support.program import SMALL, run_well


def only_at_home(refused: Path) -> None:
    """Refuse connections to other machines, and leave a note of each."""
    connect = socket.socket.connect

    def connect_at_home(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            refused.touch()
            raise ConnectionRefusedError(f"{address} is another machine")
        connect(self, address)

    def resolve_at_home(host: Any, *others: Any, **options: Any) -> Any:
        if host not in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname()):
            refused.touch()
            raise socket.gaierror(f"{host} is another machine")
        return resolve(host, *others, **options)

    resolve = socket.getaddrinfo
    patch.object(socket.socket, "connect", connect_at_home).start()
    patch.object(socket, "getaddrinfo", resolve_at_home).start()


@pytest.mark.parametrize(
    "flags",
    [
        "",
        pytest.param("--search --search-min-bits 2", marks=pytest.mark.slow),
        pytest.param("--compression-type topk", marks=pytest.mark.slow),
    ],
)
def test_a_run_asks_no_other_machine(flags: str, pictures: Path, tmp_path: Path) -> None:
    files = ("--workspace", tmp_path / "work", "--tensorboard-dir", tmp_path / "events")
    run_well(pictures, *SMALL, *files, *flags.split(), ranks=2, before=partial(only_at_home, tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()


def test_a_connection_to_another_machine_would_be_seen(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(socket.socket, "connect", socket.socket.connect)
        monkeypatch.setattr(socket, "getaddrinfo", socket.getaddrinfo)
        only_at_home(tmp_path / "refused")
        with pytest.raises(OSError, match="is another machine"):
            socket.create_connection(("example.invalid", 80), timeout=1)
        patch.stopall()
    assert (tmp_path / "refused").exists()
