"""The driver `luks`: an encrypted disk; its header may live on another node.

The child "file" holds the payload; the header is at its beginning, or on the
child "header" if there is one.  The passphrase is asked for at the moment of
opening and forgotten at once; the volume key lives in the sector cipher until
the node is closed.  Keys are derived in a thread, so that the event loop
never waits for one.

Which version of the format it is, the header says (`qmpd.crypto.luks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from qmpd.block import creation, keyslots, luks_header
from qmpd.block.keyslot_holder import HeaderAccess, KeyslotHolder
from qmpd.block.luks_header import HeaderArea, OpenedSlot
from qmpd.block.node import SECTOR, Data, Extent
from qmpd.block.payload import Payload, in_sectors
from qmpd.block.permissions import Permission
from qmpd.crypto.luks import LuksHeader, PayloadSegment
from qmpd.crypto.memory import KeyBuffer
from qmpd.crypto.plan import Write
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.graph import Graph


class LuksNode(KeyslotHolder):
    """A LUKS disk, unlocked."""

    driver = "luks"
    strong_options = ("key-secret",)
    request_alignment = SECTOR
    amendable = True

    _header: LuksHeader | None = None
    _segments: tuple[PayloadSegment, ...] = ()
    _payload: Payload | None = None
    _opened_slot: OpenedSlot | None = None

    async def open(self) -> None:
        """Read the header, unlock a keyslot, see that the payload is there."""
        await self._open_header()
        self._header, key, self._opened_slot = await luks_header.unlock(
            self.graph, self.header_area, self.options, detached="header" in self.children
        )
        with key:
            self._segments = self._header.segments
            self._payload = Payload(self.graph, self._segments, key.data)
        self.request_alignment = self._payload.alignment
        self._header.payload_bytes(self.file.size)

    async def _open_header(self) -> None:
        """Attach the node with the detached header, if the options name one."""
        if "header" in self.options and "header-file" in self.options:
            raise Error("Parameters 'header' and 'header-file' are mutually exclusive")
        reference = self.options.get("header", self.options.get("header-file"))
        if reference is not None:
            await self.graph.open_child(self, "header", reference)

    async def close(self) -> None:
        """Wipe the key, here and in the processes that have it."""
        if self._payload is not None:
            self._payload.close()
            self._payload = None

    # -- what it is

    @property
    def size(self) -> int:
        """The payload's size."""
        return 0 if self._payload is None else self._payload.size(self.file.size)

    @property
    def can_grow(self) -> bool:
        """As the payload's node; what it grows by does not read as zeroes, for it is deciphered."""
        return self.file.can_grow and self._open_payload.is_dynamic

    @property
    def encrypted(self) -> bool:
        """Always."""
        return True

    @property
    def _is_detached(self) -> bool:
        # A whole image may serve as header too; its payload offset still counts then.
        return "header" in self.children and self._segments[0].offset == 0

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
            if self._header is not None and self._header.length > self.header_area.node.size:
                # It ends before the key of a slot that nobody has used yet.
                perm |= Permission.RESIZE
        return self.header_access.permissions(perm, shared)

    def format_specific(self) -> dict[str, Any] | None:
        """ImageInfoSpecificLUKS."""
        assert self._header is not None, "an open disk has a header"
        info = luks_header.header_info(self._header, self._segments[0], detached=self._is_detached)
        return {"type": "luks", "data": info}

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
    def luks_header(self) -> LuksHeader | None:
        """The header."""
        return self._header

    @luks_header.setter
    def luks_header(self, header: LuksHeader) -> None:
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

    def copy_volume_key(self) -> KeyBuffer:
        """A copy of what the cipher has."""
        return self._open_payload.copy_key()

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
    def _open_payload(self) -> Payload:
        assert self._payload is not None, "requests come to an open disk"
        return self._payload

    async def _pread(self, offset: int, length: int) -> Data:
        return await self._open_payload.read(self.file, offset, length)

    def _read_cached(self, requests: Sequence[Extent], into: memoryview) -> list[bool]:
        return self._open_payload.read_cached(self.file, requests, into)

    async def _pwrite_many(self, writes: Sequence[tuple[int, Data]]) -> list[OSError | None]:
        encrypted = self._open_payload.encrypt_many(writes)
        if encrypted is None:
            return await super()._pwrite_many(writes)
        return await self.file.pwrite_many(encrypted, grow=self.can_grow)

    async def _pwrite(self, offset: int, data: memoryview) -> None:
        await self._open_payload.write(self.file, offset, data, grow=self.can_grow)

    async def _truncate(self, size: int, preallocation: str) -> None:
        payload = self._open_payload
        if not payload.is_dynamic:
            raise Error("The LUKS2 header gives the payload a fixed size")
        await self.file.truncate(payload.file_size(size), preallocation)


class GluksNode(LuksNode):
    """The same under the name of the first proposal for detached headers."""

    driver = "gluks"


async def create(graph: Graph, options: Mapping[str, Any]) -> None:
    """Make a LUKS volume, with its header in front of the payload or on a node of its own.

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
            segment = header.segments[0]
            # Nobody gets less than he asked for.
            await payload.truncate(segment.offset + in_sectors(size, segment.sector_size), preallocation)
        if header_disk is not None:
            await header_disk.truncate(header.length)
        for step in plan:
            if isinstance(step, Write):
                await target.pwrite(step.offset, step.data)
            else:
                await target.flush()
