"""What a text command is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from qmpd.commands.human.line import Parameter
from qmpd.commands.human.qmp import Qmp


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the text monitor.

    :param names: what it is called, separated by ``|``.
    :param takes: what it takes, as people write it.
    :param does: what it does, in a few words.
    :param run: takes a `Qmp` and a value for each parameter; returns the reply, with plain line ends.
    :param needs: the QMP command without which this one is not there either.
    """

    names: str
    takes: str
    does: str
    run: Callable[..., Awaitable[str]]
    parameters: tuple[Parameter, ...] = ()
    needs: str | None = None

    def is_called(self, name: str) -> bool:
        """Whether this is one of its names."""
        return name in self.names.split("|")

    def is_here(self, qmp: Qmp) -> bool:
        """Whether this daemon has it."""
        return self.needs is None or qmp.has(self.needs)

    def usage(self, prefix: str = "") -> str:
        """The line that helps."""
        return f"{prefix}{self.names} {self.takes} -- {self.does}\n"


def find(qmp: Qmp, table: tuple[Command, ...], name: str) -> Command | None:
    """The command of a table that is called so, if this daemon has it."""
    return next((each for each in table if each.is_called(name) and each.is_here(qmp)), None)
