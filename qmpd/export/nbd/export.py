"""A node as NBD clients see it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from qmpd.block.backend import Backend
from qmpd.block.node import BlockStatus
from qmpd.export.nbd import wire
from qmpd.export.nbd.handshake import Offer

if TYPE_CHECKING:
    from qmpd.export.nbd.connection import Connection

#: What every export can do (section "Transmission flags").
_ALWAYS = wire.FLAG_HAS_FLAGS | wire.FLAG_SEND_FLUSH | wire.FLAG_SEND_FUA | wire.FLAG_SEND_CACHE
#: All connections use one node, so what one has written and flushed the others see: several may be used.
_COHERENT = wire.FLAG_CAN_MULTI_CONN
_WRITABLE = wire.FLAG_SEND_TRIM | wire.FLAG_SEND_WRITE_ZEROES | wire.FLAG_SEND_FAST_ZERO

CONTEXTS = ("base:allocation", "qemu:allocation-depth")


class NBDExport:
    """One export of an NBD server, and who uses it.

    :param backend: attached to the node.
    :param writethrough: every write is on stable storage before it is answered.
    :param allocation_depth: offer the metadata context `qemu:allocation-depth`.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        *,
        description: str | None = None,
        writable: bool = False,
        writethrough: bool = False,
        allocation_depth: bool = False,
    ) -> None:
        self.name = name
        self.backend = backend
        self.description = description
        self.writable = writable
        self.writethrough = writethrough
        self._contexts = CONTEXTS if allocation_depth else CONTEXTS[:1]
        self.connections: set[Connection] = set()
        #: The range that was last seen to be no hole.
        self._data = (0, 0)

    def offer(self) -> Offer:
        """What a client hears of it during the handshake."""
        return Offer(
            name=self.name,
            description=self.description,
            size=self.backend.size,
            flags=_ALWAYS | _COHERENT | (_WRITABLE if self.writable else wire.FLAG_READ_ONLY),
            minimum_block=self.backend.node.request_alignment,
            contexts=self._contexts,
        )

    async def run(self, offset: int, length: int) -> tuple[int, bool]:
        """How far the bytes from `offset` on are alike, at most `length`, and whether they are zeroes.

        Asking a file takes a while, so what is no hole is remembered, as far as it reaches; if it has
        become one since, it is read as what it is: zeroes.

        :raise OSError: as for a read.
        """
        start, end = self._data
        if not start <= offset < end:
            status = await self._status(offset, length)
            if status.zero:
                return min(length, status.length), True
            joined = offset <= start <= offset + status.length
            end = max(end, offset + status.length) if joined else offset + status.length
            self._data = offset, end
        return min(length, end - offset), False

    async def _status(self, offset: int, length: int) -> BlockStatus:
        """What is known about the bytes from `offset` on, as far as that goes."""
        while True:
            size = self.backend.size
            try:
                # At least what was asked for: the disk may be shorter by now, and then that is an error.
                return await self.backend.block_status(offset, max(length, size - offset))
            except OSError:
                # It may have become shorter while this waited for the end of the change.
                if self.backend.size >= size:
                    raise

    def is_data(self, offset: int, length: int) -> bool:
        """Whether these bytes were no hole when they were last asked about."""
        start, end = self._data
        return start <= offset and offset + length <= end

    def forget_data(self) -> None:
        """What was no hole may be one now."""
        self._data = (0, 0)

    async def disconnect(self) -> None:
        """Part from all clients; the requests that were begun are finished first."""
        while self.connections:
            await asyncio.wait([asyncio.ensure_future(one.shut()) for one in self.connections])
