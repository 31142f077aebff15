"""Commands of `schema/fds.json`: descriptors that clients pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts
from qmpd.descriptors import ClientDescriptors


def getfd(parts: Parts, arguments: dict[str, Any], client: ClientDescriptors) -> dict[str, Any]:
    """Give a passed descriptor a name."""
    client.named.add(arguments["fdname"], client.passed.claim())
    return {}


def closefd(parts: Parts, arguments: dict[str, Any], client: ClientDescriptors) -> dict[str, Any]:
    """Close a descriptor that has a name."""
    client.named.remove(arguments["fdname"])
    return {}


def add_fd(parts: Parts, arguments: dict[str, Any], client: ClientDescriptors) -> Mapping[str, int]:
    """Put a passed descriptor into a set."""
    return parts.fdsets.add(client.passed.claim(), arguments.get("fdset-id"), arguments.get("opaque"))


def remove_fd(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Take descriptors out of a set."""
    parts.fdsets.remove(arguments["fdset-id"], arguments.get("fd"))
    return {}


def query_fdsets(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """What is in all the sets."""
    return parts.fdsets.query()


HANDLERS: Final[Mapping[str, Handler]] = {
    "getfd": getfd,
    "closefd": closefd,
    "add-fd": add_fd,
    "remove-fd": remove_fd,
    "query-fdsets": query_fdsets,
}
