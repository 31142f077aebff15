"""Looking after a LUKS header: its keyslots told, the header saved, put back, made one of another version.

The work is in :mod:`qmpd.block.keyslot_insight`, :mod:`qmpd.block.header_backup` and
:mod:`qmpd.block.luks_conversion`.  They need ciphers, so they are imported when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qmpd.block.amending import kept
from qmpd.block.keyslot_holder import keyslot_holder

if TYPE_CHECKING:
    from qmpd.block.graph import Graph
    from qmpd.block.node import Node


async def query_keyslots(node: Node) -> dict[str, Any]:
    """What the keyslots of a node are like; see :func:`qmpd.block.keyslot_insight.query`.

    :raise Error: if it has none, or they can't be read.
    """
    holder = keyslot_holder(node)
    with kept(node):
        module = await node.graph.in_io_thread(import_module, "qmpd.block.keyslot_insight")
        info: dict[str, Any] = await module.query(holder)
        return info


async def save_header(node: Node, filename: str) -> None:
    """Save a node's header to a new file; see :func:`qmpd.block.header_backup.save`."""
    with kept(node):
        module = await node.graph.in_io_thread(import_module, "qmpd.block.header_backup")
        await module.save(keyslot_holder(node), filename)


async def restore_header(
    node: Node, filename: str | None, *, secret: str | None, force: bool, commit: Callable[[], None]
) -> None:
    """Put a node's header back; see :func:`qmpd.block.header_backup.put_back`."""
    with kept(node):
        module = await node.graph.in_io_thread(import_module, "qmpd.block.header_backup")
        await module.put_back(keyslot_holder(node), filename, secret=secret, force=force, commit=commit)


async def convert_header(
    graph: Graph,
    reference: str | Mapping[str, Any],
    version: int,
    *,
    backup: str,
    commit: Callable[[], None],
) -> None:
    """Make a header one of another version; see :func:`qmpd.block.luks_conversion.convert`."""
    module = await graph.in_io_thread(import_module, "qmpd.block.luks_conversion")
    await module.convert(graph, reference, version, backup=backup, commit=commit)
