"""A clock that goes on when a test says so."""

from __future__ import annotations

from collections.abc import Callable


class FakeTimer:
    """What the clock does later."""

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeClock:
    """Seconds, and what is to be done when they have passed."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[FakeTimer] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> FakeTimer:
        timer = FakeTimer(self.now + delay, callback)
        self._timers.append(timer)
        return timer

    @property
    def next(self) -> float | None:
        """In how many seconds there is something to be done."""
        self._timers = [timer for timer in self._timers if not timer.cancelled]
        return (
            min((timer.when for timer in self._timers), default=self.now) - self.now if self._timers else None
        )

    def advance(self, seconds: float) -> None:
        """Let time pass, and do what is due, in its order."""
        end = self.now + seconds
        while (delay := self.next) is not None and self.now + delay <= end:
            timer = min(self._timers, key=lambda each: each.when)
            self.now = max(self.now, timer.when)
            self._timers.remove(timer)
            timer.callback()
        self.now = end
