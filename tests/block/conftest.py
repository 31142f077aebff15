from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.crypto.memory import KeyBuffer, KeyMemory
from qmpd.errors import Error

SECRETS = {"pw": b"pw", "other": b"other"}


def resolve(secret_id: str) -> KeyBuffer:
    if secret_id not in SECRETS:
        raise Error(f"No secret with id '{secret_id}'")
    return KeyMemory().copy_of(SECRETS[secret_id])


@pytest_asyncio.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph(DRIVERS, secrets=resolve)
    yield graph
    await graph.close()
