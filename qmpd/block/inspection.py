"""The whole graph as two lists, in the order in which QEMU shows it."""

from __future__ import annotations

from dataclasses import dataclass

from qmpd.block.backend import Backend
from qmpd.block.edge import Edge
from qmpd.block.graph import Graph
from qmpd.block.node import Node


@dataclass
class Picture:
    """Vertices with a number each, and the edges between them."""

    numbers: dict[Node | Backend, int]
    vertices: list[Node | Backend]
    edges: list[Edge]


def picture(graph: Graph) -> Picture:
    """The graph as `x-debug-query-block-graph` draws it.

    Users come first, then nodes, oldest first, each with its newest child first; a vertex gets
    its number when it is met, be it as a child; the lists are shown backwards.
    """
    numbers: dict[Node | Backend, int] = {}
    vertices: list[Node | Backend] = []
    edges: list[Edge] = []
    users: list[Node | Backend] = [*graph.backends]
    for vertex in [*users, *reversed(graph.nodes())]:
        numbers.setdefault(vertex, len(numbers) + 1)
        vertices.append(vertex)
        below = [*reversed(vertex.children.values())] if isinstance(vertex, Node) else [vertex.edge]
        for edge in below:
            if edge is not None:
                numbers.setdefault(edge.child, len(numbers) + 1)
                edges.append(edge)
    return Picture(numbers, vertices[::-1], edges[::-1])
