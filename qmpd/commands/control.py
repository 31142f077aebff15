"""Commands of `schema/control.json`: the monitor itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts


def query_version(parts: Parts, arguments: dict[str, Any]) -> Mapping[str, Any]:
    """The version of QEMU whose behaviour this is, and ours as the package."""
    return parts.version


def query_commands(parts: Parts, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The names of all commands."""
    return [{"name": name} for name in parts.schema.commands]


async def quit_daemon(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """End the daemon."""
    await parts.quit()
    return {}


HANDLERS: Final[Mapping[str, Handler]] = {
    "query-version": query_version,
    "query-commands": query_commands,
    "quit": quit_daemon,
}
