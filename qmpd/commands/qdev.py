"""Commands of `schema/qdev.json`: devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts


def device_add(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Plug a device in."""
    parts.hotplug.add(arguments)
    return {}


async def device_del(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Unplug a device."""
    await parts.hotplug.delete(arguments["id"])
    return {}


HANDLERS: Final[Mapping[str, Handler]] = {
    "device_add": device_add,
    "device_del": device_del,
}
