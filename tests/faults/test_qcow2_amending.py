"""An amendment of a qcow2 image is made as a whole or not at all, whatever happens to the storage.

Each write in turn is the last one, torn or not, with any of those missing that no barrier made safe; and each
write or flush in turn fails.  The image has the old values then or the new ones, the disk and its
snapshots hold what they held, and there are leaks at worst; after a failure there is not even a leak.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.file import FileNode
from qmpd.block.graph import Graph
from qmpd.block.node import Node, errno_error
from qmpd.errors import Error

SECTOR: Final = 512
SIZE: Final = 256 << 10

#: How the image was made, what is amended, and whether there is a snapshot in it.
CASES: Final[tuple[tuple[str, dict[str, Any], bool], ...]] = (
    ("cluster_size=512,backing_file=BASE,backing_fmt=raw", {"version": "v2"}, True),
    ("cluster_size=4096", {"version": "v2"}, True),
    ("cluster_size=8k,backing_file=BASE,backing_fmt=raw", {"version": "v2"}, False),
    ("compat=0.10,cluster_size=8k,backing_file=BASE,backing_fmt=raw", {"version": "v3"}, True),
    ("cluster_size=512", {"refcount-bits": 64}, True),
    ("cluster_size=512,refcount_bits=64", {"refcount-bits": 2, "lazy-refcounts": True}, True),
    ("cluster_size=4096,lazy_refcounts=on", {"refcount-bits": 8, "lazy-refcounts": False}, False),
    (
        "compat=0.10,cluster_size=512",
        {"version": "v3", "refcount-bits": 32, "size": SIZE * 3, "lazy-refcounts": True},
        True,
    ),
    ("cluster_size=512,refcount_bits=1", {"version": "v2", "refcount-bits": 16, "size": SIZE * 2}, False),
    ("cluster_size=4096", {"size": SIZE // 2, "refcount-bits": 1}, False),
)

Log = list[tuple[int, bytes] | int]


class Storage:
    """What reached the file; and which of its writes and flushes fails, counted from 0."""

    def __init__(self) -> None:
        self.log: Log = []
        self.requests = 0
        self.fails = -1

    def look(self) -> None:
        number, self.requests = self.requests, self.requests + 1
        if number == self.fails:
            raise errno_error(5)


def stored_by(storage: Storage) -> type[FileNode]:
    class ObservedFile(FileNode):
        async def _pwrite(self, offset: int, data: memoryview) -> None:
            storage.look()
            await super()._pwrite(offset, data)
            storage.log.append((offset, bytes(data)))

        async def _pwrite_zeroes(self, offset: int, length: int, unmap: bool) -> None:
            storage.look()
            await super()._pwrite_zeroes(offset, length, unmap)
            storage.log.append((offset, bytes(length)))

        async def _pdiscard(self, offset: int, length: int) -> None:
            await super()._pdiscard(offset, length)
            storage.log.append((offset, bytes(length)))

        async def _flush(self) -> None:
            storage.look()
            begun = len(storage.log)
            await asyncio.sleep(0)
            storage.log.append(begun)

    return ObservedFile


class Image:
    """An image with something of everything in it."""

    def __init__(self, directory: Path, made: str, snapshot: bool) -> None:
        self.directory = directory
        self.path = directory / "d.qcow2"
        self.snapshot = snapshot
        chance = random.Random(made)
        base = directory / "base.raw"
        base.write_bytes(chance.randbytes(SIZE))
        made = made.replace("BASE", str(base))
        self.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", made, "d.qcow2", str(SIZE))
        zeroes = "write -z" if "0.10" not in made else "write -P 9"
        commands = [f"write -P 1 0 {SIZE // 4}", f"{zeroes} 8k 8k", f"{zeroes} 100k 9k"]
        more = [f"write -P 2 {SIZE // 2} 20k", f"{zeroes} 16k 16k", "discard 200k 16k"]
        self.io(*commands)
        if snapshot:
            self.run("qemu-img", "snapshot", "-c", "s", "d.qcow2")
        self.io(*more)
        self.contents = self.path.read_bytes()
        self.disk = self.read()
        self.kept = self.read("s") if snapshot else b""
        self.fields = self.read_fields()

    def run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout[-1500:], done.stderr[-1500:])
        return done.stdout

    def io(self, *commands: str) -> None:
        self.run("qemu-io", "-f", "qcow2", *(part for c in commands for part in ("-c", c)), "d.qcow2")

    def read(self, snapshot: str | None = None) -> bytes:
        chosen = [] if snapshot is None else ["-l", f"snapshot.name={snapshot}"]
        self.run(
            "qemu-img", "convert", "-t", "unsafe", "-f", "qcow2", *chosen, "-O", "raw", "d.qcow2", "r.raw"
        )
        return (self.directory / "r.raw").read_bytes()

    def read_fields(self) -> dict[str, Any]:
        found = json.loads(self.run("qemu-img", "info", "-f", "qcow2", "--output=json", "d.qcow2"))
        data = found["format-specific"]["data"]
        return {
            "version": {"0.10": "v2", "1.1": "v3"}[data["compat"]],
            "size": found["virtual-size"],
            "lazy-refcounts": data.get("lazy-refcounts", False),
            "refcount-bits": data["refcount-bits"],
        }

    def holds_what_it_held(self, size: int, where: object) -> None:
        """The disk, as far as it was and is to be; and the snapshot."""
        disk = self.read()
        length = min(size, len(self.disk))
        assert disk[:length] == self.disk[:length], where
        assert not any(disk[len(self.disk) :]), where
        if self.snapshot:
            # qemu-img shows it with the disk's present size.
            kept = self.read("s")
            assert kept[: len(self.kept)] == self.kept, where
            assert not any(kept[len(self.kept) :]), where


async def amended(image: Image, wanted: dict[str, Any], storage: Storage) -> bool:
    """Amend an image; whether that succeeded."""
    graph = Graph({**DRIVERS, "file": stored_by(storage)}, secrets=lambda _: bytearray())
    node: Node = await graph.add(
        {
            "driver": "qcow2",
            "node-name": "d",
            "discard": "unmap",
            "file": {"driver": "file", "filename": str(image.path)},
        }
    )
    try:
        await node.amend(wanted, force=False, progress=lambda *_: None, commit=lambda: None)
    except (Error, OSError):
        return False
    finally:
        storage.fails = -1
        try:
            await graph.delete("d")
        finally:
            await graph.close()
    return True


def replay(before: bytes, log: Log, moment: int, cut: dict[int, float]) -> bytes:
    """All writes so far; of some only that part, in whole sectors."""
    image = bytearray(before)
    for number, entry in enumerate(log[:moment]):
        if isinstance(entry, int):
            continue
        offset, data = entry
        if number in cut:
            data = data[: int(len(data) * cut[number]) // SECTOR * SECTOR]
        image.extend(bytes(max(0, offset + len(data) - len(image))))
        image[offset : offset + len(data)] = data
    return bytes(image)


def images_after(before: bytes, log: Log, moment: int, chance: random.Random) -> Iterator[bytes]:
    """What the file may hold then: all there, the last write torn, one missing, or any of them missing."""
    safe = max((entry for entry in log[:moment] if isinstance(entry, int)), default=0)
    loose = [number for number in range(safe, moment) if not isinstance(log[number], int)]
    yield replay(before, log, moment, {})
    if loose:
        yield replay(before, log, moment, {loose[-1]: chance.random()})
        yield replay(before, log, moment, {chance.choice(loose): 0.0})
        yield replay(before, log, moment, {number: chance.random() for number in loose})


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize(("made", "wanted", "snapshot"), CASES)
async def test_each_write_of_an_amendment_may_be_the_last(
    tmp_path: Path, made: str, wanted: dict[str, Any], snapshot: bool
) -> None:
    image = Image(tmp_path, made, snapshot)
    storage = Storage()
    assert await amended(image, wanted, storage)
    log = storage.log
    new = image.read_fields()
    assert new == image.fields | wanted
    thorough = "QMPD_CRASH_EVERYWHERE" in os.environ
    chance = random.Random(made)
    moments = [number + 1 for number, entry in enumerate(log) if not isinstance(entry, int)]
    seen: list[dict[str, Any]] = []
    for moment in sorted(chance.sample(moments, min(10_000 if thorough else 12, len(moments)))):
        for variant, contents in enumerate(images_after(image.contents, log, moment, chance)):
            image.path.write_bytes(contents)
            # An image with lazy refcounts may have counts to be made anew; that is what its dirty bit is for.
            dirty = contents[72 + 7] & 1 if contents[7] == 3 else 0
            image.run("qemu-img", "check", "-q", "-r", "all" if dirty else "leaks", "d.qcow2")
            found = image.read_fields()
            assert all(found[name] in (image.fields[name], new[name]) for name in new), (moment, variant)
            image.holds_what_it_held(wanted.get("size", SIZE), (moment, variant))
            seen.append(found)
    assert image.fields in seen


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize(("made", "wanted", "snapshot"), CASES)
async def test_an_amendment_that_fails_has_changed_nothing(
    tmp_path: Path, made: str, wanted: dict[str, Any], snapshot: bool
) -> None:
    image = Image(tmp_path, made, snapshot)
    storage = Storage()
    assert await amended(image, wanted, storage)
    new = image.read_fields()
    chance = random.Random(made)
    outcomes = set()
    for fails in sorted(chance.sample(range(storage.requests), min(12, storage.requests))):
        image.path.write_bytes(image.contents)
        storage = Storage()
        storage.fails = fails
        done = await amended(image, wanted, storage)
        outcomes.add(done)
        assert image.read_fields() == (new if done else image.fields), fails
        image.run("qemu-img", "check", "-q", "d.qcow2")
        image.holds_what_it_held(wanted.get("size", SIZE), fails)
    assert False in outcomes
