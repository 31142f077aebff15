"""Keeping a disk's contents as they are now: overlays, and snapshots inside an image.

An *overlay* is an image in front of another one: whoever used the other one uses the overlay from then on,
and what they write goes there.  An *internal snapshot* is in the image itself, if its format has such.
Each function here makes one change of several that may belong together (`transaction`); it is undone
if a later one fails.
"""

from __future__ import annotations

import time
from typing import Any

from qmpd.block import backing
from qmpd.block.change import Change
from qmpd.block.drivers import DRIVERS, can_create, create
from qmpd.block.graph import Graph, check_unused_as_backing
from qmpd.block.node import InternalSnapshot, Node
from qmpd.block.permissions import Permission
from qmpd.block.reopening import set_read_only
from qmpd.errors import Error

# -- overlays


async def put_overlay(graph: Graph, name: str, overlay_name: str, change: Change) -> None:
    """Put one node in front of another (`blockdev-snapshot`).

    :param name: the device or node whose contents shall stay as they are.
    :raise Error: if the overlay is none or is in use.
    """
    node = await _hold_still(graph, graph.lookup(name, name), change)
    await _put_in_front(graph, node, graph.reference(overlay_name), change)


async def put_new_overlay(
    graph: Graph,
    node: Node,
    filename: str,
    new_name: str | None,
    change: Change,
    *,
    image_format: str = "qcow2",
    existing: bool = False,
    needs_name: bool = False,
) -> None:
    """Put an image into a file and in front of a node (`blockdev-snapshot-sync`).

    :param existing: the image is there already.
    :param needs_name: the overlay has to be given a name.
    :raise Error: if the image can't be made or opened, or be an overlay.
    """
    await _hold_still(graph, node, change)
    if needs_name and new_name is None:
        raise Error("New overlay node-name missing")
    if new_name is not None and graph.find(new_name) is not None:
        raise Error("New overlay node-name already in use")
    if not existing:
        await _make_overlay_file(graph, node, filename, image_format)
    cache = {"direct": node.node_options.direct, "no-flush": node.node_options.no_flush}
    options: dict[str, Any] = {
        **backing.options_for(filename, image_format),
        "cache": cache,
        "discard": node.node_options.discard,
    }
    if new_name is not None:
        options["node-name"] = new_name
    overlay = await graph.open_without_backing(options)
    change.on_failure(graph.release, overlay)
    change.on_success(graph.release, overlay)
    await _put_in_front(graph, node, overlay, change)


async def _hold_still(graph: Graph, node: Node, change: Change) -> Node:
    """Let requests wait until the end of the change, and have on the storage what is written so far."""
    await change.hold(graph.drained(node))
    check_unused_as_backing(node)
    try:
        if not node.read_only:
            await node.flush()
    except OSError:
        raise Error("An IO error has occurred") from None
    return node


async def _make_overlay_file(graph: Graph, node: Node, filename: str, image_format: str) -> None:
    if image_format not in DRIVERS:
        raise Error(f"Unknown file format '{image_format}'")
    if not can_create(image_format) or not DRIVERS[image_format].supports_backing:
        raise Error(f"Backing file not supported for file format '{image_format}'")
    await create(graph, {"driver": "file", "filename": filename, "size": 0})
    image: dict[str, Any] = {
        "driver": image_format,
        "file": {"driver": "file", "filename": filename},
        "size": node.size,
        "backing-file": node.filename,
        "backing-fmt": node.driver,
    }
    await create(graph, image)


async def _put_in_front(graph: Graph, node: Node, overlay: Node, change: Change) -> None:
    if any(edge.perm & Permission.CONSISTENT_READ for edge in overlay.parents):
        raise Error("The overlay is already in use")
    if overlay.backing is not None:
        raise Error("The overlay already has a backing image")
    if not overlay.supports_backing:
        raise Error("The overlay does not support backing images")
    await change.hold(graph.drained(overlay))
    change.on_failure(graph.settle, node, overlay)
    graph.swap_child(overlay, "backing", node, change)
    graph.replace(node, overlay, change)
    graph.settle(overlay, node)
    change.on_success(_freeze, graph, node)


