"""Threads for what would keep the event loop waiting.

The standard library's executor costs some 30 µs of both sides for each
function, which is more than a small write takes.  Here a function goes to the
threads by a queue that is one object of C, and its result comes back by one
call of the loop's: a third of that.

A thread can't be interrupted.  What takes long is therefore cut into steps (`qmpd.crypto.steps`):
after any of them the thread may turn to somebody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

from qmpd.crypto.steps import Steps

T = TypeVar("T")

#: Seconds between two steps.
_PAUSE: Final = 50e-6


class _Work:
    """A function, and who waits for it."""

    __slots__ = ("arguments", "ended", "function", "future", "loop", "over", "ticket")

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        #: Whether the function has ended; and what is set then, for who waits although it was cancelled.
        self.over = False
        self.ended: asyncio.Event | None = None
        #: Whoever takes it out, which only one can, decides whether the function is begun.
        self.ticket = [True]

    def claim(self) -> bool:
        """Whether nobody has decided yet."""
        try:
            self.ticket.pop()
        except IndexError:
            return False
        return True

    def run(self) -> None:
        """Run the function; called in a thread."""
        try:
            result = self.function(*self.arguments)
        except BaseException as error:
            report: tuple[Callable[..., None], Any] = self.future.set_exception, error
        else:
            report = self.future.set_result, result
        # The loop is closed when nobody waits any more.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._tell, *report)

    def _tell(self, report: Callable[..., None], what: Any) -> None:
        self.over = True
        if not self.future.done():
            report(what)
        if self.ended is not None:
            self.ended.set()


class Threads:
    """A number of threads, each of which is started when there is something for it.

    :param most: how many there may be.
    :param name: begins the threads' names.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        #: What was cancelled, but had been begun.
        self._awaited: set[_Work] = set()
        self._abandoned = False

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns or raises.

        A thread can't be interrupted: if the task is cancelled, a function that was begun goes on.
        """
        work = self._begin(function, arguments)
        try:
            result: T = await work.future
            return result
        except asyncio.CancelledError:
            work.claim()
            raise

    async def run_to_the_end(self, function: Callable[..., T], *arguments: Any) -> T:
        """The same; but whoever is cancelled goes on when the function has ended, or will never be begun.

        What it uses may be closed then.
        """
        work = self._begin(function, arguments)
        try:
            result: T = await work.future
            return result
        except asyncio.CancelledError:
            if not work.claim():
                await self._end_of(work)
            raise

    async def run_steps(self, steps: Steps[T]) -> T:
        """What `steps` return or raise; the threads take turns at the steps of all who have some.

        Whoever is cancelled goes on when the step that was begun has ended, and what the steps keep is
        then wiped: their generator is closed.  So nothing that they use changes under a thread's hands.
        After :meth:`abandon` nobody waits for a step any more.

        :param steps: what comes before their first ``yield`` is done at once, in the caller's thread.
        """
        stop = threading.Event()
        try:
            ended, result = _step(steps)
            while not ended:
                work = self._begin(self._take_steps, (steps, stop))
                try:
                    ended, result = await work.future
                except asyncio.CancelledError:
                    stop.set()
                    if not work.claim():
                        await self._end_of(work)
                    raise
            return cast(T, result)
        finally:
            # While a thread that is not waited for is at it, the generator can't be closed.
            with contextlib.suppress(ValueError):
                steps.close()

    def _take_steps(self, steps: Steps[T], stop: threading.Event) -> tuple[bool, T | None]:
        """Take steps until there are no more, or somebody else wants the thread, or nobody wants them."""
        while True:
            ended, result = _step(steps)
            if ended or stop.is_set() or not self._queue.empty():
                return ended, result
            # Whoever waits for the interpreter's lock has it now, and not when its patience of 5 ms ends.
            time.sleep(_PAUSE)

    def abandon(self) -> None:
        """Wait for nothing that was begun, now that the process is about to end."""
        self._abandoned = True
        for work in self._awaited:
            assert work.ended is not None, "who waits has said so"
            work.ended.set()

    async def _end_of(self, work: _Work) -> None:
        """Return when a thread is done with `work`, whoever cancels the waiting."""
        ended = work.ended = asyncio.Event()
        self._awaited.add(work)
        while not work.over and not self._abandoned:
            with contextlib.suppress(asyncio.CancelledError):
                await ended.wait()
        self._awaited.discard(work)

    def _begin(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> _Work:
        work = _Work(function, arguments)
        if len(self._threads) < self._most and (not self._threads or self._queue.qsize()):
            # Not to be waited for at the end of the process: it may be deriving a key for long.
            thread = threading.Thread(
                target=self._serve, name=f"{self._name}-{len(self._threads)}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        self._queue.put(work)
        return work

    def _serve(self) -> None:
        get = self._queue.get
        while (work := get()) is not None:
            if work.claim():
                work.run()

    def close(self) -> None:
        """Let the threads end when they are done with what they do; what was not begun never is."""
        with contextlib.suppress(queue.Empty):
            while (work := self._queue.get_nowait()) is not None:
                if work.claim():
                    work.future.cancel()
        for _ in self._threads:
            self._queue.put(None)
        self._threads.clear()


def _step(steps: Steps[T]) -> tuple[bool, T | None]:
    """Take a step; whether it was the last one, and what they return then."""
    try:
        next(steps)
    except StopIteration as end:
        return True, end.value
    return False, None
