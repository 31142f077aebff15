"""A volume's cipher between a node and its child: long requests are ciphered in tiles.

Others get their turn between two tiles, and a long tile is ciphered in another process if one has
room (:mod:`qmpd.block.cipher_pool`).  The drivers `luks` and `qcow2` say where the sectors lie on their
child and which numbers they have for their IVs; everything else is the same for both.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from qmpd.block.buffers import unset
from qmpd.crypto.sectors import SectorCipher

if TYPE_CHECKING:
    from qmpd.block.cipher_pool import CipherPool, Lease
    from qmpd.block.node import Data, Node

#: Long requests are ciphered in tiles of this many bytes.
TILE: Final = 256 * 1024

#: From this many bytes on another process ciphers them, if there is one: below, telling it takes as long.
LONG: Final = 64 * 1024

_SECTOR: Final = 512


class TiledCipher:
    """A sector cipher at work; it has the duty to wipe the key.

    :param cipher: the volume's cipher, which is taken over.
    :param pool: the processes that cipher long requests, if there are any.
    """

    def __init__(self, cipher: SectorCipher, pool: CipherPool | None) -> None:
        self.cipher = cipher
        self._pool = pool

    def close(self) -> None:
        """Wipe the key, here and in the processes that have it.  May be called again."""
        if self._pool is not None:
            self._pool.forget(self.cipher)
        self.cipher.close()

    async def read(self, node: Node, place: int, length: int, sector: int) -> Data:
        """Read from a node, and decrypt.

        :param place: in bytes; all of it lies inside the node.
        :param length: in bytes, whole sectors.
        :param sector: the first one's number, in units of 512 bytes.
        :raise OSError: what the node says.
        """
        if length <= TILE:
            return await self._read_tile(node, place, length, sector)
        plain = unset(length)
        for start in range(0, length, TILE):
            if start:
                await asyncio.sleep(0)
            tile = plain[start : start + TILE]
            tile[:] = await self._read_tile(node, place + start, len(tile), sector + start // _SECTOR)
        return plain

    async def write(
        self, node: Node, place: int, data: memoryview, sector: int, *, grow: bool = False
    ) -> None:
        """Encrypt, and write to a node.

        :param place: in bytes.
        :param data: whole sectors.
        :param sector: the first one's number, in units of 512 bytes.
        :param grow: as of :meth:`Node.pwrite`.
        :raise OSError: what the node says.
        """
        for start in range(0, len(data), TILE):
            if start:
                await asyncio.sleep(0)
            tile = await self._encrypt(data[start : start + TILE], sector + start // _SECTOR)
            await node.pwrite(place + start, tile, grow=grow)

    @property
    def has_room(self) -> bool:
        """Whether another process could cipher a long request now."""
        return self._pool is not None and self._pool.has_room

    async def _read_tile(self, node: Node, place: int, length: int, sector: int) -> Data:
        lease = self._lease(length)
        if lease is not None:
            if not all(node.read_cached([(place, length)], lease.data)):
                lease.data[:] = await node.pread(place, length)
            if await lease.decrypt(self.cipher, sector):
                return lease.data
        return self.cipher.decrypt(await node.pread(place, length), sector)

    async def _encrypt(self, data: memoryview, sector: int) -> Data:
        lease = self._lease(len(data))
        if lease is not None:
            lease.data[:] = data
            if await lease.encrypt(self.cipher, sector):
                return lease.data
        return self.cipher.encrypt(data, sector)

    def _lease(self, length: int) -> Lease | None:
        """Memory in which another process ciphers, if so much is worth the way there."""
        return self._pool.lease(length) if self._pool is not None and length >= LONG else None
