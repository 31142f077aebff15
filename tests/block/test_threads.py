"""Functions in threads: results, errors, and what becomes of them when nobody waits any more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from qmpd.block.threads import Threads
from qmpd.crypto.steps import Steps


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


class Computation:
    """Steps that wait to be told to go on, and what has become of them."""

    def __init__(self) -> None:
        self.begun, self.release = threading.Event(), threading.Event()
        self.taken = 0
        self.closed = False

    def steps(self) -> Steps[str]:
        try:
            while self.taken < 3:
                yield
                self.begun.set()
                self.release.wait(10)
                self.taken += 1
            return "done"
        finally:
            self.closed = True


async def _begun(computation: Computation) -> None:
    while not computation.begun.is_set():
        await asyncio.sleep(0.001)


async def test_steps_are_taken_one_after_the_other_and_their_result_comes_back() -> None:
    threads = Threads(1, "t")
    computation = Computation()
    computation.release.set()
    assert await threads.run_steps(computation.steps()) == "done"
    assert (computation.taken, computation.closed) == (3, True)
    threads.close()


async def test_those_who_have_steps_take_turns() -> None:
    threads = Threads(1, "t")
    order: list[str] = []
    queued = threading.Event()

    def steps(name: str) -> Steps[None]:
        for _ in range(3):
            yield
            queued.wait(10)
            order.append(name)

    tasks = [asyncio.create_task(threads.run_steps(steps(name))) for name in "ab"]
    await asyncio.sleep(0.01)
    queued.set()
    await asyncio.gather(*tasks)
    assert order[:2] == ["a", "b"]
    assert sorted(order) == ["a"] * 3 + ["b"] * 3
    threads.close()


async def test_an_error_in_a_step_comes_back() -> None:
    threads = Threads(1, "t")

    def steps() -> Steps[None]:
        yield
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await threads.run_steps(steps())
    threads.close()


async def test_who_is_cancelled_goes_on_when_the_step_has_ended_and_nothing_is_kept() -> None:
    threads = Threads(1, "t")
    computation = Computation()
    task = asyncio.create_task(threads.run_steps(computation.steps()))
    await _begun(computation)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done()
    assert not computation.closed
    computation.release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (computation.taken, computation.closed) == (1, True)
    threads.close()


async def test_what_is_cancelled_before_its_first_step_in_a_thread_is_closed_too() -> None:
    threads = Threads(1, "t")
    first, second = Computation(), Computation()
    busy = asyncio.create_task(threads.run_steps(first.steps()))
    await _begun(first)
    waiting = asyncio.create_task(threads.run_steps(second.steps()))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (second.taken, second.closed) == (0, True)
    first.release.set()
    assert await busy == "done"
    threads.close()


@pytest.mark.parametrize("cancelled_first", [False, True])
async def test_nobody_waits_for_a_step_when_the_process_is_about_to_end(cancelled_first: bool) -> None:
    threads = Threads(1, "t")
    computation = Computation()
    task = asyncio.create_task(threads.run_steps(computation.steps()))
    await _begun(computation)
    if cancelled_first:
        task.cancel()
        await asyncio.sleep(0.01)
        threads.abandon()
    else:
        threads.abandon()
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)
    computation.release.set()
    threads.close()
