"""Changing what an image's header says while the image is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qmpd.block.backend import Backend
from qmpd.block.node import Node
from qmpd.block.permissions import Permission
from qmpd.errors import Error


def check_amendable(node: Node, options: Mapping[str, Any]) -> None:
    """See that the options are for this node.

    :param options: BlockdevAmendOptions.
    :raise Error: if they are not, or its driver has nothing to amend.
    """
    if options["driver"] != node.driver:
        raise Error("x-blockdev-amend doesn't support changing the block driver")
    if not node.amendable:
        raise Error("Driver does not support x-blockdev-amend")


async def amend(
    node: Node,
    options: Mapping[str, Any],
    *,
    force: bool,
    progress: Callable[[int, int], None],
    commit: Callable[[], None],
) -> None:
    """Change a node's image; the node can't be deleted meanwhile.

    Parameters and errors are those of :meth:`qmpd.block.node.Node.amend`.
    """
    with kept(node):
        await node.amend(options, force=force, progress=progress, commit=commit)


@contextmanager
def kept(node: Node) -> Iterator[None]:
    """For the time of a ``with`` a node can't be deleted.

    :raise Error: if it has been.
    """
    if node.closing:
        raise Error(f"Node '{node.name}' has been deleted")
    with Backend(node.graph, perm=Permission.nothing(), is_jobs=True).use(node):
        yield
