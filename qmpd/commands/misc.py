"""Commands of `schema/misc.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts
from qmpd.descriptors import ClientDescriptors


async def human_monitor_command(parts: Parts, arguments: dict[str, Any], client: ClientDescriptors) -> str:
    """Execute a line of the text monitor."""
    # It is of use to few clients, and takes a while to import.
    from qmpd.commands import human

    return await human.execute(parts, client, arguments["command-line"])


HANDLERS: Final[Mapping[str, Handler]] = {
    "human-monitor-command": human_monitor_command,
}
