"""Run a command, and leave nothing behind of what it started: ``python reaper.py COMMAND [ARGUMENT]...``

libvirt's daemons, its emulators and their probes are *daemonized*: whoever started them is gone, and the
system's first process inherits them.  Here this process does (it is a "child subreaper", prctl(2)), which
serves two ends.  It takes note of their ends at once: libvirt waits until the process of a probe is gone,
and a first process of a container may take seconds for that.  And it knows them: when the command is done,
or this process is told to end, what is left of them is ended too, whatever it was.

The exit status is the command's.  It runs as a program of its own because reaping other people's
children is nothing for a process that has children for other reasons.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36

#: Seconds that processes have to end when they are asked to.
_COURTESY: Final = 3.0


class _Told(Exception):
    """This process is to end."""


def main(command: Sequence[str]) -> int:
    """Run *command*, reap, end what is left; return the command's exit status (from 128 on: a signal)."""
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_CHILD_SUBREAPER, 1), (_PR_SET_PDEATHSIG, signal.SIGTERM)):
        if libc.prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _told)
    status = 128 + signal.SIGTERM
    try:
        child = subprocess.Popen(command)
        while True:
            pid, raw = os.wait()
            if pid == child.pid:
                status = os.waitstatus_to_exitcode(raw)
                break
    except _Told:
        pass
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        _end_children()
    return status if status >= 0 else 128 - status


def _told(number: int, frame: object) -> None:
    raise _Told


def _end_children() -> None:
    """End all children, and those that become ours when these are gone, first politely, then not."""
    asked: set[int] = set()
    deadline = time.monotonic() + _COURTESY
    while children := _children():
        late = time.monotonic() > deadline
        for pid in children:
            if late or pid not in asked:
                _signal(pid, signal.SIGKILL if late else signal.SIGTERM)
                asked.add(pid)
        while _reaped():
            pass
        time.sleep(0.02)


def _children() -> list[int]:
    """Return the children of all this process's threads (there is one)."""
    return [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _reaped() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
