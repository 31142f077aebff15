from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.qapi import Schema, load, schema_directory
from qmpd.qom.devices import Devices
from qmpd.qom.tree import ObjectTree

Events = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="session")
def schema() -> Schema:
    return load(schema_directory())


@pytest.fixture
def tree(schema: Schema) -> ObjectTree:
    return ObjectTree(schema)


@pytest.fixture
def events() -> Events:
    return []


@pytest_asyncio.fixture
async def graph(tree: ObjectTree) -> AsyncIterator[Graph]:
    graph = Graph(DRIVERS, secrets=tree.secret_bytes)
    for name in ("n", "n2", "n3"):
        await graph.add({"driver": "null-co", "node-name": name, "size": 1 << 20, "read-zeroes": True})
    await graph.add({"driver": "null-co", "node-name": "ro", "size": 1 << 20, "read-only": True})
    yield graph
    await graph.close()


@pytest_asyncio.fixture
async def devices(graph: Graph, tree: ObjectTree, events: Events) -> AsyncIterator[Devices]:
    devices = Devices(graph, tree, lambda name, data: events.append((name, data)))
    yield devices
    devices.close()
