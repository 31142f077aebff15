"""The drivers `null-co` and `null-aio`: a disk that forgets what is written to it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qmpd.block.node import SECTOR, BlockStatus, Extent, Node
from qmpd.block.options import NodeOptions
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.graph import Graph

#: Bytes, if no size is given.
DEFAULT_SIZE = 1 << 30


class NullCoNode(Node):
    """Reads as zeroes; takes `latency-ns` for each request."""

    driver = "null-co"
    is_protocol = True
    strong_options = ("size", "read-zeroes")

    def __init__(
        self, graph: Graph, name: str, options: Mapping[str, Any], node_options: NodeOptions
    ) -> None:
        super().__init__(graph, name, options, node_options)
        size: int = options.get("size", DEFAULT_SIZE)
        if size < 0:
            raise Error(f"Value '{size}' is out of range for parameter 'size'")
        self._size = -(-size // SECTOR) * SECTOR
        latency: int = options.get("latency-ns", 0)
        if not 0 <= latency < 1 << 63:
            raise Error("latency-ns is invalid")
        self._latency = latency / 1e9

    @property
    def size(self) -> int:
        """The size asked for, rounded up to sectors."""
        return self._size

    @property
    def exact_filename(self) -> str | None:
        """``null-co://`` unless an option makes a difference."""
        if any(option in self.options for option in self.strong_options):
            return None
        return f"{self.driver}://"

    @property
    def allocated_size(self) -> int:
        """Nothing is stored."""
        return 0

    @property
    def has_info(self) -> bool:
        """There is no image to tell about."""
        return False

    def _read_cached(self, requests: Sequence[Extent], into: memoryview) -> list[bool]:
        if self._latency:
            return [False] * len(requests)
        into[:] = bytes(len(into))
        return [True] * len(requests)

    async def _pread(self, offset: int, length: int) -> bytes:
        await self._wait()
        return bytes(length)

    async def _pwrite(self, offset: int, data: memoryview) -> None:
        await self._wait()

    async def _pwrite_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        await self._wait()

    async def _pdiscard(self, offset: int, length: int) -> None:
        await self._wait()

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        zero = bool(self.options.get("read-zeroes"))
        return BlockStatus(length, data=False, zero=zero, depth=int(zero))

    async def _flush(self) -> None:
        await self._wait()

    async def _wait(self) -> None:
        if self._latency:
            await asyncio.sleep(self._latency)


class NullAioNode(NullCoNode):
    """The same under QEMU's other name for it."""

    driver = "null-aio"
