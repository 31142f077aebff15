"""Commands of `schema/machine.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts


def system_reset(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Start the machine over."""
    (parts.system or parts.devices).reset()
    return {}


HANDLERS: Final[Mapping[str, Handler]] = {
    "system_reset": system_reset,
}
