"""The driver `raw`: its child's bytes as they are, or a window of them."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any

from qmpd.block.change import Change
from qmpd.block.node import SECTOR, BlockStatus, Data, Extent, Node, NotSupported
from qmpd.block.options import NodeOptions
from qmpd.block.permissions import Permission
from qmpd.errors import Error


class RawNode(Node):
    """Shifts requests by `offset` bytes; ends after `size` bytes if that is given."""

    driver = "raw"
    strong_options = ("offset", "size")
    changeable_options = resettable_options = frozenset(strong_options)

    async def open(self) -> None:
        """Check the window against the child's size."""
        self._set_window()

    async def reopen(self, options: Mapping[str, Any], node_options: NodeOptions, change: Change) -> None:
        """Move the window."""
        await super().reopen(options, node_options, change)
        change.on_failure(setattr, self, "_offset", self._offset)
        change.on_failure(setattr, self, "_fixed_size", self._fixed_size)
        self._set_window()

    def _set_window(self) -> None:
        for name in self.strong_options:
            value = self.options.get(name, 0)
            if value < 0:
                raise Error(f"Value '{value}' is out of range for parameter '{name}'")
        real_size = self.file.size
        self._offset: int = self.options.get("offset", 0)
        self._fixed_size: int | None = self.options.get("size")
        if self._offset > real_size:
            raise Error(
                f"Offset ({self._offset}) cannot be greater than size of the containing file ({real_size})"
            )
        if self._fixed_size is not None:
            if self._fixed_size > real_size - self._offset:
                raise Error(
                    f"The sum of offset ({self._offset}) and size ({self._fixed_size}) has to be smaller "
                    f"or equal to the  actual size of the containing file ({real_size})"
                )
            if self._fixed_size % SECTOR:
                raise Error("Specified size is not multiple of 512")

    @property
    def size(self) -> int:
        """The window's size, or what the child has from the offset on."""
        if self._fixed_size is not None:
            return self._fixed_size
        return -(-max(self.file.size - self._offset, 0) // SECTOR) * SECTOR

    @property
    def can_grow(self) -> bool:
        """A window has a fixed size; else as the child."""
        return self._fixed_size is None and self.file.can_grow

    @property
    def grows_with_zeroes(self) -> bool:
        """As the child."""
        return self.file.grows_with_zeroes

    def child_permissions(
        self, role: str, perm: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """As its parents ask; but nobody may move the end under a window."""
        is_window = bool(self.options.get("offset")) or "size" in self.options
        return perm, shared & ~Permission.RESIZE if is_window else shared

    async def _pread(self, offset: int, length: int) -> Data:
        start = self._offset + offset
        available = self.file.size - start
        if length <= available:
            return await self.file.pread(start, length)
        # An odd offset leaves an odd end; the rest of the last sector reads as zeroes.
        return bytes(await self.file.pread(start, max(available, 0))).ljust(length, b"\0")

    def _read_cached(self, requests: Sequence[Extent], into: memoryview) -> list[bool]:
        # The child refuses what reaches into an odd end.
        return self.file.read_cached([(self._offset + offset, length) for offset, length in requests], into)

    async def _pwrite_many(self, writes: Sequence[tuple[int, Data]]) -> list[OSError | None]:
        moved = [(self._offset + offset, data) for offset, data in writes]
        return await self.file.pwrite_many(moved, grow=self.can_grow)

    async def _pwrite(self, offset: int, data: memoryview) -> None:
        await self.file.pwrite(self._offset + offset, data, grow=self.can_grow)

    async def _pwrite_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        try:
            await self.file.pwrite_zeroes(self._offset + offset, length, unmap=unmap, fast=True)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                # Whether they are to be written instead is for whoever asked to say.
                raise NotSupported from None
            raise

    async def _pdiscard(self, offset: int, length: int) -> None:
        await self.file.pdiscard(self._offset + offset, length)

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        start = self._offset + offset
        available = self.file.size - start
        if available <= 0:
            return BlockStatus(length, data=False, zero=True)
        return await self.file.block_status(start, min(length, available))

    async def _truncate(self, size: int, preallocation: str) -> None:
        if self._fixed_size is not None:
            raise Error("Cannot resize fixed-size raw disks")
        await self.file.truncate(self._offset + size, preallocation)
