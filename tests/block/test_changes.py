"""Nodes that change while they are in use: other options, other children, overlays, transactions."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cow_driver import CLUSTER, graph_with_cow, make_image

from qmpd.block import snapshots
from qmpd.block.backend import Backend
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.block.permissions import Permission
from qmpd.block.reopening import reopen
from qmpd.errors import Error

SIZE = 4 * CLUSTER
GUEST = Permission.CONSISTENT_READ | Permission.WRITE


@pytest_asyncio.fixture
async def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Graph]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.raw").write_bytes(b"a" * SIZE)
    (tmp_path / "b.raw").write_bytes(b"b" * SIZE)
    for name in ("over", "over2"):
        make_image(tmp_path / f"{name}.cow", SIZE)
    graph = graph_with_cow()
    yield graph
    await graph.close()


def file(name: str, filename: str, **more: Any) -> dict[str, Any]:
    return {"driver": "file", "node-name": name, "filename": filename, **more}


def raw(name: str, child: Any, **more: Any) -> dict[str, Any]:
    return {"driver": "raw", "node-name": name, "file": child, **more}


def cow(name: str, **more: Any) -> dict[str, Any]:
    return {"driver": "cow", "node-name": name, "file": {"driver": "file", "filename": f"{name}.cow"}, **more}


def picture(graph: Graph) -> list[Any]:
    """Everything that a failing change must leave as it was."""
    return [
        (
            node.name,
            node.read_only,
            node.node_options,
            node.options,
            [(edge.name, edge.child.name, edge.perm, edge.shared) for edge in node.children.values()],
            [(edge.parent.describe(), edge.name) for edge in node.parents],
        )
        for node in graph.nodes()
    ]


# -- options


async def test_all_nodes_change_or_none(graph: Graph) -> None:
    for options in (file("fa", "a.raw"), file("fb", "b.raw"), raw("r", "fa")):
        await graph.add(options)
    before = picture(graph)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Error, match="^Cannot change the option 'filename'$"):
        await reopen(
            graph,
            [
                file("fa", "a.raw", **{"read-only": True}),
                raw("r", "fb", offset=512),
                file("fb", "other.raw"),
            ],
        )
    assert picture(graph) == before
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert bytes(await graph.reference("r").pread(0, 3)) == b"aaa"


async def test_a_file_is_opened_again_under_whatever_name_it_has_now(graph: Graph, tmp_path: Path) -> None:
    await graph.add(file("fa", "a.raw", **{"read-only": True}))
    (tmp_path / "a.raw").rename(tmp_path / "moved.raw")
    (tmp_path / "a.raw").write_bytes(b"x" * SIZE)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await reopen(graph, [file("fa", "a.raw")])
        await graph.reference("fa").pwrite(0, b"new")
        await reopen(graph, [file("fa", "a.raw", **{"read-only": True})])
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert (tmp_path / "moved.raw").read_bytes()[:4] == b"newa"
    assert (tmp_path / "a.raw").read_bytes()[:4] == b"xxxx"


async def test_a_node_with_a_writer_does_not_become_read_only(graph: Graph) -> None:
    await graph.add(raw("r", file("f", "a.raw")))
    with Backend(graph, perm=GUEST).use(graph.reference("r")):
        before = picture(graph)
        text = "^Read-only block node 'r' cannot support read-write users$"
        with pytest.raises(Error, match=text):
            await reopen(graph, [raw("r", file("f", "a.raw"), **{"read-only": True})])
        assert picture(graph) == before
        await graph.reference("r").pwrite(0, b"still")


async def test_a_child_that_was_made_along_with_its_parent_follows_it(graph: Graph) -> None:
    await graph.add(raw("r", file("f", "a.raw")))
    await reopen(graph, [raw("r", "f", **{"read-only": True, "cache": {"no-flush": True}})])
    child = graph.reference("f")
    assert (child.read_only, child.node_options.no_flush) == (True, True)


async def test_a_replaced_child_that_nobody_owns_is_closed(graph: Graph) -> None:
    await graph.add(file("fb", "b.raw"))
    await graph.add(raw("r", {"driver": "file", "filename": "a.raw", "node-name": "inner"}))
    await reopen(graph, [raw("r", "fb")])
    assert [node.name for node in graph.nodes()] == ["r", "fb"]
    assert bytes(await graph.reference("r").pread(0, 1)) == b"b"


async def test_two_changes_at_once_do_not_make_a_cycle(graph: Graph) -> None:
    await graph.add(cow("over"))
    await graph.add(cow("over2"))
    before = picture(graph)
    inner = {name: {"driver": "file", "filename": f"{name}.cow"} for name in ("over", "over2")}
    with pytest.raises(Error, match="^Making 'over' a backing child of 'over2' would create a cycle$"):
        await reopen(
            graph,
            [
                {"driver": "cow", "node-name": "over", "file": inner["over"], "backing": "over2"},
                {"driver": "cow", "node-name": "over2", "file": inner["over2"], "backing": "over"},
            ],
        )
    assert picture(graph) == before


# -- overlays


async def put_overlay(graph: Graph, node: str, overlay: str) -> None:
    async with graph.change() as change:
        await snapshots.put_overlay(graph, node, overlay, change)


async def test_users_of_a_node_use_its_overlay(graph: Graph, tmp_path: Path) -> None:
    await graph.add(raw("base", {"driver": "file", "filename": "a.raw"}))
    await graph.add(cow("over"))
    user = Backend(graph, perm=GUEST)
    user.attach(graph.reference("base"))
    await put_overlay(graph, "base", "over")
    assert user.node.name == "over"
    assert graph.reference("base").read_only
    await user.pwrite(0, b"new!")
    assert bytes(await user.pread(0, CLUSTER)) == b"new!".ljust(CLUSTER, b"a")
    assert (await user.block_status(CLUSTER, CLUSTER)).depth == 2
    assert (tmp_path / "a.raw").read_bytes() == b"a" * SIZE


async def test_requests_that_come_meanwhile_see_the_overlay(graph: Graph, tmp_path: Path) -> None:
    await graph.add(raw("base", {"driver": "file", "filename": "a.raw"}))
    await graph.add(cow("over"))
    user = Backend(graph, perm=GUEST)
    user.attach(graph.reference("base"))
    async with graph.drained(graph.reference("base")):
        writes = [asyncio.create_task(user.pwrite(n * CLUSTER, b"w" * CLUSTER)) for n in range(4)]
        await asyncio.sleep(0)
        await put_overlay(graph, "base", "over")
    await asyncio.gather(*writes)
    assert bytes(await user.pread(0, SIZE)) == b"w" * SIZE
    assert (tmp_path / "a.raw").read_bytes() == b"a" * SIZE


async def test_an_overlay_that_can_not_be_had_changes_nothing(graph: Graph) -> None:
    await graph.add(raw("base", {"driver": "file", "filename": "a.raw"}))
    await graph.add(cow("over", **{"read-only": True}))
    user = Backend(graph, perm=GUEST)
    user.attach(graph.reference("base"))
    before = picture(graph)
    with pytest.raises(Error, match="^Block node is read-only$"):
        await put_overlay(graph, "base", "over")
    assert picture(graph) == before
    assert user.node.name == "base"
    await user.pwrite(0, b"still")


async def test_an_overlay_that_somebody_reads_is_refused(graph: Graph) -> None:
    await graph.add(raw("base", {"driver": "file", "filename": "a.raw"}))
    over = await graph.add(cow("over"))
    with Backend(graph).use(over), pytest.raises(Error, match="^The overlay is already in use$"):
        await put_overlay(graph, "base", "over")


async def test_a_transaction_that_fails_at_its_end_undoes_all_of_it(graph: Graph) -> None:
    await graph.add(raw("base", {"driver": "file", "filename": "a.raw"}))
    await graph.add(cow("over"))
    await graph.add(cow("over2"))
    user = Backend(graph, perm=GUEST)
    user.attach(graph.reference("base"))
    before = picture(graph)

    async def put_both_and_fail() -> None:
        async with graph.change() as change:
            await snapshots.put_overlay(graph, "base", "over", change)
            await snapshots.put_overlay(graph, "over", "over2", change)
            assert user.node.name == "over2"
            raise Error("no more")

    with pytest.raises(Error, match="no more"):
        await put_both_and_fail()
    assert picture(graph) == before
    assert not user.waiting
    await user.pwrite(0, b"still")


async def test_an_overlay_that_was_only_a_user_s_goes_with_it(graph: Graph) -> None:
    await graph.add(raw("base", {"driver": "file", "filename": "a.raw"}))
    user = Backend(graph, perm=GUEST)
    user.attach(graph.reference("base"))
    async with graph.change() as change:
        await snapshots.put_new_overlay(
            graph, user.node, "over.cow", "over", change, image_format="cow", existing=True
        )
    assert user.node.name == "over"
    user.detach()
    assert graph.find("over") is None
    await graph.departed()
    assert [node.name for node in graph.nodes() if not node.name.startswith("#")] == ["base"]
    await graph.add(cow("over"))


async def test_a_node_is_not_deleted_while_it_changes(graph: Graph) -> None:
    await graph.add(raw("base", {"driver": "file", "filename": "a.raw"}))
    await graph.add(cow("over"))
    async with graph.change() as change:
        await snapshots.put_overlay(graph, "base", "over", change)
        deleting = asyncio.create_task(graph.delete("over"))
        await asyncio.sleep(0)
        assert not deleting.done()
    await deleting
    node: Node | None = graph.find("base")
    assert node is not None
    assert not node.parents
