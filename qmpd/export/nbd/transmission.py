"""The transmission phase: requests taken apart, replies put together; no I/O.

Sources: proto.md, sections "Transmission", "Metadata querying" and
"Transmission phase".

:class:`Requests` is where a transport puts what it receives: small things into
a buffer that all clients of a server share, and the rest of a long write straight
into the memory that is then handed on.  The three ways of replying are three
:class:`Dialect` objects with the same methods, so that nobody else has to ask
what was negotiated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Final, NamedTuple

from qmpd.block.buffers import unset
from qmpd.export.nbd import wire
from qmpd.export.nbd.budget import LEAST, Share
from qmpd.export.nbd.handshake import Agreement, Disconnect

#: Bytes of the buffer that requests come in by.
BUFFER_SIZE: Final = 128 << 10
#: When so many bytes of a write's payload are missing they are received where they belong.
_LONG: Final = 32 << 10

#: The ends of pieces of a payload are multiples of this many bytes.
_SECTORS: Final = 4096
#: Added to the command of a request whose payload follows in pieces; and the command of a piece.
#: On the wire a command has 16 bits.
LONG: Final = 1 << 16
PIECE_OF_LONG: Final = 1 << 17

#: Magic, flags, command, cookie, offset, length.
_REQUEST: Final = struct.Struct(">IHHQQI")
_EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")


class Request(NamedTuple):
    """What a client asks for.

    :param flags: the command's flags.
    :param cookie: comes back in the reply.
    :param offset: in bytes.
    :param length: in bytes.
    :param payload: the bytes that came with it.
    """

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    payload: memoryview


class RequestError(Exception):
    """A request is refused.

    :param number: the error on the wire.
    """

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class TooLong(Exception):
    """A request's payload is longer than any may be; nothing can be read after it."""

    def __init__(self, request: Request) -> None:
        super().__init__(f"len ({request.length}) is larger than max len ({wire.MAX_PAYLOAD})")
        self.request = request


_NOTHING: Final = memoryview(b"")


