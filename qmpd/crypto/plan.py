"""A change on a disk as a list of steps: what to write, and where what was written must have arrived.

Whoever computes a plan does no I/O, so a test can stop after any step of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Write:
    """`data` has to be written at byte `offset`."""

    offset: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Barrier:
    """What was written before has to be on stable storage before what comes after is written."""


#: In this order.
Plan = list[Write | Barrier]
