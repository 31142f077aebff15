"""The block exports of a daemon: which nodes are to be had from outside, by which way.

An export attaches a backend of its own to its node, so that the graph knows
about it: it reads consistently, writes if it is writable, and lets others do
anything but resize the node.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qmpd.block.backend import Backend
from qmpd.block.graph import Graph
from qmpd.block.permissions import Permission
from qmpd.errors import Error
from qmpd.export.nbd import wire
from qmpd.export.nbd.export import NBDExport

if TYPE_CHECKING:
    import ssl

    from qmpd.export.nbd.server import NBDServer

#: Sends an event to every negotiated client.
Emit = Callable[[str, dict[str, Any]], None]

#: Seconds for a client's handshake, and clients at once, where nothing else is said.
HANDSHAKE_SECONDS: Final = 10
MAX_CONNECTIONS: Final = 100

_WELL_FORMED: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_NOT_RUNNING: Final = "NBD server not running"


@dataclass
class _Export:
    """One entry of `query-block-exports`."""

    id: str
    nbd: NBDExport
    shutting_down: bool = False


class Exports:
    """All block exports, and the NBD server.

    :param emit: is told of BLOCK_EXPORT_DELETED.
    """

    def __init__(self, graph: Graph, emit: Emit) -> None:
        self._graph = graph
        self._emit = emit
        #: By id, oldest first.
        self._all: dict[str, _Export] = {}
        self._server: NBDServer | None = None

    # -- the NBD server

    async def start_nbd_server(
        self,
        addr: Mapping[str, Any],
        *,
        max_connections: int = MAX_CONNECTIONS,
        handshake_max_seconds: float = HANDSHAKE_SECONDS,
        credentials: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        """Listen for NBD clients.

        :param addr: SocketAddressLegacy or SocketAddress, validated.
        :param max_connections: how many clients are served at once; 0 for any number.
        :param handshake_max_seconds: what a client has for its handshake; 0 for ever.
        :param credentials: gives what TLS needs, which clients have to start then.  It is asked when the
            server listens already, so that of two mistakes a client is told of the one that QEMU tells of.
        :raise Error: if there is a server already, it can't listen there, or has no credentials.
        """
        if self._server is not None:
            raise Error("NBD server already running")
        # It takes a while, and not every daemon needs it.
        server_class = await self._graph.in_io_thread(_nbd_server_class)
        if self._server is not None:
            raise Error("NBD server already running")
        server = server_class(max_connections=max_connections, handshake_seconds=handshake_max_seconds)
        # Taken at once, so that of two commands at the same time one is refused.
        self._server = server
        try:
            await server.listen(addr)
            if credentials is not None:
                # Nobody has come in yet: there was no waiting since.
                server.tls = credentials()
        except BaseException:
            self._server = None
            await server.close()
            raise

    async def stop_nbd_server(self, *, keep_file: bool = False) -> None:
        """Remove all NBD exports, newest first, then part from all clients.

        :param keep_file: leave a UNIX socket's file behind.
        :raise Error: if there is no server.
        """
        server = self._server
        if server is None:
            raise Error(_NOT_RUNNING)
        for export in reversed(list(self._all.values())):
            await self._remove(export)
        if self._server is server:
            self._server = None
        await server.close(keep_file=keep_file)

    @property
    def nbd_server(self) -> NBDServer | None:
        """The server, if there is one."""
        return self._server

    # -- exports

    def add(self, options: Mapping[str, Any]) -> None:
        """Export a node as `block-export-add` does.

        :param options: BlockExportOptions of the type nbd, validated, in QAPI's names.
        :raise Error: in QEMU's words; then nothing has changed.
        """
        export_id, node_name = options["id"], options["node-name"]
        if not _WELL_FORMED.fullmatch(export_id):
            raise Error("Invalid block export id")
        if export_id in self._all:
            raise Error(f"Block export id '{export_id}' is already in use")
        node = self._graph.lookup(None, node_name)
        writable = options.get("writable", False)
        if writable and node.read_only:
            raise Error("Cannot export read-only node as writable")
        server = self._server
        if server is None:
            raise Error(_NOT_RUNNING)
        name = options.get("name", node_name)
        description = options.get("description")
        for text, what in ((name, "export name"), (description or "", "description")):
            if len(text.encode(errors="surrogateescape")) > wire.MAX_STRING:
                raise Error(f"{what} '{text}' too long")
        if name in server.exports:
            raise Error(f"NBD server already has export named '{name}'")
        for bitmap in options.get("bitmaps", ()):
            raise Error(f"Bitmap '{bitmap if isinstance(bitmap, str) else bitmap['name']}' is not found")
        perm = Permission.CONSISTENT_READ | (Permission.WRITE if writable else Permission.nothing())
        backend = Backend(self._graph, perm=perm)
        backend.attach(node)
        try:
            # Whoever does not let us in is complained of before who would change the size.
            backend.set_permissions(perm, Permission.everything() & ~Permission.RESIZE)
        except BaseException:
            backend.detach()
            raise
        nbd = NBDExport(
            name,
            backend,
            description=description,
            writable=writable,
            writethrough=options.get("writethrough", False),
            allocation_depth=options.get("allocation-depth", False),
        )
        server.exports[name] = nbd
        self._all[export_id] = _Export(export_id, nbd)

    async def remove(self, export_id: str, mode: str = "safe") -> None:
        """Take an export away, as `block-export-del` does.  Its begun requests are finished first.

        :param mode: "safe" refuses if a client is connected, "hard" disconnects it.
        :raise Error: if there is none with this id, or it is in use.
        """
        export = self._all.get(export_id)
        if export is None:
            raise Error(f"Export '{export_id}' is not found")
        if export.shutting_down:
            raise Error(f"Export '{export_id}' is already shutting down")
        if mode == "safe" and export.nbd.connections:
            raise Error(f"export '{export_id}' still in use")
        await self._remove(export)

    async def _remove(self, export: _Export) -> None:
        if export.shutting_down:
            return
        export.shutting_down = True
        server = self._server
        if server is not None and server.exports.get(export.nbd.name) is export.nbd:
            del server.exports[export.nbd.name]
        await export.nbd.disconnect()
        backend = export.nbd.backend
        async with self._graph.drained(backend.node):
            backend.detach()
        del self._all[export.id]
        await self._graph.departed()
        self._emit("BLOCK_EXPORT_DELETED", {"id": export.id})

    def query(self) -> list[dict[str, Any]]:
        """What `query-block-exports` returns, newest first."""
        return [
            {
                "node-name": export.nbd.backend.node.name,
                "shutting-down": export.shutting_down,
                "type": "nbd",
                "id": export.id,
            }
            for export in reversed(self._all.values())
        ]

    async def close(self) -> None:
        """Remove all exports, and the server if there is one; its socket's file stays, as QEMU leaves it."""
        if self._server is not None:
            await self.stop_nbd_server(keep_file=True)


def _nbd_server_class() -> type[NBDServer]:
    from qmpd.export.nbd.server import NBDServer

    return NBDServer
