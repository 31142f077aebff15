"""No process that may have keys or passphrases writes core dumps, or lets others look into its memory.

A process that does not belongs to root in /proc, whoever runs it.  So where root runs the tests, the
daemons have another group, which shows the difference.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from daemons import CHECKOUT, PATIENCE, QMPD, Connection
from process_memory import children

GROUP = 65534 if os.geteuid() == 0 else os.getegid()

Launch = Callable[..., subprocess.Popen[bytes]]

WAITING = ("--chardev", "socket,id=m,path=s,server=on,wait=on", "--monitor", "m")
SECRET = ("--object", "secret,id=s,data=passphrase")


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Run a program in *tmp_path*; it ends with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        group = GROUP if os.geteuid() == 0 else None
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, group=group))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def is_closed(pid: int) -> bool:
    """Whether a process writes no core dumps and can't be traced by its user."""
    owner = os.stat(f"/proc/{pid}/mem")
    if os.geteuid() == 0:
        return owner.st_gid == 0
    return owner.st_uid == 0


def core_limit(pid: int) -> str:
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (soft,) = [line.split()[4] for line in limits if line.startswith("Max core file size")]
    return soft


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_ordinary_process_is_told_apart(launch: Launch) -> None:
    process = launch("sleep", "60")
    until(lambda: not is_closed(process.pid))


def test_a_daemon_and_its_cipher_processes_are_closed(launch: Launch, tmp_path: Path) -> None:
    wanted = ("--cipher-processes", "2", *SECRET)
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    process = launch(*QMPD, *wanted, "--chardev", "socket,id=m,path=s,server=on,wait=off", "--monitor", "m")
    until((tmp_path / "s").exists)
    assert is_closed(process.pid)
    assert core_limit(process.pid) == "0"
    with Connection(tmp_path / "s") as connection:
        options = {"driver": "luks", "file": "disk", "key-secret": "s", "iter-time": 10, "size": 1 << 20}
        connection.execute(
            "blockdev-add", {"driver": "file", "node-name": "disk", "filename": str(tmp_path / "disk")}
        )
        connection.execute("blockdev-create", {"job-id": "j", "options": options})
        until(lambda: connection.execute("query-jobs")[0]["status"] == "concluded")
        connection.execute(
            "blockdev-add", {"driver": "luks", "node-name": "l", "file": "disk", "key-secret": "s"}
        )
        connection.execute("human-monitor-command", {"command-line": 'qemu-io l "read 0 1M"'})
        until(lambda: len(children(process.pid)) == 2)
        for child in children(process.pid):
            until(partial(is_closed, child))
            assert core_limit(child) == "0"


def test_both_processes_are_closed_while_a_daemon_goes_into_the_background(
    launch: Launch, tmp_path: Path
) -> None:
    parent = launch(*QMPD, "--daemonize", *SECRET, *WAITING)
    until((tmp_path / "s").exists)
    (daemon,) = children(parent.pid)
    assert is_closed(parent.pid)
    assert is_closed(daemon)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        assert parent.wait(PATIENCE) == 0
        assert is_closed(daemon)
        assert core_limit(daemon) == "0"
        client.sendall(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
        until(lambda: not Path(f"/proc/{daemon}").exists())
