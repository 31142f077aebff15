"""Sockets from systemd, and news back to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from daemons import CHECKOUT, PATIENCE, QMPD, Connection

from qmpd.cli.systemd import Notifier, passed_sockets
from qmpd.errors import Error


def test_without_systemd_nothing_happens() -> None:
    environment: dict[str, str] = {}
    assert passed_sockets(environment) == []
    notifier = Notifier(environment)
    assert not notifier
    assert notifier.watchdog_interval is None
    notifier.send("READY=1")


def test_sockets_for_another_process_are_left_alone() -> None:
    environment = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a"}
    assert passed_sockets(environment) == []
    assert environment == {}


@pytest.mark.parametrize("count", ["", "x", "-1", "0"])
def test_a_count_that_is_none_passes_nothing(count: str) -> None:
    assert passed_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count}) == []


def test_a_passed_descriptor_that_does_not_listen_is_refused() -> None:
    # Far above what is open, whatever descriptor 3 may be in this process.
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "60000", "LISTEN_FDNAMES": "control"}
    with pytest.raises(Error, match=r"^LISTEN_FDS: descriptor \d+ \('.*'\) is not a listening stream socket"):
        passed_sockets(environment)
    assert environment == {}


@pytest.mark.parametrize("abstract", [False, True])
def test_news_go_to_the_service_manager(abstract: bool, tmp_path: Path) -> None:
    name = f"@qmpd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    environment = {"NOTIFY_SOCKET": name}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0") if abstract else name)
        manager.settimeout(PATIENCE)
        notifier = Notifier(environment)
        assert notifier
        assert environment == {}
        notifier.send("READY=1", "STATUS=Serving QMP")
        assert manager.recv(4096) == b"READY=1\nSTATUS=Serving QMP"


def test_a_service_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).send("READY=1")


def test_the_watchdog_is_fed_twice_as_often_as_it_asks() -> None:
    watched = {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}
    assert Notifier(dict(watched)).watchdog_interval == 1.5
    assert Notifier({**watched, "WATCHDOG_PID": str(os.getpid() + 1)}).watchdog_interval is None
    assert Notifier({**watched, "WATCHDOG_USEC": "soon"}).watchdog_interval is None


#: Becomes what is behind it with the descriptors and the variables that systemd would give it.
_ACTIVATE = """
import os, sys
for index, descriptor in enumerate(map(int, sys.argv[1].split(","))):
    os.dup2(descriptor, 3 + index)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(index + 1), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
"""


@pytest.mark.parametrize("extra", [[], ["--loop", "asyncio"]])
def test_the_daemon_serves_passed_sockets_and_says_when_it_is_ready(extra: list[str], tmp_path: Path) -> None:
    path = tmp_path / "passed.sock"
    with (
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_INET) as internet,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        unix.bind(str(path))
        unix.listen()
        internet.bind(("127.0.0.1", 0))
        internet.listen()
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE)
        # High numbers, so that dup2() to 3 and 4 closes none of them.
        numbers = [os.dup(listening.fileno()) for listening in (unix, internet)]
        for _ in range(8):
            numbers.append(os.dup(numbers[0]))
        command = [
            sys.executable,
            "-c",
            _ACTIVATE,
            f"{numbers[0]},{numbers[1]}",
            "control:tcp",
            *QMPD,
            *extra,
        ]
        process = subprocess.Popen(
            command,
            pass_fds=numbers,
            env={
                **os.environ,
                "PYTHONPATH": str(CHECKOUT),
                "NOTIFY_SOCKET": str(tmp_path / "notify"),
                "WATCHDOG_USEC": "100000",
            },
        )
        for number in numbers:
            os.close(number)
        try:
            told = manager.recv(4096).decode().splitlines()
            assert "READY=1" in told
            assert f"MAINPID={process.pid}" in told
            assert manager.recv(4096) == b"WATCHDOG=1"
            assert manager.recv(4096) == b"WATCHDOG=1"
            with Connection(path) as connection:
                assert {entry["label"] for entry in connection.execute("query-chardev")} == {"control", "tcp"}
                environment = Path(f"/proc/{process.pid}/environ")
                assert environment.exists()
                with socket.create_connection(internet.getsockname(), PATIENCE) as client:
                    assert b"QMP" in client.recv(4096)
                connection.execute("quit")
            assert process.wait(PATIENCE) == 0
            while (news := manager.recv(4096)) == b"WATCHDOG=1":
                pass
            assert news.startswith(b"STOPPING=1")
        finally:
            process.kill()
            process.wait()
    # It is systemd's socket: the file stays for the next start.
    assert path.exists()
