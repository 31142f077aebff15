"""Exports of a graph, without a daemon around them, for tests with real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nbd_wire import Wire

from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.crypto.memory import KeyBuffer, KeyMemory
from qmpd.errors import Error
from qmpd.export.exports import Exports

T = TypeVar("T")

SIZE = 1 << 20


def resolve(secret_id: str) -> KeyBuffer:
    if secret_id != "pw":
        raise Error(f"No secret with id '{secret_id}'")
    return KeyMemory().copy_of(b"pw")


class Served:
    """A graph, its exports on a UNIX socket, and blocking clients in threads.

    Nodes: ``f`` and ``ro`` (the file `image`, of :data:`SIZE` zero bytes), ``n`` (null-co, 64 MiB).
    """

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "nbd.sock"
        self.image = directory / "image"
        self.image.write_bytes(bytes(SIZE))
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.graph = Graph(DRIVERS, secrets=resolve)
        self.exports = Exports(self.graph, lambda name, data: self.events.append((name, data)))
        self.address = {"type": "unix", "data": {"path": str(self.socket)}}

    async def start(self, **options: Any) -> None:
        await self.exports.start_nbd_server(self.address, **options)
        for node in (
            {"node-name": "f", "driver": "file", "filename": str(self.image), "discard": "unmap"},
            {"node-name": "ro", "driver": "file", "filename": str(self.image), "read-only": True},
            {"node-name": "n", "driver": "null-co", "size": 64 << 20},
        ):
            if self.graph.find(node["node-name"]) is None:
                await self.graph.add(node)
        self.add("e-f", "f", writable=True)
        self.add("e-ro", "ro")
        self.add("e-n", "n", writable=True)

    def add(self, export_id: str, node_name: str, **options: Any) -> None:
        named = {name.replace("_", "-"): value for name, value in options.items()}
        self.exports.add({"type": "nbd", "id": export_id, "node-name": node_name, **named})

    async def run(self, client: Callable[[], T]) -> T:
        """Let a blocking client run beside the server."""
        return await asyncio.to_thread(client)

    def wire(self, flags: int | None = 3) -> Wire:
        return Wire(self.socket, flags)

    def taken(self, name: str = "f", **negotiated: bool) -> Wire:
        """A client that has taken up an export."""
        wire = self.wire()
        wire.negotiate(**negotiated)
        wire.go(name)
        return wire
