from __future__ import annotations

import asyncio

import pytest

from qmpd.export import eager


async def test_what_need_not_wait_is_done_at_once() -> None:
    done = []

    async def work() -> None:
        done.append(1)

    assert eager.begin(work(), pytest.fail)
    assert done == [1]


async def test_what_waits_goes_on_in_a_task() -> None:
    log: list[object] = []
    tasks: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    first, second, third = loop.create_future(), loop.create_future(), loop.create_future()

    async def work() -> None:
        log.append(await first)
        try:
            await second
        except OSError as error:
            log.append(error.errno)
        await asyncio.sleep(0)
        log.append(await third)

    assert not eager.begin(work(), tasks.append)
    first.set_result("a")
    second.set_exception(OSError(5, "b"))
    third.set_result("c")
    await tasks[0]
    assert log == ["a", 5, "c"]


@pytest.mark.parametrize("caught", [True, False])
async def test_a_failure_of_what_is_awaited_first_reaches_the_coroutine(caught: bool) -> None:
    tasks: list[asyncio.Task[None]] = []
    log = []
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        try:
            await future
        except OSError:
            if not caught:
                raise
            await asyncio.sleep(0)
            log.append("went on")

    eager.begin(work(), tasks.append)
    future.set_exception(OSError(5, "broken"))
    if caught:
        await tasks[0]
        assert log == ["went on"]
    else:
        with pytest.raises(OSError, match="broken"):
            await tasks[0]


async def test_a_cancelled_task_cancels_the_coroutine() -> None:
    tasks: list[asyncio.Task[None]] = []
    log = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            log.append("cancelled")
            raise

    eager.begin(work(), tasks.append)
    await asyncio.sleep(0)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert log == ["cancelled"]


async def test_what_is_raised_before_waiting_reaches_the_caller() -> None:
    async def work() -> None:
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        eager.begin(work(), pytest.fail)
