"""Commands of `schema/run-state.json`: a machine runs, stops and is switched off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands.parts import Handler, Parts


def query_status(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """The run state."""
    return parts.machine.status()


def stop(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Stop the machine."""
    parts.machine.stop()
    return {}


def cont(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Let the machine go on."""
    parts.machine.cont()
    return {}


def system_powerdown(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Press the power button."""
    parts.machine.power_down()
    return {}


def set_action(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Say what is done when something happens."""
    parts.machine.set_actions(arguments)
    return {}


def watchdog_set_action(parts: Parts, arguments: dict[str, Any]) -> dict[str, Any]:
    """Say what is done when a watchdog bites."""
    parts.machine.set_actions({"watchdog": arguments["action"]})
    return {}


HANDLERS: Final[Mapping[str, Handler]] = {
    "query-status": query_status,
    "stop": stop,
    "cont": cont,
    "system_powerdown": system_powerdown,
    "set-action": set_action,
    "watchdog-set-action": watchdog_set_action,
}