class Requests:
    """Turns the bytes of one client into requests.

    :param extended: the client uses extended headers.
    :param received: bytes that came too early.
    :param space: where bytes are received, :data:`BUFFER_SIZE` of them.  It may be shared: from
        `get_buffer` to `settle` it is this object's, in between it is anybody's.
    :param share: what payloads are taken from; without it there is no limit.

    A payload for which there is no room at once, or which is longer than a piece, comes in
    several requests: one with the command :data:`LONG` added, without any of the payload, then as
    many :data:`PIECE_OF_LONG` as it takes, each with the place of its part.
    """

    def __init__(
        self,
        *,
        extended: bool,
        received: bytes = b"",
        space: memoryview | None = None,
        share: Share | None = None,
    ) -> None:
        self._header, self._magic = (
            (_EXTENDED_REQUEST, wire.EXTENDED_REQUEST_MAGIC) if extended else (_REQUEST, wire.REQUEST_MAGIC)
        )
        self._extended = extended
        self._space = memoryview(bytearray(BUFFER_SIZE)) if space is None else space
        self._share = share
        #: What has come and was not taken out: `_buffer` from `_start` to `_end`.
        self._buffer = memoryview(received)
        self._start, self._end = 0, len(received)
        #: The request whose payload is being received, and the part that is missing.
        self._request: Request | None = None
        self._missing = _NOTHING
        #: What is to come of a long payload, after the piece that is being received.
        self._rest: Request | None = None
        #: Whether nothing more can be received until the client's requests have given memory back.
        self.starved = False

    def get_buffer(self) -> memoryview:
        """Where the next bytes are to go.  Never empty, unless this is `full`."""
        self.settle()
        if self._start == self._end:
            return self._missing if len(self._missing) >= _LONG else self._space
        waiting = self._end - self._start
        self._space[:waiting] = self._buffer[self._start : self._end]
        return self._space[waiting:]

    def buffer_updated(self, length: int) -> None:
        """So many bytes were put where :meth:`get_buffer` said."""
        waiting = self._end - self._start
        if not waiting and len(self._missing) >= _LONG:
            self._missing = self._missing[length:]
        else:
            self._buffer, self._start, self._end = self._space, 0, waiting + length

    def settle(self) -> None:
        """Leave the space to others; what was not taken out is kept elsewhere."""
        if self._buffer is self._space:
            self._buffer = memoryview(bytes(self._space[self._start : self._end]))
            self._start, self._end = 0, self._end - self._start

    @property
    def full(self) -> bool:
        """Whether there is no room before something is taken out."""
        return self._end - self._start >= len(self._space)

    def next(self) -> Request | None:
        """The next request, or None until more bytes have come, or, if `starved`, more memory is free.

        :raise Disconnect: if this is no NBD request.
        :raise TooLong: if its payload is too long.
        """
        request = self._request
        if request is None:
            if self._rest is not None:
                request = self._next_piece(self._rest)
                if request is None:
                    return None
            else:
                start = self._start
                header = self._header
                if self._end - start < header.size:
                    return None
                magic, flags, command, cookie, offset, length = header.unpack_from(self._buffer, start)
                if magic != self._magic:
                    raise Disconnect(f"a request with the magic {magic:#x}")
                self._start = start + header.size
                has_payload = command == wire.CMD_WRITE or (
                    self._extended and flags & wire.CMD_FLAG_PAYLOAD_LEN
                )
                if not has_payload or not length:
                    return Request(flags, command, cookie, offset, length, _NOTHING)
                if length > wire.MAX_PAYLOAD:
                    raise TooLong(Request(flags, command, cookie, offset, length, _NOTHING))
                share = self._share
                if share is not None:
                    if length > share.room:
                        self._rest = Request(flags, PIECE_OF_LONG, cookie, offset, length, _NOTHING)
                        return Request(flags, LONG | command, cookie, offset, length, _NOTHING)
                    share.take(length)
                self._missing = unset(length)
                request = Request(flags, command, cookie, offset, length, self._missing)
            self._request = request
        missing = self._missing
        if missing:
            there = min(len(missing), self._end - self._start)
            missing[:there] = self._buffer[self._start : self._start + there]
            self._start += there
            self._missing = missing[there:]
            if there < len(missing):
                return None
        self._request = None
        return request

    def _next_piece(self, rest: Request) -> Request | None:
        assert self._share is not None
        length = rest.length
        room = self._share.room
        if length > room:
            # Very small pieces cost more than waiting; and none should end in the middle of a sector.
            length = room - (rest.offset + room) % _SECTORS if room >= LEAST else 0
        self.starved = not length
        if self.starved:
            return None
        self._share.take(length)
        left = rest.length - length
        self._rest = rest._replace(offset=rest.offset + length, length=left) if left else None
        self._missing = unset(length)
        return rest._replace(length=length, payload=self._missing)

    def drop(self) -> None:
        """Give back the memory of a payload of which not all has come."""
        if self._request is not None:
            if self._share is not None:
                self._share.give(len(self._request.payload))
            self._request = None
        self._rest, self._missing, self._buffer = None, _NOTHING, _NOTHING
        self._start = self._end = 0


