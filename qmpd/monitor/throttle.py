"""Events that come in floods are sent once in a while.

The first one is sent at once.  Of those that follow within the interval only the
last is kept, and sent, with the time at which it happened, when the interval is
over.  What belongs together is told by a member of the event's data: a disk that
fails does not hide the failure of another one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

#: Sends an event: its name, its data, and when it happened (nanoseconds since the epoch).
Send = Callable[[str, dict[str, Any], int], None]


class _Limit(NamedTuple):
    """At most one event each `seconds` for each value of `member`."""

    member: str
    seconds: float


#: QEMU's limits.
_LIMITS: Final[Mapping[str, _Limit]] = {"BLOCK_IO_ERROR": _Limit("qom-path", 1.0)}


class EventThrottle:
    """Lets events through to `send`, some of them not too often."""

    def __init__(self, send: Send) -> None:
        self._send = send
        #: By event and member: the intervals that have begun, and the last event that came since.
        self._timers: dict[tuple[str, Any], asyncio.TimerHandle] = {}
        self._held: dict[tuple[str, Any], tuple[dict[str, Any], int]] = {}

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event that happened now, or keep it for later."""
        now = time.time_ns()
        limit = _LIMITS.get(name)
        if limit is None:
            self._send(name, data, now)
            return
        key = name, data[limit.member]
        if key in self._timers:
            self._held[key] = data, now
            return
        self._send(name, data, now)
        self._wait(key, limit)

    def _wait(self, key: tuple[str, Any], limit: _Limit) -> None:
        loop = asyncio.get_running_loop()
        self._timers[key] = loop.call_later(limit.seconds, self._interval_over, key)

    def _interval_over(self, key: tuple[str, Any]) -> None:
        del self._timers[key]
        held = self._held.pop(key, None)
        if held is not None:
            self._send(key[0], *held)
            self._wait(key, _LIMITS[key[0]])

    def close(self) -> None:
        """Send what is kept."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for (name, _), held in self._held.items():
            self._send(name, *held)
        self._held.clear()
