"""qmpd's command line in processes that have imported it already.

Starting Python and importing the daemon takes half a second of a processor, ten times as long as it takes
qmpd to refuse an option.  A :class:`Preloaded` has done both once, and gives every command line a fork of
itself, in which `main` runs as it does behind ``python -m qmpd``.  Tests of how the process starts and ends
do without.

Run as a program, this file is the process that is forked.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Final, Self

from daemons import CHECKOUT, PATIENCE


class Preloaded:
    """Processes with qmpd in them, one for each processor; a context manager.  Several threads may use it.

    :param program: the module with the program's `main`.
    """

    def __init__(self, program: str = "qmpd.cli.main") -> None:
        self._idle: queue.SimpleQueue[_Forker] = queue.SimpleQueue()
        self._forkers = [_Forker(program) for _ in range(os.cpu_count() or 1)]
        for forker in self._forkers:
            self._idle.put(forker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for forker in self._forkers:
            forker.close()

    def run(self, *arguments: str, directory: Path, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run qmpd to its end, with *text* on its standard input."""
        with self._one() as forker:
            return forker.run(arguments, directory, text)

    @contextmanager
    def _one(self) -> Iterator[_Forker]:
        forker = self._idle.get()
        try:
            yield forker
        finally:
            self._idle.put(forker)


class _Forker:
    def __init__(self, program: str) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, __file__, program, str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def run(self, arguments: Sequence[str], directory: Path, text: str) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as streams:
            stdin, stdout, stderr = (Path(streams, name) for name in ("stdin", "stdout", "stderr"))
            stdin.write_text(text)
            request = [list(arguments), *map(os.fspath, (directory, stdin, stdout, stderr))]
            self._socket.send(json.dumps(request).encode())
            status = int(self._socket.recv(16))
            return subprocess.CompletedProcess(
                list(arguments), os.waitstatus_to_exitcode(status), stdout.read_text(), stderr.read_text()
            )

    def close(self) -> None:
        self._socket.close()
        self._process.wait(PATIENCE)


#: A command line with its files, as JSON.
_REQUEST_MAX: Final = 1 << 16


def serve(requests: socket.socket) -> list[str]:
    """Fork for each request and tell how the fork ended.

    :returns: in a fork, qmpd's arguments; in the process itself, nothing, when nobody has requests any more.
    """
    while request := requests.recv(_REQUEST_MAX):
        process = os.fork()
        if not process:
            requests.close()
            return _become(*json.loads(request))
        _, status = os.waitpid(process, 0)
        requests.send(str(status).encode())
    return []


def _become(arguments: list[str], directory: str, *streams: str) -> list[str]:
    os.chdir(directory)
    for number, name in enumerate(streams):
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # One that hangs is killed.
    signal.alarm(int(PATIENCE))
    return arguments


def _program(program: str, descriptor: str) -> int:
    # What takes so long.  Not numpy, which starts threads that a fork would lose.
    import qmpd.cli.serve  # noqa: F401

    main = import_module(program).main
    given = serve(socket.socket(fileno=int(descriptor)))
    status: int = main(given) if given else 0
    return status


if __name__ == "__main__":
    sys.exit(_program(*sys.argv[1:]))
