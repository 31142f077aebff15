"""A write beyond a node's threshold is told of, once, whatever kind of write it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from qmpd.block.backend import Backend
from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.block.permissions import Permission
from qmpd.crypto.memory import KeyBuffer

WRITING = Permission.CONSISTENT_READ | Permission.WRITE
MEGABYTE = 1 << 20

Told = list[tuple[str, int, int]]
Write = Callable[[Backend], Awaitable[object]]


def no_secrets(name: str) -> KeyBuffer:
    raise NotImplementedError


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda backend: backend.pwrite(65536, bytes(512)), id="one"),
        pytest.param(lambda backend: backend.pwrite_many([(0, b"x"), (65536, bytes(512))]), id="several"),
        pytest.param(lambda backend: backend.write_zeroes(65536, 512), id="zeroes"),
    ],
)
async def test_a_write_beyond_the_threshold_is_told_of_once(write: Write) -> None:
    told: Told = []

    def tell(node: Node, threshold: int, end: int) -> None:
        told.append((node.name, threshold, end))

    graph = Graph(DRIVERS, secrets=no_secrets, exceeded=tell)
    node = await graph.add({"driver": "null-co", "node-name": "n", "size": MEGABYTE})
    with Backend(graph, perm=WRITING).use(node) as backend:
        node.write_threshold = 66048
        await write(backend)
        assert told == [], "it ends where the threshold is"
        node.write_threshold = 66047
        await write(backend)
        assert told == [("n", 66047, 66048)]
        assert node.write_threshold == 0
        await write(backend)
        assert len(told) == 1
    await graph.close()
