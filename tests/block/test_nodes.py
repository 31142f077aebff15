"""Requests through file, raw and null nodes; sizes and file names."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.backend import Backend
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.block.permissions import Permission
from qmpd.errors import Error


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(range(256)) * 16)
    return path


async def open_file(graph: Graph, path: Path, **more: Any) -> Node:
    return await graph.add({"driver": "file", "node-name": "f", "filename": str(path), **more})


async def test_a_file_reads_and_writes(graph: Graph, image: Path) -> None:
    node = await open_file(graph, image)
    assert node.size == 4096
    assert bytes(await node.pread(250, 10)) == bytes([250, 251, 252, 253, 254, 255, 0, 1, 2, 3])
    await node.pwrite(100, b"hello")
    await node.flush()
    assert image.read_bytes()[100:105] == b"hello"


async def test_an_odd_tail_reads_as_zeroes(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"x" * 1000)
    node = await open_file(graph, path)
    assert node.size == 1024
    assert bytes(await node.pread(990, 34)) == b"x" * 10 + bytes(24)


@pytest.mark.parametrize(("offset", "length"), [(4096, 1), (0, 4097), (-1, 1), (1 << 62, 512)])
async def test_outside_the_disk_is_an_input_output_error(
    graph: Graph, image: Path, offset: int, length: int
) -> None:
    node = await open_file(graph, image)
    with pytest.raises(OSError, match="Input/output error") as caught:
        await node.pread(offset, length)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        await node.pwrite(offset, bytes(length))
    assert image.stat().st_size == 4096


async def test_a_read_only_node_is_not_written(graph: Graph, image: Path) -> None:
    node = await open_file(graph, image, **{"read-only": True})
    with pytest.raises(PermissionError):
        await node.pwrite(0, b"x")
    with pytest.raises(Error, match="^Image is read-only$"):
        await node.truncate(512)


async def test_direct_access_reads_and_writes_the_same_bytes(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "d.img"
    path.write_bytes(os.urandom(64 * 1024 + 100))
    before = path.read_bytes()
    node = await open_file(graph, path, cache={"direct": True})
    assert bytes(await node.pread(0, 65536)) == before[:65536]
    assert bytes(await node.pread(17, 5000)) == before[17:5017]
    await node.pwrite(4096, b"A" * 8192)
    await node.pwrite(65536, b"B" * 100)
    assert path.read_bytes() == before[:4096] + b"A" * 8192 + before[12288:65536] + b"B" * 100


async def test_zeroes_are_punched_out_only_if_that_is_wanted(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "z.img"
    path.write_bytes(b"x" * (1 << 20))
    subprocess.run(["sync", str(path)], check=True)
    node = await open_file(graph, path, discard="unmap", **{"detect-zeroes": "unmap"})
    allocated = node.allocated_size
    await node.pwrite(0, bytes(1 << 19))
    assert node.allocated_size < allocated
    assert path.read_bytes() == bytes(1 << 19) + b"x" * (1 << 19)


async def test_discards_are_dropped_unless_asked_for(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "z.img"
    path.write_bytes(b"x" * 65536)
    node = await open_file(graph, path)
    await node.pdiscard(0, 65536)
    assert path.read_bytes() == b"x" * 65536


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "Could not open '{}': No such file or directory"),
        (Path.mkdir, "Could not open '{}': Is a directory"),
        (os.mkfifo, "'file' driver requires '{}' to be a regular file"),
    ],
)
async def test_what_is_no_regular_file_is_refused(graph: Graph, tmp_path: Path, make: Any, text: str) -> None:
    path = tmp_path / "odd"
    make(path)
    with pytest.raises(Error) as caught:
        await open_file(graph, path)
    assert caught.value.desc == text.format(path)
    assert graph.nodes() == []


async def test_a_window_shifts_and_ends(graph: Graph, image: Path) -> None:
    await open_file(graph, image)
    window = await graph.add({"driver": "raw", "node-name": "w", "file": "f", "offset": 512, "size": 1024})
    assert window.size == 1024
    await window.pwrite(1023, b"!")
    assert image.read_bytes()[1535] == ord("!")
    with pytest.raises(OSError, match="Input/output"):
        await window.pread(1024, 1)
    with pytest.raises(Error, match="Cannot resize fixed-size raw disks"):
        await window.truncate(512)


async def test_resizing_goes_through_to_the_file(graph: Graph, image: Path) -> None:
    await open_file(graph, image)
    top = await graph.add({"driver": "raw", "node-name": "r", "file": "f"})
    await top.truncate(10000)
    assert image.stat().st_size == 10000
    assert top.size == 10240


async def test_two_nodes_on_one_file_keep_each_other_out(graph: Graph, image: Path) -> None:
    await open_file(graph, image)
    other = await graph.add({"driver": "file", "node-name": "g", "filename": str(image)})
    alone = Backend(
        graph, qdev="d", perm=Permission.WRITE, shared=Permission.everything() & ~Permission.WRITE
    )
    alone.attach(other)
    with pytest.raises(Error, match='^Failed to get "write" lock$'):
        Backend(graph, perm=Permission.WRITE).attach(graph.lookup(None, "f"))
    alone.detach()
    Backend(graph, perm=Permission.WRITE).attach(graph.lookup(None, "f"))


async def test_file_names_are_plain_while_nothing_else_matters(graph: Graph, image: Path) -> None:
    await open_file(graph, image)
    plain = await graph.add({"driver": "raw", "node-name": "r", "file": "f"})
    assert plain.filename == str(image)
    window = await graph.add({"driver": "raw", "node-name": "w", "file": "f", "size": 512})
    assert window.filename == (
        f'json:{{"driver": "raw", "file": {{"driver": "file", "filename": "{image}"}}, "size": 512}}'
    )
    over = await graph.add({"driver": "raw", "node-name": "o", "file": "r"})
    assert over.filename.startswith('json:{"driver": "raw", "file": {"driver": "raw"')


@pytest.mark.parametrize(("size", "rounded"), [(None, 1 << 30), (0, 0), (1, 512), (1025, 1536)])
async def test_a_null_disk_has_whole_sectors(graph: Graph, size: int | None, rounded: int) -> None:
    options: dict[str, Any] = {"driver": "null-co", "node-name": "n"}
    if size is not None:
        options["size"] = size
    node = await graph.add(options)
    assert node.size == rounded
    assert bytes(await node.pread(0, min(rounded, 100))) == bytes(min(rounded, 100))


async def test_a_negative_null_disk_is_refused(graph: Graph) -> None:
    with pytest.raises(Error, match="Value '-1' is out of range for parameter 'size'"):
        await graph.add({"driver": "null-co", "node-name": "n", "size": -1})
    assert graph._nodes == {}


async def test_inline_children_inherit(graph: Graph, image: Path) -> None:
    inner = {"driver": "file", "node-name": "i", "filename": str(image)}
    await graph.add(
        {
            "driver": "raw",
            "node-name": "r",
            "file": inner,
            "read-only": True,
            "cache": {"no-flush": True},
            "detect-zeroes": "on",
        }
    )
    options = graph.lookup(None, "i").node_options
    assert (options.read_only, options.no_flush, options.detect_zeroes) == (True, True, "off")
    assert options.discard == "unmap"


async def test_auto_read_only_opens_for_writing_when_somebody_writes(graph: Graph, image: Path) -> None:
    node = await open_file(graph, image, **{"auto-read-only": True})

    def modes() -> set[int]:
        links = Path("/proc/self/fd").iterdir()
        mine = [link for link in links if link.exists() and os.path.samefile(link, image)]
        return {os.stat(link, follow_symlinks=False).st_mode & 0o200 for link in mine}

    assert node.read_only is False
    assert modes() == {0}
    with Backend(graph, perm=Permission.WRITE).use(node) as writer:
        await writer.pwrite(0, b"written")
    assert image.read_bytes()[:7] == b"written"
    await graph.delete("f")
    assert modes() == set()


async def test_inactive_nodes_are_refused(graph: Graph) -> None:
    with pytest.raises(Error, match="Inactive nodes are not supported"):
        await graph.add({"driver": "null-co", "node-name": "n", "active": False})


@pytest.mark.parametrize(
    ("more", "shares_resize"),
    [({}, True), ({"offset": 0}, True), ({"offset": 512}, False), ({"size": 512}, False)],
)
async def test_only_a_real_window_holds_its_end(
    graph: Graph, image: Path, more: dict[str, int], shares_resize: bool
) -> None:
    await open_file(graph, image)
    node = await graph.add({"driver": "raw", "node-name": "w", "file": "f", **more})
    assert bool(node.children["file"].shared & Permission.RESIZE) is shares_resize


async def test_an_odd_offset_leaves_an_end_of_zeroes(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"x" * 777)
    await open_file(graph, path)
    node = await graph.add({"driver": "raw", "node-name": "w", "file": "f", "offset": 770})
    assert node.size == 512
    assert bytes(await node.pread(0, 512)) == b"x" * 7 + bytes(505)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": (1 << 63) - (1 << 30) + 1}, "Could not refresh total sector count: File too large"),
        ({"latency-ns": 1 << 63}, "latency-ns is invalid"),
        ({"latency-ns": -1}, "latency-ns is invalid"),
    ],
)
async def test_absurd_null_disks_are_refused(graph: Graph, options: dict[str, int], text: str) -> None:
    with pytest.raises(Error) as caught:
        await graph.add({"driver": "null-co", "node-name": "n", **options})
    assert caught.value.desc == text
    assert graph._nodes == {}
