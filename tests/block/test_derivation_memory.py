"""The bound on what key derivations take together: who waits, in which order, and who is refused."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from qmpd.block.derivation_memory import DerivationMemory
from qmpd.errors import Error


class Derivation:
    """Somebody who wants memory, has it until he is told to end, and notes when he gets it."""

    def __init__(self, memory: DerivationMemory, amount: int, order: list[int]) -> None:
        self.ending = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(self._run(memory, amount, order))

    async def _run(self, memory: DerivationMemory, amount: int, order: list[int]) -> None:
        async with memory.reserve(amount):
            order.append(amount)
            await self.ending.wait()

    async def end(self) -> None:
        self.ending.set()
        await self.task


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def can_have(memory: DerivationMemory, amount: int) -> bool:
    """Whether so much is there just now."""
    try:
        async with asyncio.timeout(0.01), memory.reserve(amount):
            return True
    except TimeoutError:
        return False


async def test_what_can_never_be_had_is_refused_with_limit_and_option() -> None:
    memory = DerivationMemory(100)
    with pytest.raises(Error, match="needs 101 KiB of memory, and --pbkdf-memory-max allows 100"):
        async with memory.reserve(101):
            pass
    assert await can_have(memory, 100)


async def test_those_that_wait_are_served_in_the_order_in_which_they_came() -> None:
    memory, order = DerivationMemory(100), list[int]()
    first = Derivation(memory, 60, order)
    await settled()
    # The small one would fit, but would keep the large one waiting for ever if others like it came.
    large, small = Derivation(memory, 90, order), Derivation(memory, 10, order)
    await settled()
    assert order == [60]
    await first.end()
    await settled()
    assert order == [60, 90, 10]
    await large.end()
    await small.end()
    assert await can_have(memory, 100)


async def test_who_needs_no_memory_does_not_wait_for_those_who_do() -> None:
    memory, order = DerivationMemory(100), list[int]()
    holder, waiting = Derivation(memory, 100, order), Derivation(memory, 50, order)
    await settled()
    assert await can_have(memory, 0)
    assert order == [100]
    await holder.end()
    await waiting.end()


async def test_who_is_cancelled_while_he_waits_lets_the_next_one_go_on() -> None:
    memory, order = DerivationMemory(100), list[int]()
    holder, large = Derivation(memory, 60, order), Derivation(memory, 90, order)
    small = Derivation(memory, 40, order)
    await settled()
    large.task.cancel()
    await settled()
    assert order == [60, 40]
    await holder.end()
    await small.end()
    assert await can_have(memory, 100)


async def test_memory_that_comes_back_in_the_moment_of_a_cancellation_is_not_lost() -> None:
    memory, order = DerivationMemory(100), list[int]()
    holder, waiting, other = (Derivation(memory, 100, order) for _ in range(3))
    await settled()
    # Cancelled, but not told yet, when the memory comes back.
    waiting.task.cancel()
    await holder.end()
    await settled()
    assert waiting.task.cancelled()
    assert order == [100, 100]
    await other.end()
    assert await can_have(memory, 100)


async def test_who_is_cancelled_when_it_is_his_turn_gives_it_to_the_next_one() -> None:
    memory, order = DerivationMemory(100), list[int]()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(memory.reserve(100))
        waiting, other = Derivation(memory, 100, order), Derivation(memory, 100, order)
        await settled()
    # It is his turn, and he has not noticed.
    waiting.task.cancel()
    await settled()
    assert waiting.task.cancelled()
    assert order == [100]
    await other.end()
    assert await can_have(memory, 100)


async def test_an_error_gives_the_memory_back() -> None:
    memory = DerivationMemory(100)
    with pytest.raises(ValueError, match="whatever"):
        async with memory.reserve(100):
            raise ValueError("whatever")
    assert await can_have(memory, 100)
