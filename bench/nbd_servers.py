"""The NBD servers that are compared, and how each serves a chain on a UNIX socket."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from bench.chains import NBDKIT, Chain, filled
from bench.servers import PATIENCE, Program


class ServerFailed(Exception):
    """A server that does not serve, with what it said."""


def nbdkit() -> Program | None:
    """Return nbdkit, or None where it is not installed."""
    path = shutil.which(NBDKIT)
    return None if path is None else Program(NBDKIT, (path,))


@dataclass
class NbdServer:
    """A server of *chain* on *image*, started again whenever it has died.

    :param directory: where its sockets and its log are, its own.
    """

    program: Program
    chain: Chain
    image: Path
    directory: Path

    def __post_init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket = self.directory / "nbd.sock"
        self._log = self.directory / "log"
        self.monitor = self.directory / "qmp.sock"

    @property
    def uri(self) -> str:
        """The export's URI."""
        return f"nbd+unix:///?socket={self._socket}"

    @property
    def has_monitor(self) -> bool:
        """Whether it speaks QMP, on the socket ``monitor``."""
        return self.program.name != NBDKIT

    def command(self) -> list[str] | None:
        """Return the words that start it, or None if the program can't serve the chain."""
        if not self.has_monitor:
            if self.chain.nbdkit is None:
                return None
            words = filled(self.chain.nbdkit, image=str(self.image))
            return [*self.program.command, "--foreground", "--unix", str(self._socket), *words]
        node = filled(self.chain.blockdev, image=str(self.image)) | {"node-name": "disk"}
        return [
            *self.program.command,
            *(word for value in self.chain.objects for word in ("--object", value)),
            *("--blockdev", json.dumps(node)),
            *("--nbd-server", f"addr.type=unix,addr.path={self._socket}"),
            *("--export", "nbd,id=export,node-name=disk,name=,writable=on"),
            *("--chardev", f"socket,id=mon,path={self.monitor},server=on,wait=off"),
            *("--monitor", "chardev=mon"),
        ]

    def start(self) -> None:
        """Start it, unless it runs.

        :raise ServerFailed: it does not listen.
        """
        if self._process is not None and self._process.poll() is None:
            return
        command = self.command()
        if command is None:
            raise ServerFailed(f"{self.program.name} can't serve this chain")
        for path in (self._socket, self.monitor):
            path.unlink(missing_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ServerFailed(f"{self.program.name} does not serve this chain: {self.last_words()}")
            time.sleep(0.01)

    def _listens(self) -> bool:
        # The monitor is the last that qmpd and qemu-storage-daemon open.
        for path in (self._socket, *([self.monitor] if self.has_monitor else [])):
            with socket.socket(socket.AF_UNIX) as client:
                # qemu-storage-daemon may never greet a client that comes while it is still starting.
                client.settimeout(PATIENCE / 10)
                try:
                    client.connect(str(path))
                    if not client.recv(1):
                        return False
                except OSError:
                    return False
        return True

    def last_words(self) -> str:
        """Return the last line of its log."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return lines[-1] if lines else "it said nothing"

    def peak_memory(self) -> int:
        """Return the greatest resident set of the process so far (VmHWM), in bytes."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        if found is None:  # a process that has ended and is not waited for yet has no memory
            raise ServerFailed(f"{self.program.name} ended: {self.last_words()}")
        return int(found[1]) * 1024

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
