"""A format with backing images that is as small as can be, to test what the graph does with such formats.

An image is one JSON text of `HEADER` bytes ("size", and if there is a backing image "backing" and
perhaps "format"), a byte for each cluster ("d" for data, "z" for zeroes, else it is not there), and
at `HEADER` + `MAP` the clusters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.block.node import BlockStatus, Data, Node
from qmpd.block.permissions import Permission
from qmpd.crypto.memory import KeyMemory
from qmpd.errors import Error

HEADER: Final = 4096
MAP: Final = 4096
CLUSTER: Final = 4096


def make_image(path: Path, size: int, clusters: Mapping[int, bytes] | None = None, **header: str) -> Path:
    """Write an image; `clusters` are filled with the one byte that each is given, b"" is a zero cluster."""
    clusters = clusters or {}
    image = bytearray(HEADER + MAP + size)
    image[:HEADER] = json.dumps({"size": size, **header}).encode().ljust(HEADER)
    for number, byte in clusters.items():
        image[HEADER + number] = ord("d" if byte else "z")
        start = HEADER + MAP + number * CLUSTER
        image[start : start + CLUSTER] = (byte or b"\0") * CLUSTER
    path.write_bytes(image)
    return path


class CowNode(Node):
    """Such an image; a write copies the rest of the cluster from the backing image."""

    driver = "cow"
    supports_backing = True
    request_alignment = CLUSTER

    _size = 0

    async def open(self) -> None:
        text = bytes(await self.file.pread(0, min(HEADER, self.file.size)))
        try:
            header = json.loads(text)
        except ValueError:
            raise Error("Image is not in cow format") from None
        self._size = header["size"]
        self.backing_filename = header.get("backing")
        self.backing_format = header.get("format")
        self._map = bytearray(await self.file.pread(HEADER, MAP))

    @property
    def size(self) -> int:
        return self._size

    def child_permissions(
        self, role: str, perm: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        perm |= Permission.CONSISTENT_READ
        if not self.read_only:
            perm |= Permission.WRITE
        return perm, shared & ~(Permission.WRITE | Permission.RESIZE)

    async def _pread(self, offset: int, length: int) -> Data:
        data = b""
        for start in range(offset, offset + length, CLUSTER):
            state = self._map[start // CLUSTER]
            if state == ord("d"):
                data += bytes(await self.file.pread(HEADER + MAP + start, CLUSTER))
            else:
                data += bytes(CLUSTER) if state else bytes(await self.pread_backing(start, CLUSTER))
        return data

    async def _pwrite(self, offset: int, data: memoryview) -> None:
        await self.file.pwrite(HEADER + MAP + offset, data)
        first, count = offset // CLUSTER, len(data) // CLUSTER
        self._map[first : first + count] = b"d" * count
        await self.file.pwrite(HEADER, self._map)

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        length = min(length, CLUSTER - offset % CLUSTER)
        state = self._map[offset // CLUSTER]
        return BlockStatus(length, data=state == ord("d"), zero=state == ord("z"), depth=int(state != 0))


#: qmpd's drivers, and this one.
WITH_COW: Final[Mapping[str, Any]] = {**DRIVERS, "cow": CowNode}


def graph_with_cow() -> Graph:
    """A graph that has this driver besides qmpd's own."""
    return Graph(WITH_COW, secrets=lambda secret_id: KeyMemory().copy_of(b"pw"))
