"""Damaged images, by accident or made to harm: an error in QEMU's words, and nothing outside is touched."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
from qcow2_images import attach, create, detach, judge, run

from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.qcow2.header import INCOMPATIBLE_POSITION
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.crypto.memory import KeyMemory
from qmpd.errors import Error

CLUSTER = 65536
#: Where qemu-img puts the tables of a new image of one megabyte, and qemu-io the first data.
REFCOUNT_TABLE, REFCOUNT_BLOCK, L1, L2, DATA = (number * CLUSTER for number in (1, 2, 3, 4, 5))
COPIED = 1 << 63

Told = list[tuple[str, int, int, bool]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = create(tmp_path, "", 1 << 20)
    run(tmp_path, "qemu-io", "-f", "qcow2", "-c", "write -P 7 0 128k", "d.qcow2")
    return path


def patch(path: Path, *words: tuple[int, int]) -> None:
    """Write 64-bit words into the file."""
    with path.open("r+b") as file:
        for offset, word in words:
            file.seek(offset)
            file.write(struct.pack(">Q", word))


def telling() -> tuple[Graph, Told]:
    told: Told = []

    def corrupted(node: Node, message: str, offset: int, size: int, fatal: bool) -> None:
        told.append((message, offset, size, fatal))

    return Graph(DRIVERS, secrets=lambda _: KeyMemory().take(0), corrupted=corrupted), told


UNALIGNED_DATA = "Cluster allocation offset 0x50200 unaligned (L2 offset: 0x40000, L2 index: 0)"
UNALIGNED_L2 = "L2 table offset 0x40200 unaligned (L1 index: 0)"
OVERLAP = "Preventing invalid write on metadata (overlaps with {})"


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize(
    ("words", "request_", "expected"),
    [
        ([(L2, COPIED | DATA + 512)], "read", (UNALIGNED_DATA, -1, -1)),
        (
            [(L2, COPIED | DATA + 512)],
            "write",
            ("Data cluster offset 0x50200 unaligned (guest offset: 0)", -1, -1),
        ),
        ([(L1, COPIED | L2 + 512)], "read", (UNALIGNED_L2, -1, -1)),
        ([(L1, COPIED | L2 + 512)], "write", (UNALIGNED_L2, -1, -1)),
        ([(L1, COPIED | L2 + 512)], "discard", (UNALIGNED_L2, -1, -1)),
        ([(L2, COPIED | REFCOUNT_TABLE)], "write", (OVERLAP.format("refcount table"), REFCOUNT_TABLE, 4096)),
        ([(L2, COPIED | L1)], "write", (OVERLAP.format("active L1 table"), L1, 4096)),
        ([(L2, COPIED | L2)], "write", (OVERLAP.format("active L2 table"), L2, 4096)),
        ([(L2, COPIED | REFCOUNT_BLOCK)], "write", (OVERLAP.format("refcount block"), REFCOUNT_BLOCK, 4096)),
        (
            [(REFCOUNT_TABLE, REFCOUNT_BLOCK + 512)],
            "allocate",
            ("Refblock offset 0x20200 unaligned (reftable index: 0)", -1, -1),
        ),
        (
            [(REFCOUNT_TABLE, 0)],
            "allocate",
            ("Preventing invalid allocation of refcount block at offset 0", -1, -1),
        ),
    ],
)
async def test_damage_marks_the_image_and_ends_its_use(
    image: Path, words: list[tuple[int, int]], request_: str, expected: tuple[str, int, int]
) -> None:
    patch(image, *words)
    before = image.read_bytes()
    graph, told = telling()
    backend = await attach(graph, image)
    requests: dict[str, Any] = {
        "read": lambda: backend.pread(0, 4096),
        "write": lambda: backend.pwrite(0, b"x" * 4096),
        "allocate": lambda: backend.pwrite(1 << 19, b"x" * 4096),
        "discard": lambda: backend.discard(0, CLUSTER),
    }
    with pytest.raises(OSError, match="Input/output error"):
        await requests[request_]()
    assert told == [(*expected, True)]
    for request in requests.values():
        with pytest.raises(OSError, match="No medium found"):
            await request()
    assert len(told) == 1
    await detach(graph, backend)
    after = bytearray(image.read_bytes())
    assert after[INCOMPATIBLE_POSITION : INCOMPATIBLE_POSITION + 8] == struct.pack(">Q", 2)
    after[INCOMPATIBLE_POSITION : INCOMPATIBLE_POSITION + 8] = bytes(8)
    assert after[: len(before)] == before, "nothing but the mark was written"
    with pytest.raises(Error, match="^qcow2: Image is corrupt; cannot be opened read/write$"):
        await attach(graph, image)
    assert graph.nodes() == []
    await graph.close()


@pytest.mark.peer("qemu-img", "qemu-io")
async def test_damage_in_a_read_only_image_is_told_once_and_the_rest_is_read(image: Path) -> None:
    patch(image, (L2, COPIED | DATA + 512))
    before = image.read_bytes()
    graph, told = telling()
    backend = await attach(graph, image, write=False)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            await backend.pread(0, 4096)
    assert told == [(UNALIGNED_DATA, -1, -1, False)]
    assert bytes(await backend.pread(CLUSTER, 4096)) == b"\7" * 4096
    await detach(graph, backend)
    await graph.close()
    assert image.read_bytes() == before


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize(
    ("option", "stopped"),
    [
        ("none", False),
        ("constant", True),
        ({"template": "none", "active-l1": True}, True),
        ({"active-l1": False}, False),
        ({"template": "all", "active-l1": False}, False),
    ],
)
async def test_only_what_was_asked_for_is_checked(image: Path, option: Any, stopped: bool) -> None:
    patch(image, (L2, COPIED | L1))
    graph, told = telling()
    backend = await attach(graph, image, **{"overlap-check": option})
    if stopped:
        with pytest.raises(OSError, match="Input/output error"):
            await backend.pwrite(4096, b"x" * 512)
    else:
        await backend.pwrite(4096, b"x" * 512)
    assert bool(told) == stopped
    await detach(graph, backend)
    await graph.close()


@pytest.mark.peer("qemu-img", "qemu-io")
async def test_lazy_refcounts_left_by_a_crash_are_counted_anew(tmp_path: Path, graph: Graph) -> None:
    path = create(tmp_path, "lazy_refcounts=on,cluster_size=4096", 1 << 20)
    backend = await attach(graph, path)
    data = random.Random(1).randbytes(300000)
    await backend.pwrite(5000, data)
    await backend.flush()
    crashed = path.read_bytes()
    await detach(graph, backend)
    judge(path, bytes(5000) + data + bytes((1 << 20) - 305000))
    assert path.read_bytes()[INCOMPATIBLE_POSITION + 7] == 0
    assert crashed[INCOMPATIBLE_POSITION + 7] == 1, "the dirty bit is set while counts are put off"
    path.write_bytes(crashed)
    await detach(graph, await attach(graph, path))
    judge(path, bytes(5000) + data + bytes((1 << 20) - 305000))


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize("method", ["zlib", "zstd"])
async def test_a_damaged_compressed_cluster_is_an_error_for_its_reader_only(
    graph: Graph, tmp_path: Path, method: str
) -> None:
    (tmp_path / "s.raw").write_bytes(b"compressible " * 20000)
    options = f"compression_type={method},cluster_size=4096"
    run(tmp_path, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "s.raw", "d.qcow2")
    path = tmp_path / "d.qcow2"
    extent = run(tmp_path, "qemu-img", "map", "--output=json", "d.qcow2")
    assert '"compressed": true' in extent
    image = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", image, struct.unpack_from(">Q", image, 40)[0])
    (entry,) = struct.unpack_from(">Q", image, table & 0x00FFFFFFFFFFFE00)
    start = entry & (1 << 62 - 4) - 1
    image[start : start + 16] = b"\xff" * 16
    path.write_bytes(image)
    backend = await attach(graph, path)
    with pytest.raises(OSError, match="Input/output error"):
        await backend.pread(0, 512)
    expected = (b"compressible " * 700)[4096:8192]
    assert bytes(await backend.pread(4096, 4096)) == expected
    await detach(graph, backend)


@pytest.mark.peer("qemu-img", "qemu-io")
async def test_a_mutated_image_is_an_error_or_an_image_and_never_more(tmp_path: Path) -> None:
    chance = random.Random(4)
    path = create(tmp_path, "cluster_size=512", 200000)
    run(tmp_path, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 50k", "-c", "write -z 60k 20k", "d.qcow2")
    good = path.read_bytes()
    outcomes = {"refused": 0, "failed": 0, "went": 0}
    for _ in range(150):
        image = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            # Where tables are, mostly: the header, and the words of the first clusters.
            where = chance.randrange(112) if chance.random() < 0.3 else chance.randrange(512, 6000)
            image[where] = chance.choice((0, 1, 0x80, 0xFF, chance.randrange(256)))
        path.write_bytes(image)
        graph, _ = telling()
        try:
            backend = await attach(graph, path)
        except Error:
            outcomes["refused"] += 1
            await graph.close()
            continue
        try:
            for start in range(0, backend.size, 40000):
                await backend.pread(start, min(40000, backend.size - start))
                await backend.block_status(start, min(40000, backend.size - start))
                await backend.pwrite(start, b"y" * min(3000, backend.size - start))
                if start > 400000:
                    break
            await backend.discard(0, min(30000, backend.size))
            await backend.flush()
            outcomes["went"] += 1
        except OSError:
            outcomes["failed"] += 1
        await detach(graph, backend)
        await graph.close()
        assert path.stat().st_size < 1 << 21, "it does not grow to where a damaged entry points"
    assert min(outcomes.values()) > 5, outcomes
