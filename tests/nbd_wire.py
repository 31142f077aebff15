"""A small NBD client for tests: it sends what it is told to, right or wrong, and takes replies apart.

The names and numbers are those of the NBD protocol document.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

PATIENCE: Final = 20.0

IHAVEOPT: Final = b"IHAVEOPT"
REQUEST: Final = 0x25609513
EXTENDED_REQUEST: Final = 0x21E41C71
SIMPLE_REPLY: Final = 0x67446698
STRUCTURED_REPLY: Final = 0x668E33EF
EXTENDED_REPLY: Final = 0x6E8A278C

(EXPORT_NAME, ABORT, LIST, PEEK, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED) = range(1, 12)
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))


@dataclass(frozen=True)
class OptionReply:
    option: int
    kind: int
    data: bytes


@dataclass(frozen=True)
class Reply:
    """A simple reply (`kind` None), or one chunk."""

    cookie: int
    error: int = 0
    kind: int | None = None
    done: bool = True
    offset: int = 0
    data: bytes = b""


class Wire:
    """A connection to an NBD server.

    :param address: a UNIX path, or (host, port).
    :param flags: the client flags; None for stopping before them.
    """

    def __init__(self, address: Path | str | tuple[str, int], flags: int | None = 3) -> None:
        if isinstance(address, tuple):
            self.socket = socket.create_connection(address)
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(os.fspath(address))
        self.socket.settimeout(PATIENCE)
        self.structured = self.extended = False
        self.greeting = self.take(18)
        if flags is not None:
            self.send(struct.pack(">I", flags))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def take(self, length: int) -> bytes:
        """Receive exactly so many bytes.

        :raise EOFError: the server closed the connection.
        """
        data = b""
        while len(data) < length:
            try:
                received = self.socket.recv(length - len(data))
            except ConnectionResetError:
                received = b""
            if not received:
                raise EOFError(f"the server closed the connection after {data!r}")
            data += received
        return data

    def at_end(self) -> bool:
        """Whether the server closes the connection without another word."""
        try:
            return not self.socket.recv(1)
        except ConnectionResetError:
            return True

    # -- the handshake

    def send_option(self, option: int, data: bytes = b"", length: int | None = None) -> None:
        self.send(IHAVEOPT + struct.pack(">II", option, len(data) if length is None else length) + data)

    def option_reply(self) -> OptionReply:
        magic, option, kind, length = struct.unpack(">QIII", self.take(20))
        assert magic == 0x3E889045565A9, hex(magic)
        return OptionReply(option, kind, self.take(length))

    def option(self, option: int, data: bytes = b"", length: int | None = None) -> list[OptionReply]:
        """Send an option; return its replies up to the final one (ACK or an error)."""
        self.send_option(option, data, length)
        replies = [self.option_reply()]
        while replies[-1].kind not in (1,) and not replies[-1].kind & 1 << 31:
            replies.append(self.option_reply())
        return replies

    def negotiate(self, *, structured: bool = False, extended: bool = False) -> None:
        """Ask for structured replies or extended headers, which the server must have."""
        if structured:
            assert self.option(STRUCTURED)[-1].kind == 1
        if extended:
            assert self.option(EXTENDED)[-1].kind == 1
        self.structured, self.extended = structured, extended

    def go(self, name: str, requests: tuple[int, ...] = (3,), option: int = GO) -> list[OptionReply]:
        return self.option(
            option, name_data(name) + struct.pack(f">H{len(requests)}H", len(requests), *requests)
        )

    def meta(self, name: str, *queries: str, option: int = SET_META) -> list[OptionReply]:
        data = name_data(name) + struct.pack(">I", len(queries)) + b"".join(name_data(one) for one in queries)
        return self.option(option, data)

    # -- transmission

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
        *,
        flags: int = 0,
        cookie: int = 7,
        magic: int | None = None,
    ) -> None:
        if self.extended:
            header = struct.pack(">IHHQQQ", magic or EXTENDED_REQUEST, flags, command, cookie, offset, length)
        else:
            header = struct.pack(">IHHQQI", magic or REQUEST, flags, command, cookie, offset, length)
        self.send(header + data)

    def reply(self, length: int = 0) -> Reply:
        """Receive a simple reply (with `length` bytes if it is no error), or a chunk."""
        (magic,) = struct.unpack(">I", self.take(4))
        if magic == SIMPLE_REPLY:
            error, cookie = struct.unpack(">IQ", self.take(12))
            return Reply(cookie, error, data=b"" if error else self.take(length))
        if magic == STRUCTURED_REPLY:
            flags, kind, cookie, size = struct.unpack(">HHQI", self.take(16))
            offset = 0
        else:
            assert magic == EXTENDED_REPLY, hex(magic)
            flags, kind, cookie, offset, size = struct.unpack(">HHQQQ", self.take(28))
        data = self.take(size)
        error = struct.unpack_from(">I", data)[0] if kind & 0x8000 else 0
        return Reply(cookie, error, kind, bool(flags & 1), offset, data)

    def chunks(self) -> list[Reply]:
        """Receive chunks up to the one that says it is the last."""
        replies = [self.reply()]
        while not replies[-1].done:
            replies.append(self.reply())
        return replies

    def ask(
        self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", *, flags: int = 0
    ) -> Reply:
        """Send a request and return its only or last reply; simple READs come with their data."""
        self.request(command, offset, length, data, flags=flags)
        if self.structured or self.extended:
            return self.chunks()[-1]
        return self.reply(length if command == READ else 0)


def name_data(name: str) -> bytes:
    """A string with its length before it, as most options want it."""
    return struct.pack(">I", len(name.encode())) + name.encode()
