"""One session on standard input and output, whatever these are.

A protocol wants one transport that reads and writes, but the two descriptors may be
anything: a terminal, two pipes, a socket, a file.  What the loop can watch it
watches; a regular file is read and written directly, for it never makes anybody wait.

At the end of the input the session is over, but not the daemon.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import Final

from qmpd.monitor.stream import CHUNK, DescriptorStream

_INPUT: Final = 0
_OUTPUT: Final = 1


class StandardStreams(DescriptorStream):
    """A transport between a protocol and two descriptors.

    :param protocol: is connected by :meth:`start`.
    :param source: the descriptor that is read.
    :param sink: the descriptor that is written.
    """

    def __init__(self, protocol: asyncio.Protocol, source: int = _INPUT, sink: int = _OUTPUT) -> None:
        super().__init__(protocol, source, sink, partial(os.write, sink))
        self._flags: list[tuple[int, bool]] = []

    def start(self) -> None:
        """Connect the protocol, and begin to read."""
        self._flags = [(descriptor, os.get_blocking(descriptor)) for descriptor in (self._source, self._sink)]
        for descriptor, _ in self._flags:
            os.set_blocking(descriptor, False)
        super().start()

    def _watch_source(self) -> None:
        try:
            super()._watch_source()
        except (OSError, ValueError):
            # epoll does not take regular files: they are always readable.
            self._loop.call_soon(self._readable_file)

    def _readable_file(self) -> None:
        self._readable()
        if self._watching_source:
            self._loop.call_soon(self._readable_file)

    def _receive(self) -> bytes:
        try:
            return os.read(self._source, CHUNK)
        except (BlockingIOError, InterruptedError):
            raise
        except OSError:
            # A terminal that is gone, for instance.
            return b""

    def _release(self) -> None:
        for descriptor, blocking in self._flags:
            # The shell, or whoever else shares the descriptors, wants them back as they were.
            try:
                os.set_blocking(descriptor, blocking)
            except OSError:
                pass
