"""What qmpd and systemd say to each other, without libsystemd.

Sockets come as descriptors from 3 on, announced by the environment
(sd_listen_fds(3)); news goes back as datagrams to the socket that
``NOTIFY_SOCKET`` names (sd_notify(3)).  Started by hand, none of these
variables is set and everything here does nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Final

from qmpd.errors import Error

_FIRST_DESCRIPTOR: Final = 3  # SD_LISTEN_FDS_START


@dataclass(frozen=True)
class PassedSocket:
    """A listening socket from systemd.

    :param descriptor: its number in this process.
    :param name: its ``FileDescriptorName=``; empty if it has none.
    """

    descriptor: int
    name: str


def passed_sockets(environment: MutableMapping[str, str]) -> list[PassedSocket]:
    """Take the sockets that systemd passed to this process, and the variables that announced them.

    To be called once, in the process that systemd started (not after a fork).
    Descriptors that were meant for somebody else are not touched.

    :raise Error: one of them is not a stream socket that listens.
    """
    process = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if process != str(os.getpid()) or not count.isdecimal():
        return []
    passed = []
    for index in range(int(count)):
        descriptor = _FIRST_DESCRIPTOR + index
        name = names[index] if index < len(names) else ""
        if not _listens(descriptor):
            raise Error(
                f"LISTEN_FDS: descriptor {descriptor} ('{name}') is not a listening stream socket;"
                " the socket unit needs ListenStream= and Accept=no"
            )
        os.set_inheritable(descriptor, False)
        passed.append(PassedSocket(descriptor, name))
    return passed


def _listens(descriptor: int) -> bool:
    try:
        duplicate = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        return False
    with duplicate:
        return (
            duplicate.family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
            and duplicate.type == socket.SOCK_STREAM
            and duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        )


class Notifier:
    """The way to the service manager; silent if there is none.

    :param environment: ``NOTIFY_SOCKET`` and the watchdog's variables are read and removed.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        # '@' stands for the zero byte of an abstract address.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        timeout = environment.pop("WATCHDOG_USEC", "")
        process = environment.pop("WATCHDOG_PID", str(os.getpid()))
        watched = address and timeout.isdecimal() and process == str(os.getpid())
        #: Seconds after which the service manager wants to hear ``WATCHDOG=1``, halved to be on the safe
        #: side; None if it does not watch.
        self.watchdog_interval: float | None = int(timeout) / 2_000_000 if watched else None

    def __bool__(self) -> bool:
        return bool(self._address)

    def send(self, *assignments: str) -> None:
        """Send assignments such as ``READY=1`` in one datagram.

        A service manager that cannot be reached is no reason to fail, as in sd_notify(3).
        """
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            try:
                sender.sendto("\n".join(assignments).encode(), self._address)
            except OSError:
                pass
