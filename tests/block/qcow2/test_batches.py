"""Several small requests at a time do what each does by itself; no request reaches the file for nothing."""

from __future__ import annotations

import asyncio
import os
import random
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from qcow2_images import OPTIONS, WITH_BACKING, attach, create, create_over, detach, judge, run

from qmpd.block.backend import Backend
from qmpd.block.drivers.file import FileNode
from qmpd.block.drivers.qcow2 import mapping
from qmpd.block.drivers.qcow2.driver import Qcow2Node
from qmpd.block.graph import Graph
from qmpd.block.node import Data

KILOBYTE = 1 << 10
MEGABYTE = 1 << 20
GIGABYTE = 1 << 30
TERABYTE = 1 << 40

#: Bytes of a long request.
LONG = 256 * KILOBYTE

#: One of every kind, and of those with a backing image; all of them are in test_interop.
CASES = [
    *((options, False) for options in OPTIONS if "refcount_bits" not in options),
    *((options, True) for options in WITH_BACKING if "compression" not in options),
]


async def read_batch(backend: Backend, extents: Sequence[tuple[int, int]]) -> list[bytes]:
    """Reads as an export does them: together, and by itself what is not served so."""
    into = memoryview(bytearray(b"\xaa" * sum(length for _, length in extents)))
    served = backend.read_cached(extents, into)
    results, start = [], 0
    for (offset, length), done in zip(extents, served, strict=True):
        found = into[start : start + length] if done else await backend.pread(offset, length)
        results.append(bytes(found))
        start += length
    return results


