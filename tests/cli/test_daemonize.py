"""The background, the pid file, and word to the parent when both are there."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import CHECKOUT, PATIENCE, QMPD, Connection

from qmpd.cli.daemonize import PidFile
from qmpd.errors import Error

Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Run qmpd in the background of *tmp_path*, with the pid file ``pid``; it ends with the test."""

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*QMPD, "--daemonize", "--pidfile", "pid", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    yield start
    if (tmp_path / "pid").exists():
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


SOCKET = ("--chardev", "socket,id=m,path=s,server=on,wait=off", "--monitor", "m")


def wait_gone(path: Path) -> None:
    """Wait until a file is gone."""
    deadline = time.monotonic() + PATIENCE
    while path.exists():
        assert time.monotonic() < deadline, f"{path} is still there"
        time.sleep(0.01)


def test_the_parent_ends_when_the_daemon_is_ready(launch: Launch, tmp_path: Path) -> None:
    result = launch(*SOCKET)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    # No waiting here: this is what "ready" promises.
    process = int((tmp_path / "pid").read_text())
    with Connection(tmp_path / "s") as connection:
        assert connection.execute("query-version")
        assert os.getsid(process) != os.getsid(0)
        assert Path(f"/proc/{process}/cwd").readlink() == Path("/")
        for descriptor in (0, 1, 2):
            assert Path(f"/proc/{process}/fd/{descriptor}").readlink() == Path("/dev/null")
        connection.execute("quit")
    # Relative names still mean what they meant at the start.
    wait_gone(tmp_path / "pid")
    wait_gone(tmp_path / "s")


def test_a_failed_start_is_seen_by_the_parent(launch: Launch, tmp_path: Path) -> None:
    result = launch("--blockdev", "file,node-name=f,filename=missing")
    assert result.returncode == 1
    assert result.stderr == (
        "qmpd: --blockdev file,node-name=f,filename=missing:"
        " Could not open 'missing': No such file or directory\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_second_daemon_on_the_same_pid_file_refuses_to_start(launch: Launch, tmp_path: Path) -> None:
    assert launch().returncode == 0
    first = (tmp_path / "pid").read_text()
    result = launch()
    assert result.returncode == 1
    assert result.stderr == (
        "qmpd: cannot create PID file: Cannot lock pid file: Resource temporarily unavailable\n"
    )
    assert (tmp_path / "pid").read_text() == first


def test_a_pid_file_that_was_left_over_is_no_obstacle(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("999999999 and more\n")
    assert launch().returncode == 0
    assert (tmp_path / "pid").read_text().strip().isdecimal()


def test_a_pid_file_is_private_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    pid_file = PidFile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    pid_file.remove()
    assert not path.exists()


def test_a_pid_file_that_somebody_removed_is_no_error(tmp_path: Path) -> None:
    pid_file = PidFile(str(tmp_path / "pid"))
    (tmp_path / "pid").unlink()
    pid_file.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_pid_file_is_locked_for_as_long_as_it_is_there(tmp_path: Path) -> None:
    first = PidFile(str(tmp_path / "pid"))
    with pytest.raises(Error) as refusal:
        PidFile(str(tmp_path / "pid"))
    assert refusal.value.desc == (
        "cannot create PID file: Cannot lock pid file: Resource temporarily unavailable"
    )
    first.remove()
    PidFile(str(tmp_path / "pid")).remove()


@pytest.mark.parametrize(
    ("path", "reason"),
    [("", "No such file or directory"), ("/", "Is a directory"), ("x/y", "No such file or directory")],
)
def test_a_pid_file_that_cannot_be_written_is_refused(
    path: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Error) as refusal:
        PidFile(path)
    assert refusal.value.desc == f"cannot create PID file: Could not create '{path}': {reason}"
