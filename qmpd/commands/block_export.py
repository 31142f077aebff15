"""Commands of `schema/block-export.json`: the NBD server and exports."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts


async def nbd_server_start(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Start the NBD server; `addr` is a SocketAddressLegacy or a SocketAddress."""
    credentials, authorization = arguments.get("tls-creds"), arguments.get("tls-authz")
    # Members that are absent leave the defaults to the server.
    limits = {
        name.replace("-", "_"): arguments[name]
        for name in ("max-connections", "handshake-max-seconds")
        if name in arguments
    }
    tls = None if credentials is None else parts.objects.tls_server_context(credentials, authorization)
    await parts.exports.start_nbd_server(arguments["addr"], tls=tls, **limits)
    parts.hotplug.open_doors()
    return {}


async def nbd_server_stop(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Stop the NBD server."""
    await parts.exports.stop_nbd_server()
    return {}


def nbd_server_add(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make an export in the old way: the id is the name, and a read-only node is exported read-only."""
    device = arguments["device"]
    node = parts.graph.lookup(device, device)
    name = arguments.get("name", device)
    options = {
        "type": "nbd",
        "id": name,
        "node-name": node.name,
        "name": name,
        "writable": arguments.get("writable", False) and not node.read_only,
        "bitmaps": [arguments["bitmap"]] if "bitmap" in arguments else [],
    }
    if "description" in arguments:
        options["description"] = arguments["description"]
    parts.exports.add(options)
    return {}


def block_export_add(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make an export."""
    if "iothread" in arguments:
        parts.objects.check_iothread(arguments["iothread"])
    parts.exports.add(arguments)
    return {}


async def block_export_del(member: str, parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove an export.

    :param member: the argument that holds its id.
    """
    await parts.exports.remove(arguments[member], arguments.get("mode", "safe"))
    return {}


def query_block_exports(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """All exports, newest first."""
    return parts.exports.query()


HANDLERS: Final[Mapping[str, Handler]] = {
    "nbd-server-start": nbd_server_start,
    "nbd-server-stop": nbd_server_stop,
    "nbd-server-add": nbd_server_add,
    "nbd-server-remove": partial(block_export_del, "name"),
    "block-export-add": block_export_add,
    "block-export-del": partial(block_export_del, "id"),
    "query-block-exports": query_block_exports,
}
