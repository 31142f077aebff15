"""Who may change keyslots while who has the header open.

What the slots are like afterwards, for other programs too, is in tests/interop and tests/faults.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.backend import Backend
from qmpd.block.drivers.luks import create
from qmpd.block.file_locks import ImageLocks
from qmpd.block.graph import Graph
from qmpd.block.keyslots import exclusive
from qmpd.block.node import Node
from qmpd.block.permissions import Permission
from qmpd.errors import Error

NEW_KEY = {"driver": "luks", "state": "active", "new-secret": "other", "iter-time": 1}


async def amend(node: Node, options: dict[str, Any] | None = None, *, force: bool = False) -> None:
    await node.amend(options or NEW_KEY, force=force, progress=lambda *_: None, commit=lambda: None)


def active_slots(node: Node) -> list[int]:
    info = node.format_specific()
    assert info is not None
    return [number for number, slot in enumerate(info["data"]["slots"]) if slot["active"]]


@pytest.fixture
async def header(graph: Graph, tmp_path: Path) -> Path:
    """A detached header, opened by "pw"."""
    path = tmp_path / "header.img"
    path.touch()
    reference = {"driver": "file", "filename": str(path)}
    await create(graph, {"driver": "luks", "header": reference, "key-secret": "pw", "iter-time": 1})
    return path


async def disk(graph: Graph, name: str, header: str | Path, **more: Any) -> Node:
    """A disk whose header is on a node of this name, or in this file."""
    reference = header if isinstance(header, str) else {"driver": "file", "filename": str(header)}
    payload = {"driver": "null-co", "size": 1 << 20, "read-zeroes": True}
    options = {"driver": "luks", "node-name": name, "file": payload, "header": reference, "key-secret": "pw"}
    return await graph.add({**options, **more})


async def test_disks_that_share_a_headers_node_are_amended_through_any_of_them(
    graph: Graph, header: Path
) -> None:
    await graph.add({"driver": "file", "node-name": "h", "filename": str(header)})
    disks = [await disk(graph, f"d{number}", "h") for number in range(3)]
    guests = [Backend(graph, perm=Permission.CONSISTENT_READ | Permission.WRITE) for _ in disks]
    for guest, node in zip(guests, disks, strict=True):
        guest.attach(node)
    await amend(disks[1])
    assert [active_slots(node) for node in disks] == [[0, 1]] * 3
    await amend(disks[2], {"driver": "luks", "state": "inactive", "keyslot": 0})
    assert [active_slots(node) for node in disks] == [[1]] * 3
    for guest in guests:
        await guest.pwrite(0, bytes(512))


async def test_disks_with_nodes_of_their_own_on_the_headers_file_are_no_obstacle(
    graph: Graph, header: Path
) -> None:
    disks = [await disk(graph, f"d{number}", header) for number in range(3)]
    await amend(disks[0])
    assert [active_slots(node) for node in disks] == [[0, 1]] * 3
    # Everybody has the locks again that it had before.
    with header.open("rb") as file:
        stranger = ImageLocks(file.fileno())
        with pytest.raises(Error, match="Failed to get shared"):
            stranger.prepare(Permission.nothing(), Permission.nothing())


async def test_another_process_with_the_header_open_is_an_obstacle(graph: Graph, header: Path) -> None:
    node = await disk(graph, "d", header)
    before = header.read_bytes()
    with header.open("rb") as file:
        stranger = ImageLocks(file.fileno())
        stranger.prepare(Permission.CONSISTENT_READ, Permission.everything())
        stranger.commit()
        with pytest.raises(Error, match='Failed to get shared "consistent read" lock'):
            await amend(node)
    assert header.read_bytes() == before
    await amend(node)
    assert active_slots(node) == [0, 1]


async def test_another_user_of_the_headers_node_is_an_obstacle_and_named(graph: Graph, header: Path) -> None:
    await graph.add({"driver": "file", "node-name": "h", "filename": str(header)})
    node = await disk(graph, "d", "h")
    before = header.read_bytes()
    reader = Backend(graph, name="reader")
    with reader.use(graph.reference("h")), pytest.raises(Error) as refusal:
        await amend(node)
    assert refusal.value.desc == (
        "Permission conflict on node 'h': permissions 'consistent read' are both required by block device "
        "'reader' (uses node 'h' as 'root' child) and unshared by node 'd' (uses node 'h' as 'header' child)."
    )
    assert header.read_bytes() == before
    await amend(node)


async def test_nobody_comes_in_while_keyslots_change(graph: Graph, header: Path) -> None:
    await graph.add({"driver": "file", "node-name": "h", "filename": str(header)})
    node = await disk(graph, "d", "h")
    async with exclusive(node):  # type: ignore[arg-type]
        with pytest.raises(Error, match="Permission conflict"):
            Backend(graph).attach(graph.reference("h"))
        with pytest.raises(Error, match="Permission conflict"):
            await disk(graph, "late", "h")
        with pytest.raises(Error, match="Failed to get"):
            await disk(graph, "late", header)
    await disk(graph, "late", header)


async def test_a_header_on_a_read_only_node_is_not_changed(graph: Graph, header: Path) -> None:
    await graph.add({"driver": "file", "node-name": "h", "filename": str(header), "read-only": True})
    node = await disk(graph, "d", "h", **{"read-only": True})
    with pytest.raises(Error, match="Block node is read-only"):
        await amend(node)


async def test_requests_go_on_while_keyslots_change(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "d.luks"
    path.touch()
    file = {"driver": "file", "filename": str(path)}
    options = {"driver": "luks", "file": file, "size": 1 << 20, "key-secret": "pw", "iter-time": 1}
    await create(graph, options)
    node = await graph.add({"driver": "luks", "node-name": "d", "file": file, "key-secret": "pw"})
    guest = Backend(graph, perm=Permission.CONSISTENT_READ | Permission.WRITE)
    guest.attach(node)
    changing = asyncio.ensure_future(amend(node, {**NEW_KEY, "iter-time": 50}))
    served = 0
    while not changing.done():
        await guest.pwrite(served % 2048 * 512, bytes([served % 256]) * 512)
        served += 1
        await asyncio.sleep(0)
    await changing
    assert served
    last = served - 1
    assert bytes(await guest.pread(last % 2048 * 512, 512)) == bytes([last % 256]) * 512
    assert active_slots(node) == [0, 1]


async def test_two_changes_of_one_header_come_one_after_the_other(graph: Graph, header: Path) -> None:
    await graph.add({"driver": "file", "node-name": "h", "filename": str(header)})
    disks = [await disk(graph, f"d{number}", "h") for number in range(4)]
    await asyncio.gather(*(amend(node) for node in disks))
    assert active_slots(disks[0]) == [0, 1, 2, 3, 4]


async def test_a_change_that_is_cancelled_before_anything_is_written_leaves_all_as_it_was(
    graph: Graph, header: Path
) -> None:
    node = await disk(graph, "d", header)
    before = header.read_bytes()
    changing = asyncio.ensure_future(amend(node))
    await asyncio.sleep(0)
    changing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await changing
    assert header.read_bytes() == before
    await amend(node)
    assert active_slots(node) == [0, 1]


async def test_the_header_of_another_volume_is_not_touched(graph: Graph, header: Path) -> None:
    node = await disk(graph, "d", header)
    other = header.with_name("other.img")
    other.touch()
    reference = {"driver": "file", "filename": str(other)}
    await create(graph, {"driver": "luks", "header": reference, "key-secret": "pw", "iter-time": 1})
    header.write_bytes(other.read_bytes())
    with pytest.raises(Error, match="The LUKS header is another one than when the node was opened"):
        await amend(node)
    assert header.read_bytes() == other.read_bytes()


async def test_the_volume_key_in_memory_serves_when_no_passphrase_is_left(graph: Graph, header: Path) -> None:
    node = await disk(graph, "d", header)
    await amend(node, {"driver": "luks", "state": "inactive", "keyslot": 0}, force=True)
    assert active_slots(node) == []
    with pytest.raises(Error, match="Invalid password, cannot unlock any keyslot"):
        await amend(node)
    await amend(node, force=True)
    assert active_slots(node) == [0]
    await graph.delete("d")
    await disk(graph, "again", header, **{"key-secret": "other"})
