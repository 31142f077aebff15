"""The driver `luks`: an encrypted disk; its header may live on another node.

The child "file" holds the payload; the header is at its beginning, or on the
child "header" if there is one.  The passphrase is asked for at the moment of
opening and forgotten at once; the volume key lives in the sector cipher until
the node is closed.  Keys are derived in a thread, so that the event loop
never waits for one.

Source: LUKS On-Disk Format Specification 1.2.3 (the format itself is in
`qmpd.crypto.luks1`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from qmpd.block import creation
from qmpd.block.buffers import unset
from qmpd.block.node import SECTOR, Data, Extent, Node
from qmpd.block.permissions import Permission
from qmpd.crypto import luks1
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.sectors import SectorCipher
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.cipher_pool import Lease
    from qmpd.block.graph import Graph

#: Long requests are ciphered in tiles of this many bytes, and others get a turn in between.
TILE = 256 * 1024

#: From this many bytes on another process ciphers them, if there is one: below, telling it takes as long.
LONG = 64 * 1024

#: Milliseconds for one passphrase check, if `iter-time` is not given.
DEFAULT_ITER_TIME = 2000


async def read_padded(node: Node, offset: int, length: int) -> bytearray:
    """The bytes at `offset`; what lies behind the end of the node reads as zeroes.

    A truncated header is thereby found by what it says, not by its length.
    """
    available = max(0, min(length, node.size - offset))
    buffer = bytearray(length)
    if available:
        buffer[:available] = memoryview(await node.pread(offset, available))
    return buffer


def unlock(
    header: luks1.Header, password: bytearray, materials: list[tuple[int, bytearray]]
) -> luks1.VolumeKey:
    """The volume key, from the first keyslot that `password` opens.  Takes long: run it in a thread.

    :param materials: the number and the key material of each active keyslot.
    :raise Error: if it opens none; a keyslot with an absurd iteration count does not
        keep the others from being tried, but is what is complained of then.
    """
    refusal = Error(luks1.INVALID_PASSWORD)
    for slot, material in materials:
        try:
            key = luks1.unlock_slot(header, slot, password, material)
        except Error as error:
            refusal = error
            continue
        if key is not None:
            return luks1.VolumeKey(key)
    raise refusal


class LuksNode(Node):
    """A LUKS1 disk, unlocked."""

    driver = "luks"
    strong_options = ("key-secret",)
    request_alignment = SECTOR

    _header: luks1.Header
    _cipher: SectorCipher | None = None
    _payload_offset = 0

    async def open(self) -> None:
        """Read the header, unlock a keyslot, see that the payload is there."""
        source = await self._open_header() or self.file
        if "key-secret" not in self.options:
            raise Error("Parameter 'key-secret' is required for cipher")
        password = self.graph.secrets(self.options["key-secret"])
        try:
            header, materials = await self._read_header(source)
            with await self.graph.in_key_thread(unlock, header, password, materials) as key:
                self._cipher = SectorCipher(header.spec, key.data)
        finally:
            password[:] = bytes(len(password))
        self._header = header
        self._payload_offset = header.payload_offset * luks1.SECTOR
        header.payload_bytes(self.file.size)

    async def _read_header(self, source: Node) -> tuple[luks1.Header, list[tuple[int, bytearray]]]:
        """The header, and the key material of the active keyslots with their numbers."""
        try:
            data = await read_padded(source, 0, luks1.HEADER_BYTES)
            header = luks1.Header.parse(data, detached="header" in self.children)
            active = [number for number, slot in enumerate(header.slots) if slot.active]
            return header, [
                (number, await read_padded(source, *header.material_extent(number))) for number in active
            ]
        except OSError as error:
            raise Error(f"Unable to read LUKS header: {error.strerror}") from None

    async def _open_header(self) -> Node | None:
        """Attach the node with the detached header, if the options name one."""
        if "header" in self.options and "header-file" in self.options:
            raise Error("Parameters 'header' and 'header-file' are mutually exclusive")
        reference = self.options.get("header", self.options.get("header-file"))
        if reference is None:
            return None
        return await self.graph.open_child(self, "header", reference)

    async def close(self) -> None:
        """Wipe the key, here and in the processes that have it."""
        if self._cipher is not None:
            if self.graph.cipher_pool is not None:
                self.graph.cipher_pool.forget(self._cipher)
            self._cipher.close()
            self._cipher = None

    # -- what it is

    @property
    def size(self) -> int:
        """The payload's size."""
        return max(self.file.size - self._payload_offset, 0) // SECTOR * SECTOR

    @property
    def can_grow(self) -> bool:
        """As the payload's node; what it grows by does not read as zeroes, for it is deciphered."""
        return self.file.can_grow

    @property
    def encrypted(self) -> bool:
        """Always."""
        return True

    @property
    def _is_detached(self) -> bool:
        # A whole image may serve as header too; its payload offset still counts then.
        return "header" in self.children and self._header.payload_offset == 0

    def child_permissions(
        self, role: str, perm: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """As its parents ask, and always to read: the key is worth nothing if the data moves.

        The same goes for the header's node, so whoever writes the disk holds
        off others who would change its keyslots.
        """
        return perm | Permission.CONSISTENT_READ, shared

    def format_specific(self) -> dict[str, Any] | None:
        """ImageInfoSpecificLUKS."""
        header, spec = self._header, self._header.spec
        data: dict[str, Any] = {
            "cipher-alg": spec.algorithm,
            "cipher-mode": spec.mode,
            "ivgen-alg": spec.ivgen,
            "hash-alg": header.hash_name,
            "detached-header": self._is_detached,
            "payload-offset": self._payload_offset,
            "master-key-iters": header.digest_iterations,
            "uuid": header.uuid,
            "slots": [_slot_info(slot) for slot in header.slots],
        }
        if spec.ivgen == "essiv":
            data["ivgen-hash-alg"] = spec.ivgen_hash
        return {"type": "luks", "data": data}

    # -- requests

    @property
    def _active_cipher(self) -> SectorCipher:
        assert self._cipher is not None
        return self._cipher

    async def _pread(self, offset: int, length: int) -> Data:
        if length <= TILE:
            return await self._read_tile(offset, length)
        plain = unset(length)
        for start in range(0, length, TILE):
            if start:
                await asyncio.sleep(0)
            tile = plain[start : start + TILE]
            tile[:] = await self._read_tile(offset + start, len(tile))
        return plain

    async def _read_tile(self, offset: int, length: int) -> Data:
        place, sector, cipher = self._payload_offset + offset, offset // SECTOR, self._active_cipher
        lease = self._lease(length)
        if lease is not None:
            if not all(self.file.read_cached([(place, length)], lease.data)):
                lease.data[:] = await self.file.pread(place, length)
            if await lease.decrypt(cipher, sector):
                return lease.data
        return cipher.decrypt(await self.file.pread(place, length), sector)

    def _lease(self, length: int) -> Lease | None:
        """Memory in which another process ciphers, if so much is worth the way there."""
        pool = self.graph.cipher_pool
        return pool.lease(length) if pool is not None and length >= LONG else None

    def _read_cached(self, requests: Sequence[Extent], into: memoryview) -> list[bool]:
        pool = self.graph.cipher_pool
        if pool is not None and pool.has_room and any(length >= LONG for _, length in requests):
            return [False] * len(requests)
        payload = self._payload_offset
        served = self.file.read_cached([(payload + offset, length) for offset, length in requests], into)
        if True in served:
            runs = [(offset // SECTOR, length) for offset, length in requests]
            self._active_cipher.decrypt_runs(into, runs, into)
        return served

    async def _pwrite_many(self, writes: Sequence[tuple[int, Data]]) -> list[OSError | None]:
        if sum(len(data) for _, data in writes) > TILE:
            return await super()._pwrite_many(writes)
        joined = bytearray().join([data for _, data in writes])
        self._active_cipher.encrypt_runs(
            joined, [(offset // SECTOR, len(data)) for offset, data in writes], joined
        )
        rest = memoryview(joined)
        encrypted: list[tuple[int, Data]] = []
        for offset, data in writes:
            encrypted.append((self._payload_offset + offset, rest[: len(data)]))
            rest = rest[len(data) :]
        return await self.file.pwrite_many(encrypted, grow=self.can_grow)

    async def _pwrite(self, offset: int, data: memoryview) -> None:
        for start in range(0, len(data), TILE):
            if start:
                await asyncio.sleep(0)
            tile = await self._encrypt(data[start : start + TILE], (offset + start) // SECTOR)
            await self.file.pwrite(self._payload_offset + offset + start, tile, grow=self.can_grow)

    async def _encrypt(self, data: memoryview, sector: int) -> Data:
        lease = self._lease(len(data))
        if lease is not None:
            lease.data[:] = data
            if await lease.encrypt(self._active_cipher, sector):
                return lease.data
        return self._active_cipher.encrypt(data, sector)

    async def _truncate(self, size: int, preallocation: str) -> None:
        await self.file.truncate(self._payload_offset + size, preallocation)


def _slot_info(slot: luks1.Keyslot) -> dict[str, Any]:
    info: dict[str, Any] = {"active": slot.active, "key-offset": slot.key_offset * luks1.SECTOR}
    if slot.active:
        info |= {"iters": slot.iterations, "stripes": slot.stripes}
    return info


class GluksNode(LuksNode):
    """The same under the name of the first proposal for detached headers."""

    driver = "gluks"


async def create(graph: Graph, options: Mapping[str, Any]) -> None:
    """Make a LUKS1 volume, with its header in front of the payload or on a node of its own.

    :param options: BlockdevCreateOptions, validated, in QAPI's names.
    :raise Error: what went wrong.
    """
    size: int | None = options.get("size")
    preallocation: str = options.get("preallocation", "off")
    async with AsyncExitStack() as stack:
        if "file" not in options and "header" not in options:
            raise Error("Either the parameter 'header' or 'file' must be specified")
        payload = header_disk = None
        if "file" in options:
            payload = await stack.enter_async_context(creation.disk_for(graph, options["file"]))
        if "header" in options:
            header_disk = await stack.enter_async_context(creation.disk_for(graph, options["header"]))

        spec = CipherSpec.from_options(
            options.get("cipher-alg"),
            options.get("cipher-mode"),
            options.get("ivgen-alg"),
            options.get("ivgen-hash-alg"),
        )
        if "key-secret" not in options:
            raise Error("Parameter 'key-secret' is required for cipher")
        if size is not None and size > creation.MAX_SIZE:
            raise Error("The requested file size is too large")
        hash_name = options.get("hash-alg", "sha256")
        iter_time = options.get("iter-time", DEFAULT_ITER_TIME)

        def derive() -> tuple[luks1.Header, list[luks1.Write | luks1.Barrier]]:
            iterations = luks1.iterations_for(hash_name, spec.key_bytes, iter_time)
            detached = header_disk is not None
            header, key, plan = luks1.format_plan(spec, hash_name, password, *iterations, detached=detached)
            key.wipe()
            return header, plan

        password = graph.secrets(options["key-secret"])
        try:
            header, plan = await graph.in_key_thread(derive)
        finally:
            password[:] = bytes(len(password))
        target = header_disk or payload
        assert target is not None
        if payload is not None and size is not None:
            offset = header.payload_offset * luks1.SECTOR
            await payload.truncate(offset + size, preallocation)
        if header_disk is not None:
            await header_disk.truncate(header.header_length())
        for step in plan:
            if isinstance(step, luks1.Write):
                await target.pwrite(step.offset, step.data)
            else:
                await target.flush()
