"""A crash in the middle of writing a qcow2 image leaves leaks at worst, and all that was flushed.

A file records what reaches it.  Then the machine "loses power" after each of many moments: what came before
the last barrier is there; of what came after it some writes are, others are not, and one may
be torn between two sectors.  qemu-img mends leaks and nothing else, and what a guest had flushed before has
to be in the image.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.file import FileNode
from qmpd.block.graph import Graph
from qmpd.block.node import Node

SECTOR = 512
SIZE = 1 << 20

#: A write that is over: where, and what.  A barrier: how many entries before it are safe now.
Log = list[tuple[int, bytes] | int]


class Disk:
    """What reached the file, and what the guest knows to be safe."""

    def __init__(self) -> None:
        self.log: Log = []
        #: (length of the log, the disk at that moment) after each flush of the guest.
        self.flushed: list[tuple[int, bytes]] = []
        #: (length of the log, start, data) before each request that changes the disk.
        self.touched: list[tuple[int, int, bytes]] = []


def recording(disk: Disk) -> type[FileNode]:
    class RecordingFile(FileNode):
        async def _pwrite(self, offset: int, data: memoryview) -> None:
            await super()._pwrite(offset, data)
            disk.log.append((offset, bytes(data)))

        async def _pwrite_zeroes(self, offset: int, length: int, unmap: bool) -> None:
            await super()._pwrite_zeroes(offset, length, unmap)
            disk.log.append((offset, bytes(length)))

        async def _pdiscard(self, offset: int, length: int) -> None:
            await super()._pdiscard(offset, length)
            disk.log.append((offset, bytes(length)))

        async def _flush(self) -> None:
            # The barrier is ours to keep: what it costs on real storage would only make the test slow.
            begun = len(disk.log)
            await asyncio.sleep(0)
            disk.log.append(begun)

    return RecordingFile


async def work(node: Node, disk: Disk, chance: random.Random) -> None:
    """Write, discard, zero and flush at random, several requests at a time."""
    for _ in range(50):
        requests = []
        taken: list[tuple[int, int]] = []
        for _ in range(chance.randrange(1, 4)):
            length = chance.choice((SECTOR, 4096, 39 * SECTOR, 136 * SECTOR))
            start = chance.randrange(0, SIZE - length) // SECTOR * SECTOR
            if any(start < end and begin < start + length for begin, end in taken):
                continue
            taken.append((start, start + length))
            kind = chance.random()
            data = chance.randbytes(length) if kind < 0.6 else bytes(length)
            disk.touched.append((len(disk.log), start, data))
            if kind < 0.6:
                requests.append(node.pwrite(start, data))
            elif kind < 0.8:
                requests.append(node.pwrite_zeroes(start, length, unmap=chance.random() < 0.7))
            else:
                requests.append(node.pdiscard(start, length))
        await asyncio.gather(*requests)
        if chance.random() < 0.3:
            await node.flush()
            disk.flushed.append((len(disk.log), bytes(await node.pread(0, SIZE))))


def image_after(before: bytes, log: Log, moment: int, chance: random.Random) -> bytes:
    """What the file holds if the power goes after so many entries of the log."""
    safe = max((entry for entry in log[:moment] if isinstance(entry, int)), default=0)
    image = bytearray(before)
    for number, entry in enumerate(log[:moment]):
        if isinstance(entry, int):
            continue
        offset, data = entry
        if number >= safe:
            if (fate := chance.random()) < 0.3:
                continue
            if fate < 0.5:
                # Torn between two sectors of the storage.
                whole = (offset + chance.randrange(len(data))) // SECTOR * SECTOR
                data = data[: max(0, whole - offset)]
        if len(image) < offset + len(data):
            image.extend(bytes(offset + len(data) - len(image)))
        image[offset : offset + len(data)] = data
    return bytes(image)


def wrong_sectors(disk: Disk, moment: int, found: bytes) -> list[int]:
    """The sectors that hold neither what was flushed nor what was written since."""
    length, safe = max((state for state in disk.flushed if state[0] <= moment), key=lambda state: state[0])
    since = [(start, data) for begun, start, data in disk.touched if begun >= length]
    return [
        sector // SECTOR
        for sector in range(0, SIZE, SECTOR)
        if (now := found[sector : sector + SECTOR]) != safe[sector : sector + SECTOR]
        and not any(
            now == data[sector - start : sector - start + SECTOR] for start, data in since if start <= sector
        )
    ]


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    ("options", "snapshot"),
    [
        ("cluster_size=4096", False),
        ("cluster_size=512,refcount_bits=1", False),
        ("cluster_size=4096,backing_file=base.raw,backing_fmt=raw", False),
        ("cluster_size=4096,refcount_bits=64", True),
        ("cluster_size=16k,extended_l2=on,backing_file=base.raw,backing_fmt=raw", False),
        ("cluster_size=64k", True),
    ],
)
async def test_a_crash_leaves_leaks_at_worst(tmp_path: Path, options: str, snapshot: bool) -> None:
    def qemu_img(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["qemu-img", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    chance = random.Random(options)
    base = chance.randbytes(SIZE)
    model = bytearray(SIZE)
    (tmp_path / "base.raw").write_bytes(base)
    if "backing" in options:
        model[:] = base
    assert qemu_img("create", "-q", "-f", "qcow2", "-o", options, "d.qcow2", str(SIZE)).returncode == 0
    disk = Disk()
    graph = Graph({**DRIVERS, "file": recording(disk)}, secrets=lambda _: bytearray())
    reference: dict[str, Any] = {"driver": "file", "filename": str(tmp_path / "d.qcow2")}
    # With the smallest cache tables are written now and then without a flush.
    open_options = {
        "driver": "qcow2",
        "node-name": "d",
        "discard": "unmap",
        "l2-cache-size": 512,
        "l2-cache-entry-size": 512,
        "file": reference,
    }
    if snapshot:
        # What is written again after a snapshot was shared before.
        node = await graph.add(open_options)
        await work(node, disk, chance)
        model[:] = bytes(memoryview(await node.pread(0, SIZE)))
        await graph.delete("d")
        assert qemu_img("snapshot", "-c", "s", "d.qcow2").returncode == 0
        disk.log.clear()
        disk.touched.clear()
    disk.flushed[:] = [(0, bytes(model))]
    before = (tmp_path / "d.qcow2").read_bytes()
    node = await graph.add(open_options)
    await work(node, disk, chance)
    await graph.delete("d")
    await graph.close()

    moments = sorted(chance.sample(range(len(disk.log) + 1), 25))
    assert any(isinstance(entry, int) for entry in disk.log)
    for moment in moments:
        (tmp_path / "d.qcow2").write_bytes(image_after(before, disk.log, moment, chance))
        checked = qemu_img("check", "-r", "leaks", "d.qcow2")
        assert checked.returncode == 0, (moment, checked.stdout[-2000:])
        assert qemu_img("convert", "-O", "raw", "d.qcow2", "d.raw").returncode == 0
        found = (tmp_path / "d.raw").read_bytes()
        assert wrong_sectors(disk, moment, found) == [], moment
