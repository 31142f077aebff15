"""Images behind images: names, formats, permissions, loops, and who holds what."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cow_driver import CLUSTER, graph_with_cow, make_image

from qmpd.block import backing
from qmpd.block.backend import Backend
from qmpd.block.graph import Graph
from qmpd.block.permissions import Permission
from qmpd.commands.block_core import block_device_info
from qmpd.errors import Error

EVERYTHING = Permission.everything()
SIZE = 4 * CLUSTER


@pytest_asyncio.fixture
async def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Graph]:
    monkeypatch.chdir(tmp_path)
    graph = graph_with_cow()
    yield graph
    await graph.close()


def cow(name: str, filename: str, **more: Any) -> dict[str, Any]:
    return {"driver": "cow", "node-name": name, "file": {"driver": "file", "filename": filename}, **more}


def three_images(tmp_path: Path) -> None:
    """top.cow -> mid.cow -> base.raw, each with a cluster of its own."""
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    make_image(tmp_path / "mid.cow", SIZE, {1: b"m"}, backing="base.raw", format="raw")
    make_image(tmp_path / "top.cow", SIZE, {2: b"t", 3: b""}, backing="mid.cow", format="cow")


# -- names


@pytest.mark.parametrize(
    ("overlay", "name", "full"),
    [
        ("top.img", "base.img", "base.img"),
        ("sub/top.img", "base.img", "sub/base.img"),
        ("sub/top.img", "../base.img", "sub/../base.img"),
        ("/a/top.img", "base.img", "/a/base.img"),
        ("sub/top.img", "/b/base.img", "/b/base.img"),
        ("sub/top.img", "nbd://host/x", "nbd://host/x"),
        ("sub/top.img", "./a:b", "sub/./a:b"),
        (None, "/b/base.img", "/b/base.img"),
    ],
)
def test_a_backing_name_is_relative_to_the_image_that_names_it(
    overlay: str | None, name: str, full: str
) -> None:
    assert backing.full_name(overlay, name) == full


def test_a_relative_name_needs_an_image_with_a_name() -> None:
    with pytest.raises(Error, match="Cannot use relative backing file names"):
        backing.full_name(None, "base.img")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nbd://localhost/x", "Unknown protocol 'nbd'"),
        ("foo:bar", "Unknown protocol 'foo'"),
        ("json:{bad", "Could not parse the JSON options: "),
        ("json:[]", "Invalid JSON object given"),
        ('json:{"file": "a", "file.driver": "file"}', "Cannot mix scalar and non-scalar keys"),
    ],
)
def test_a_name_that_can_not_be_opened_is_refused_with_the_reason(name: str, text: str) -> None:
    with pytest.raises(Error, match=f"^{text}"):
        backing.options_for(name, None)


@pytest.mark.parametrize(
    ("name", "image_format", "options"),
    [
        ("a/b", "raw", {"driver": "raw", "file": {"driver": "file", "filename": "a/b"}}),
        ("file:a", None, {"file": {"driver": "file", "filename": "a"}}),
        (
            'json:{"driver":"raw","file.driver":"file","file.filename":"a"}',
            None,
            {"driver": "raw", "file": {"driver": "file", "filename": "a"}},
        ),
        (
            'json:{"file":{"driver":"raw","file.driver":"file","file.filename":"a"}}',
            "luks",
            {"driver": "luks", "file": {"driver": "raw", "file": {"driver": "file", "filename": "a"}}},
        ),
    ],
)
def test_names_become_options(name: str, image_format: str | None, options: dict[str, Any]) -> None:
    assert backing.options_for(name, image_format) == options


@pytest.mark.parametrize(
    ("beginning", "name"),
    [
        (b"QFI\xfb\0\0\0\x03" + bytes(500), "qcow2"),
        (b"QFI\xfb\0\0\0\x01", "qcow"),
        (b"LUKS\xba\xbe\0\x01", "luks"),
        (b"LUKS\xba\xbe\0\x02", "raw"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "vdi"),
        (b"", "raw"),
    ],
)
def test_a_format_is_known_by_its_signature(beginning: bytes, name: str) -> None:
    assert backing.probe(beginning) == name


# -- chains


async def test_a_chain_is_opened_from_the_headers_read_only(graph: Graph, tmp_path: Path) -> None:
    three_images(tmp_path)
    top = await graph.add(cow("top", "top.cow"))
    mid = top.backing
    assert mid is not None
    assert mid.backing is not None
    assert [top.backing_depth, mid.backing_depth, mid.backing.backing_depth] == [2, 1, 0]
    assert not top.read_only
    assert mid.read_only
    assert mid.file.read_only
    assert [node.driver for node in graph.nodes()] == ["raw", "file", "cow", "file", "cow", "file"]
    data = bytes(await top.pread(0, SIZE))
    assert data == b"b" * CLUSTER + b"m" * CLUSTER + b"t" * CLUSTER + bytes(CLUSTER)


async def test_the_status_tells_how_deep_the_data_is(graph: Graph, tmp_path: Path) -> None:
    three_images(tmp_path)
    top = await graph.add(cow("top", "top.cow"))
    status = [await top.block_status(offset, SIZE - offset) for offset in range(0, SIZE, CLUSTER)]
    assert [(run.depth, run.data, run.zero) for run in status] == [
        (3, True, False),
        (2, True, False),
        (1, True, False),
        (1, False, True),
    ]


async def test_behind_the_end_of_a_short_backing_image_are_zeroes(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * (CLUSTER + 512))
    make_image(tmp_path / "top.cow", SIZE, backing="base.raw", format="raw")
    top = await graph.add(cow("top", "top.cow"))
    assert bytes(await top.pread(0, SIZE)) == (b"b" * (CLUSTER + 512)).ljust(SIZE, b"\0")
    status = await top.block_status(2 * CLUSTER, CLUSTER)
    assert (status.zero, status.depth) == (True, 2)


async def test_what_is_nowhere_has_no_depth(graph: Graph, tmp_path: Path) -> None:
    make_image(tmp_path / "mid.cow", SIZE)
    make_image(tmp_path / "top.cow", SIZE, backing="mid.cow", format="cow")
    top = await graph.add(cow("top", "top.cow"))
    status = await top.block_status(0, SIZE)
    assert (status.data, status.zero, status.depth) == (False, True, 0)


async def test_null_leaves_the_backing_image_out(graph: Graph, tmp_path: Path) -> None:
    three_images(tmp_path)
    top = await graph.add(cow("top", "top.cow", backing=None))
    assert top.backing is None
    assert bytes(await top.pread(0, CLUSTER)) == bytes(CLUSTER)
    info = block_device_info(top)
    assert (info["backing_file_depth"], "backing_file" in info) == (0, False)
    assert info["file"].startswith("json:")
    assert '"backing": null' in info["file"]
    assert info["image"]["backing-filename"] == "mid.cow"


async def test_a_reference_that_is_the_header_s_image_is_no_other_one(graph: Graph, tmp_path: Path) -> None:
    three_images(tmp_path)
    await graph.add(cow("mid", "mid.cow", **{"read-only": True}))
    top = await graph.add(cow("top", "top.cow", backing="mid"))
    assert block_device_info(top)["file"] == "top.cow"
    with pytest.raises(Error, match=r"^Node 'mid' is busy: node is used as backing hd of 'top'$"):
        await graph.delete("mid")


async def test_another_backing_image_stands_in_the_file_name(graph: Graph, tmp_path: Path) -> None:
    three_images(tmp_path)
    await graph.add({"driver": "null-co", "node-name": "null"})
    top = await graph.add(cow("top", "top.cow", backing="null"))
    assert '"backing": {"driver": "null-co"}' in top.filename


async def test_the_chain_is_shown_nested_or_flat(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    three_images(tmp_path / "sub")
    top = await graph.add(cow("top", "sub/top.cow"))
    info = block_device_info(top)
    assert (info["backing_file_depth"], info["backing_file"]) == (2, "sub/mid.cow")
    image = info["image"]
    assert image["full-backing-filename"] == "sub/mid.cow"
    assert image["backing-filename-format"] == "cow"
    assert image["backing-image"]["backing-image"]["filename"] == "sub/base.raw"
    flat = block_device_info(top, flat=True)
    assert (flat["backing_file_depth"], flat["backing_file"]) == (0, "sub/mid.cow")
    assert "backing-image" not in flat["image"]


async def test_what_a_chain_inherits(graph: Graph, tmp_path: Path) -> None:
    three_images(tmp_path)
    options = {"cache": {"no-flush": True}, "detect-zeroes": "on", "auto-read-only": True}
    top = await graph.add(cow("top", "top.cow", **options))
    mid = top.backing
    assert mid is not None
    assert mid.node_options.no_flush
    assert mid.node_options.detect_zeroes == "off"
    assert not mid.node_options.auto_read_only


async def test_an_inline_backing_image_may_be_writable(graph: Graph, tmp_path: Path) -> None:
    three_images(tmp_path)
    top = await graph.add(cow("top", "top.cow", backing={**cow("mid", "mid.cow"), "read-only": False}))
    assert top.backing is not None
    assert not top.backing.read_only


# -- formats that are not named


async def test_a_format_that_is_not_named_is_found_out(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    make_image(tmp_path / "top.cow", SIZE, backing="base.raw")
    top = await graph.add(cow("top", "top.cow"))
    assert top.backing is not None
    assert top.backing.driver == "raw"
    assert "backing-filename-format" not in block_device_info(top)["image"]


async def test_an_image_of_a_format_without_a_driver_is_not_taken_for_raw(
    graph: Graph, tmp_path: Path
) -> None:
    (tmp_path / "base.vmdk").write_bytes(b"KDMV".ljust(SIZE, b"\0"))
    make_image(tmp_path / "top.cow", SIZE, backing="base.vmdk")
    with pytest.raises(Error, match="^Could not open backing file: Unknown driver 'vmdk'$"):
        await graph.add(cow("top", "top.cow"))
    assert not graph._nodes


# -- what goes wrong


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ({"backing": "gone", "format": "raw"}, "Could not open 'gone': No such file or directory"),
        ({"backing": "gone"}, "Could not open 'gone': No such file or directory"),
        ({"backing": "x", "format": "nosuch"}, "Unknown driver 'nosuch'"),
        ({"backing": "nbd:x", "format": "raw"}, "Unknown protocol 'nbd'"),
        (
            {"backing": 'json:{"driver":"raw","file":"nowhere"}'},
            "Cannot find device='nowhere' nor node-name='nowhere'",
        ),
    ],
)
async def test_a_backing_image_that_does_not_open_leaves_nothing_behind(
    graph: Graph, tmp_path: Path, header: dict[str, str], text: str
) -> None:
    make_image(tmp_path / "mid.cow", SIZE, **header)
    make_image(tmp_path / "top.cow", SIZE, backing="mid.cow", format="cow")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Error, match=f"^Could not open backing file: Could not open backing file: {text}$"):
        await graph.add(cow("top", "top.cow"))
    assert not graph._nodes
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("length", [1, 2, 3])
async def test_a_loop_is_refused(graph: Graph, tmp_path: Path, length: int) -> None:
    for number in range(length):
        name = f"./{(number + 1) % length}.cow"
        make_image(tmp_path / f"{number}.cow", SIZE, backing=name, format="cow")
    with pytest.raises(Error, match="creates an infinite loop"):
        await graph.add(cow("top", "0.cow", **{"read-only": True}))
    with pytest.raises(Error, match='Failed to get shared "write" lock'):
        await graph.add(cow("top", "0.cow"))
    assert not graph._nodes


async def test_a_chain_has_an_end(graph: Graph, tmp_path: Path) -> None:
    for number in range(backing.LONGEST_CHAIN + 1):
        make_image(tmp_path / f"{number}.cow", CLUSTER, backing=f"{number + 1}.cow", format="cow")
    make_image(tmp_path / f"{backing.LONGEST_CHAIN + 1}.cow", CLUSTER, {0: b"x"})
    with pytest.raises(Error, match="images are behind this one"):
        await graph.add(cow("top", "0.cow", **{"read-only": True}))
    assert not graph._nodes
    top = await graph.add(cow("top", "1.cow", **{"read-only": True}))
    assert bytes(await top.pread(0, 3)) == b"xxx"
    assert (await top.block_status(0, CLUSTER)).depth == backing.LONGEST_CHAIN + 1


async def test_a_node_is_not_its_own_backing_image(graph: Graph, tmp_path: Path) -> None:
    three_images(tmp_path)
    with pytest.raises(Error, match="^Making 'top' a backing child of 'top' would create a cycle$"):
        await graph.add(cow("top", "top.cow", backing="top"))


# -- permissions


async def test_an_overlay_reads_its_backing_image_only_if_somebody_reads_it(
    graph: Graph, tmp_path: Path
) -> None:
    three_images(tmp_path)
    top = await graph.add(cow("top", "top.cow"))
    edge = top.children["backing"]
    assert (edge.perm, edge.shared) == (Permission.nothing(), EVERYTHING)
    user = Backend(graph, perm=Permission.CONSISTENT_READ, shared=EVERYTHING & ~Permission.WRITE)
    with user.use(top):
        assert edge.perm == Permission.CONSISTENT_READ
        assert edge.shared == Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
    assert (edge.perm, edge.shared) == (Permission.nothing(), EVERYTHING)


async def test_a_backing_image_is_not_written_while_its_overlay_s_user_can_not_bear_it(
    graph: Graph, tmp_path: Path
) -> None:
    three_images(tmp_path)
    await graph.add(cow("mid", "mid.cow"))
    top = await graph.add(cow("top", "top.cow", backing="mid"))
    reader = Backend(graph, qdev="disk", shared=EVERYTHING & ~Permission.WRITE)
    with reader.use(top), pytest.raises(Error) as caught:
        Backend(graph, perm=Permission.WRITE).attach(graph.reference("mid"))
    assert caught.value.desc == (
        "Permission conflict on node 'mid': permissions 'write' are both required by an unnamed block "
        "device (uses node 'mid' as 'root' child) and unshared by node 'top' (uses node 'mid' as "
        "'backing' child)."
    )
