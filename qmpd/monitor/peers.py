"""Who may connect to a UNIX socket, by the credentials that the kernel vouches for.

The socket's mode keeps others from connecting at all; the lists here are for what
a mode can't say (several users, several groups).  A peer is let in if its user is
listed, or one of its groups, supplementary ones included.  root and the user that the
daemon runs as are always let in: they could do to the daemon's files and memory
whatever they like anyway, and a list that locks out its own administrator would only be
replaced by none.

Credentials are those of the process that called connect(2) (or socketpair(2)), at that
moment: unix(7), SO_PEERCRED and SO_PEERGROUPS.
"""

from __future__ import annotations

import grp
import os
import pwd
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from qmpd.errors import Error

#: Not in Python's socket module; Linux 4.13, <asm-generic/socket.h>.
_SO_PEERGROUPS: Final = 59
_CREDENTIALS: Final = struct.Struct("iII")
#: Python reads at most 1024 bytes of an option.  Of a peer in more groups only the first one is known.
_MAXIMUM_GROUPS: Final = 256


class Credentials(NamedTuple):
    """The process at the other end of a UNIX socket.

    :param groups: its group and its supplementary groups.
    """

    process: int
    user: int
    groups: frozenset[int]


def credentials(connection: socket.socket) -> Credentials:
    """Ask the kernel who is at the other end of a UNIX socket.

    :raise OSError: if it does not know.
    """
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, group = _CREDENTIALS.unpack(packed)
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAXIMUM_GROUPS * 4)
    except OSError:
        packed = b""
    supplementary = struct.unpack(f"{len(packed) // 4}I", packed)
    return Credentials(process, user, frozenset((group, *supplementary)))


def _number(name: str, look_up: Callable[[str], int], what: str) -> int:
    if name.isascii() and name.isdecimal():
        return int(name)
    try:
        return look_up(name)
    except KeyError:
        raise Error(f"There is no {what} '{name}'") from None


def user_number(name: str) -> int:
    """The number of a user given by name or number.

    :raise Error: if there is no user of this name.
    """
    return _number(name, lambda one: pwd.getpwnam(one).pw_uid, "user")


def group_number(name: str) -> int:
    """The number of a group given by name or number.

    :raise Error: if there is no group of this name.
    """
    return _number(name, lambda one: grp.getgrnam(one).gr_gid, "group")


class Policy:
    """Lists of users and groups.

    :param users: names or numbers.
    :param groups: names or numbers.  If both lists are empty everybody may connect whom the
        socket's mode lets through.
    :raise Error: for a name that does not exist.
    """

    def __init__(self, users: Iterable[str] = (), groups: Iterable[str] = ()) -> None:
        self._users = frozenset(map(user_number, users))
        self._groups = frozenset(map(group_number, groups))

    def __bool__(self) -> bool:
        return bool(self._users or self._groups)

    def refusal(self, connection: socket.socket) -> str | None:
        """Say why a peer is kept out, for the log; None if it is let in."""
        if not self:
            return None
        try:
            peer = credentials(connection)
        except OSError as error:
            return f"its credentials are not known: {error.strerror}"
        always = {0, os.geteuid()}
        if peer.user in always or peer.user in self._users or peer.groups & self._groups:
            return None
        return f"process {peer.process} of user {peer.user} is in none of the lists"
