from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.backend import Backend
from qmpd.block.graph import Graph
from qmpd.block.node import BlockStatus
from qmpd.block.permissions import Permission

DATA, HOLE = {"data": True, "zero": False}, {"data": False, "zero": True}


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """Data, a hole, data: 64 KiB each."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(b"x" * 65536)
        file.seek(2 * 65536)
        file.write(b"y" * 65536)
    return path


async def runs(graph: Graph, options: dict[str, Any]) -> list[BlockStatus]:
    node = await graph.add({"node-name": "n", **options})
    found = []
    offset = 0
    while offset < node.size:
        found.append(await node.block_status(offset, node.size - offset))
        offset += found[-1].length
    return found


async def test_a_file_tells_holes_from_data(graph: Graph, sparse: Path) -> None:
    found = await runs(graph, {"driver": "file", "filename": str(sparse)})
    assert found == [BlockStatus(65536, **DATA), BlockStatus(65536, **HOLE), BlockStatus(65536, **DATA)]


async def test_a_window_shifts_what_its_file_says(graph: Graph, sparse: Path) -> None:
    file = {"driver": "file", "filename": str(sparse)}
    found = await runs(graph, {"driver": "raw", "file": file, "offset": 65536, "size": 65536 + 512})
    assert found == [BlockStatus(65536, **HOLE), BlockStatus(512, **DATA)]


@pytest.mark.parametrize(("zeroes", "depth"), [(True, 1), (False, 0)])
async def test_a_null_disk_is_a_hole(graph: Graph, zeroes: bool, depth: int) -> None:
    found = await runs(graph, {"driver": "null-co", "size": 1024, "read-zeroes": zeroes})
    assert found == [BlockStatus(1024, data=False, zero=zeroes, depth=depth)]


async def test_status_beyond_the_end_is_refused(graph: Graph) -> None:
    node = await graph.add({"node-name": "n", "driver": "null-co", "size": 1024})
    with pytest.raises(OSError, match="Input/output"):
        await node.block_status(1024, 1)


async def test_zeroes_that_would_have_to_be_written_are_not_fast(graph: Graph, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 65536)
    file = {"driver": "file", "filename": str(image)}
    node = await graph.add({"node-name": "n", "driver": "raw", "file": file})
    await node.pwrite_zeroes(0, 4096, fast=True)
    assert image.read_bytes()[:4096] == bytes(4096)

    async def can_not(*_: Any) -> bool:
        return False

    node.file._fallocate = can_not  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="not supported"):
        await node.pwrite_zeroes(4096, 4096, fast=True)
    assert image.read_bytes()[4096:] == b"x" * (65536 - 4096)


async def test_small_writes_that_go_together_succeed_and_fail_alone(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(65536))
    node = await graph.add({"node-name": "n", "driver": "file", "filename": str(image)})
    pwrite = os.pwrite

    def failing(descriptor: int, data: Any, offset: int) -> int:
        if offset == 8192:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    writes = [node.pwrite(number * 4096, bytes([number]) * 4096) for number in range(16)]
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert [number for number, outcome in enumerate(outcomes) if outcome is not None] == [2]
    expected = b"".join(bytes([0 if number == 2 else number]) * 4096 for number in range(16))
    assert image.read_bytes() == expected


async def test_a_backend_counts_what_it_does(graph: Graph) -> None:
    node = await graph.add({"node-name": "n", "driver": "null-co", "size": 4096, "latency-ns": 20_000_000})
    backend = Backend(graph, perm=Permission.CONSISTENT_READ | Permission.WRITE)
    backend.attach(node)
    requests = [asyncio.ensure_future(one) for one in (backend.pread(0, 512), backend.pwrite(0, b"x"))]
    await asyncio.sleep(0)
    assert backend.in_flight == 2
    await backend.idle()
    assert backend.in_flight == 0
    assert all(one.done() for one in requests)
    with pytest.raises(OSError, match="Input/output"):
        await backend.pread(4096, 1)
    counters = backend.accounting.counters
    assert (counters["rd"].operations, counters["rd"].bytes, counters["rd"].failed) == (1, 512, 1)
    assert (counters["wr"].operations, counters["wr"].bytes, counters["wr"].failed) == (1, 1, 0)
    assert counters["rd"].time >= 20_000_000
