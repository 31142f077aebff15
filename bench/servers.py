"""The servers that are compared, how they start, and what they weigh."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

#: Seconds that a daemon may take from its start to its greeting.
PATIENCE: Final = 30.0

#: What the tables call the programs.
QMPD: Final = "qmpd"
STORAGE_DAEMON: Final = "qemu-storage-daemon"
QMPD_SYSTEM: Final = "qmpd-system-x86_64"
QEMU_SYSTEM: Final = "qemu-system-x86_64"

#: An emulator with nothing in it, as libvirt starts it to ask questions.
_EMPTY_MACHINE: Final = (
    *("-S", "-no-user-config", "-nodefaults", "-nographic"),
    *("-machine", "none,accel=kvm:tcg"),
)


@dataclass(frozen=True)
class Program:
    """A daemon with the command line of qemu-storage-daemon or of an emulator.

    :param command: the words that start it, before any option.
    :param monitor: what its option for a monitor is called.
    """

    name: str
    command: Sequence[str]
    monitor: str = "--monitor"

    def version(self) -> str:
        """Return the version that the program itself says."""
        shown = subprocess.run([*self.command, "--version"], capture_output=True, text=True, check=False)
        found = re.search(r"\d+(?:\.\d+)+", shown.stdout)
        return found[0] if found else "of no version"


def qmpd() -> Program:
    """Return qmpd as this interpreter runs it."""
    return Program(QMPD, (sys.executable, "-m", "qmpd"))


def storage_daemon() -> Program | None:
    """Return qemu-storage-daemon, or None where it is not installed."""
    path = shutil.which(STORAGE_DAEMON)
    return None if path is None else Program(STORAGE_DAEMON, (path,))


def qmpd_system() -> Program:
    """Return the emulator that qmpd is, without a machine, as this interpreter runs it."""
    command = (sys.executable, "-m", "qmpd.cli.system", *_EMPTY_MACHINE)
    return Program(QMPD_SYSTEM, command, "-mon")


def qemu_system() -> Program | None:
    """Return QEMU's emulator without a machine, or None where it is not installed."""
    path = shutil.which(QEMU_SYSTEM)
    return None if path is None else Program(QEMU_SYSTEM, (path, *_EMPTY_MACHINE), "-mon")


@dataclass(frozen=True)
class Server:
    """A running daemon with a monitor on ``socket``.

    :param start_seconds: from the start of the process to its greeting.
    """

    process: subprocess.Popen[bytes]
    socket: Path
    start_seconds: float

    def resident_memory(self) -> int:
        """Return the resident set in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def processor_seconds(self) -> float:
        """Return the processor time that the process has had, all threads together, in seconds."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(program: Program) -> Iterator[Server]:
    """Start *program* with a monitor, and end it at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        path = Path(directory, "qmp.sock")
        start = time.perf_counter()
        process = subprocess.Popen(
            [
                *program.command,
                "--chardev",
                f"socket,id=mon,path={path},server=on,wait=off",
                program.monitor,
                "chardev=mon,mode=control",
            ]
        )
        try:
            _wait_for_greeting(process, path)
            yield Server(process, path, time.perf_counter() - start)
        finally:
            process.kill()
            process.wait()


def _wait_for_greeting(process: subprocess.Popen[bytes], path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(PATIENCE)
                client.connect(str(path))
                client.recv(4096)
                return
        except (FileNotFoundError, ConnectionRefusedError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{process.args!r} does not serve {path}") from None
            time.sleep(0.001)


class Loader:
    """A load process (``load.py``) connected to the monitor at *path*."""

    def __init__(self, path: Path) -> None:
        script = Path(__file__).with_name("load.py")
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(script), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, template: str, count: int, *, first: int = 0, pipelined: bool = False) -> float:
        """Have *count* commands sent and return commands a second."""
        request = {"template": template, "first": first, "count": count, "pipelined": pipelined}
        return float(count / self._answer(request)["seconds"])

    def latencies(self, command: str, lasting: float, pause: float) -> list[float]:
        """Have *command* sent for *lasting* seconds, a *pause* after each reply; return what each took."""
        request = {"template": command, "lasting": lasting, "pause": pause}
        taken: list[float] = self._answer(request)["latencies"]
        return taken

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the load process gave up on {request['template']}")
        answered: dict[str, Any] = json.loads(answer)
        return answered

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
