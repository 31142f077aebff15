"""A tiny schema and clients, so that the monitor is tested without the rest of the house."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from qmpd.errors import Error
from qmpd.monitor.dispatch import Dispatcher, Handler
from qmpd.monitor.server import Monitor

VERSION = {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}


@dataclass
class FakeCommand:
    members: frozenset[str] = frozenset()
    allow_oob: bool = False
    success_response: bool = True
    returns_number: bool = False

    def validate(self, arguments: dict[str, Any], /) -> None:
        for member in arguments:
            if member not in self.members:
                raise Error(f"Parameter '{member}' is unexpected")


@dataclass
class FakeSchema:
    commands: Mapping[str, FakeCommand] = field(default_factory=dict)


def fake_dispatcher(handlers: Mapping[str, Handler], **commands: FakeCommand) -> Dispatcher:
    """A dispatcher for these handlers; commands whose entry matters are given with _ for -.

    The command `vain` is given up when its client goes, and `claim` is told of the client's descriptors.
    """
    entries = {name: FakeCommand(frozenset({"value"})) for name in handlers}
    entries |= {name.replace("_", "-"): command for name, command in commands.items()}
    entries["qmp_capabilities"] = FakeCommand(frozenset({"enable"}))
    return Dispatcher(FakeSchema(entries), handlers, {"vain"}, {"claim"})


class Client:
    """A client that reads and writes lines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def receive(self) -> Any:
        line = await asyncio.wait_for(self.reader.readline(), 30)
        return json.loads(line) if line else None

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def ask(self, name: str, **request: Any) -> Any:
        self.send(json.dumps({"execute": name, **request}).encode() + b"\n")
        return await self.receive()

    async def negotiate(self, *enable: str) -> None:
        assert "QMP" in await self.receive()
        assert await self.ask("qmp_capabilities", arguments={"enable": list(enable)}) == {"return": {}}


class Served:
    """A monitor on a UNIX socket."""

    def __init__(self, monitor: Monitor, path: str) -> None:
        self.monitor = monitor
        self.path = path
        self.clients: list[Client] = []

    async def connect(self, *enable: str, negotiate: bool = True) -> Client:
        client = Client(*await asyncio.open_unix_connection(self.path, limit=1 << 26))
        self.clients.append(client)
        if negotiate:
            await client.negotiate(*enable)
        return client


@pytest.fixture
async def serve(tmp_path):
    """Function that makes a monitor of handlers and serves it."""
    closing = []

    async def start(
        handlers: Mapping[str, Handler], *, options: Any = None, **commands: FakeCommand
    ) -> Served:
        monitor = Monitor(fake_dispatcher(handlers, **commands), VERSION, **(options or {}))
        path = str(tmp_path / f"monitor{len(closing)}")
        server = await asyncio.get_running_loop().create_unix_server(monitor.connection, path, backlog=1000)
        served = Served(monitor, path)
        closing.append((server, served))
        return served

    yield start
    for server, served in closing:
        server.close()
        for client in served.clients:
            client.writer.close()
        await served.monitor.close()


@pytest.fixture
def dispatcher():
    """Function that makes a dispatcher of handlers."""
    return fake_dispatcher


@pytest.fixture
def command():
    """The class of a command's entry in the fake schema."""
    return FakeCommand
