"""Order between overlapping writes, where some of them are read-modify-write.

A driver with a request alignment (an encrypted node: 512 bytes) serves an
unaligned write by reading the sectors at its ends, changing them, and writing
them back.  Another write to the same sectors in between would be lost, so an
unaligned write waits until those that overlap it are done, and whoever comes
later and overlaps it waits in turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager


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

    @property
    def any_serialising(self) -> bool:
        """Whether any of them reads before it writes."""
        return any(request.serialising for request in self._requests)

    @contextmanager
    def hold(self, ranges: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Hold several ranges of bytes, (start, end), while the body runs.

        Nobody is waited for: to be used while there is none that reads before it writes.
        """
        requests = [_Request(start, end, serialising=False) for start, end in ranges]
        self._requests += requests
        try:
            yield
        finally:
            for request in requests:
                self._end(request)

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
            self._end(request)

    def _end(self, request: _Request) -> None:
        self._requests.remove(request)
        if request.done is not None and not request.done.done():
            request.done.set_result(None)