class LongWrite:
    """A write whose payload comes in pieces, each of which is written as soon as it is there.

    :param request: the one that it began with, as the client sent it.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        #: On `perf_counter_ns`.
        self.began = perf_counter_ns()
        #: Bytes that are still to come, and pieces that are being written.
        self.missing = request.length
        self.under_way = 0
        #: What went wrong first; nothing is written any more.
        self.failure: Exception | None = None

    def fail(self, failure: Exception) -> None:
        """Note what went wrong, unless something had before."""
        if self.failure is None:
            self.failure = failure

    @property
    def done(self) -> bool:
        """Whether it can be answered."""
        return not self.missing and not self.under_way


# -- what a request may be


@dataclass(frozen=True)
class _Command:
    """What a command's request may look like.

    :param flags: those that it takes.
    :param writes: it changes the export.
    :param moves_data: `length` bytes go over the wire, or through memory.
    :param whole_disk: it has no offset and length.
    """

    name: str
    flags: int
    writes: bool = False
    moves_data: bool = False
    whole_disk: bool = False


_COMMANDS: Final[Mapping[int, _Command]] = {
    wire.CMD_READ: _Command("read", wire.CMD_FLAG_FUA | wire.CMD_FLAG_DF, moves_data=True),
    wire.CMD_WRITE: _Command(
        "write", wire.CMD_FLAG_FUA | wire.CMD_FLAG_PAYLOAD_LEN, writes=True, moves_data=True
    ),
    wire.CMD_FLUSH: _Command("flush", wire.CMD_FLAG_FUA, whole_disk=True),
    wire.CMD_TRIM: _Command("trim", wire.CMD_FLAG_FUA, writes=True),
    wire.CMD_CACHE: _Command("cache", wire.CMD_FLAG_FUA, moves_data=True),
    wire.CMD_WRITE_ZEROES: _Command(
        "write zeroes",
        wire.CMD_FLAG_FUA | wire.CMD_FLAG_NO_HOLE | wire.CMD_FLAG_FAST_ZERO,
        writes=True,
    ),
    wire.CMD_BLOCK_STATUS: _Command("block status", wire.CMD_FLAG_FUA | wire.CMD_FLAG_REQ_ONE),
}


def check(request: Request, agreement: Agreement, size: int, *, writable: bool) -> None:
    """See whether a request may be served (section "Request types").

    :param size: the export's size in bytes.
    :raise RequestError: if not.
    """
    command = _COMMANDS.get(request.command)
    if command is None:
        raise RequestError(wire.EINVAL, f"invalid request type ({request.command}) received")
    known = command.flags
    if not agreement.structured:
        known &= ~wire.CMD_FLAG_DF
    if not agreement.extended:
        known &= ~wire.CMD_FLAG_PAYLOAD_LEN
    if request.flags & ~known:
        raise RequestError(
            wire.EINVAL, f"unsupported flags for command {command.name} (got {request.flags:#x})"
        )
    if command.whole_disk:
        return
    offset, length = request.offset, request.length
    if command.moves_data and length > wire.MAX_PAYLOAD:
        raise RequestError(wire.EINVAL, f"len ({length}) is larger than max len ({wire.MAX_PAYLOAD})")
    if command.writes and not writable:
        raise RequestError(wire.EPERM, "Export is read-only")
    if request.command == wire.CMD_BLOCK_STATUS:
        if not length:
            raise RequestError(wire.EINVAL, "need non-zero length")
        if not agreement.contexts:
            raise RequestError(wire.EINVAL, "CMD_BLOCK_STATUS not negotiated")
    if offset + length > size:
        # Section "Error values" would have ENOSPC for writes; QEMU's clients hear this.
        raise RequestError(
            wire.EINVAL,
            f"operation past EOF; From: {offset}, Len: {length}, Size: {size}",
        )


# -- replies

_SIMPLE: Final = struct.Struct(">IIQ")
#: Magic, flags, type, cookie, length; and the same with the beginning of the payload.
_CHUNK: Final = struct.Struct(">IHHQI")
_CHUNK_OFFSET: Final = struct.Struct(">IHHQIQ")
#: Magic, flags, type, cookie, offset, length.
_EXTENDED: Final = struct.Struct(">IHHQQQ")
_EXTENDED_OFFSET: Final = struct.Struct(">IHHQQQQ")
#: Offset, length.
_HOLE: Final = struct.Struct(">QI")
_ERROR: Final = struct.Struct(">IH")

#: Runs of equal status: (length in bytes, flags).
Extents = Iterable[tuple[int, int]]


class Dialect:
    """How replies are put together; this is the one of simple replies (section "Simple reply message")."""

    #: Whether a read may be answered in several pieces.
    in_pieces = False
    #: The longest extent that a status reply can say, in bytes.
    longest_extent = 0

    def data(self, request: Request, offset: int, length: int, *, done: bool = True) -> bytes:
        """What goes before `length` bytes read at `offset`."""
        return _SIMPLE.pack(wire.SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """A chunk of a read in pieces: `length` bytes at `offset` are zeroes."""
        raise NotImplementedError

    def success(self, request: Request) -> bytes:
        """The whole reply to a request that went well and returns nothing."""
        return _SIMPLE.pack(wire.SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def error(self, request: Request, number: int, text: str = "") -> bytes:
        """The whole reply, or the last chunk, of a request that failed.

        :param number: the error on the wire.
        :param text: for people.
        """
        return _SIMPLE.pack(wire.SIMPLE_REPLY_MAGIC, number, request.cookie)

    def status(self, request: Request, context: int, extents: Extents, *, done: bool) -> bytes:
        """A chunk with the runs of a metadata context from the request's offset on."""
        raise NotImplementedError


