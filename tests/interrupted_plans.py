"""What is on a storage whose power fails while a plan is carried out.

It keeps what was written before the last barrier, and of what came after it any sectors: none, all, the
first half, single ones, any.  A sector is written or not, as on a disk; a half of it is tried all the same.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from qmpd.crypto.plan import Plan, Write
from qmpd.crypto.sectors import SECTOR

#: With this many sectors since the last barrier all combinations are tried.
FEW = 4


def left_by_a_crash(area: bytes, plan: Plan, chance: random.Random) -> Iterator[bytes]:
    """Each volume that may be there if the plan is cut off."""
    durable = area
    for _, group in itertools.groupby(plan, lambda step: isinstance(step, Write)):
        writes = [step for step in group if isinstance(step, Write)]
        pieces = [
            (write.offset + at, write.data[at : at + SECTOR])
            for write in writes
            for at in range(0, len(write.data), SECTOR)
        ]
        yield durable
        for arrived in some_of(pieces, chance):
            yield with_pieces(durable, arrived)
        for offset, data in pieces if len(pieces) <= FEW else pieces[:1]:
            half = len(data) // 2
            yield with_pieces(durable, [(offset, data[:half])])
            yield with_pieces(durable, [(offset + half, data[half:])])
        durable = with_pieces(durable, pieces)
    yield durable


Pieces = list[tuple[int, bytes]]


def some_of(pieces: Pieces, chance: random.Random) -> Iterator[Pieces]:
    if len(pieces) <= FEW:
        for number in range(1, len(pieces)):
            yield from map(list, itertools.combinations(pieces, number))
        return
    half = len(pieces) // 2
    yield from (pieces[:half], pieces[half:], pieces[:1], pieces[:-1], pieces[1:])
    yield [piece for piece in pieces if chance.random() < 0.5]


def with_pieces(area: bytes, pieces: Pieces) -> bytes:
    image = bytearray(area)
    for offset, data in pieces:
        image[offset : offset + len(data)] = data
    return bytes(image)
