"""Character devices: the ways into a monitor, by QEMU's options and names.

A *socket* listens (`server`) or connects, on a UNIX path, an abstract UNIX name,
TCP, or a descriptor that somebody passed; *stdio* is one session on standard input
and output (:mod:`qmpd.monitor.stdio`); by *null* and *ringbuf* nobody ever comes in.
A character device is opened when its option comes, so that errors are told in the
options' order, and starts to serve when a monitor is attached to it.  QEMU serves one
client at a time on a listening socket; here each one is served.

A UNIX socket is made with mode 0600 (QEMU: whatever the umask leaves), and nobody
can connect with another mode for even a moment: Linux creates the file with the
mode that the socket itself has, and it is widened, if that is asked for, before
listen(2).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from qmpd.errors import Error
from qmpd.monitor import peers
from qmpd.monitor.server import ProtocolFactory
from qmpd.monitor.stdio import StandardStreams
from qmpd.monitor.unix_stream import UnixStream
from qmpd.sockets import PATH_SIZE, listen_on, make_room, resolve

_logger = logging.getLogger(__name__)

#: Told what a person who starts the daemon should know.
Announce = Callable[[str], None]

_DEFAULT_MODE: Final = 0o600
#: Connections that the kernel keeps until they are accepted (or net.core.somaxconn of them).  On UNIX
#: sockets a non-blocking connect(2) fails when they are used up, which few clients expect.
_BACKLOG: Final = 4096
#: Seconds to wait before accepting again when there are no descriptors left.
_BREATH: Final = 0.1

_OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True)
class ChardevConfig:
    """What a character device is to be.

    :param id: its name, QEMU's `label`.
    :param kind: `socket`, `stdio`, `null` or `ringbuf`.
    :param path: of a UNIX socket; an abstract one begins with a zero byte.
    :param host: of a TCP socket, a name or an address; empty for every address of this machine.
    :param port: a number or the name of a service; `0` for any that is free.
    :param server: listen, instead of connecting.
    :param wait: when listening, do not go on before a client has come.
    :param fd: a socket passed to this process, in place of an address.
    :param mode: of a UNIX socket's file; 0600 if it is not given.
    :param group: that is to own a UNIX socket's file, by name or number.
    :param users: names or numbers of those who may connect, beside root and the daemon's own user.
    :param groups: the same for groups.  With neither, the socket's mode alone decides.
    """

    id: str
    kind: str = "socket"
    path: str | None = None
    host: str | None = None
    port: str | None = None
    server: bool = False
    wait: bool = True
    fd: int | None = None
    mode: int | None = None
    group: str | None = None
    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


class Chardev(ABC):
    """One character device.

    :param config: what it is to be.
    """

    def __init__(self, config: ChardevConfig) -> None:
        self.config = config
        self._factory: ProtocolFactory | None = None

    @abstractmethod
    async def open(self, announce: Announce) -> None:
        """Make it ready to be attached to; to be closed even if it fails.

        :param announce: is told if there is something to wait for.
        :raise Error: in QEMU's words.
        """

    async def attach(self, factory: ProtocolFactory) -> None:
        """Let every client talk to a protocol of its own from now on.

        :raise Error: if something is attached already.
        """
        if self._factory is not None:
            raise Error(f"chardev '{self.config.id}' is already in use")
        self._factory = factory
        await self._serve()

    @abstractmethod
    async def _serve(self) -> None:
        """Begin with what there is to be served."""

    @abstractmethod
    async def close(self) -> None:
        """Let nobody else in, and remove what was made.  Clients are taken leave of by the monitor."""

    @abstractmethod
    def filename(self) -> str:
        """QEMU's description of the address and of who is connected."""

    def info(self) -> dict[str, Any]:
        """The entry in `query-chardev`.  `frontend-open` says whether a monitor is attached."""
        return {
            "frontend-open": self._factory is not None,
            "filename": self.filename(),
            "label": self.config.id,
        }


class StdioChardev(Chardev):
    """Standard input and output."""

    def __init__(self, config: ChardevConfig) -> None:
        super().__init__(config)
        self._streams: StandardStreams | None = None

    async def open(self, announce: Announce) -> None:
        """There is nothing to open."""

    async def _serve(self) -> None:
        assert self._factory is not None
        self._streams = StandardStreams(self._factory())
        self._streams.start()

    async def close(self) -> None:
        """Nothing more is read."""
        if self._streams is not None:
            self._streams.close()

    def filename(self) -> str:
        """Always the same."""
        return "stdio"


class EmptyChardev(Chardev):
    """Nobody is at its other end: `null`, and `ringbuf`, which keeps what nobody here writes."""

    async def open(self, announce: Announce) -> None:
        """There is nothing to open."""

    async def _serve(self) -> None:
        """No client ever comes."""

    async def close(self) -> None:
        """There is nothing to close."""

    def filename(self) -> str:
        """Its kind."""
        return self.config.kind


