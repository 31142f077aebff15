"""All handlers in one table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from qmpd.commands import (
    block_core,
    block_export,
    char,
    control,
    introspect,
    job,
    machine,
    misc,
    qdev,
    qom,
    transaction,
)
from qmpd.commands.parts import Parts

_MODULES: Final = (
    block_core,
    block_export,
    char,
    control,
    introspect,
    job,
    machine,
    misc,
    qdev,
    qom,
    transaction,
)

#: What is cancelled when the client that wants it goes away: it may have a key derived, which takes long,
#: and undoes all of itself.
GIVEN_UP: Final = frozenset({"blockdev-add"})


def handlers(parts: Parts) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """The handlers by command name, each bound to the parts of this daemon.

    :raise ValueError: if a command has two.
    """
    table: dict[str, Callable[[dict[str, Any]], Any]] = {}
    for module in _MODULES:
        for name, handler in module.HANDLERS.items():
            if name in table:
                raise ValueError(f"command with two handlers: {name}")
            table[name] = partial(handler, parts)
    return table