class StructuredDialect(Dialect):
    """Chunks (section "Structured reply chunk message")."""

    in_pieces = True
    longest_extent = (1 << 32) - (1 << 16)
    _extent: struct.Struct = struct.Struct(">II")

    def data(self, request: Request, offset: int, length: int, *, done: bool = True) -> bytes:
        """The header of an OFFSET_DATA chunk, or all of a read of nothing."""
        if not length:
            return self._chunk(request, wire.REPLY_TYPE_NONE, b"", done=done)
        return _CHUNK_OFFSET.pack(
            wire.STRUCTURED_REPLY_MAGIC,
            wire.REPLY_FLAG_DONE if done else 0,
            wire.REPLY_TYPE_OFFSET_DATA,
            request.cookie,
            length + 8,
            offset,
        )

    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """An OFFSET_HOLE chunk: `length` bytes at `offset` are zeroes."""
        return self._chunk(request, wire.REPLY_TYPE_OFFSET_HOLE, _HOLE.pack(offset, length), done=done)

    def success(self, request: Request) -> bytes:
        """A read is answered by chunks; all else may have a simple reply, which is shorter."""
        return _SIMPLE.pack(wire.SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def error(self, request: Request, number: int, text: str = "") -> bytes:
        """An ERROR chunk, the last one."""
        explained = text.encode()[: wire.MAX_STRING]
        data = _ERROR.pack(number, len(explained)) + explained
        return self._chunk(request, wire.REPLY_TYPE_ERROR, data, done=True)

    def status(self, request: Request, context: int, extents: Extents, *, done: bool) -> bytes:
        """A BLOCK_STATUS chunk."""
        runs = b"".join(self._extent.pack(*extent) for extent in extents)
        data = context.to_bytes(4, "big") + runs
        return self._chunk(request, wire.REPLY_TYPE_BLOCK_STATUS, data, done=done)

    def _chunk(self, request: Request, kind: int, data: bytes, *, done: bool) -> bytes:
        flags = wire.REPLY_FLAG_DONE if done else 0
        return _CHUNK.pack(wire.STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, len(data)) + data


class ExtendedDialect(StructuredDialect):
    """Chunks with extended headers (the same section): every reply is one, and repeats the offset."""

    longest_extent = (1 << 63) - 1
    _extent = struct.Struct(">QQ")

    def data(self, request: Request, offset: int, length: int, *, done: bool = True) -> bytes:
        """The header of an OFFSET_DATA chunk, or all of a read of nothing."""
        if not length:
            return self._chunk(request, wire.REPLY_TYPE_NONE, b"", done=done)
        return _EXTENDED_OFFSET.pack(
            wire.EXTENDED_REPLY_MAGIC,
            wire.REPLY_FLAG_DONE if done else 0,
            wire.REPLY_TYPE_OFFSET_DATA,
            request.cookie,
            request.offset,
            length + 8,
            offset,
        )

    def success(self, request: Request) -> bytes:
        """A chunk without contents."""
        return self._chunk(request, wire.REPLY_TYPE_NONE, b"", done=True)

    def status(self, request: Request, context: int, extents: Extents, *, done: bool) -> bytes:
        """A BLOCK_STATUS_EXT chunk."""
        runs = [self._extent.pack(*extent) for extent in extents]
        data = context.to_bytes(4, "big") + len(runs).to_bytes(4, "big") + b"".join(runs)
        return self._chunk(request, wire.REPLY_TYPE_BLOCK_STATUS_EXT, data, done=done)

    def _chunk(self, request: Request, kind: int, data: bytes, *, done: bool) -> bytes:
        flags = wire.REPLY_FLAG_DONE if done else 0
        return (
            _EXTENDED.pack(wire.EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, len(data))
            + data
        )


def dialect(agreement: Agreement) -> Dialect:
    """The way of replying that a client has asked for."""
    if agreement.extended:
        return ExtendedDialect()
    return StructuredDialect() if agreement.structured else Dialect()
