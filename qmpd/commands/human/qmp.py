"""The way from a text command to the QMP command that does the work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from qmpd.commands import (
    absent,
    block_core,
    block_export,
    char,
    control,
    emulator,
    fds,
    machine,
    qdev,
    qom,
    run_state,
)
from qmpd.commands.parts import Handler, Parts

_MODULES: Final = (
    absent,
    block_core,
    block_export,
    char,
    control,
    emulator,
    fds,
    machine,
    qdev,
    qom,
    run_state,
)

_HANDLERS: Final[Mapping[str, Handler]] = {
    name: handler for module in _MODULES for name, handler in module.HANDLERS.items()
}


def has(parts: Parts, name: str) -> bool:
    """Whether this daemon has a QMP command."""
    return name in parts.schema.commands


async def call(parts: Parts, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """Execute a QMP command.

    :param arguments: those that are None are left out.
    :return: what the command returns.
    :raise Error: as the command does.
    """
    given = {key: value for key, value in (arguments or {}).items() if value is not None}
    parts.schema.commands[name].validate(given)
    result = _HANDLERS[name](parts, given)
    return await result if inspect.isawaitable(result) else result
