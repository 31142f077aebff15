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

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from qmpd.block import creation, keyslots, luks_header
from qmpd.block.keyslot_holder import HeaderAccess, KeyslotHolder
from qmpd.block.luks_header import HeaderArea, OpenedSlot
from qmpd.block.node import SECTOR, Data, Extent
from qmpd.block.permissions import Permission
from qmpd.block.tiled_cipher import LONG, TILE, TiledCipher
from qmpd.crypto import luks1
from qmpd.crypto.plan import Write
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.graph import Graph


class LuksNode(KeyslotHolder):
    """A LUKS1 disk, unlocked."""

    driver = "luks"
    strong_options = ("key-secret",)
    request_alignment = SECTOR
    amendable = True

    _header: luks1.Header | None = None
    _cipher: TiledCipher | None = None
    _opened_slot: OpenedSlot | None = None
    _payload_offset = 0

    async def open(self) -> None:
        """Read the header, unlock a keyslot, see that the payload is there."""
        await self._open_header()
        header, cipher, self._opened_slot = await luks_header.unlock(
            self.graph, self.header_area, self.options, detached="header" in self.children
        )
        self._header = header
        self._cipher = TiledCipher(cipher, self.graph.cipher_pool)
        self._payload_offset = header.payload_offset * luks1.SECTOR
        header.payload_bytes(self.file.size)

    async def _open_header(self) -> None:
        """Attach the node with the detached header, if the options name one."""
        if "header" in self.options and "header-file" in self.options:
            raise Error("Parameters 'header' and 'header-file' are mutually exclusive")
        reference = self.options.get("header", self.options.get("header-file"))
        if reference is not None:
            await self.graph.open_child(self, "header", reference)

    async def close(self) -> None:
        """Wipe the key, here and in the processes that have it."""
        if self._cipher is not None:
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
        return "header" in self.children and self._payload_offset == 0

    def child_permissions(
        self, role: str, perm: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """As its parents ask, and always to read: the key is worth nothing if the data moves.

        The same goes for the header's node, so whoever writes the disk holds
        off others who would change its keyslots.
        """
        perm |= Permission.CONSISTENT_READ
        if role != self.header_role:
            return perm, shared
        if self.header_access is HeaderAccess.EXCLUSIVE:
            perm |= Permission.WRITE
            if self._header is not None and self._header.header_length() > self.header_area.node.size:
                # It ends before the key of a slot that nobody has used yet.
                perm |= Permission.RESIZE
        return self.header_access.permissions(perm, shared)

    def format_specific(self) -> dict[str, Any] | None:
        """ImageInfoSpecificLUKS."""
        assert self._header is not None, "an open disk has a header"
        return {"type": "luks", "data": luks_header.header_info(self._header, detached=self._is_detached)}

    # -- the header

    @property
    def header_role(self) -> str:
        """Where the header is: on a node of its own, or in front of the payload."""
        return "header" if "header" in self.children else "file"

    @property
    def header_area(self) -> HeaderArea:
        """The beginning of that node."""
        return HeaderArea(self.children[self.header_role].child)

    @property
    def luks_header(self) -> luks1.Header | None:
        """The header."""
        return self._header

    @luks_header.setter
    def luks_header(self, header: luks1.Header) -> None:
        self._header = header

    @property
    def opened_with(self) -> str:
        """The option `key-secret`."""
        secret: str = self.options["key-secret"]
        return secret

    @property
    def opened_slot(self) -> OpenedSlot:
        """The slot that the passphrase opened."""
        assert self._opened_slot is not None, "an open disk was opened"
        return self._opened_slot

    def copy_volume_key(self) -> luks1.VolumeKey:
        """A copy of what the cipher has."""
        return luks1.VolumeKey(self._active_cipher.cipher.copy_key())

    def check_amend(self) -> None:
        """Nobody else may have the header open."""
        keyslots.check_access(self)

    async def amend(
        self,
        options: Mapping[str, Any],
        *,
        force: bool,
        progress: Callable[[int, int], None],
        commit: Callable[[], None],
    ) -> None:
        """Change keyslots.

        :param options: BlockdevAmendOptionsLUKS.
        """
        await keyslots.amend(self, options, force=force, commit=commit)

    # -- requests

    @property
    def _active_cipher(self) -> TiledCipher:
        assert self._cipher is not None
        return self._cipher

    async def _pread(self, offset: int, length: int) -> Data:
        return await self._active_cipher.read(
            self.file, self._payload_offset + offset, length, offset // SECTOR
        )

    def _read_cached(self, requests: Sequence[Extent], into: memoryview) -> list[bool]:
        if any(length >= LONG for _, length in requests) and self._active_cipher.has_room:
            return [False] * len(requests)
        payload = self._payload_offset
        served = self.file.read_cached([(payload + offset, length) for offset, length in requests], into)
        if True in served:
            runs = [(offset // SECTOR, length) for offset, length in requests]
            self._active_cipher.cipher.decrypt_runs(into, runs, into)
        return served

    async def _pwrite_many(self, writes: Sequence[tuple[int, Data]]) -> list[OSError | None]:
        if sum(len(data) for _, data in writes) > TILE:
            return await super()._pwrite_many(writes)
        joined = bytearray().join([data for _, data in writes])
        self._active_cipher.cipher.encrypt_runs(
            joined, [(offset // SECTOR, len(data)) for offset, data in writes], joined
        )
        rest = memoryview(joined)
        encrypted: list[tuple[int, Data]] = []
        for offset, data in writes:
            encrypted.append((self._payload_offset + offset, rest[: len(data)]))
            rest = rest[len(data) :]
        return await self.file.pwrite_many(encrypted, grow=self.can_grow)

    async def _pwrite(self, offset: int, data: memoryview) -> None:
        await self._active_cipher.write(
            self.file, self._payload_offset + offset, data, offset // SECTOR, grow=self.can_grow
        )

    async def _truncate(self, size: int, preallocation: str) -> None:
        await self.file.truncate(self._payload_offset + size, preallocation)


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

        spec = luks_header.spec_for(options)
        if size is not None and size > creation.MAX_SIZE:
            raise Error("The requested file size is too large")
        header, plan = await luks_header.make(graph, spec, options, detached=header_disk is not None)
        target = header_disk or payload
        assert target is not None
        if payload is not None and size is not None:
            offset = header.payload_offset * luks1.SECTOR
            await payload.truncate(offset + size, preallocation)
        if header_disk is not None:
            await header_disk.truncate(header.header_length())
        for step in plan:
            if isinstance(step, Write):
                await target.pwrite(step.offset, step.data)
            else:
                await target.flush()
