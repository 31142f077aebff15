"""Edges of the graph: who uses which node, as what, with which permissions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from qmpd.block.permissions import Permission

if TYPE_CHECKING:
    from qmpd.block.node import Node


class Parent(Protocol):
    """The upper end of an edge: a node, or a backend (a user outside the graph)."""

    def describe(self) -> str:
        """How a message names this parent, e.g. ``"node 'fmt'"``."""


class Edge:
    """A use of `child` by `parent` under the role `name` ("file", "header", "root").

    `perm` is what the parent takes on the child, `shared` what it leaves to
    the child's other parents.
    """

    __slots__ = ("child", "name", "parent", "perm", "shared")

    def __init__(self, parent: Parent, name: str, child: Node, perm: Permission, shared: Permission) -> None:
        self.parent = parent
        self.name = name
        self.child = child
        self.perm = perm
        self.shared = shared

    def describe(self) -> str:
        """The edge as messages about conflicts name it."""
        return f"{self.parent.describe()} (uses node '{self.child.name}' as '{self.name}' child)"