def some_extents(chance: random.Random, size: int) -> list[tuple[int, int]]:
    """Small requests that do not overlap; some of them follow each other."""
    extents, end = [], 0
    for start in sorted(chance.sample(range(size // 512 - 80), 40)):
        offset = end if end and chance.random() < 0.4 else max(end, start * 512)
        length = chance.choice((512, 4096, 4096, 20 * KILOBYTE))
        if offset + length <= size:
            extents.append((offset, length))
            end = offset + length
    if chance.random() < 0.5:
        chance.shuffle(extents)
    return extents


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(("options", "backed"), CASES)
async def test_batches_do_what_a_plain_array_of_bytes_does(
    graph: Graph, tmp_path: Path, options: str, backed: bool
) -> None:
    chance = random.Random(options)
    size = 2 * MEGABYTE + 1024
    base = chance.randbytes(MEGABYTE + 1536) if backed else b""
    path, model = create_over(tmp_path, options, size, base)
    for cache in ({}, {"l2-cache-size": 1024, "refcount-cache-size": 1024}):
        backend = await attach(graph, path, **cache)
        for _ in range(8):
            writes = [(offset, chance.randbytes(length)) for offset, length in some_extents(chance, size)]
            assert await backend.pwrite_many(writes) == [None] * len(writes)
            for offset, data in writes:
                model[offset : offset + len(data)] = data
            start = chance.randrange(0, size - 200 * KILOBYTE) // 512 * 512
            length = chance.randrange(512, 200 * KILOBYTE)
            model[start : start + length] = bytes(length)
            await backend.write_zeroes(start, length, unmap=chance.random() < 0.5)
            extents = some_extents(chance, size)
            for (offset, length), found in zip(extents, await read_batch(backend, extents), strict=True):
                assert found == model[offset : offset + length]
        assert bytes(await backend.pread(0, size)) == model
        await detach(graph, backend)
        judge(path, model)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("options", ["", "cluster_size=512", "extended_l2=on"])
async def test_batches_beside_discards_and_other_writes_leave_a_clean_image(
    graph: Graph, tmp_path: Path, options: str
) -> None:
    chance = random.Random(options)
    size = MEGABYTE
    path = create(tmp_path, options, size)
    model = bytearray(size)
    backend = await attach(graph, path)
    for _ in range(12):
        # Every request has sectors of its own, but they meet in clusters.
        sectors = list(range(size // 512))
        chance.shuffle(sectors)
        requests: list[Awaitable[Any]] = []
        for _ in range(6):
            writes = [(sectors.pop() * 512, chance.randbytes(512)) for _ in range(10)]
            requests.append(backend.pwrite_many(writes))
            sector = sectors.pop()
            requests.append(backend.write_zeroes(sector * 512, 512, unmap=True))
            model[sector * 512 : sector * 512 + 512] = bytes(512)
            for offset, data in writes:
                model[offset : offset + 512] = data
        outcomes = await asyncio.gather(*requests)
        assert all(failure is None for outcome in outcomes for failure in outcome or ())
        assert bytes(await backend.pread(0, size)) == model
        start = chance.randrange(0, 8) * 65536
        await backend.discard(start, 131072)
        model[start : start + 131072] = await backend.pread(start, 131072)
    await detach(graph, backend)
    judge(path, model)


@pytest.mark.peer("qemu-img")
async def test_what_is_in_memory_is_served_without_waiting(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(random.Random(1).randbytes(MEGABYTE))
    backend = await attach(graph, create(tmp_path, "", MEGABYTE, backing="base.raw"))
    await backend.pwrite(65536, b"d" * 65536)
    await backend.write_zeroes(131072, 65536)
    extents = [(0, 4096), (65536, 4096), (131072, 4096), (126976, 8192), (61440, 8192)]
    into = memoryview(bytearray(sum(length for _, length in extents)))
    assert backend.node.read_cached([(0, 4096)], into[:4096]) == [True]
    assert backend.node.read_cached(extents, into) == [True] * len(extents)
    assert into == b"".join([bytes(await backend.pread(*extent)) for extent in extents])
    await detach(graph, backend)


async def fails(*_: Any, **__: Any) -> Any:
    raise AssertionError("this write should have gone together with the others")


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("options", ["", "extended_l2=on", "data_file=data.raw"])
async def test_writes_to_clusters_of_their_own_are_one_call(
    graph: Graph, tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = create(tmp_path, options, MEGABYTE)
    backend = await attach(graph, path)
    await backend.pwrite(0, bytes(MEGABYTE - 1) + b"x")
    monkeypatch.setattr(Qcow2Node, "_pwrite", fails)
    writes = [(offset, bytes([number]) * 4096) for number, offset in enumerate(range(0, MEGABYTE, 65536), 1)]
    assert await backend.pwrite_many(writes) == [None] * 16
    assert [bytes(await backend.pread(offset, 4096)) for offset, _ in writes] == [data for _, data in writes]
    await detach(graph, backend)


@pytest.mark.peer("qemu-img")
async def test_a_write_that_fails_does_not_concern_those_elsewhere(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = create(tmp_path, "", MEGABYTE)
    backend = await attach(graph, path)
    await backend.pwrite(0, b"a" * 65536)
    full = OSError(28, "No space left on device")

    async def no_room(self: Qcow2Node, offset: int, data: memoryview) -> None:
        raise full

    monkeypatch.setattr(Qcow2Node, "_pwrite", no_room)
    outcomes = await backend.pwrite_many([(0, b"b" * 512), (131072, b"c" * 512), (131584, b"c" * 512)])
    assert outcomes == [None, full, full]
    monkeypatch.undo()
    assert bytes(await backend.pread(0, 1024)) == b"b" * 512 + b"a" * 512
    await detach(graph, backend)


@pytest.mark.peer("qemu-img")
async def test_a_batch_does_not_write_to_where_a_table_is(graph: Graph, tmp_path: Path) -> None:
    path = create(tmp_path, "", MEGABYTE)
    backend = await attach(graph, path)
    await backend.pwrite(0, b"x" * 131072)
    await detach(graph, backend)
    with path.open("r+b") as image:
        image.seek(40)
        l1 = int.from_bytes(image.read(8), "big")
        image.seek(l1)
        l2 = int.from_bytes(image.read(8), "big") & mapping.OFFSET
        image.seek(l2)
        image.write((l2 | mapping.COPIED).to_bytes(8, "big"))
    before = path.read_bytes()[l2 : l2 + 65536]
    backend = await attach(graph, path)
    await backend.pread(0, 512)
    outcomes = await backend.pwrite_many([(65536, b"y" * 512), (0, b"z" * 512)])
    assert outcomes[0] is None
    assert isinstance(outcomes[1], OSError)
    assert path.read_bytes()[l2 : l2 + 65536] == before
    await detach(graph, backend)


# -- how many requests reach the file


class Counted:
    """Counts what reaches files, whichever way it comes; what is written in long requests goes no further."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests = self.bytes_read = 0
        reads, writes = FileNode._pread, FileNode._pwrite
        cached, many = FileNode._read_cached, FileNode._pwrite_many

        async def pread(node: FileNode, offset: int, length: int) -> memoryview:
            self.requests += 1
            self.bytes_read += length
            return await reads(node, offset, length)

        async def pwrite(node: FileNode, offset: int, data: memoryview) -> None:
            if len(data) < LONG:
                await writes(node, offset, data)
                return
            self.requests += 1
            node._size = max(node._size, offset + len(data))
            os.truncate(node._filename, node._size)

        def read_cached(node: FileNode, extents: Sequence[tuple[int, int]], into: memoryview) -> list[bool]:
            self.requests += len(extents)
            self.bytes_read += len(into)
            return cached(node, extents, into)

        async def pwrite_many(node: FileNode, data: Sequence[tuple[int, Data]]) -> list[OSError | None]:
            self.requests += len(data)
            return await many(node, data)

        for name, function in (
            ("_pread", pread),
            ("_pwrite", pwrite),
            ("_read_cached", read_cached),
            ("_pwrite_many", pwrite_many),
        ):
            monkeypatch.setattr(FileNode, name, function)


async def in_order(request: Callable[[int], Awaitable[Any]]) -> None:
    """Go through a disk of 1 GiB as a client with eight long requests at a time does."""
    for start in range(0, GIGABYTE, 8 * LONG):
        await asyncio.gather(*(request(offset) for offset in range(start, start + 8 * LONG, LONG)))


#: A pass over 1 GiB takes so many requests, if there is not a single one for anything else.
IDEAL = GIGABYTE // LONG


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("options", ["preallocation=metadata", "preallocation=metadata,cluster_size=2M"])
async def test_reading_through_takes_one_request_to_the_file_for_each_of_the_guest(
    graph: Graph, tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = await attach(graph, create(tmp_path, options, GIGABYTE))
    counted = Counted(monkeypatch)
    await in_order(lambda offset: backend.pread(offset, LONG))
    assert IDEAL <= counted.requests <= IDEAL * 1.01
    await detach(graph, backend)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("options", ["", "preallocation=metadata", "extended_l2=on"])
async def test_writing_through_takes_one_request_to_the_file_for_each_of_the_guest(
    graph: Graph, tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = create(tmp_path, options, GIGABYTE)
    counted = Counted(monkeypatch)
    backend = await attach(graph, path)
    data = bytes(LONG)
    await in_order(lambda offset: backend.pwrite(offset, data))
    await backend.flush()
    assert IDEAL <= counted.requests <= IDEAL * 1.01
    await detach(graph, backend)
    assert counted.requests <= IDEAL * 1.01
    run(tmp_path, "qemu-img", "check", "d.qcow2")


@pytest.mark.peer("qemu-img")
async def test_reading_a_backed_image_through_asks_each_table_once(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "base.raw").open("wb") as base:
        base.truncate(GIGABYTE)
    backend = await attach(graph, create(tmp_path, "", GIGABYTE, backing="base.raw"))
    await backend.pwrite(GIGABYTE // 2, b"x" * LONG)
    counted = Counted(monkeypatch)
    await in_order(lambda offset: backend.pread(offset, LONG))
    assert IDEAL <= counted.requests <= IDEAL * 1.01
    await detach(graph, backend)


@pytest.mark.peer("qemu-img")
async def test_many_small_reads_in_order_are_few_for_the_file(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = await attach(graph, create(tmp_path, "preallocation=metadata,cluster_size=512", MEGABYTE))
    await backend.pread(0, MEGABYTE)
    counted = Counted(monkeypatch)
    await read_batch(backend, [(offset, 4096) for offset in range(0, MEGABYTE, 4096)])
    # Where there is a table the disk's clusters are apart.
    assert counted.requests <= MEGABYTE // (64 * 512) + 8
    await detach(graph, backend)


@pytest.mark.peer("qemu-img")
async def test_opening_a_large_image_takes_no_more_than_a_small_one_but_its_l1_table(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    taken: list[tuple[int, int, int]] = []
    for size in (GIGABYTE, GIGABYTE, TERABYTE):
        path = create(tmp_path, "", size)
        before = counted.requests, counted.bytes_read
        tracemalloc.start()
        backend = await attach(graph, path)
        await backend.pread(size - 4096, 4096)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        taken.append((counted.requests - before[0], counted.bytes_read - before[1], peak))
        await detach(graph, backend)
        path.unlink()
    # The first one imports modules.
    _, small, large = taken
    l1_bytes = TERABYTE // (8192 * 65536) * 8
    assert large[0] == small[0]
    assert large[1] - small[1] < l1_bytes
    # As bytes, as words, and as what is looked through for tables.
    assert large[2] - small[2] < 8 * l1_bytes
