"""The process: into the background, its pid file, and no core dumps.

``--daemonize`` forks before anything is opened.  The parent waits on a pipe:
a byte means that the daemon is ready, the pipe's end without one that the
start failed, whose reason the child has then written to the standard error
that both still share.

A pid file is locked for as long as the daemon lives, so that a second one with
the same file refuses to start; the lock goes with the process, whatever kills
it, and a file that is left over is no obstacle.
"""

from __future__ import annotations

import fcntl
import os
import resource
import struct
from pathlib import Path
from typing import Final

from qmpd.errors import Error

_READY: Final = b"\0"


class Daemonization:
    """A child process on its way into the background."""

    def __init__(self, report: int) -> None:
        self._report = report

    @classmethod
    def begin(cls) -> Daemonization:
        """Fork; return in the child only.

        The parent ends here, with status 0 once the child is ready and 1 if it
        never was.  Must be called before there are threads or an event loop.
        """
        readiness, report = os.pipe()
        if os.fork():
            os.close(report)
            ready = os.read(readiness, 1) == _READY
            # Not sys.exit(): whatever is buffered or registered belongs to the child as well.
            os._exit(0 if ready else 1)
        os.close(readiness)
        os.setsid()
        # Of a session leader's child nobody can become the controlling terminal.
        if os.fork():
            os._exit(0)
        # As qemu-storage-daemon does; what it keeps others from writing are sockets, above all.
        os.umask(0o027)
        return cls(report)

    def complete(self) -> None:
        """Cut the last ties to the terminal and let the parent go."""
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        if null > 2:
            os.close(null)
        try:
            os.write(self._report, _READY)
        except BrokenPipeError:
            pass  # somebody killed the parent, which is no reason to end too
        os.close(self._report)


class PidFile:
    """A locked file with this process's id; :meth:`remove` takes it away.

    :raise Error: in QEMU's words, if it cannot be written or a live process has it.
    """

    def __init__(self, path: str) -> None:
        while True:
            self._descriptor = _open_locked(path)
            try:
                named = os.stat(path)
            except FileNotFoundError:
                named = None
            if named is not None and os.path.samestat(named, os.fstat(self._descriptor)):
                break
            # Between the opening and the lock its last owner removed it: once more, with a new file.
            os.close(self._descriptor)
        # Absolute, because --daemonize changes the working directory.
        self.path = Path(path).absolute()
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def remove(self) -> None:
        """Remove the file, then the lock: in this order nobody locks a name that is about to go."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _open_locked(path: str) -> int:
    problem = "cannot create PID file: "
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Error(f"{problem}Could not create '{path}': {error.strerror}") from None
    # An open file description's lock survives other openings of the file in this process; struct flock with
    # length 0 is the whole file.
    whole_file = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole_file)
    except OSError as error:
        os.close(descriptor)
        raise Error(f"{problem}Cannot lock pid file: {error.strerror}") from None
    return descriptor


def forbid_core_dumps() -> None:
    """Keep passphrases and volume keys out of core files, and other processes out of our memory.

    Forked processes inherit it; an executed program starts without.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # Here and not above: ctypes is the slowest import of this file, and --version must not wait for it.
    import ctypes

    set_dumpable = 4  # PR_SET_DUMPABLE, <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_dumpable, 0, 0, 0, 0)


def allow_locked_memory() -> None:
    """Let as much memory be locked as this process may allow itself; its children inherit that."""
    most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    except OSError:
        pass  # a filter of system calls: what is allowed already will do
