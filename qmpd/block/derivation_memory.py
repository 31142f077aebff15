"""How much memory key derivations may take together.

A LUKS2 header says how much memory argon2 needs, and a header comes from whoever wrote the disk.  What needs
more than there may be at all is refused; what needs more than is left just now waits for its turn.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from qmpd.errors import Error

#: The most that cryptsetup makes a header with, in KiB.
MOST = 4 << 20


def usual_limit() -> int:
    """What derivations may take if nobody says so: half of the machine's memory, in KiB, at most `MOST`."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 10
    return min(MOST, total // 2)


class DerivationMemory:
    """Memory for key derivations, in KiB.

    :param limit: of all that are under way; None for what is usual.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = usual_limit() if limit is None else limit
        self._left = self.limit
        #: Who waits, in the order in which they came.
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def check(self, amount: int) -> None:
        """Refuse what could never be had.

        :raise Error: it names the limit and the option.
        """
        if amount > self.limit:
            raise Error(
                f"The key derivation needs {amount} KiB of memory, and --pbkdf-memory-max allows {self.limit}"
            )

    @asynccontextmanager
    async def reserve(self, amount: int) -> AsyncIterator[None]:
        """Have `amount` KiB for the time of an ``async with``.

        :raise Error: there is not as much.
        """
        self.check(amount)
        # Who needs none does not wait for those who do.
        if amount and (self._waiting or amount > self._left):
            await self._wait(amount)
        else:
            self._left -= amount
        try:
            yield
        finally:
            self._left += amount
            self._serve()

    async def _wait(self, amount: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # It was his turn already.
                self._left += amount
            self._serve()
            raise

    def _serve(self) -> None:
        while self._waiting:
            amount, turn = self._waiting[0]
            if not turn.cancelled():
                if amount > self._left:
                    break
                self._left -= amount
                turn.set_result(None)
            # Who was cancelled may not know it yet.
            self._waiting.popleft()
