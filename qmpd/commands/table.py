"""All handlers in one table, checked against the schema."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from qmpd.commands import block_core, char, control, introspect, job, machine, misc, qdev, qom
from qmpd.commands.parts import Handler, Parts
from qmpd.qapi import Schema

_MODULES: Final = (block_core, char, control, introspect, job, machine, misc, qdev, qom)

#: The session answers these itself: they change its own state.
_OF_THE_SESSION: Final = frozenset({"qmp_capabilities"})


def check(schema: Schema, handlers: dict[str, Handler]) -> None:
    """See that every command has exactly one handler, and every handler a command.

    :raise RuntimeError: names those that have not.
    """
    commands = set(schema.commands) - _OF_THE_SESSION
    if missing := sorted(commands - set(handlers)):
        raise RuntimeError(f"commands without a handler: {', '.join(missing)}")
    if surplus := sorted(set(handlers) - commands):
        raise RuntimeError(f"handlers without a command: {', '.join(surplus)}")


def build(parts: Parts) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """The handlers by command name, each bound to the parts of this daemon.

    :raise RuntimeError: if they and the schema's commands are not one to one.
    """
    handlers: dict[str, Handler] = {}
    for module in _MODULES:
        if twice := sorted(handlers.keys() & module.HANDLERS.keys()):
            raise RuntimeError(f"commands with two handlers: {', '.join(twice)}")
        handlers.update(module.HANDLERS)
    check(parts.schema, handlers)
    return {name: partial(handler, parts) for name, handler in handlers.items()}
