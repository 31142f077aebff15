"""One write or flush of a qcow2 image's file fails, and no harm is done.

The request that needed it may fail; what it would have changed is as before or as wanted, sector by sector.
All others, and a later try, succeed, and the image is sound and without a leak when it is closed.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from qcow2_images import create, judge

from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.file import FileNode
from qmpd.block.graph import Graph
from qmpd.block.node import Node, errno_error
from qmpd.crypto.memory import KeyMemory
from qmpd.errors import Error

SECTOR = 512
SIZE = 256 << 10


class Trouble:
    """Lets one request of the file fail: the one with this number, counted from 0."""

    def __init__(self, number: int) -> None:
        self.left = number

    def look(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise errno_error(errno.EIO)


def failing(trouble: Trouble) -> type[FileNode]:
    class FailingFile(FileNode):
        async def _pwrite(self, offset: int, data: memoryview) -> None:
            trouble.look()
            await super()._pwrite(offset, data)

        async def _pwrite_zeroes(self, offset: int, length: int, unmap: bool) -> None:
            trouble.look()
            await super()._pwrite_zeroes(offset, length, unmap)

        async def _flush(self) -> None:
            trouble.look()
            await asyncio.sleep(0)

    return FailingFile


class Guest:
    """Does things, some of which fail, and knows what the disk may hold."""

    def __init__(self, node: Node, model: bytearray) -> None:
        self.node = node
        self.model = model
        self.failed = 0

    async def attempt(self, request: Awaitable[Any]) -> bool:
        try:
            await request
        except (OSError, Error):
            self.failed += 1
            return False
        return True

    async def change(self, request: Awaitable[None], start: int, data: bytes) -> None:
        done = await self.attempt(request)
        found = bytes(await self.node.pread(start, len(data)))
        if done:
            assert found == data
        else:
            for at in range(0, len(data), SECTOR):
                now = found[at : at + SECTOR]
                assert now in (data[at : at + SECTOR], self.model[start + at : start + at + SECTOR])
        self.model[start : start + len(data)] = found

    async def resize(self, size: int) -> None:
        await self.attempt(self.node.truncate(size))
        assert self.node.size in (size, len(self.model))
        old = len(self.model)
        if size < self.node.size:
            # Part of what was to be cut off may be gone.
            tail = bytes(await self.node.pread(size, self.node.size - size))
            for at in range(0, len(tail), SECTOR):
                now = tail[at : at + SECTOR]
                assert now in (bytes(SECTOR), self.model[size + at : size + at + SECTOR])
            self.model[size:] = tail
        self.model[:] = self.model[: self.node.size].ljust(self.node.size, b"\0")
        if self.node.size > old:
            # A new end may have been reached, although what is there could not be made zeroes.
            self.model[old:] = bytes(await self.node.pread(old, self.node.size - old))


async def live(guest: Guest, seed: int) -> None:
    """Much of what can happen to an image."""
    chance = random.Random(seed)
    node, model = guest.node, guest.model
    for step in range(26):
        length = chance.choice((1, 5, 40)) * SECTOR
        start = chance.randrange(0, len(model) - length) // SECTOR * SECTOR
        match chance.choice(("write", "write", "write", "zeroes", "flush", "size", "keep", "forget")):
            case "write":
                data = chance.randbytes(length)
                await guest.change(node.pwrite(start, data), start, data)
            case "zeroes":
                await guest.change(node.pwrite_zeroes(start, length, unmap=True), start, bytes(length))
            case "flush":
                await guest.attempt(node.flush())
            case "size":
                await guest.resize(SIZE + chance.choice((-70, 0, 200)) * 1024)
            case "keep":
                before = len(node.internal_snapshots)
                made = await guest.attempt(node.create_internal_snapshot(f"s{step}", 0.0))
                assert len(node.internal_snapshots) == before + made
            case _:
                if node.internal_snapshots:
                    await guest.attempt(node.delete_internal_snapshot(node.internal_snapshots[0].id))


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "options", ["cluster_size=512", "cluster_size=4096", "cluster_size=16k,extended_l2=on"]
)
async def test_an_error_does_no_harm(tmp_path: Path, options: str) -> None:
    chance = random.Random(options)
    for turn in range(40):
        number = chance.randrange(0, 250)
        model = bytearray(SIZE)
        path = create(tmp_path, options, SIZE)
        trouble = Trouble(number)
        graph = Graph({**DRIVERS, "file": failing(trouble)}, secrets=lambda _: KeyMemory().take(0))
        file = {"driver": "file", "filename": str(path)}
        cache = {"l2-cache-size": 1024, "l2-cache-entry-size": 512}
        node = await graph.add(
            {"driver": "qcow2", "node-name": "d", "discard": "unmap", "file": file, **cache}
        )
        guest = Guest(node, model)
        await live(guest, turn)
        trouble.left = -2
        assert guest.failed <= 2, (turn, number)
        assert bytes(await node.pread(0, node.size)) == model, (turn, number)
        await graph.delete("d")
        await graph.close()
        try:
            judge(path, model)
        except AssertionError as error:
            raise AssertionError(f"turn {turn}, request {number}: {error}") from None
