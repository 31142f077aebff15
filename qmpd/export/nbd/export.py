"""A node as NBD clients see it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from qmpd.block.backend import Backend
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

    async def disconnect(self) -> None:
        """Part from all clients; the requests that were begun are finished first."""
        while self.connections:
            await asyncio.wait([asyncio.ensure_future(one.shut()) for one in self.connections])
