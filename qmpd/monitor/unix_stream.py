"""Clients on UNIX sockets, who can pass descriptors along with their bytes.

asyncio's transports and uvloop's read with recv(2), which throws away what came
along (unix(7), SCM_RIGHTS).  So this one reads with recvmsg(2), and is otherwise
like theirs.

However many descriptors a client passes with one message, there is only room for
the first, which is the one that counts; the kernel closes the others
(MSG_CTRUNC), so that no client can fill the daemon's table with them.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from typing import Any, Final, Protocol

from qmpd.monitor.stream import CHUNK, DescriptorStream

#: Room for one descriptor.  CMSG_SPACE would round up, to room for two.
_ROOM: Final = socket.CMSG_LEN(4)
#: Bytes that are received at once unless there are more.
_SMALL: Final = 4096
#: What else a socket may be set to receive, which would take that room away: SO_PASSCRED, SO_PASSSEC and
#: SO_PASSPIDFD (socket(7), unix(7)).  A listening socket that was passed to the daemon hands it on.
_COMPANIONS: Final = (16, 34, 76)


class DescriptorProtocol(Protocol):
    """A protocol that takes descriptors: an asyncio.Protocol with one more method."""

    def descriptor_received(self, descriptor: int) -> None:
        """Take one, to be closed in the end; the bytes that it came with follow."""


class UnixStream(DescriptorStream):
    """A transport over a connected UNIX socket.

    :param protocol: is connected by :meth:`start`.  If it has a method `descriptor_received`
        (:class:`DescriptorProtocol`), it is given the descriptors.
    :param connection: is closed at the end.
    """

    def __init__(self, protocol: Any, connection: socket.socket) -> None:
        super().__init__(protocol, connection.fileno(), connection.fileno(), connection.send)
        self._connection = connection
        self._recvmsg = connection.recvmsg
        #: How much is received at once: most messages are small, and room for large ones takes time to make.
        self._size = _SMALL
        self._descriptor_received = getattr(protocol, "descriptor_received", os.close)
        connection.setblocking(False)
        for option in _COMPANIONS:
            with suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, option, 0)

    def _receive(self) -> bytes:
        data, ancillary, _, _ = self._recvmsg(self._size, _ROOM, socket.MSG_CMSG_CLOEXEC)
        self._size = CHUNK if len(data) == self._size else _SMALL
        if ancillary:
            ((_, _, descriptor),) = ancillary
            self._descriptor_received(int.from_bytes(descriptor, sys.byteorder))
        return data

    def _release(self) -> None:
        self._connection.close()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return the socket under `socket`; nothing else is known."""
        return self._connection if name == "socket" else default
