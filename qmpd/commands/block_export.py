"""Commands of `schema/block-export.json`: the NBD server and exports."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts
from qmpd.descriptors import ClientDescriptors
from qmpd.errors import Error

#: In QEMU's words, where "QEMU" is the program with a machine in it.
_NO_DESCRIPTORS: Final = "only QEMU supports file descriptor passing"


async def nbd_server_start(
    parts: Parts, arguments: dict[str, Any], client: ClientDescriptors
) -> dict[str, Any]:
    """Start the NBD server for a client."""
    if arguments["addr"]["type"] != "fd":
        return await start_nbd_server(parts, arguments)
    if parts.exports.nbd_server:
        raise Error("NBD server already running")
    # The daemon's own descriptors are none of a client's business: it names one that was passed.
    name = arguments["addr"]["data"]["str"]
    if not parts.is_system and name not in client.named:
        raise Error(_NO_DESCRIPTORS)
    descriptor = client.named.take(name)
    try:
        passed = {"type": "fd", "str": name, "descriptor": descriptor}
        return await start_nbd_server(parts, {**arguments, "addr": passed})
    finally:
        os.close(descriptor)


async def start_nbd_server(parts: Parts, options: dict[str, Any]) -> dict[str, Any]:
    """Start the NBD server; `addr` is a SocketAddressLegacy or a SocketAddress."""
    tls_creds, tls_authz = options.get("tls-creds"), options.get("tls-authz")
    # Members that are absent leave the defaults to the server.
    limits = {
        name.replace("-", "_"): options[name]
        for name in ("max-connections", "handshake-max-seconds")
        if name in options
    }
    credentials = None
    if tls_creds is not None:
        credentials = partial(parts.objects.tls_server_context, tls_creds, tls_authz)
    await parts.exports.start_nbd_server(options["addr"], credentials=credentials, **limits)
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
