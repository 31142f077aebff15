"""The luks node over files: inline and detached headers, requests, creation.

What is made here is opened by other programs in tests/interop.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.drivers.luks import create
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.errors import Error

MEGABYTE = 1 << 20


async def make(graph: Graph, path: Path, size: int = MEGABYTE, **options: Any) -> None:
    path.touch()
    file = {"driver": "file", "filename": str(path)}
    await create(
        graph,
        {"driver": "luks", "file": file, "size": size, "key-secret": "pw", "iter-time": 1, **options},
    )


async def open_luks(graph: Graph, path: Path, **more: Any) -> Node:
    options = {"driver": "luks", "node-name": "l", "key-secret": "pw", **more}
    return await graph.add({"file": {"driver": "file", "filename": str(path)}, **options})


@pytest.fixture
async def detached(graph: Graph, tmp_path: Path) -> tuple[Path, Path]:
    """A header on a file of its own, and an empty payload of 1 MiB."""
    header, payload = tmp_path / "header.img", tmp_path / "payload.img"
    header.touch()
    payload.write_bytes(bytes(MEGABYTE))
    reference = {"driver": "file", "filename": str(header)}
    await create(graph, {"driver": "luks", "header": reference, "key-secret": "pw", "iter-time": 1})
    return header, payload


async def test_a_created_image_has_the_size_asked_for(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "d.luks"
    await make(graph, path)
    assert graph.nodes() == []
    node = await open_luks(graph, path)
    assert node.size == MEGABYTE
    assert path.stat().st_size == MEGABYTE + 2068480


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 512), (1, 1), (511, 2), (0, MEGABYTE), (1000, 300000), (MEGABYTE - 1, 1)]
)
async def test_what_is_written_is_read_back_and_nothing_beside_it_changes(
    graph: Graph, tmp_path: Path, offset: int, length: int
) -> None:
    path = tmp_path / "d.luks"
    await make(graph, path)
    node = await open_luks(graph, path)
    before = os.urandom(MEGABYTE)
    await node.pwrite(0, before)
    data = os.urandom(length)
    await node.pwrite(offset, data)
    expected = before[:offset] + data + before[offset + length :]
    assert bytes(await node.pread(0, MEGABYTE)) == expected
    assert bytes(await node.pread(offset, length)) == data
    assert data not in path.read_bytes() or length < 16


async def test_zeroes_are_written_out_encrypted(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "d.luks"
    await make(graph, path)
    node = await open_luks(graph, path)
    await node.pwrite(0, b"x" * 4096)
    await node.pwrite_zeroes(100, 2000, unmap=True)
    assert bytes(await node.pread(0, 4096)) == b"x" * 100 + bytes(2000) + b"x" * 1996
    assert bytes(512) not in path.read_bytes()[2068480 : 2068480 + 4096]


async def test_a_detached_header_leaves_the_payload_alone(graph: Graph, detached: tuple[Path, Path]) -> None:
    header, payload = detached
    assert payload.read_bytes() == bytes(MEGABYTE)
    node = await open_luks(graph, payload, header={"driver": "file", "filename": str(header)})
    assert node.size == MEGABYTE
    specific = node.format_specific()
    assert specific is not None
    assert specific["data"]["detached-header"] is True
    await node.pwrite(0, b"secret!!" * 64)
    assert b"secret!!" not in payload.read_bytes()
    assert b"LUKS" not in payload.read_bytes()[:512]
    assert bytes(await node.pread(0, 512)) == b"secret!!" * 64


async def test_several_disks_share_one_header(graph: Graph, detached: tuple[Path, Path]) -> None:
    header, payload = detached
    second = payload.with_name("second.img")
    second.write_bytes(bytes(8192))
    await graph.add({"driver": "file", "node-name": "h", "filename": str(header)})
    one = await open_luks(graph, payload, header="h")
    two = await open_luks(graph, second, header="h", **{"node-name": "l2"})
    await one.pwrite(0, b"same plaintext!!" * 32)
    await two.pwrite(0, b"same plaintext!!" * 32)
    assert payload.read_bytes()[:512] == second.read_bytes()[:512]
    with pytest.raises(Error, match="^Block device h is in use$"):
        await graph.delete("h")


async def test_the_names_of_the_first_proposal_are_taken(graph: Graph, detached: tuple[Path, Path]) -> None:
    header, payload = detached
    await graph.add({"driver": "file", "node-name": "h", "filename": str(header)})
    node = await open_luks(graph, payload, driver="gluks", **{"header-file": "h"})
    assert node.children["header"].child.name == "h"
    with pytest.raises(Error, match="mutually exclusive"):
        await open_luks(graph, payload, header="h", **{"header-file": "h", "node-name": "x"})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"key-secret": "other"}, "Invalid password, cannot unlock any keyslot"),
        ({"key-secret": "nobody"}, "No secret with id 'nobody'"),
        ({"header": "l"}, "Making 'l' a header child of 'l' would create a cycle"),
        ({"header": "nobody"}, "Cannot find device='nobody' nor node-name='nobody'"),
        ({"node-name": "0"}, "Invalid node-name: '0'"),
    ],
)
async def test_what_is_refused_leaves_no_node(
    graph: Graph, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    path = tmp_path / "d.luks"
    await make(graph, path)
    with pytest.raises(Error) as caught:
        await open_luks(graph, path, **change)
    assert caught.value.desc == text
    assert graph._nodes == {}


async def test_a_key_is_required(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "d.luks"
    await make(graph, path)
    file = {"driver": "file", "filename": str(path)}
    with pytest.raises(Error, match="^Parameter 'key-secret' is required for cipher$"):
        await graph.add({"driver": "luks", "node-name": "l", "file": file})


@pytest.mark.parametrize("size", [0, 10, 591])
async def test_a_file_without_a_whole_header_is_not_luks(graph: Graph, tmp_path: Path, size: int) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(size))
    with pytest.raises(Error, match="^Volume is not in LUKS format$"):
        await open_luks(graph, path)


async def test_a_payload_behind_the_end_of_the_file_is_refused(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "d.luks"
    await make(graph, path)
    os.truncate(path, MEGABYTE)
    with pytest.raises(Error, match="Could not refresh total sector count: Input/output error"):
        await open_luks(graph, path)


async def test_a_wiped_key_material_opens_nothing(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "d.luks"
    await make(graph, path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(512))
    with pytest.raises(Error, match="Invalid password, cannot unlock any keyslot"):
        await open_luks(graph, path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"file": "nobody"}, "Cannot find device='nobody' nor node-name='nobody'"),
        ({"key-secret": "nobody"}, "No secret with id 'nobody'"),
        ({"size": (1 << 64) - 512}, "The requested file size is too large"),
    ],
)
async def test_a_refused_creation_leaves_the_file_as_it_was(
    graph: Graph, tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    path = tmp_path / "d.luks"
    path.write_bytes(b"precious")
    file = {"driver": "file", "filename": str(path)}
    with pytest.raises(Error) as caught:
        await create(
            graph,
            {"driver": "luks", "file": file, "size": 512, "key-secret": "pw", "iter-time": 1, **options},
        )
    assert caught.value.desc == text
    assert path.read_bytes() == b"precious"
    assert graph._nodes == {}


async def test_a_creation_needs_a_place(graph: Graph) -> None:
    with pytest.raises(Error, match="^Either the parameter 'header' or 'file' must be specified$"):
        await create(graph, {"driver": "luks", "size": 512, "key-secret": "pw"})


async def test_the_key_is_wiped_when_the_node_goes(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "d.luks"
    await make(graph, path)
    node = await open_luks(graph, path)
    await graph.delete("l")
    assert node._payload is None
    assert "pw" not in repr(node)


async def test_resizing_keeps_the_header(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "d.luks"
    await make(graph, path)
    node = await open_luks(graph, path)
    await node.pwrite(0, b"kept" * 128)
    await node.truncate(2 * MEGABYTE)
    assert node.size == 2 * MEGABYTE
    assert bytes(await node.pread(0, 512)) == b"kept" * 128
    await graph.delete("l")
    assert (await open_luks(graph, path)).size == 2 * MEGABYTE


async def test_a_header_can_be_a_node_that_is_defined_inside_file(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "d.luks"
    await make(graph, path)
    file = {"driver": "file", "filename": str(path), "node-name": "inner"}
    node = await graph.add(
        {"driver": "luks", "node-name": "l", "key-secret": "pw", "file": file, "header": "inner"}
    )
    assert node.children["header"].child is node.file
    await graph.delete("l")
    assert graph._nodes == {}
