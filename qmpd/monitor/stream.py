"""What transports over descriptors of our own have in common: watching, buffering, ending.

The loops' own transports can't be had for everything that a monitor talks over.
What a class below adds is how bytes are received and sent, and what is done at
the end.  To a protocol it all looks like a transport of asyncio's: it is asked to
pause when too much waits to be written, what was written before `close` is still
sent, and `connection_lost` is the last that it hears, never from within a call of
its own.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Final

#: Bytes that are received at once, and above which a protocol is asked to pause unless it says otherwise.
CHUNK: Final = 64 * 1024


class DescriptorStream(asyncio.Transport):
    """A transport between a protocol and two descriptors, which may be the same.

    :param protocol: is connected by :meth:`start`.
    :param source: the descriptor that is read, not blocking.
    :param sink: the descriptor that is written, not blocking.
    :param transmit: sends some of the bytes and returns how many; raises OSError as the system does.
    """

    def __init__(
        self,
        protocol: asyncio.Protocol,
        source: int,
        sink: int,
        transmit: Callable[[bytes | bytearray | memoryview], int],
    ) -> None:
        super().__init__()
        self._protocol = protocol
        # A client's round trip is so short that a call in between would be noticed.
        self._data_received = protocol.data_received
        self._transmit = transmit
        self._source = source
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._high = CHUNK
        self._low = CHUNK // 4
        self._watching_source = False
        self._watching_sink = False
        self._protocol_paused = False
        self._source_ended = False
        self._closing = False
        self._lost = False

    # What a class below says

    @abstractmethod
    def _receive(self) -> bytes:
        """What has come; empty at the end.

        :raise OSError: if nothing can be received (now, or any more).
        """

    @abstractmethod
    def _release(self) -> None:
        """Give the descriptors back: nothing more is done with them."""

    def start(self) -> None:
        """Connect the protocol, and begin to read."""
        self._protocol.connection_made(self)
        self.resume_reading()

    # Input

    def resume_reading(self) -> None:
        """Read again."""
        if self._watching_source or self._source_ended or self._closing:
            return
        self._watching_source = True
        self._watch_source()

    def _watch_source(self) -> None:
        self._loop.add_reader(self._source, self._readable)

    def pause_reading(self) -> None:
        """Read no more for the time being."""
        if self._watching_source:
            self._watching_source = False
            self._loop.remove_reader(self._source)

    def is_reading(self) -> bool:
        """Whether input is being waited for."""
        return self._watching_source

    def _readable(self) -> None:
        if not self._watching_source:
            return
        try:
            data = self._receive()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._abandon(error)
            return
        if data:
            self._data_received(data)
            return
        self.pause_reading()
        self._source_ended = True
        if not self._protocol.eof_received():
            self.close()

    # Output

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write as much as goes, keep the rest."""
        if self._closing or not data:
            return
        if not self._buffer:
            # Most often all of it goes at once, without being copied.
            try:
                written = self._transmit(data)
            except (BlockingIOError, InterruptedError):
                written = 0
            except OSError as error:
                self._abandon(error)
                return
            if written == len(data):
                return
            data = memoryview(data)[written:]
            self._watch_sink(True)
        self._buffer += data
        if len(self._buffer) > self._high and not self._protocol_paused:
            self._protocol_paused = True
            self._protocol.pause_writing()

    def _writable(self) -> None:
        if not self._watching_sink:
            return
        try:
            del self._buffer[: self._transmit(self._buffer)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._abandon(error)
            return
        if not self._buffer:
            self._watch_sink(False)
        if self._protocol_paused and len(self._buffer) <= self._low:
            self._protocol_paused = False
            self._protocol.resume_writing()
        if self._closing and not self._buffer:
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

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """The bytes below which the protocol goes on, and those above which it is asked to pause."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the bytes above which the protocol is asked to pause, and those at which it goes on."""
        if high is None:
            high = CHUNK if low is None else 4 * low
        self._high = high
        self._low = high // 4 if low is None else low

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
        self._release()
        self._loop.call_soon(self._protocol.connection_lost, error)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Nothing is known about the other end."""
        return default

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Who is connected."""
        return self._protocol
