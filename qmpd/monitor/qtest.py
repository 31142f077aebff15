"""The qtest protocol, as far as there is something to test: not at all.

A test harness that steers a machine's clock and registers sends lines, and reads
one line for each.  QEMU answers ``OK`` or ``FAIL`` and a reason.  Whoever passes
such a socket only because he always does gets by; who asks for something is told
that it was not done.
"""

from __future__ import annotations

import asyncio
from typing import Final, cast

_ANSWER: Final = b"FAIL there is no processor and no clock to steer\n"


class QtestConnection(asyncio.Protocol):
    """Answers every line with FAIL."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody is there."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Whatever the lines say, only their number counts."""
        assert self._transport is not None
        self._transport.write(_ANSWER * data.count(b"\n"))

    def pause_writing(self) -> None:
        """Who doesn't read the answers is not read from."""
        assert self._transport is not None
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The answers have been read."""
        assert self._transport is not None
        self._transport.resume_reading()
