"""Making new images: what the drivers' `create` functions share.

A `create` does first all that can fail without touching the disk (options,
secrets, the key derivation); then it sets the sizes and writes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from qmpd.block.backend import Backend
from qmpd.block.graph import Graph
from qmpd.block.permissions import Permission

#: What whoever makes an image takes on its nodes.
PERMISSIONS = Permission.WRITE | Permission.RESIZE

_NOTHING = Permission.nothing()

#: The largest image, in bytes: a file's size is signed.
MAX_SIZE = (1 << 63) - 512


@asynccontextmanager
async def disk_for(
    graph: Graph,
    reference: str | Mapping[str, Any],
    shared: Permission = Permission.everything(),  # noqa: B008 - an enum's member never changes
    *,
    reads: bool = False,
) -> AsyncIterator[Backend]:
    """A node that is written as a whole for the time of an ``async with``.

    :param reference: its name, or BlockdevOptions to open it with.
    :param shared: what others may do with it meanwhile.
    :param reads: what was written is read again.
    :raise Error: if it is not there, can't be opened, or somebody does not share it.
    """
    async with graph.borrow(reference) as node:
        with Backend(graph, perm=PERMISSIONS).use(node) as backend:
            # Whoever does not share the node with us is complained of before those with whom we don't.
            backend.set_permissions(PERMISSIONS | (Permission.CONSISTENT_READ if reads else _NOTHING), shared)
            yield backend
