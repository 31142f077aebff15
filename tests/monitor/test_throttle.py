from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qmpd.monitor import throttle
from qmpd.monitor.throttle import EventThrottle

Sent = list[tuple[str, dict[str, Any], int]]


@pytest.fixture
def sent() -> Sent:
    return []


@pytest.fixture
def events(sent: Sent) -> EventThrottle:
    return EventThrottle(lambda *event: sent.append(event))


def error(disk: str, number: int) -> dict[str, Any]:
    return {"qom-path": disk, "number": number}


async def test_of_a_flood_the_first_and_the_last_are_sent(
    events: EventThrottle, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100, 200))
    monkeypatch.setattr(throttle.time, "time_ns", lambda: next(clock))
    monkeypatch.setattr(throttle, "_LIMITS", {"BLOCK_IO_ERROR": throttle._Limit("qom-path", 0)})
    for number in range(5):
        events.emit("BLOCK_IO_ERROR", error("a", number))
    events.emit("BLOCK_IO_ERROR", error("b", 0))
    assert [data for _, data, _ in sent] == [error("a", 0), error("b", 0)]
    await asyncio.sleep(0.01)
    assert sent[2:] == [("BLOCK_IO_ERROR", error("a", 4), 104)]
    await asyncio.sleep(0.01)
    events.emit("BLOCK_IO_ERROR", error("a", 5))
    assert len(sent) == 4
    events.close()
    assert len(sent) == 4


async def test_other_events_are_never_kept(events: EventThrottle, sent: Sent) -> None:
    for _ in range(3):
        events.emit("DEVICE_DELETED", {"path": "a"})
    assert len(sent) == 3


async def test_what_is_kept_is_sent_at_the_end(events: EventThrottle, sent: Sent) -> None:
    events.emit("BLOCK_IO_ERROR", error("a", 0))
    events.emit("BLOCK_IO_ERROR", error("a", 1))
    events.close()
    assert [data for _, data, _ in sent] == [error("a", 0), error("a", 1)]
