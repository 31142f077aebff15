"""Daemons for tests: a process, its monitor socket, and a client small enough to be above suspicion.

The client speaks QMP over a plain socket, line by line, which is all that a
daemon's *output* needs; what clients may send is the tests' own affair.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

#: Seconds after which a daemon that does not answer counts as hung.
PATIENCE: Final = 30.0

#: Seconds from a peer's socket to the first connection.
PEER_SETTLE: Final = 0.05

#: The checkout that these tests are part of: daemons run its code, wherever they run.
CHECKOUT: Final = Path(__file__).parent.parent

QMPD: Final = (sys.executable, "-m", "qmpd")
QMPD_SYSTEM: Final = (sys.executable, "-m", "qmpd.cli.system")
STORAGE_DAEMON: Final = ("qemu-storage-daemon",)
#: A machine of QEMU's.  What its `qemu-io` prints is not to wait in a buffer.
SYSTEM: Final = ("stdbuf", "--output=L", "qemu-system-x86_64")


class CommandError(Exception):
    """An error reply: ``error_class`` and ``desc`` as they came over the wire."""

    def __init__(self, command: str, error: Mapping[str, str]) -> None:
        super().__init__(f"{command}: {error['desc']}")
        self.error_class = error["class"]
        self.desc = error["desc"]


class Connection:
    """One client's connection to a QMP monitor on a UNIX socket.

    :param negotiate: take the greeting and send ``qmp_capabilities``.
    """

    def __init__(self, path: Path, *, negotiate: bool = True, patience: float = PATIENCE) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(patience)
        self.socket.connect(os.fspath(path))
        self._received = b""
        self.events: list[dict[str, Any]] = []
        self.greeting: dict[str, Any] | None = None
        if negotiate:
            self.greeting = self.receive()
            self.send(b'{"execute": "qmp_capabilities"}\n')
            # qemu-storage-daemon greets a client twice that connects while it is still starting.
            while "QMP" in (answer := self.receive()):
                pass
            assert answer == {"return": {}}, answer
        self.socket.settimeout(PATIENCE)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> dict[str, Any]:
        """Return the next message, whatever it is.

        :raise EOFError: the daemon closed the connection.
        :raise TimeoutError: nothing came.
        """
        while b"\n" not in self._received:
            received = self.socket.recv(1 << 16)
            if not received:
                raise EOFError("the daemon closed the connection")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def reply(self) -> dict[str, Any]:
        """Return the next message that is no event; events before it go to ``events``."""
        while "event" in (message := self.receive()):
            self.events.append(message)
        return message

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, passing: Sequence[int] = ()
    ) -> Any:
        """Run *command* and return what its reply returned.

        :param passing: descriptors that are sent along.
        :raise CommandError: the reply is an error.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments is not None:
            request["arguments"] = arguments
        line = json.dumps(request).encode() + b"\n"
        if passing:
            socket.send_fds(self.socket, [line], list(passing))
        else:
            self.send(line)
        reply = self.reply()
        if "error" in reply:
            raise CommandError(command, reply["error"])
        return reply["return"]

    def wait_event(self, name: str, **data: Any) -> dict[str, Any]:
        """Return the first event *name* whose data has these members, taking it off ``events``."""
        while True:
            for index, event in enumerate(self.events):
                if event["event"] == name and data.items() <= event["data"].items():
                    return self.events.pop(index)
            message = self.receive()
            assert "event" in message, f"a reply nobody asked for: {message}"
            self.events.append(message)

    def run_job(self, command: str, job: str, options: Mapping[str, Any]) -> str | None:
        """Run a job to its end, dismiss it, and return its error (None if it went well)."""
        self.execute(command, {"job-id": job, "options": options})
        self.wait_event("JOB_STATUS_CHANGE", id=job, status="concluded")
        (info,) = [entry for entry in self.execute("query-jobs") if entry["id"] == job]
        self.execute("job-dismiss", {"id": job})
        error: str | None = info.get("error")
        return error


