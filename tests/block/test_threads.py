"""Functions in threads: results, errors, and what becomes of them when nobody waits any more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from qmpd.block.threads import Threads


async def test_results_and_errors_come_back() -> None:
    threads = Threads(2, "t")
    assert await threads.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await threads.run_to_the_end(divmod, 7, 0)
    threads.close()


async def test_as_many_run_at_a_time_as_there_may_be_threads() -> None:
    threads = Threads(3, "t")
    together = threading.Barrier(3)
    await asyncio.gather(*(threads.run(together.wait, 10) for _ in range(6)))
    threads.close()


async def test_one_thread_does_many_things_in_their_order() -> None:
    threads = Threads(1, "t")
    done: list[int] = []
    await asyncio.gather(*(threads.run(done.append, number) for number in range(100)))
    assert done == list(range(100))
    threads.close()


async def test_who_is_cancelled_goes_on_when_the_function_has_ended() -> None:
    threads = Threads(1, "t")
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        release.wait(10)
        ended.set()

    task = asyncio.create_task(threads.run_to_the_end(work))
    while not begun.is_set():
        await asyncio.sleep(0.001)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    threads.close()


async def test_who_is_cancelled_just_as_the_function_ends_does_not_wait_for_ever() -> None:
    threads = Threads(1, "t")
    for _ in range(300):
        task = asyncio.create_task(threads.run_to_the_end(lambda: None))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
    threads.close()


async def test_what_was_not_begun_never_is() -> None:
    threads = Threads(1, "t")
    release = threading.Event()
    done: list[str] = []
    first = asyncio.create_task(threads.run(release.wait, 10))
    second = asyncio.create_task(threads.run_to_the_end(done.append, "second"))
    third = asyncio.create_task(threads.run(done.append, "third"))
    await asyncio.sleep(0.01)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    threads.close()
    with pytest.raises(asyncio.CancelledError):
        await third
    release.set()
    assert await first
    assert done == []
