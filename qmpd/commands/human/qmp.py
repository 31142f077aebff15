"""The way from a text command to the QMP commands that do the work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmpd.commands import table
from qmpd.commands.parts import WITH_DESCRIPTORS, Parts
from qmpd.descriptors import ClientDescriptors


@dataclass(frozen=True)
class Qmp:
    """The QMP commands, as they are for the client that has typed a line.

    :param parts: the daemon's.
    :param client: the descriptors that the client has passed.
    """

    parts: Parts
    client: ClientDescriptors

    def has(self, name: str) -> bool:
        """Whether this daemon has a command."""
        return name in self.parts.schema.commands

    async def call(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Execute a command.

        :param arguments: those that are None are left out.
        :return: what it returns.
        :raise Error: as it does.
        """
        given = {key: value for key, value in (arguments or {}).items() if value is not None}
        self.parts.schema.commands[name].validate(given)
        client = (self.client,) if name in WITH_DESCRIPTORS else ()
        result = table.handler_of(self.parts, name)(self.parts, given, *client)
        return await result if inspect.isawaitable(result) else result
