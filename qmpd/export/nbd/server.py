"""An NBD server: listening sockets, its clients and its exports."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
import stat
from collections.abc import Mapping
from contextlib import suppress
from time import perf_counter
from typing import Any, Final

from qmpd.errors import Error
from qmpd.export.nbd.budget import Budget
from qmpd.export.nbd.connection import Connection
from qmpd.export.nbd.export import NBDExport
from qmpd.export.nbd.handshake import Offer
from qmpd.export.nbd.transmission import BUFFER_SIZE
from qmpd.sockets import (
    PATH_SIZE,
    descriptor_number,
    encoded,
    listen_on,
    make_room,
    resolve,
    vsock_address,
)

_logger = logging.getLogger(__name__)

_BACKLOG: Final = 1024
#: Who may connect to a UNIX socket: the daemon's own user.  What is behind it was behind a key.
_MODE: Final = 0o600
#: Seconds to wait before accepting again when there are no descriptors left.
_BREATH: Final = 0.1
#: Seconds for which all clients together may keep the rest of the daemon waiting.
_TURN: Final = 0.002
#: Seconds for which the loop stays awake for the next request; QEMU's I/O threads poll as long by default.
_WATCH: Final = 50e-6
#: Bytes of data that the requests of all clients together may hold.
_BUDGET: Final = 32 << 20
_OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
#: Bytes that the kernel buffers on a UNIX socket: a piece of data should fit.
_SOCKET_BUFFER: Final = 1 << 20


class NBDServer:
    """Serves its `exports` to whoever connects.

    :param max_connections: so many clients are served at once; others wait until one leaves.
        0 for no limit.
    :param handshake_seconds: a client that has not taken up an export by then is disconnected.
        0 for no limit.
    """

    def __init__(
        self,
        *,
        max_connections: int = 0,
        handshake_seconds: float = 10,
    ) -> None:
        self.handshake_seconds = handshake_seconds
        #: With it a client has to start TLS before anything else.
        self.tls: ssl.SSLContext | None = None
        #: By name, oldest first.
        self.exports: dict[str, NBDExport] = {}
        self._max_connections = max_connections
        self._connections: set[Connection] = set()
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._place = asyncio.Event()
        self._place.set()
        #: Clients that are between accept(2) and `joined`.
        self._entering = 0
        self._turn_ends = 0.0
        #: Seconds for which the loop stays awake; on a single processor it would keep the client waiting.
        self._watch = _WATCH if len(os.sched_getaffinity(0)) > 1 else 0.0
        self._watching = False
        self._awake_until = 0.0
        #: Where all clients receive: each has it only until it has looked at what came.
        self.space = memoryview(bytearray(BUFFER_SIZE))
        self.budget = Budget(_BUDGET)
        #: Path, device and inode of the socket's file, which is removed in the end.
        self._made: tuple[bytes, int, int] | None = None
        #: Whether the kernel asks after clients that have been silent for long.
        self._keep_alive = True

    def offers(self) -> Mapping[str, Offer]:
        """The exports as clients hear of them, oldest first."""
        return {name: export.offer() for name, export in self.exports.items()}

    @property
    def addresses(self) -> list[Any]:
        """What the listening sockets are bound to, as `socket.getsockname` says it."""
        return [listener.getsockname() for listener in self._listeners]

    # -- beginning

    async def listen(self, address: Mapping[str, Any]) -> None:
        """Let clients come in.

        :param address: a SocketAddressLegacy: `type` and `data`; or a SocketAddress, which is flat.
        :raise Error: in QEMU's words; then nothing is left behind.
        """
        data = address.get("data", address)
        try:
            await _LISTEN[address["type"]](self, data)
        except BaseException:
            self._close_listeners()
            raise
        for listener in self._listeners:
            self._accepting.append(asyncio.create_task(self._accept_all(listener)))

    async def _listen_unix(self, address: Mapping[str, Any]) -> None:
        # Without a name it is one that nobody else has thought of; `query-block` tells it.
        path: str = address["path"]
        abstract = bool(address.get("abstract"))
        if not path and not abstract:
            path = f"{os.environ.get('TMPDIR', '/tmp')}/qmpd-socket-{os.urandom(8).hex()}"
        name = encoded(path)
        # Linux takes one byte more for a name in the file system, and Python doesn't.
        if len(name) >= PATH_SIZE:
            raise Error(f"UNIX socket path '{path}' is too long")
        listener = socket.socket(socket.AF_UNIX)
        self._listeners.append(listener)
        listener.setblocking(False)
        if not abstract:
            make_room(name)
        try:
            if abstract:
                name = b"\0" + name
                listener.bind(name if address.get("tight", True) else name.ljust(PATH_SIZE, b"\0"))
            else:
                # Linux gives the file the socket's mode, so that it is never open to others.
                os.fchmod(listener.fileno(), _MODE)
                listener.bind(name)
                made = os.lstat(name)
                self._made = name, made.st_dev, made.st_ino
            listener.listen(_BACKLOG)
        except OSError as error:
            raise Error(f"Failed to bind socket to {path}: {error.strerror}") from None

    async def _listen_inet(self, address: Mapping[str, Any]) -> None:
        found = await resolve(
            address["host"],
            address["port"],
            numeric=address.get("numeric", False),
            ipv4=address.get("ipv4"),
            ipv6=address.get("ipv6"),
        )
        self._listeners += listen_on(
            found, _BACKLOG, last_port=address.get("to"), mptcp=address.get("mptcp", False)
        )
        self._keep_alive = address.get("keep-alive", True)

    async def _listen_vsock(self, address: Mapping[str, Any]) -> None:
        place = vsock_address(address["cid"], address["port"])
        try:
            listener = socket.socket(socket.AF_VSOCK)
        except OSError as error:
            raise Error(f"Failed to create socket: {error.strerror}") from None
        self._listeners.append(listener)
        listener.setblocking(False)
        try:
            listener.bind(place)
            listener.listen(_BACKLOG)
        except OSError as error:
            raise Error(f"Failed to bind socket: {error.strerror}") from None

    async def _listen_fd(self, address: Mapping[str, Any]) -> None:
        name: str = address["str"]
        passed: int | None = address.get("descriptor")
        number = descriptor_number(name) if passed is None else passed
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                raise OSError
            # If it can't be used, it stays as it is.
            listener = socket.socket(fileno=os.dup(number))
        except OSError:
            raise Error(f"File descriptor '{name}' is not a socket") from None
        listener.setblocking(False)
        self._listeners.append(listener)
        try:
            listener.listen(_BACKLOG)
        except OSError as error:
            raise Error(f"Failed to listen on fd socket: {error.strerror}") from None
        if passed is None:
            # From now on it is the server's, and nobody listens there any more when that has stopped.
            os.close(number)

    # -- clients

    async def _accept_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self._crowded:
                self._place.clear()
                await self._place.wait()
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL):
                    raise
                if error.errno in _OUT_OF_RESOURCES:
                    _logger.warning("no NBD client can be accepted: %s", error.strerror)
                    await asyncio.sleep(_BREATH)
                # Any other is an error of the client's network; the next one may do well.
                continue
            with suppress(OSError):
                if client.family == socket.AF_UNIX:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
                else:
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, self._keep_alive)
            self._entering += 1
            try:
                await loop.connect_accepted_socket(lambda: Connection(self), client)
            except OSError:
                client.close()
            finally:
                self._entering -= 1

    @property
    def _crowded(self) -> bool:
        limit = self._max_connections
        return bool(limit) and len(self._connections) + self._entering >= limit

    def joined(self, connection: Connection) -> None:
        """Take note of a client that is there now."""
        self._connections.add(connection)

    def left(self, connection: Connection) -> None:
        """Forget a client; another one may come in."""
        self._connections.discard(connection)
        self._place.set()

    def end_of_turn(self) -> float:
        """Until when, on `perf_counter`, requests may be begun in this turn of the event loop.

        All clients share it, so that the monitor's are not kept waiting the longer the more
        there are.  Who comes too late is the first in the next turn.
        """
        if not self._turn_ends:
            self._turn_ends = perf_counter() + _TURN
            asyncio.get_running_loop().call_soon(self._next_turn)
        return self._turn_ends

    def expect_requests(self) -> None:
        """Look again and again for what comes, for a moment: who was just answered often asks at once.

        Going to sleep and being woken up takes longer than that, on a virtual machine most of all.
        """
        self._awake_until = perf_counter() + self._watch
        if self._watch and not self._watching:
            self._watching = True
            asyncio.get_running_loop().call_soon(self._stay_awake)

    def _stay_awake(self) -> None:
        self._watching = perf_counter() < self._awake_until
        if self._watching:
            # A loop that has something to call does not sleep.
            asyncio.get_running_loop().call_soon(self._stay_awake)

    def _next_turn(self) -> None:
        self._turn_ends = 0.0

    # -- the end

    async def close(self, *, keep_file: bool = False) -> None:
        """Let nobody in any more, part from the clients, remove the socket's file.

        :param keep_file: leave the file behind, as QEMU does at its exit.
        """
        if keep_file:
            self._made = None
        for task in self._accepting:
            task.cancel()
        if self._accepting:
            await asyncio.wait(self._accepting)
        self._accepting.clear()
        self._close_listeners()
        if self._connections:
            await asyncio.wait([asyncio.ensure_future(one.shut()) for one in self._connections])

    def _close_listeners(self) -> None:
        if self._made is not None:
            path, *identity = self._made
            self._made = None
            with suppress(OSError):
                there = os.lstat(path)
                if [there.st_dev, there.st_ino] == identity:
                    os.unlink(path)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()


_LISTEN: Final[Mapping[str, Any]] = {
    "unix": NBDServer._listen_unix,
    "inet": NBDServer._listen_inet,
    "vsock": NBDServer._listen_vsock,
    "fd": NBDServer._listen_fd,
}
