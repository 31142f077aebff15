"""Adding and deleting nodes, names, permissions."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.backend import Backend
from qmpd.block.drivers.null import NullCoNode
from qmpd.block.graph import Graph
from qmpd.block.permissions import Permission
from qmpd.crypto.memory import KeyMemory
from qmpd.errors import Error

GUEST = Permission.CONSISTENT_READ | Permission.WRITE
GUEST_SHARES = Permission.everything() & ~Permission.WRITE


def null(name: str, **more: Any) -> dict[str, Any]:
    return {"driver": "null-co", "node-name": name, **more}


def raw(name: str, file: str | dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"driver": "raw", "node-name": name, "file": file, **more}


async def test_nodes_are_listed_newest_first(graph: Graph) -> None:
    for name in ("a", "b", "c"):
        await graph.add(null(name))
    assert [node.name for node in graph.nodes()] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("0a", "Invalid node-name: '0a'"),
        ("", "Invalid node-name: ''"),
        ("#block1", "Invalid node-name: '#block1'"),
        ("n" * 32, "Node name too long"),
        ("a", "Duplicate nodes with node-name='a'"),
    ],
)
async def test_a_bad_name_is_refused_and_leaves_no_node(graph: Graph, name: str, text: str) -> None:
    await graph.add(null("a"))
    with pytest.raises(Error, match=f"^{text}$"):
        await graph.add(raw(name, {"driver": "null-co"}))
    assert [node.name for node in graph.nodes()] == ["a"]
    assert not graph._nodes.keys() - {"a"}


async def test_an_inline_child_goes_with_its_parent(graph: Graph) -> None:
    await graph.add(raw("r", null("inner")))
    with pytest.raises(Error, match="Node inner is not owned by the monitor"):
        await graph.delete("inner")
    await graph.delete("r")
    assert graph.nodes() == []


async def test_an_inline_child_stays_while_somebody_else_uses_it(graph: Graph) -> None:
    await graph.add(raw("r", null("inner")))
    await graph.add(raw("r2", "inner"))
    await graph.delete("r")
    assert [node.name for node in graph.nodes()] == ["r2", "inner"]
    await graph.delete("r2")
    assert graph.nodes() == []


async def test_a_node_in_use_is_not_deleted(graph: Graph) -> None:
    await graph.add(null("n"))
    await graph.add(raw("r", "n"))
    with pytest.raises(Error, match="^Block device n is in use$"):
        await graph.delete("n")
    with Backend(graph).use(graph.lookup(None, "r")), pytest.raises(Error, match="^Node r is in use$"):
        await graph.delete("r")


async def test_a_node_under_construction_holds_its_name_but_is_not_seen() -> None:
    gate = asyncio.Event()

    class SlowNode(NullCoNode):
        driver = "slow"

        async def open(self) -> None:
            await gate.wait()

    graph = Graph({"slow": SlowNode, "null-co": NullCoNode}, secrets=lambda _: KeyMemory().take(0))
    opening = asyncio.create_task(graph.add({"driver": "slow", "node-name": "s"}))
    while "s" not in graph._nodes:
        await asyncio.sleep(0.001)
    assert graph.nodes() == []
    assert graph.find("s") is None
    with pytest.raises(Error, match="Duplicate"):
        await graph.add(null("s"))
    gate.set()
    await opening
    assert [node.name for node in graph.nodes()] == ["s"]


async def test_a_cancelled_opening_leaves_nothing(tmp_path: Path) -> None:
    class StuckNode(NullCoNode):
        driver = "stuck"
        is_protocol = False

        async def open(self) -> None:
            await asyncio.Event().wait()

    graph = Graph({"stuck": StuckNode, "null-co": NullCoNode}, secrets=lambda _: KeyMemory().take(0))
    await graph.add(null("below"))
    opening = asyncio.create_task(graph.add({"driver": "stuck", "node-name": "s", "file": "below"}))
    while "s" not in graph._nodes:
        await asyncio.sleep(0.001)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await graph.delete("below")
    assert graph._nodes == {}


async def test_a_conflict_names_both_users_and_changes_nothing(graph: Graph) -> None:
    await graph.add(null("n"))
    node = graph.lookup(None, "n")
    first = Backend(graph, qdev="one", perm=GUEST, shared=GUEST_SHARES)
    first.attach(node)
    second = Backend(graph, qdev="two", perm=GUEST, shared=GUEST_SHARES)
    with pytest.raises(Error) as caught:
        second.attach(node)
    assert caught.value.desc == (
        "Permission conflict on node 'n': permissions 'write' are both required by block device 'one' "
        "(uses node 'n' as 'root' child) and unshared by block device 'two' (uses node 'n' as 'root' child)."
    )
    assert graph.backends == [first]
    assert len(node.parents) == 1
    first.detach()
    second.attach(node)


async def test_a_conflict_further_down_changes_nothing_above(graph: Graph) -> None:
    await graph.add(null("n"))
    await graph.add(raw("a", "n"))
    await graph.add(raw("b", "n"))
    first = Backend(graph, qdev="one", perm=GUEST, shared=GUEST_SHARES)
    first.attach(graph.lookup(None, "a"))
    before = [(edge.perm, edge.shared) for edge in graph.lookup(None, "n").parents]
    with pytest.raises(Error, match="Permission conflict on node 'n'"):
        Backend(graph, qdev="two", perm=GUEST, shared=GUEST_SHARES).attach(graph.lookup(None, "b"))
    assert [(edge.perm, edge.shared) for edge in graph.lookup(None, "n").parents] == before


async def test_a_window_does_not_share_resize(graph: Graph) -> None:
    await graph.add(null("n"))
    await graph.add(raw("w", "n", offset=512))
    edge = graph.lookup(None, "w").children["file"]
    assert edge.shared == Permission.everything() & ~Permission.RESIZE
    resize = Backend(graph, perm=Permission.RESIZE)
    with pytest.raises(Error, match="an unnamed block device .* and unshared by node 'w'"):
        resize.attach(graph.lookup(None, "n"))


async def test_nobody_writes_a_read_only_node(graph: Graph) -> None:
    await graph.add(null("n", **{"read-only": True}))
    with pytest.raises(Error, match="^Block node is read-only$"):
        Backend(graph, perm=GUEST).attach(graph.lookup(None, "n"))
    Backend(graph).attach(graph.lookup(None, "n"))


async def test_one_node_in_two_roles_is_checked_once_for_both(graph: Graph) -> None:
    await graph.add(null("n"))
    await graph.add(raw("a", "n"))
    await graph.add(raw("b", {"driver": "raw", "file": "a", "node-name": "m"}))
    backend = Backend(graph, qdev="one", perm=GUEST, shared=GUEST_SHARES)
    backend.attach(graph.lookup(None, "b"))
    assert graph.lookup(None, "n").parents[0].perm == GUEST
    backend.detach()
    assert not graph.lookup(None, "n").parents[0].perm


async def test_force_share_shares_everything(graph: Graph) -> None:
    inner = null("n", **{"read-only": True, "force-share": True})
    await graph.add(raw("w", inner, size=512))
    assert graph.lookup(None, "w").children["file"].shared == Permission.everything()
