"""How much data the requests of a server's clients may hold in memory together.

Every client has a :class:`Share`.  What it may hold is a fair part of the
whole as long as there is some left, and always a little (:data:`LEAST`).  So
nobody ever waits for another client: who may not take enough holds something
itself, and asks again when it has let go of that.  A request for which there
is not room enough is served in pieces.
"""

from __future__ import annotations

from typing import Final

#: Bytes that a client may take at once at most, and that it may hold in any case.
PIECE: Final = 1 << 20
LEAST: Final = 64 << 10


class Budget:
    """What all clients of a server may hold.

    :param total: in bytes; each client may have :data:`LEAST` beyond it.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        #: What they hold now.
        self.used = 0
        self._clients = 0
        #: What one client may hold.
        self.part = total

    def enter(self) -> Share:
        """A share for one more client."""
        self._divide(self._clients + 1)
        return Share(self)

    def leave(self) -> None:
        """A client is gone; what its requests still hold they give back themselves."""
        self._divide(self._clients - 1)

    def _divide(self, clients: int) -> None:
        self._clients = clients
        self.part = max(PIECE, self.total // max(1, clients))


class Share:
    """What one client holds, in bytes."""

    __slots__ = ("budget", "held")

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.held = 0

    @property
    def room(self) -> int:
        """How many bytes may be taken now."""
        budget, held = self.budget, self.held
        room = min(budget.total - budget.used, budget.part - held, PIECE)
        return room if room >= LEAST else max(0, LEAST - held)

    def take(self, length: int) -> None:
        """Hold `length` bytes more, even if there is no room for them."""
        self.held += length
        self.budget.used += length

    def give(self, length: int) -> None:
        """Give back `length` bytes."""
        self.held -= length
        self.budget.used -= length
