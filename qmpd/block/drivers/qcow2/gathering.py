"""Several requests at a time, with as few requests to the nodes below as there can be.

A read is cut where the mapping changes.  What comes from one node and has to stand one behind the other in
the buffer is asked of that node at once, and what is one behind the other there as well is one request.
"""

from __future__ import annotations

from collections.abc import Sequence

from qmpd.block.node import Data, Extent, Node

#: A piece of a read: the node that has it (None: it is zeroes), its offset there, and its length in bytes.
Piece = tuple[Node | None, int, int]


class _Group:
    """Pieces in one node whose bytes follow each other in the buffer, from `start` up to `end`."""

    __slots__ = ("end", "extents", "node", "owners", "start")

    def __init__(self, node: Node | None, start: int) -> None:
        self.node = node
        self.start = self.end = start
        self.extents: list[Extent] = []
        #: For each extent the numbers of the first and the last read that it belongs to.
        self.owners: list[tuple[int, int]] = []

    def add(self, place: int, length: int, owner: int) -> None:
        self.end += length
        if self.extents:
            before, size = self.extents[-1]
            if before + size == place:
                self.extents[-1] = before, size + length
                self.owners[-1] = self.owners[-1][0], owner
                return
        self.extents.append((place, length))
        self.owners.append((owner, owner))


class CachedReads:
    """Reads that are served together, as far as nothing has to be waited for.

    :param into: receives their data one after the other.
    """

    def __init__(self, into: memoryview) -> None:
        self._into = into
        self._groups: list[_Group] = []
        self._served: list[bool] = []
        self._position = 0

    def add(self, length: int, pieces: Sequence[Piece] | None) -> None:
        """One more read.

        :param pieces: what it consists of, in order; None if it can't be served here.
        """
        owner = len(self._served)
        self._served.append(pieces is not None)
        position = self._position
        self._position += length
        for node, place, size in pieces or ():
            group = self._groups[-1] if self._groups else None
            if group is None or group.node is not node or group.end != position:
                group = _Group(node, position)
                self._groups.append(group)
            group.add(place if node is not None else position, size, owner)
            position += size

    def read(self) -> list[bool]:
        """Get all of them; returns of each whether it was served."""
        for group in self._groups:
            target = self._into[group.start : group.end]
            if group.node is None:
                target[:] = bytes(len(target))
                continue
            for done, (first, last) in zip(
                group.node.read_cached(group.extents, target), group.owners, strict=True
            ):
                if not done:
                    self._served[first : last + 1] = [False] * (last + 1 - first)
        return self._served


class JoinedWrite:
    """Writes that follow each other on the disk, as one: they get their clusters together.

    :param number: of the first write among several.
    """

    __slots__ = ("_end", "_parts", "numbers", "offset")

    def __init__(self, offset: int, data: Data, number: int) -> None:
        self.offset = offset
        self.numbers = [number]
        self._parts = [data]
        self._end = offset + len(data)

    def add(self, offset: int, data: Data, number: int) -> bool:
        """One more write; returns whether it is where the others end."""
        if offset != self._end:
            return False
        self.numbers.append(number)
        self._parts.append(data)
        self._end += len(data)
        return True

    @property
    def data(self) -> Data:
        """What they write."""
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
