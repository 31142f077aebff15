"""All handlers in one table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Final

from qmpd.commands import (
    absent,
    block_core,
    block_export,
    char,
    control,
    emulator,
    fds,
    introspect,
    job,
    luks,
    machine,
    migration,
    misc,
    qdev,
    qom,
    run_state,
    throttling,
    transaction,
)
from qmpd.commands.parts import Handler, Parts

_MODULES: Final = (
    block_core,
    block_export,
    char,
    control,
    fds,
    introspect,
    job,
    luks,
    machine,
    misc,
    qdev,
    qom,
    transaction,
)

#: Of the program that stands for an emulator.
_SYSTEM_MODULES: Final = (absent, emulator, migration, run_state, throttling)

#: What is cancelled when the client that wants it goes away: it may have a key derived, which takes long,
#: and undoes all of itself.
GIVEN_UP: Final = frozenset({"blockdev-add"})


def handlers(parts: Parts) -> dict[str, Callable[..., Any]]:
    """The handlers by command name, each bound to the parts of this daemon.

    :raise ValueError: if a command has two.
    """
    table: dict[str, Callable[..., Any]] = {}
    for module in _modules(parts):
        for name, handler in module.HANDLERS.items():
            if name in table:
                raise ValueError(f"command with two handlers: {name}")
            table[name] = partial(handler, parts)
    return table


def handler_of(parts: Parts, name: str) -> Handler:
    """The handler of one command that this daemon has, not bound to the parts."""
    found: Handler = next(module.HANDLERS[name] for module in _modules(parts) if name in module.HANDLERS)
    return found


def _modules(parts: Parts) -> tuple[ModuleType, ...]:
    return _MODULES + _SYSTEM_MODULES if parts.is_system else _MODULES