async def _freeze(graph: Graph, node: Node) -> None:
    """Nobody shall write to an image that has an overlay, if that can be had."""
    try:
        async with Change() as change:
            await set_read_only(graph, node, True, change)
    except Error:
        # Somebody else writes to it, and may.
        pass


# -- the name in the header


async def change_backing_file(graph: Graph, device: str, name: str, backing_file: str) -> None:
    """Write another backing file's name into an image's header (`change-backing-file`).

    :param device: the device or node at the top of the chain.
    :param name: the node of the image.
    :raise Error: if the image has no backing image, or its header can't be changed.
    """
    async with graph.change() as change:
        top = root(graph, device)
        node = graph.lookup(None, name)
        if node.backing is None:
            raise Error("not allowing backing file change on an image without a backing file")
        if node not in graph.subtree(top):
            raise Error(f"'{device}' and image file are not in the same chain")
        await change.hold(graph.drained(node))
        was_read_only = node.read_only
        if was_read_only:
            async with Change() as opening:
                await set_read_only(graph, node, False, opening)
        try:
            image_format = node.backing.driver if backing_file else None
            await node.change_backing_name(backing_file or None, image_format)
        except OSError as error:
            raise Error(f"Could not change backing file to '{backing_file}': {error.strerror}") from None
        finally:
            if was_read_only:
                await _freeze(graph, node)


# -- snapshots inside an image


def root(graph: Graph, name: str) -> Node:
    """The node of a device, or one that is no other node's child.

    :raise Error: if there is none.
    """
    node = graph.lookup(name, name)
    if any(isinstance(edge.parent, Node) for edge in node.parents):
        raise Error("Need a root block node")
    return node


def _root_with_medium(graph: Graph, name: str) -> Node:
    node = root(graph, name)
    if node.ejected:
        raise Error("Device has no medium")
    return node


async def create_internal(graph: Graph, device: str, name: str, change: Change) -> None:
    """Keep a disk's contents inside its image (`blockdev-snapshot-internal-sync`).

    :raise Error: if there is no such device, or its image can't.
    """
    node = _root_with_medium(graph, device)
    await change.hold(graph.drained(node))
    if node.read_only:
        raise Error(f"Device '{device}' is read only")
    if not node.supports_internal_snapshots:
        raise Error(
            f"Block format '{node.driver}' used by device '{device}' does not support internal snapshots"
        )
    if not name:
        raise Error("Name is empty")
    if _find(node, None, name) is not None:
        raise Error(f"Snapshot with name '{name}' already exists on device '{device}'")
    try:
        made = await node.create_internal_snapshot(name, time.time())
    except OSError as error:
        raise Error(f"Failed to create snapshot '{name}' on device '{device}': {error.strerror}") from None
    change.on_failure(node.delete_internal_snapshot, made.id)


async def delete_internal(
    graph: Graph, device: str, snapshot_id: str | None, name: str | None
) -> InternalSnapshot:
    """Forget a snapshot inside an image (`blockdev-snapshot-delete-internal-sync`).

    :param snapshot_id: its id, if not only the name counts; one of the two is given.
    :raise Error: if there is no such device or snapshot.
    """
    async with graph.change() as change:
        node = _root_with_medium(graph, device)
        await change.hold(graph.drained(node))
        if snapshot_id is None and name is None:
            raise Error("Name or id must be provided")
        found = _find(node, snapshot_id, name)
        if found is None:
            raise Error(
                f"Snapshot with id '{_or_null(snapshot_id)}' and name '{_or_null(name)}' does not exist on "
                f"device '{device}'"
            )
        try:
            await node.delete_internal_snapshot(found.id)
        except OSError as error:
            raise Error(f"Failed to remove snapshot from snapshot list: {error.strerror}") from None
        return found


def _find(node: Node, snapshot_id: str | None, name: str | None) -> InternalSnapshot | None:
    if not node.supports_internal_snapshots or not node.lists_internal_snapshots:
        raise Error("Failed to get a snapshot list: Operation not supported")
    for snapshot in node.internal_snapshots:
        if snapshot_id in (None, snapshot.id) and name in (None, snapshot.name):
            return snapshot
    return None


def _or_null(value: str | None) -> str:
    return "null" if value is None else value
