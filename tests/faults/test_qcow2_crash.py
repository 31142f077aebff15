"""A crash in the middle of writing a qcow2 image leaves leaks at worst, and all that was flushed.

A file records what reaches it.  Then the machine "loses power" after each of many moments: what came before
the last barrier is there; of what came after it some writes are, others are not, and one may
be torn between two sectors.  qemu-img mends leaks and nothing else, and what a guest had flushed before has
to be in the image.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.file import FileNode
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.crypto.memory import KeyMemory

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
        #: By snapshot: what it holds, and the length of the log when making it began and ended, and
        #: when deleting it did.
        self.snapshots: dict[str, tuple[bytes, list[int]]] = {}


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
        for sector in range(0, min(len(safe), len(found)), SECTOR)
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
    graph = Graph({**DRIVERS, "file": recording(disk)}, secrets=lambda _: KeyMemory().take(0))
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


# -- each write in turn is the last one


class Story:
    """What a guest and its manager do, one after the other, and what they may rely on."""

    def __init__(self, node: Node, disk: Disk) -> None:
        self.node = node
        self.disk = disk
        self.chance = random.Random(7)

    async def write(self, start: int, length: int) -> None:
        # Whole sectors, for those are torn.
        length = -(-(start + length) // SECTOR) * SECTOR - start // SECTOR * SECTOR
        start = start // SECTOR * SECTOR
        data = self.chance.randbytes(length)
        self.disk.touched.append((len(self.disk.log), start, data))
        await self.node.pwrite(start, data)

    async def drop(self, start: int, length: int) -> None:
        self.disk.touched.append((len(self.disk.log), start, bytes(length)))
        await self.node.pdiscard(start, length)

    async def flush(self) -> None:
        await self.node.flush()
        now = bytes(await self.node.pread(0, self.node.size))
        self.disk.flushed.append((len(self.disk.log), now))

    async def resize(self, size: int) -> None:
        old = self.node.size
        self.disk.touched.append((len(self.disk.log), size, bytes(max(0, old - size))))
        await self.node.truncate(size)

    async def keep(self, name: str) -> None:
        begun = len(self.disk.log)
        held = bytes(await self.node.pread(0, self.node.size))
        await self.node.create_internal_snapshot(name, 0.0)
        self.disk.snapshots[name] = (held, [begun, len(self.disk.log)])

    async def forget(self, name: str) -> None:
        begun = len(self.disk.log)
        found = next(snapshot for snapshot in self.node.internal_snapshots if snapshot.name == name)
        await self.node.delete_internal_snapshot(found.id)
        self.disk.snapshots[name][1].extend((begun, len(self.disk.log)))


async def with_snapshots(story: Story) -> None:
    await story.write(0, 9000)
    await story.flush()
    await story.keep("a")
    await story.write(3000, 3000)
    await story.flush()
    await story.keep("b")
    await story.write(50_000, 700)
    await story.forget("a")
    await story.write(4000, 8000)
    await story.flush()
    await story.forget("b")
    await story.write(0, 6000)
    await story.flush()


async def with_other_sizes(story: Story) -> None:
    await story.write(60_000, 5000)
    await story.flush()
    await story.resize(SIZE + 200_192)
    await story.write(SIZE + 200_192 - 3000, 3000)
    await story.flush()
    await story.resize(63_488)
    await story.write(30_000, 4000)
    await story.flush()
    await story.resize(SIZE)
    await story.write(62_000, 9000)
    await story.flush()


async def until_the_refcount_table_moves(story: Story) -> None:
    # 64 blocks of 64 counts for clusters of 512 bytes: 2 MiB.
    await story.resize(3 << 20)
    for start in range(0, (2 << 20) - 40_000, 1 << 20):
        await story.write(start, min(1 << 20, (2 << 20) - 40_000 - start))
    await story.flush()
    for start in range((2 << 20) - 40_000, (2 << 20) + 40_000, 10_000):
        await story.write(start, 10_000)
    await story.flush()


async def with_clusters_used_again(story: Story) -> None:
    await story.write(0, 64 * 512)
    await story.flush()
    await story.drop(512, 20 * 512)
    # There is room for two pieces of L2 tables, so these have the changed one written, without a flush.
    for table in range(4, 10):
        await story.write(table * 64 * 512, 1024)
    await story.flush()


STORIES: list[tuple[str, Callable[[Story], Awaitable[None]], int]] = [
    ("cluster_size=512", with_snapshots, 40),
    ("cluster_size=4096,refcount_bits=64", with_snapshots, 30),
    ("cluster_size=16k,extended_l2=on", with_snapshots, 30),
    ("cluster_size=512", with_other_sizes, 40),
    ("cluster_size=4096,lazy_refcounts=off,compat=0.10", with_other_sizes, 30),
    ("cluster_size=512,refcount_bits=64", until_the_refcount_table_moves, 30),
    ("cluster_size=512", with_clusters_used_again, 60),
]


def images_after(before: bytes, log: Log, moment: int, chance: random.Random) -> Iterator[bytes]:
    """What the file may hold then: all there, the last write torn, one missing, or any of them missing."""
    safe = max((entry for entry in log[:moment] if isinstance(entry, int)), default=0)
    loose = [number for number in range(safe, moment) if not isinstance(log[number], int)]
    yield replay(before, log, moment, {})
    if loose:
        yield replay(before, log, moment, {loose[-1]: chance.random()})
        yield replay(before, log, moment, {chance.choice(loose[:-1] or loose): 0.0})
        yield image_after(before, log, moment, chance)


def replay(before: bytes, log: Log, moment: int, cut: dict[int, float]) -> bytes:
    """All writes so far; of some only that part, in whole sectors."""
    image = bytearray(before)
    for number, entry in enumerate(log[:moment]):
        if isinstance(entry, int):
            continue
        offset, data = entry
        data = data[
            : int(len(data) * cut.get(number, 1.0)) // SECTOR * SECTOR or len(data) * (number not in cut)
        ]
        image.extend(bytes(max(0, offset + len(data) - len(image))))
        image[offset : offset + len(data)] = data
    return bytes(image)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    ("options", "tell", "most"), STORIES, ids=[f"{tell.__name__}-{options}" for options, tell, _ in STORIES]
)
async def test_each_write_may_be_the_last(
    tmp_path: Path, options: str, tell: Callable[[Story], Awaitable[None]], most: int
) -> None:
    def qemu_img(*arguments: str) -> str:
        done = subprocess.run(
            ["qemu-img", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (moment, variant, arguments, done.stdout[-1500:], done.stderr)
        return done.stdout

    moment = variant = -1
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "d.qcow2", str(SIZE))
    disk = Disk()
    disk.flushed.append((0, bytes(SIZE)))
    before = (tmp_path / "d.qcow2").read_bytes()
    graph = Graph({**DRIVERS, "file": recording(disk)}, secrets=lambda _: KeyMemory().take(0))
    file = {"driver": "file", "filename": str(tmp_path / "d.qcow2")}
    caches = {"l2-cache-size": 1024, "l2-cache-entry-size": 512}
    node = await graph.add({"driver": "qcow2", "node-name": "d", "discard": "unmap", "file": file, **caches})
    await tell(Story(node, disk))
    await graph.delete("d")
    await graph.close()

    # All moments where somebody has the time for it.
    thorough = "QMPD_CRASH_EVERYWHERE" in os.environ
    chance = random.Random(options)
    moments = [number + 1 for number, entry in enumerate(disk.log) if not isinstance(entry, int)]
    for moment in sorted(chance.sample(moments, min(most * (20 if thorough else 1), len(moments)))):
        for variant, image in enumerate(images_after(before, disk.log, moment, chance)):
            (tmp_path / "d.qcow2").write_bytes(image)
            qemu_img("check", "-r", "leaks", "d.qcow2")
            qemu_img("convert", "-t", "unsafe", "-O", "raw", "d.qcow2", "d.raw")
            found = (tmp_path / "d.raw").read_bytes()
            assert wrong_sectors(disk, moment, found) == [], (moment, variant)
            if disk.snapshots:
                listed = json.loads(qemu_img("info", "--output=json", "d.qcow2")).get("snapshots", [])
                there = {snapshot["name"] for snapshot in listed}
                for name, (held, (begun, ended, *deleting)) in disk.snapshots.items():
                    if name in there:
                        assert begun < moment
                        assert not deleting or moment <= deleting[1]
                        qemu_img("convert", "-l", f"snapshot.name={name}", "-O", "raw", "d.qcow2", "s.raw")
                        assert (tmp_path / "s.raw").read_bytes() == held, (moment, variant, name)
                    else:
                        assert moment < ended or (deleting and moment > deleting[0]), (moment, variant, name)
