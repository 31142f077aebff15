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
from qmpd.sockets import listen_on

_logger = logging.getLogger(__name__)

_BACKLOG: Final = 1024
#: Who may connect to a UNIX socket: the daemon's own user.  What is behind it was behind a key.
_MODE: Final = 0o600
#: Seconds to wait before accepting again when there are no descriptors left.
_BREATH: Final = 0.1
#: Seconds for which all clients together may keep the rest of the daemon waiting.
_TURN: Final = 0.002
#: Bytes of data that the requests of all clients together may hold.
_BUDGET: Final = 32 << 20
#: <sys/un.h>: the size of sun_path.
_PATH_SIZE: Final = 108
_OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
#: Bytes that the kernel buffers on a UNIX socket: a piece of data should fit.
_SOCKET_BUFFER: Final = 1 << 20


class NBDServer:
    """Serves its `exports` to whoever connects.

    :param max_connections: so many clients are served at once; others wait until one leaves.
        0 for no limit.
    :param handshake_seconds: a client that has not taken up an export by then is disconnected.
        0 for no limit.
    :param tls: with it a client has to start TLS before anything else.
    """

    def __init__(
        self,
        *,
        max_connections: int = 0,
        handshake_seconds: float = 10,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.handshake_seconds = handshake_seconds
        self.tls = tls
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
        #: Where all clients receive: each has it only until it has looked at what came.
        self.space = memoryview(bytearray(BUFFER_SIZE))
        self.budget = Budget(_BUDGET)
        #: Path, device and inode of the socket's file, which is removed in the end.
        self._made: tuple[str, int, int] | None = None

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
        path: str = address["path"]
        abstract = bool(address.get("abstract"))
        if len(os.fsencode(path)) > _PATH_SIZE - abstract:
            raise Error(f"UNIX socket path '{path}' is too long")
        listener = socket.socket(socket.AF_UNIX)
        self._listeners.append(listener)
        listener.setblocking(False)
        try:
            if abstract:
                name = "\0" + path
                listener.bind(name if address.get("tight", True) else name.ljust(_PATH_SIZE, "\0"))
            else:
                _make_room(path)
                # Linux gives the file the socket's mode, so that it is never open to others.
                os.fchmod(listener.fileno(), _MODE)
                listener.bind(path)
                made = os.lstat(path)
                self._made = path, made.st_dev, made.st_ino
            listener.listen(_BACKLOG)
        except OSError as error:
            raise Error(f"Failed to bind socket to {path}: {error.strerror}") from None

    async def _listen_inet(self, address: Mapping[str, Any]) -> None:
        host, port = address["host"], address["port"]
        families = {
            (True, False): socket.AF_INET,
            (False, True): socket.AF_INET6,
        }
        family = families.get((address.get("ipv4", False), address.get("ipv6", False)), socket.AF_UNSPEC)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host or None, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except socket.gaierror as error:
            raise Error(f"address resolution failed for {host}:{port}: {error.args[1]}") from None
        try:
            self._listeners += listen_on(found, _BACKLOG)
        except OSError as error:
            what = "find an available port" if error.errno == errno.EADDRINUSE else "bind socket"
            raise Error(f"Failed to {what}: {error.strerror}") from None

    async def _listen_vsock(self, address: Mapping[str, Any]) -> None:
        listener = socket.socket(socket.AF_VSOCK)
        self._listeners.append(listener)
        listener.setblocking(False)
        try:
            listener.bind((int(address["cid"]), int(address["port"])))
            listener.listen(_BACKLOG)
        except ValueError:
            raise Error(f"Failed to parse cid '{address['cid']}' or port '{address['port']}'") from None
        except OSError as error:
            raise Error(f"Failed to bind socket: {error.strerror}") from None

    async def _listen_fd(self, address: Mapping[str, Any]) -> None:
        name: str = address["str"]
        try:
            listener = socket.socket(fileno=os.dup(int(name)))
        except (OSError, ValueError):
            raise Error(f"File descriptor '{name}' is not a socket") from None
        listener.setblocking(False)
        self._listeners.append(listener)
        try:
            listener.listen(_BACKLOG)
        except OSError as error:
            raise Error(f"Failed to listen on fd socket: {error.strerror}") from None

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
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
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


def _make_room(path: str) -> None:
    """Remove what stands where a socket is to be made.

    QEMU removes any file.  Here it has to be a socket or empty, so that a slip of the pen costs
    nobody a disk image.

    :raise Error: if it has contents.
    """
    try:
        there = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISREG(there.st_mode) and there.st_size:
        raise Error(f"Failed to bind socket to {path}: there is a file that is not empty")
    os.unlink(path)