class SocketChardev(Chardev):
    """A UNIX or TCP socket, listening or connected.

    :raise Error: for a user or group that does not exist.
    """

    def __init__(self, config: ChardevConfig) -> None:
        super().__init__(config)
        self._policy = peers.Policy(config.users, config.groups)
        self._owner = None if config.group is None else peers.group_number(config.group)
        self._listeners: list[socket.socket] = []
        #: The client of a socket that connected, or that was waited for, until a monitor is attached.
        self._first: socket.socket | None = None
        self._accepting: list[asyncio.Task[None]] = []
        self._clients: dict[asyncio.BaseTransport, str] = {}
        self._address = ""
        #: Device and inode of the file that is to be removed.
        self._made: tuple[int, int] | None = None

    # Opening

    async def open(self, announce: Announce) -> None:
        """Listen, wait for a client if that is asked for, or connect."""
        config = self.config
        if config.fd is not None:
            self._take_over(config.fd)
        elif config.path is not None:
            self._address = "unix:" + _shown(config.path)
            if config.server:
                self._listen_unix(config.path)
            else:
                self._first = await self._connect(socket.AF_UNIX, config.path, config.path)
        else:
            await self._open_tcp(config.host or "", config.port or "")
        if self._policy and self._address.startswith("tcp:"):
            raise Error("'users' and 'groups' need a UNIX socket: TCP does not tell who a client is")
        if self._listeners and config.wait:
            announce(f"info: QEMU waiting for connection on: {self.filename()}")
            while self._first is None:
                self._first = await self._accept(self._listeners[0])

    def _take_over(self, descriptor: int) -> None:
        try:
            passed = socket.socket(fileno=descriptor)
        except (OSError, ValueError):
            raise Error(f"File descriptor '{descriptor}' is not a socket") from None
        passed.setblocking(False)
        name = passed.getsockname()
        if passed.family == socket.AF_UNIX:
            self._address = "unix:" + _shown(os.fsdecode(name))
        else:
            self._address = f"tcp:{name[0]}:{name[1]}"
        if self.config.server:
            self._listeners.append(passed)
            try:
                passed.listen(_BACKLOG)
            except OSError as error:
                raise Error(f"Failed to listen on fd socket: {error.strerror}") from None
        else:
            self._first = passed

    def _listen_unix(self, path: str) -> None:
        abstract = path.startswith("\0")
        if len(os.fsencode(path)) > (PATH_SIZE if abstract else PATH_SIZE - 1):
            raise Error(f"UNIX socket path '{path}' is too long\nPath must be less than {PATH_SIZE} bytes")
        if not abstract:
            make_room(path)
        listener = socket.socket(socket.AF_UNIX)
        self._listeners.append(listener)
        listener.setblocking(False)
        mode = _DEFAULT_MODE if self.config.mode is None else self.config.mode
        try:
            os.fchmod(listener.fileno(), mode & 0o700)
            listener.bind(path)
        except OSError as error:
            raise Error(f"Failed to bind socket to {path}: {error.strerror}") from None
        if not abstract:
            made = os.lstat(path)
            self._made = made.st_dev, made.st_ino
            try:
                if self._owner is not None:
                    os.chown(path, -1, self._owner)
                # The umask may have taken bits away, and the group is only now the right one.
                os.chmod(path, mode)
            except OSError as error:
                raise Error(f"Failed to set the mode of socket {path}: {error.strerror}") from None
        listener.listen(_BACKLOG)

    async def _open_tcp(self, host: str, port: str) -> None:
        found = await resolve(host, port, passive=self.config.server)
        if self.config.server:
            self._listen_tcp(found)
            return
        for number, (family, _, _, _, address) in enumerate(found, 1):
            try:
                self._first = await self._connect(family, address, f"{host}:{port}")
                break
            except Error:
                if number == len(found):
                    raise
        self._address = f"tcp:{host}:{port}"

    def _listen_tcp(self, found: list[Any]) -> None:
        self._listeners += listen_on(found, _BACKLOG)
        name = self._listeners[0].getsockname()
        self._address = f"tcp:{name[0]}:{name[1]}"

    async def _connect(self, family: int, address: Any, shown: str) -> socket.socket:
        connection = socket.socket(family)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, address)
        except OSError as error:
            connection.close()
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise Error(f"Failed to connect to '{shown}': {reason}") from None
        return connection

    # Serving

    async def _serve(self) -> None:
        if self._first is not None:
            first, self._first = self._first, None
            if self._admitted(first):
                await self._hand_over(first)
        for listener in self._listeners:
            self._accepting.append(asyncio.create_task(self._accept_all(listener)))

    def _admitted(self, connection: socket.socket) -> bool:
        refusal = self._policy.refusal(connection)
        if refusal is None:
            return True
        _logger.warning("chardev %s: a client was turned away: %s", self.config.id, refusal)
        connection.close()
        return False

    async def _accept(self, listener: socket.socket) -> socket.socket | None:
        """The next client, if it may come in.

        :raise OSError: if accepting fails for good.
        """
        try:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        except OSError as error:
            if error.errno in _OUT_OF_RESOURCES:
                _logger.warning("chardev %s: no client can be accepted: %s", self.config.id, error.strerror)
                await asyncio.sleep(_BREATH)
                return None
            if error.errno in (errno.EBADF, errno.EINVAL):
                raise
            # accept(2): an error of the client's network is delivered here; the next one may do well.
            return None
        return connection if self._admitted(connection) else None

    async def _accept_all(self, listener: socket.socket) -> None:
        while True:
            connection = await self._accept(listener)
            if connection is None:
                continue
            try:
                await self._hand_over(connection)
            except OSError:
                # It is gone already.
                connection.close()

    async def _hand_over(self, connection: socket.socket) -> None:
        assert self._factory is not None
        if connection.family == socket.AF_UNIX:
            description = self._address + self._options()
        else:
            with suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            here, there = connection.getsockname(), connection.getpeername()
            description = f"tcp:{_endpoint(here)}{self._options()} <-> {_endpoint(there)}"
        transport: asyncio.BaseTransport
        if connection.family == socket.AF_UNIX:
            transport = stream = UnixStream(self._factory(), connection)
            stream.start()
        else:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.connect_accepted_socket(self._factory, connection)
        self._forget_closed()
        self._clients[transport] = description

    @property
    def connected(self) -> bool:
        """Whether there is a client."""
        self._forget_closed()
        return bool(self._clients)

    def socket_address(self) -> dict[str, Any]:
        """Where it listens or what it is connected to (SocketAddress)."""
        if self._address.startswith("tcp:"):
            host, _, port = self._address.removeprefix("tcp:").rpartition(":")
            version = "ipv6" if ":" in host else "ipv4"
            return {"type": "inet", "host": host, "port": port, version: True}
        path = self.config.path or self._address.removeprefix("unix:")
        return {"type": "unix", "path": path.removeprefix("\0")}

    def _forget_closed(self) -> None:
        for transport in [one for one in self._clients if one.is_closing()]:
            del self._clients[transport]

    def _options(self) -> str:
        return ",server=on" if self.config.server else ""

    def filename(self) -> str:
        """The address; with several clients on TCP, the one that came last."""
        self._forget_closed()
        if self._clients:
            return list(self._clients.values())[-1]
        return f"disconnected:{self._address}{self._options()}"

    # Closing

    async def close(self) -> None:
        """Stop listening, and remove the socket's file if it is still the one that was made here.

        The file of a socket that was passed stays: whoever made it (systemd) may go on using it.
        """
        for task in self._accepting:
            task.cancel()
        if self._accepting:
            await asyncio.wait(self._accepting)
        self._accepting.clear()
        self._close_sockets()

    def _close_sockets(self) -> None:
        if self._made is not None:
            assert self.config.path is not None
            with suppress(OSError):
                there = os.lstat(self.config.path)
                if (there.st_dev, there.st_ino) == self._made:
                    os.unlink(self.config.path)
            self._made = None
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        if self._first is not None:
            self._first.close()
            self._first = None