class RunningDaemon:
    """A daemon with a monitor on ``socket``; its standard output and error go to files.

    :param program: what to run.
    :param arguments: what comes before the monitor's own options.
    :param directory: where it runs, and where socket and files are.
    """

    def __init__(
        self, program: Sequence[str], arguments: Sequence[str], directory: Path, name: str = "daemon"
    ) -> None:
        self.directory = directory
        self.socket = directory / f"{name}.sock"
        self.stdout = directory / f"{name}.stdout"
        self.stderr = directory / f"{name}.stderr"
        monitor = f"socket,id=mon,path={str(self.socket).replace(',', ',,')},server=on,wait=off"
        system = program in (SYSTEM, QMPD_SYSTEM)
        mode = ["-mon", "chardev=mon,mode=control"] if system else ["--monitor", "chardev=mon"]
        self.command = [*program, *arguments, "--chardev", monitor, *mode]
        with self.stdout.open("wb") as stdout, self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                self.command,
                cwd=directory,
                env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        try:
            self.monitor = self._first_connection()
        except BaseException:
            self.kill()
            raise

    def _first_connection(self) -> Connection:
        """Connect as soon as it listens.

        qemu-storage-daemon can lose track of a client that comes while it is still
        starting, so it gets a moment, and another connection if it falls silent.
        """
        deadline = time.monotonic() + PATIENCE
        is_peer = tuple(self.command[: len(QMPD)]) != QMPD
        while True:
            try:
                if is_peer and self.socket.exists():
                    time.sleep(PEER_SETTLE)
                return Connection(self.socket, patience=PATIENCE / 6 if is_peer else PATIENCE)
            except (TimeoutError, EOFError, ConnectionResetError, BrokenPipeError):
                if not is_peer or time.monotonic() > deadline:
                    raise
            except (FileNotFoundError, ConnectionRefusedError):
                if self.process.poll() is not None:
                    raise AssertionError(
                        f"{self.command} ended with {self.process.returncode}: {self.stderr.read_text()}"
                    ) from None
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def connect(self, *, negotiate: bool = True) -> Connection:
        """Open one more connection to the monitor (qemu-storage-daemon serves one at a time)."""
        return Connection(self.socket, negotiate=negotiate)

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, passing: Sequence[int] = ()
    ) -> Any:
        """Run a command on the first connection; see :meth:`Connection.execute`."""
        return self.monitor.execute(command, arguments, passing=passing)

    def qemu_io(self, target: str, command: str) -> str:
        """Run a qemu-io command on a node or device and return what it printed.

        The answer goes to the daemon's standard output, as QEMU does it; only
        errors of the set-up come back in the reply.
        """
        before = self.stdout.stat().st_size
        reply = self.execute("human-monitor-command", {"command-line": f'qemu-io {target} "{command}"'})
        with self.stdout.open("rb") as printed:
            printed.seek(before)
            return printed.read().decode() + str(reply)

    def node_names(self) -> set[str]:
        return {node["node-name"] for node in self.execute("query-named-block-nodes", {"flat": True})}

    def resident_memory(self) -> int:
        """Return the resident set in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) * 1024

    def open_files(self) -> list[str]:
        """Return what the process's descriptors stand for, in order of their names."""
        shown = []
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                shown.append(str(entry.readlink()))
            except FileNotFoundError:
                pass
        return sorted(shown)

    def assert_alive(self) -> None:
        """Fail unless a new command is answered and the log is free of tracebacks."""
        assert self.process.poll() is None, f"the daemon died: {self.stderr.read_text()}"
        self.execute("query-version")
        assert "Traceback" not in self.stderr.read_text()

    def quit(self) -> int:
        """Say ``quit`` and return the exit status."""
        self.execute("quit")
        self.monitor.close()
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        """End the process whatever state it is in."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if hasattr(self, "monitor"):
            self.monitor.close()


def emulator_replies(*commands: Mapping[str, Any]) -> list[Any]:
    """Return the replies of QEMU's emulator, without a machine, to commands that it takes."""
    requests = ({"execute": "qmp_capabilities"}, *commands, {"execute": "quit"})
    said = subprocess.run(
        [SYSTEM[-1], "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"],
        input="".join(map(json.dumps, requests)),
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    replies = [message["return"] for message in map(json.loads, said.splitlines()) if "return" in message]
    return replies[1:-1]


def wait_readable(sockets: Sequence[socket.socket], seconds: float = PATIENCE) -> list[socket.socket]:
    """Return those of *sockets* that have something to read.

    :raise TimeoutError: none had within *seconds*.
    """
    readable: list[socket.socket] = select.select(sockets, [], [], seconds)[0]
    if not readable:
        raise TimeoutError(f"none of {len(sockets)} sockets had anything to read")
    return readable
