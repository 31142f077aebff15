"""Several small requests at a time do what each of them does by itself."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.backend import Backend
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.block.permissions import Permission
from tests.block.test_luks import make

MEGABYTE = 1 << 20
WRITING = Permission.CONSISTENT_READ | Permission.WRITE


async def open_chain(graph: Graph, path: Path, chain: str, **more: Any) -> Node:
    """A disk of 1 MiB that is written by its backend."""
    options: dict[str, Any] = {"driver": "file", "filename": str(path)}
    if chain == "luks":
        await make(graph, path)
        options = {"driver": "luks", "key-secret": "pw", "file": options}
    else:
        path.write_bytes(bytes(MEGABYTE + 512))
        if chain == "raw":
            options = {"driver": "raw", "offset": 512, "file": options}
    return await graph.add({**options, "node-name": "d", **more})


@pytest.mark.parametrize("chain", ["file", "raw", "luks"])
async def test_writes_and_reads_together_are_those_one_by_one(
    graph: Graph, tmp_path: Path, chain: str
) -> None:
    node = await open_chain(graph, tmp_path / "i", chain)
    with Backend(graph, perm=WRITING).use(node) as backend:
        writes = [(offset * 8192, os.urandom(512 * (1 + offset % 9))) for offset in range(30)]
        assert await backend.pwrite_many(writes) == [None] * 30
        for offset, data in writes:
            assert await node.pread(offset, len(data)) == data
        extents = [(offset, len(data)) for offset, data in reversed(writes)]
        into = memoryview(bytearray(sum(length for _, length in extents)))
        assert backend.read_cached(extents, into) == [True] * 30
        assert into == b"".join(data for _, data in reversed(writes))
        counters = backend.accounting.counters
        assert (counters["wr"].operations, counters["rd"].operations) == (30, 30)
        assert counters["wr"].bytes == counters["rd"].bytes == len(into)
        assert node.write_highest_offset == writes[-1][0] + len(writes[-1][1])


@pytest.mark.parametrize("chain", ["raw", "luks"])
@pytest.mark.parametrize("extent", [(MEGABYTE - 512, 1024), (MEGABYTE, 512)])
async def test_a_read_beyond_the_end_is_left_to_who_can_say_so(
    graph: Graph, tmp_path: Path, chain: str, extent: tuple[int, int]
) -> None:
    node = await open_chain(graph, tmp_path / "i", chain)
    into = memoryview(bytearray(512 + extent[1]))
    assert node.read_cached([(0, 512), extent], into) == [False, False]
    with pytest.raises(OSError, match="Input/output error"):
        await node.pread(*extent)


async def test_an_unaligned_read_is_left_to_who_can_align_it(graph: Graph, tmp_path: Path) -> None:
    node = await open_chain(graph, tmp_path / "i", "luks")
    assert node.read_cached([(1, 512)], memoryview(bytearray(512))) == [False]


async def test_a_short_file_is_left_to_who_fills_up_with_zeroes(graph: Graph, tmp_path: Path) -> None:
    node = await open_chain(graph, tmp_path / "i", "raw")
    os.truncate(tmp_path / "i", 1000)
    assert node.read_cached([(0, 512)], memoryview(bytearray(512))) == [False]
    assert await node.pread(0, 512) == bytes(512)


async def test_a_failing_write_does_not_concern_the_others(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await open_chain(graph, tmp_path / "i", "luks")
    full = OSError(errno.ENOSPC, "full")
    write = type(node.file)._write  # type: ignore[attr-defined]

    def fail_behind(self: Node, data: Any, offset: int) -> None:
        if offset > 3 * MEGABYTE - 500_000:
            raise full
        write(self, data, offset)

    monkeypatch.setattr(type(node.file), "_write", fail_behind)
    with Backend(graph, perm=WRITING).use(node) as backend:
        outcomes = await backend.pwrite_many(
            [(0, b"a" * 512), (MEGABYTE - 512, b"b" * 512), (MEGABYTE, b"c" * 512), (1, b"d")]
        )
        assert outcomes[0] is None
        assert outcomes[1] is full
        assert outcomes[2] is not None
        assert outcomes[2].errno == errno.EIO
        assert outcomes[3] is None
        assert (await node.pread(0, 3)) == b"ada"
        assert backend.accounting.counters["wr"].failed == 2


async def test_together_they_respect_one_that_reads_before_it_writes(graph: Graph, tmp_path: Path) -> None:
    node = await open_chain(graph, tmp_path / "i", "luks")
    await asyncio.gather(
        *(node.pwrite(offset, b"x") for offset in range(1, 512, 2)),
        node.pwrite_many([(512, b"y" * 512)]),
        *(node.pwrite_many([(offset, b"z")]) for offset in range(0, 512, 2)),
        *(node.pwrite(512 + offset, b"w") for offset in range(0, 512, 4)),
    )
    data = bytes(await node.pread(0, 1024))
    assert data[:512] == b"zx" * 256
    assert set(data[512::4]) <= {ord("w"), ord("y")}
    assert data[513:516] == b"yyy"


async def test_zeroes_are_detected_among_several_writes(graph: Graph, tmp_path: Path) -> None:
    node = await open_chain(graph, tmp_path / "i", "file", **{"detect-zeroes": "unmap", "discard": "unmap"})
    await node.pwrite(0, b"x" * 65536)
    before = node.allocated_size
    assert await node.pwrite_many([(0, bytes(32768)), (32768, bytes(32768))]) == [None, None]
    assert node.allocated_size < before
    assert await node.pread(0, 65536) == bytes(65536)


async def test_nothing_is_read_while_the_graph_is_changed(graph: Graph, tmp_path: Path) -> None:
    node = await open_chain(graph, tmp_path / "i", "file")
    into = memoryview(bytearray(512))
    with Backend(graph).use(node) as backend:
        async with graph.drained(node):
            assert backend.read_cached([(0, 512)], into) == [False]
        assert backend.read_cached([(0, 512)], into) == [True]