def _shown(path: str) -> str:
    """A UNIX socket's path as QEMU shows it."""
    if not path.startswith("\0"):
        return path
    tight = "" if len(path) == PATH_SIZE else ",tight=on"
    return path.strip("\0") + ",abstract=on" + tight


def _endpoint(name: tuple[Any, ...]) -> str:
    """One end of a TCP connection as QEMU shows it."""
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


_KINDS: Final[dict[str, type[Chardev]]] = {
    "null": EmptyChardev,
    "ringbuf": EmptyChardev,
    "socket": SocketChardev,
    "stdio": StdioChardev,
}


class Chardevs:
    """All the character devices of a daemon.

    :param announce: is told what a person who starts the daemon should know.
    """

    def __init__(self, announce: Announce) -> None:
        self._announce = announce
        self._all: dict[str, Chardev] = {}

    async def add(self, config: ChardevConfig) -> Chardev:
        """Open a character device.

        :raise Error: if its id is taken, the kind does not exist, or it can't be opened; then nothing
            is left behind.
        """
        if config.id in self._all:
            raise Error(f"Chardev with id '{config.id}' already exists")
        if config.kind not in _KINDS:
            raise Error(f"'{config.kind}' is not a valid char driver name")
        if config.kind == "stdio" and any(one.config.kind == "stdio" for one in self._all.values()):
            raise Error("cannot use stdio by multiple character devices")
        chardev = _KINDS[config.kind](config)
        try:
            await chardev.open(self._announce)
        except BaseException:
            await chardev.close()
            raise
        self._all[config.id] = chardev
        return chardev

    def find(self, name: str) -> Chardev:
        """The character device of an id.

        :raise Error: if there is none.
        """
        try:
            return self._all[name]
        except KeyError:
            raise Error(f'chardev "{name}" not found') from None

    def query(self) -> list[dict[str, Any]]:
        """What `query-chardev` returns."""
        return [chardev.info() for chardev in self._all.values()]

    async def close(self) -> None:
        """Close all of them."""
        for chardev in self._all.values():
            await chardev.close()
        self._all.clear()
