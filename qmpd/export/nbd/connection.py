"""One NBD client on asyncio.

During the handshake the client's bytes go to a
:class:`~qmpd.export.nbd.handshake.Handshake`; afterwards to a
:class:`~qmpd.export.nbd.transmission.Requests`, straight from the socket.  A
request is served by a coroutine that runs at once as far as it gets without
waiting; what the page cache can answer is answered in the same turn, all the
rest in tasks, and replies go out in the order in which they are ready.

A client can't make the daemon wait or grow.  It is not read from while

- :data:`MAX_REQUESTS` of its requests are under way, or they hold more than its share of the
  memory that the server has for its clients' data (:mod:`~qmpd.export.nbd.budget`);
- it does not take its replies;
- the clients of its server have had their turn: after some milliseconds the rest of the
  daemon gets its own (:meth:`~qmpd.export.nbd.server.NBDServer.end_of_turn`).

Long reads are answered in pieces where the client's dialect allows that, and
read only as fast as the client takes them; of holes only their lengths are
sent.  Long writes are written in pieces while the rest is still coming.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import nullcontext
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, cast

from qmpd.block.buffers import unset
from qmpd.block.node import BlockStatus, Data
from qmpd.errors import trace
from qmpd.export import eager
from qmpd.export.nbd import wire
from qmpd.export.nbd.budget import LEAST, PIECE, Share
from qmpd.export.nbd.handshake import Agreement, Disconnect, Handshake, State
from qmpd.export.nbd.transmission import (
    LONG,
    Dialect,
    LongWrite,
    Request,
    RequestError,
    Requests,
    TooLong,
    check,
    dialect,
)

if TYPE_CHECKING:
    from qmpd.export.nbd.export import NBDExport
    from qmpd.export.nbd.server import NBDServer

_logger = logging.getLogger(__name__)

#: Requests that one client may have under way.
MAX_REQUESTS: Final = 16
#: Bytes that may wait for a client to take them before nothing more is served to it.
_OUTPUT_HIGH: Final = 1 << 20
#: In shorter reads holes are not looked for.
_SPARSE: Final = 64 << 10
#: Bytes received at once during the handshake.
_HANDSHAKE_BUFFER: Final = 4096
#: Reads up to this many bytes in all are served together.
_BATCH: Final = 256 << 10
#: Writes up to this many bytes each, too.
_SMALL_WRITE: Final = 32 << 10
#: The most extents in one reply.
_MAX_EXTENTS: Final = 2048
#: The most buffers in one writev(2), well under IOV_MAX.
_MAX_BUFFERS: Final = 512

#: QEMU's words for what failed.
_FAILURES: Final[Mapping[int, str]] = {
    wire.CMD_READ: "reading from file failed",
    wire.CMD_WRITE: "writing to file failed",
    wire.CMD_FLUSH: "flush failed",
    wire.CMD_TRIM: "discard failed",
    wire.CMD_CACHE: "caching data failed",
    wire.CMD_WRITE_ZEROES: "writing to file failed",
    wire.CMD_BLOCK_STATUS: "can't get block status",
    LONG | wire.CMD_WRITE: "writing to file failed",
}


class _Gone(Exception):
    """There is nobody to answer any more."""


class Connection(asyncio.BufferedProtocol):
    """One client.  Made by :class:`~qmpd.export.nbd.server.NBDServer` for a new transport."""

    def __init__(self, server: NBDServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._handshake: Handshake | None = Handshake(server.offers, tls=server.tls is not None)
        self._timer: asyncio.TimerHandle | None = None
        self._output: list[Data] = []
        self._output_size = 0
        #: The socket's number where it may be written to past the transport, else -1.
        self._descriptor = -1
        self._export: NBDExport | None = None
        #: The tasks of what is being served, and how many requests (or batches of them) that are.
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way = 0
        #: Small reads, or small writes, that are to be begun together.
        self._batch: list[Request] = []
        self._batch_size = 0
        #: The write whose payload is coming in pieces.
        self._long: LongWrite | None = None
        self._scheduled = False
        self._in_turn = False
        self._writing_paused = False
        self._reading_paused = False
        #: No further request is begun; the connection is closed when the begun ones are done.
        self._ending = False
        self._room: asyncio.Future[None] | None = None
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._starting_tls: asyncio.Task[None] | None = None
        self._early = b""
        # Set when the handshake is done.
        self._agreement: Agreement
        self._requests: Requests
        self._share: Share
        self._dialect: Dialect
        self._size = 0

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the client; or, after TLS was started, go on with it."""
        # Not asserted: uvloop's transports are not of this class.
        self._transport = transport = cast(asyncio.Transport, transport)
        transport.set_write_buffer_limits(high=_OUTPUT_HIGH)
        assert self._handshake is not None
        self._server.joined(self)
        if self._server.handshake_seconds:
            self._timer = self._loop.call_later(self._server.handshake_seconds, self._give_up)
        transport.write(self._handshake.greeting())

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client; what it has begun is finished, the replies are dropped."""
        self._transport = None
        self._ending = True
        self._output.clear()
        self._output_size = 0
        if self._timer is not None:
            self._timer.cancel()
        self._make_room()
        if self._export is not None:
            self._requests.drop()
            self._server.budget.leave()
            if not self._tasks:
                self._export.connections.discard(self)
        self._server.left(self)
        if not self._closed.done():
            self._closed.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport is to put what it receives."""
        if self._handshake is not None:
            return self._server.space[:_HANDSHAKE_BUFFER]
        return self._requests.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Do what is complete by now."""
        if self._handshake is not None:
            self._negotiate(self._handshake, self._server.space[:nbytes])
        else:
            self._requests.buffer_updated(nbytes)
            self._work()
            self._requests.settle()

    def eof_received(self) -> bool:
        """The client talks no more; without DISC it is not interested in answers either."""
        return False

    def pause_writing(self) -> None:
        """Serve nothing: the client does not take its replies."""
        self._writing_paused = True
        # What it is told during the handshake would pile up without end.
        if self._handshake is not None and self._transport is not None and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Go on."""
        self._writing_paused = False
        if self._handshake is not None and self._transport is not None and self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()
        self._make_room()
        self._work()

    # -- the handshake

    def _give_up(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _negotiate(self, handshake: Handshake, data: memoryview) -> None:
        transport = self._transport
        if self._starting_tls is not None:
            # The transport below was paused before, so this came through TLS, just before we hear of it.
            self._early += data
            return
        if transport is None or handshake.waiting:
            return
        answer = handshake.receive(data)
        if answer and not transport.is_closing():
            transport.write(answer)
        if handshake.state is State.CLOSED:
            if handshake.problem is not None:
                _logger.debug("NBD client disconnected: %s", handshake.problem)
            transport.close()
        elif handshake.state is State.TLS:
            transport.pause_reading()
            self._starting_tls = self._loop.create_task(self._start_tls(handshake, transport))
        elif handshake.state is State.TRANSMISSION:
            self._start_transmission(handshake, transport)

    async def _start_tls(self, handshake: Handshake, transport: asyncio.Transport) -> None:
        assert self._server.tls is not None
        try:
            secured = await self._loop.start_tls(
                transport,
                self,
                self._server.tls,
                server_side=True,
                ssl_handshake_timeout=self._server.handshake_seconds or None,
            )
        except (OSError, ssl.SSLError, asyncio.CancelledError) as error:
            _logger.debug("NBD client failed to start TLS: %s", error)
            transport.abort()
            return
        if secured is None or self._transport is None:
            return
        self._transport = secured
        secured.set_write_buffer_limits(high=_OUTPUT_HIGH)
        handshake.secured()
        self._starting_tls = None
        early, self._early = self._early, b""
        if early:
            self._negotiate(handshake, memoryview(early))

    def _start_transmission(self, handshake: Handshake, transport: asyncio.Transport) -> None:
        agreement = handshake.agreement
        assert agreement is not None
        export = self._server.exports.get(agreement.export)
        if export is None:
            transport.abort()
            return
        if self._timer is not None:
            self._timer.cancel()
        self._agreement = agreement
        self._export = export
        self._size = export.backend.size
        self._dialect = dialect(agreement)
        self._share = self._server.budget.enter()
        self._requests = Requests(
            extended=agreement.extended,
            received=handshake.rest(),
            space=self._server.space,
            share=self._share,
        )
        self._handshake = None
        export.connections.add(self)
        if transport.get_extra_info("ssl_object") is None:
            self._descriptor = transport.get_extra_info("socket").fileno()
        self._work()

    # -- requests

    def _work(self) -> None:
        """Begin what has come in, as far as the limits let; then write, and see whether to read on."""
        self._scheduled = False
        if self._in_turn or self._handshake is not None:
            return
        self._in_turn = True
        deadline = self._server.end_of_turn()
        try:
            while self._may_begin():
                if perf_counter() > deadline:
                    self._schedule()
                    break
                request = self._requests.next()
                if request is None:
                    break
                if request.command == wire.CMD_DISC:
                    self._ending = True
                    break
                self._begin(request)
                if len(self._batch) + self._under_way >= MAX_REQUESTS:
                    self._serve_batch()
                if self._output_size > _OUTPUT_HIGH:
                    self._flush()
        except TooLong as error:
            # What follows is the payload, which nobody reads.
            self._put(self._dialect.error(error.request, wire.EINVAL, str(error)))
            self._ending = True
        except Disconnect as problem:
            _logger.debug("NBD client disconnected: %s", problem)
            self._ending = True
        finally:
            self._serve_batch()
            self._in_turn = False
        self._flush()
        self._adjust()
        if not self._under_way:
            self._server.expect_requests()

    def _may_begin(self) -> bool:
        return (
            not self._ending
            and not self._writing_paused
            and self._under_way < MAX_REQUESTS
            and (self._share.held < LEAST or self._share.room > 0)
        )

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._work)

    def _adjust(self) -> None:
        """Read from the client only while there is room for what it asks; close when all is done."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._ending and not self._tasks:
            transport.close()
            return
        requests = self._requests
        pause = self._ending or self._scheduled or requests.starved or requests.full or not self._may_begin()
        if pause != self._reading_paused:
            self._reading_paused = pause
            if pause:
                transport.pause_reading()
            else:
                transport.resume_reading()

    def _begin(self, request: Request) -> None:
        if request.command >= LONG:
            self._begin_long(request)
            return
        export = self._export
        assert export is not None
        try:
            check(request, self._agreement, self._size, writable=export.writable)
        except RequestError as refusal:
            self._share.give(len(request.payload))
            self._put(self._dialect.error(request, refusal.number, str(refusal)))
            return
        if self._goes_with_others(request):
            batch, length = self._batch, request.length
            if batch and (batch[0].command != request.command or self._batch_size + length > _BATCH):
                self._serve_batch()
            self._batch.append(request)
            self._batch_size += length
            return
        self._serve_batch()
        self._start(self._serve(request))

    def _goes_with_others(self, request: Request) -> bool:
        """Whether this is a small read or write, of a kind that is served together with its like."""
        length, export = request.length, self._used
        if export.backend.throttle_group is not None:
            # Each is answered when the limits have let it through.
            return False
        if request.command == wire.CMD_READ:
            # Where holes may be told of, only what is known to be none.
            return 0 < length <= _BATCH and (
                length < _SPARSE
                or not self._dialect.in_pieces
                or bool(request.flags & wire.CMD_FLAG_DF)
                or export.is_data(request.offset, length)
            )
        return (
            request.command == wire.CMD_WRITE
            and 0 < length <= _SMALL_WRITE
            and not request.flags & wire.CMD_FLAG_FUA
            and not export.writethrough
        )

    def _serve_batch(self) -> None:
        """Begin the small reads, or writes, that came one after the other: together they cost less."""
        batch = self._batch
        if not batch:
            return
        self._batch = []
        size, self._batch_size = self._batch_size, 0
        if batch[0].command == wire.CMD_WRITE:
            self._start(self._write_batch(batch, size))
            return
        data = unset(size)
        served = self._used.backend.read_cached([(request.offset, request.length) for request in batch], data)
        header = self._dialect.data
        start = 0
        for request, done in zip(batch, served, strict=True):
            end = start + request.length
            if done:
                self._put(header(request, request.offset, request.length), data[start:end])
            else:
                self._start(self._serve(request))
            start = end

    async def _write_batch(self, batch: list[Request], size: int) -> None:
        try:
            outcomes = await self._used.backend.pwrite_many(
                [(request.offset, request.payload) for request in batch]
            )
            for request, failure in zip(batch, outcomes, strict=True):
                self._put(
                    self._dialect.success(request) if failure is None else self._failure(request, failure)
                )
        except Exception as error:
            for request in batch:
                self._put(self._failure(request, error))
        finally:
            self._share.give(size)

    def _failure(self, request: Request, error: Exception) -> bytes:
        """The reply to a request that failed."""
        return self._dialect.error(request, _number_of(error, request), _FAILURES[request.command])

    def _begin_long(self, request: Request) -> None:
        """Take note of a write whose payload follows, or begin with a piece of it."""
        long = self._long
        if long is None:
            self._long = long = LongWrite(request._replace(command=request.command - LONG))
            try:
                check(long.request, self._agreement, self._size, writable=self._used.writable)
            except RequestError as refusal:
                long.fail(refusal)
            return
        long.missing -= request.length
        if not long.missing:
            self._long = None
        if long.failure is None:
            long.under_way += 1
            self._start(self._serve_piece(long, request))
            return
        self._share.give(request.length)
        if long.done:
            self._start(self._answer_long(long))

    def _start(self, serving: Coroutine[Any, Any, None]) -> None:
        """Serve something as far as it gets without waiting, and the rest in a task."""
        self._under_way += 1
        eager.begin(self._serve_and_tell(serving), self._keep)

    async def _serve_and_tell(self, serving: Coroutine[Any, Any, None]) -> None:
        try:
            await serving
        finally:
            self._under_way -= 1
            # Several requests are often done at once; their replies go out together.
            if not self._in_turn:
                self._schedule()

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._transport is None and not self._tasks and self._export is not None:
            self._export.connections.discard(self)
        if self._ending:
            self._schedule()

    async def _serve(self, request: Request) -> None:
        """Serve a request and answer it, come what may."""
        command, length = request.command, request.length
        size = 0
        if command == wire.CMD_WRITE:
            size = length
        elif command == wire.CMD_READ and length > LEAST:
            # Shorter ones are few enough not to matter.
            in_pieces = self._dialect.in_pieces and not request.flags & wire.CMD_FLAG_DF
            size = min(length, PIECE) if in_pieces else length
            self._share.take(size)
        try:
            await _SERVERS[command](self, request)
        except _Gone:
            pass
        except Exception as error:
            self._put(self._failure(request, error))
        finally:
            if size:
                self._share.give(size)

    async def _serve_piece(self, long: LongWrite, piece: Request) -> None:
        """Write a piece; after the last one answer."""
        try:
            await self._used.backend.pwrite(piece.offset, piece.payload, counted=False)
        except Exception as error:
            long.fail(error)
        finally:
            long.under_way -= 1
            self._share.give(piece.length)
        if long.done:
            await self._answer_long(long)

    async def _answer_long(self, long: LongWrite) -> None:
        """Count a long write, as one request, and answer it."""
        request, failure, backend = long.request, long.failure, self._used.backend
        if isinstance(failure, RequestError):
            self._put(self._dialect.error(request, failure.number, str(failure)))
            return
        took = perf_counter_ns() - long.began
        if failure is None:
            backend.succeeded("wr", request.length, took)
        elif not (isinstance(failure, OSError) and backend.failed("wr", request.length, took, failure)):
            self._put(self._failure(request, failure))
            return
        await self._serve(request._replace(command=LONG | wire.CMD_WRITE))

    async def _read(self, request: Request) -> None:
        _, _, _, offset, length, _ = request
        dialect = self._dialect
        if length >= _SPARSE and dialect.in_pieces and not request.flags & wire.CMD_FLAG_DF:
            await self._read_in_pieces(request)
        elif length:
            data = await self._used.backend.pread(offset, length)
            self._put(dialect.data(request, offset, length), data)
        else:
            self._put(dialect.data(request, offset, 0))

    async def _read_in_pieces(self, request: Request) -> None:
        """Answer a long read: data in pieces, holes by their lengths."""
        dialect, export = self._dialect, self._used
        offset = request.offset
        end = offset + request.length
        while offset < end:
            length, zero = await export.run(offset, end - offset)
            if zero:
                self._put(dialect.hole(request, offset, length, done=offset + length == end))
            else:
                if request.length > PIECE:
                    await self._wait_for_room()
                length = min(PIECE, length)
                data = await export.backend.pread(offset, length)
                self._put(dialect.data(request, offset, length, done=offset + length == end), data)
            offset += length

    async def _write(self, request: Request) -> None:
        await self._used.backend.pwrite(request.offset, request.payload)
        await self._written(request)

    async def _write_zeroes(self, request: Request) -> None:
        self._used.forget_data()
        await self._used.backend.write_zeroes(
            request.offset,
            request.length,
            unmap=not request.flags & wire.CMD_FLAG_NO_HOLE,
            fast=bool(request.flags & wire.CMD_FLAG_FAST_ZERO),
        )
        await self._written(request)

    async def _trim(self, request: Request) -> None:
        self._used.forget_data()
        await self._used.backend.discard(request.offset, request.length)
        await self._written(request)

    async def _written(self, request: Request) -> None:
        export = self._used
        if request.flags & wire.CMD_FLAG_FUA or export.writethrough:
            await export.backend.flush()
        self._put(self._dialect.success(request))

    async def _flush_export(self, request: Request) -> None:
        await self._used.backend.flush()
        self._put(self._dialect.success(request))

    async def _cache(self, request: Request) -> None:
        offset, end = request.offset, request.offset + request.length
        while offset < end:
            piece = min(PIECE, end - offset)
            await self._used.backend.pread(offset, piece)
            offset += piece
            await asyncio.sleep(0)
        self._put(self._dialect.success(request))

    async def _block_status(self, request: Request) -> None:
        contexts = self._agreement.contexts
        wanted = 1 if request.flags & wire.CMD_FLAG_REQ_ONE else _MAX_EXTENTS
        #: For each context its extents so far, of equal neighbours one.
        runs: list[list[tuple[int, int]]] = [[] for _ in contexts]
        offset = request.offset
        end = min(offset + request.length, offset + self._dialect.longest_extent)
        while offset < end:
            status = await self._used.backend.block_status(offset, end - offset)
            flags = [_CONTEXT_FLAGS[context](status) for context in contexts]
            for extents, value in zip(runs, flags, strict=True):
                if extents and extents[-1][1] == value:
                    extents[-1] = (extents[-1][0] + status.length, value)
                else:
                    extents.append((status.length, value))
            offset += status.length
            if max(map(len, runs)) > wanted:
                break
        for number, (context, extents) in enumerate(zip(contexts, runs, strict=True), 1):
            done = number == len(contexts)
            self._put(self._dialect.status(request, context, extents[:wanted], done=done))

    @property
    def _used(self) -> NBDExport:
        assert self._export is not None
        return self._export

    # -- output

    def _put(self, *buffers: Data) -> None:
        if self._transport is None:
            return
        for buffer in buffers:
            self._output.append(buffer)
            self._output_size += len(buffer)

    def _flush(self) -> None:
        output = self._output
        transport = self._transport
        if not output or transport is None:
            return
        self._output = []
        size, self._output_size = self._output_size, 0
        if transport.is_closing():
            return
        if self._descriptor >= 0 and not transport.get_write_buffer_size():
            # The transport would join the buffers into one, which costs a copy of all of them.
            try:
                sent = os.writev(self._descriptor, output[:_MAX_BUFFERS])
            except OSError:
                # It is full; or something is wrong, which the transport will find out.
                sent = 0
            if sent == size:
                return
            while sent >= len(output[0]):
                sent -= len(output.pop(0))
            output[0] = memoryview(output[0])[sent:]
        for buffer in output:
            transport.write(buffer)

    async def _wait_for_room(self) -> None:
        """Return when the client takes what is sent.

        :raise _Gone: if it never will.
        """
        self._flush()
        while self._writing_paused and self._transport is not None and not self._ending:
            if self._room is None:
                self._room = self._loop.create_future()
            await asyncio.shield(self._room)
        if self._transport is None or (self._ending and self._writing_paused):
            raise _Gone

    def _make_room(self) -> None:
        if self._room is not None:
            self._room.set_result(None)
            self._room = None

    # -- the end

    async def shut(self) -> None:
        """Begin nothing more, finish what was begun, and close the connection.

        A client that does not take its replies does not get them.
        """
        self._ending = True
        self._make_room()
        with nullcontext() if self._export is None else self._export.backend.hurried():
            while self._tasks:
                await asyncio.wait(set(self._tasks))
        if self._transport is not None:
            self._flush()
            self._transport.close()
            await asyncio.wait([self._closed], timeout=_FAREWELL)
            if self._transport is not None:
                self._transport.abort()
                await self._closed
        if self._export is not None:
            self._export.connections.discard(self)


#: Seconds that a client has for taking its last replies.
_FAREWELL: Final = 0.5

_SERVERS: Final[Mapping[int, Callable[[Connection, Request], Awaitable[None]]]] = {
    wire.CMD_READ: Connection._read,
    wire.CMD_WRITE: Connection._write,
    wire.CMD_FLUSH: Connection._flush_export,
    wire.CMD_TRIM: Connection._trim,
    wire.CMD_CACHE: Connection._cache,
    wire.CMD_WRITE_ZEROES: Connection._write_zeroes,
    wire.CMD_BLOCK_STATUS: Connection._block_status,
    LONG | wire.CMD_WRITE: Connection._written,
}


def _number_of(error: Exception, request: Request) -> int:
    """The error on the wire for what went wrong; what nobody expected is logged."""
    if isinstance(error, OSError):
        return wire.error_number(error)
    _logger.error("an NBD request failed: %r\n%s", request[:5], trace(error))
    return wire.EIO


def _base_allocation(status: BlockStatus) -> int:
    return (0 if status.data else wire.STATE_HOLE) | (wire.STATE_ZERO if status.zero else 0)


def _allocation_depth(status: BlockStatus) -> int:
    return status.depth


#: By the numbers of :data:`qmpd.export.nbd.export.CONTEXTS`.
_CONTEXT_FLAGS: Final[tuple[Callable[[BlockStatus], int], ...]] = (_base_allocation, _allocation_depth)
