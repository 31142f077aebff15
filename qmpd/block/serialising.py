"""Order between overlapping writes, where some of them are read-modify-write.

A driver with a request alignment (an encrypted node: 512 bytes) serves an
unaligned write by reading the sectors at its ends, changing them, and writing
them back.  Another write to the same sectors in between would be lost, so an
unaligned write waits until those that overlap it are done, and whoever comes
later and overlaps it waits in turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class _Request:
    __slots__ = ("done", "end", "serialising", "start")

    def __init__(self, start: int, end: int, serialising: bool) -> None:
        self.start = start
        self.end = end
        self.serialising = serialising
        self.done: asyncio.Future[None] | None = None


class TrackedWrites:
    """The writes that are under way on one node."""

    def __init__(self) -> None:
        self._requests: list[_Request] = []

    @asynccontextmanager
    async def track(self, start: int, end: int, *, serialising: bool) -> AsyncIterator[None]:
        """Hold the bytes from `start` up to `end` while the body runs.

        :param serialising: the body reads before it writes, so no overlapping
            write may run beside it.
        """
        request = _Request(start, end, serialising)
        earlier = list(self._requests)
        self._requests.append(request)
        try:
            for other in earlier:
                overlap = other.start < end and start < other.end
                if overlap and (serialising or other.serialising) and other in self._requests:
                    if other.done is None:
                        other.done = asyncio.get_running_loop().create_future()
                    await asyncio.shield(other.done)
            yield
        finally:
            self._requests.remove(request)
            if request.done is not None and not request.done.done():
                request.done.set_result(None)
