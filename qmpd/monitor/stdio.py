"""One session on standard input and output, whatever these are.

A protocol wants one transport that reads and writes, but the two descriptors may be
anything: a terminal, two pipes, a socket, a file.  What the loop can watch it
watches; a regular file is read and written directly, for it never makes anybody wait.

At the end of the input the session is over, but not the daemon.
"""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any, Final

_CHUNK: Final = 64 * 1024
_INPUT: Final = 0
_OUTPUT: Final = 1


class StandardStreams(asyncio.Transport):
    """A transport between a protocol and two descriptors.

    :param protocol: is connected by :meth:`start`.
    :param source: the descriptor that is read.
    :param sink: the descriptor that is written.
    """

    def __init__(self, protocol: asyncio.Protocol, source: int = _INPUT, sink: int = _OUTPUT) -> None:
        super().__init__()
        self._protocol = protocol
        self._source = source
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._high = _CHUNK
        self._watching_source = False
        self._watching_sink = False
        self._protocol_paused = False
        self._source_ended = False
        self._closing = False
        self._lost = False
        self._flags: list[tuple[int, bool]] = []

    async def start(self) -> None:
        """Connect the protocol, and begin to read."""
        self._flags = [(descriptor, os.get_blocking(descriptor)) for descriptor in (self._source, self._sink)]
        for descriptor, _ in self._flags:
            os.set_blocking(descriptor, False)
        self._protocol.connection_made(self)
        self.resume_reading()

    # Input

    def resume_reading(self) -> None:
        """Read again."""
        if self._watching_source or self._source_ended or self._closing:
            return
        self._watching_source = True
        try:
            self._loop.add_reader(self._source, self._readable)
        except (OSError, ValueError):
            # epoll does not take regular files: they are always readable.
            self._loop.call_soon(self._readable_file)

    def pause_reading(self) -> None:
        """Read no more for the time being."""
        if self._watching_source:
            self._watching_source = False
            # Harmless if it is a file that was never watched.
            self._loop.remove_reader(self._source)

    def is_reading(self) -> bool:
        """Whether input is being waited for."""
        return self._watching_source

    def _readable_file(self) -> None:
        self._readable()
        if self._watching_source:
            self._loop.call_soon(self._readable_file)

    def _readable(self) -> None:
        if not self._watching_source:
            return
        try:
            data = os.read(self._source, _CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            # A terminal that is gone, for instance.
            data = b""
        if data:
            self._protocol.data_received(data)
            return
        self.pause_reading()
        self._source_ended = True
        if not self._protocol.eof_received():
            self.close()

    # Output

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write as much as goes, keep the rest."""
        if self._closing:
            return
        self._buffer += data
        if not self._watching_sink:
            self._writable()
        if len(self._buffer) > self._high and not self._protocol_paused:
            self._protocol_paused = True
            self._protocol.pause_writing()

    def _writable(self) -> None:
        while self._buffer:
            try:
                written = os.write(self._sink, self._buffer)
            except (BlockingIOError, InterruptedError):
                self._watch_sink(True)
                return
            except OSError as error:
                self._abandon(None if error.errno == errno.EPIPE else error)
                return
            del self._buffer[:written]
        self._watch_sink(False)
        if self._protocol_paused:
            self._protocol_paused = False
            self._protocol.resume_writing()
        if self._closing:
            self._abandon(None)

    def _watch_sink(self, watch: bool) -> None:
        if watch != self._watching_sink:
            self._watching_sink = watch
            if watch:
                self._loop.add_writer(self._sink, self._writable)
            else:
                self._loop.remove_writer(self._sink)

    def get_write_buffer_size(self) -> int:
        """Bytes that are still to be written."""
        return len(self._buffer)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the number of bytes over which the protocol is asked to pause; it goes on when none is left."""
        self._high = _CHUNK if high is None else high

    # The end

    def is_closing(self) -> bool:
        """Whether nothing more is taken for writing."""
        return self._closing

    def close(self) -> None:
        """Write what is left, then end the session."""
        if self._closing:
            return
        self._closing = True
        self.pause_reading()
        if not self._buffer:
            self._abandon(None)

    def abort(self) -> None:
        """End the session at once."""
        self._abandon(None)

    def _abandon(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = self._closing = True
        self.pause_reading()
        self._watch_sink(False)
        self._buffer.clear()
        for descriptor, blocking in self._flags:
            # The shell, or whoever else shares the descriptors, wants them back as they were.
            try:
                os.set_blocking(descriptor, blocking)
            except OSError:
                pass
        self._loop.call_soon(self._protocol.connection_lost, error)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Nothing is known about the other end."""
        return default
