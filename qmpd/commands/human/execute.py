"""What happens to a line: which command it names, what that takes, and the help."""

from __future__ import annotations

from typing import Final

from qmpd.commands.human.actions import ACTIONS
from qmpd.commands.human.command import Command, find
from qmpd.commands.human.info import INFO
from qmpd.commands.human.line import Complaint, Rest, is_blank, name, values, words
from qmpd.commands.human.qmp import Qmp
from qmpd.commands.parts import Parts
from qmpd.descriptors import ClientDescriptors
from qmpd.errors import Error


async def execute(parts: Parts, client: ClientDescriptors, line: str) -> str:
    """Execute a line of the text monitor.

    :param client: the descriptors that whoever typed the line has passed.
    :return: what it has to say; "" for nothing.
    """
    return (await _execute(Qmp(parts, client), line)).replace("\n", "\r\n")


async def _execute(qmp: Qmp, line: str) -> str:
    if is_blank(line):
        return ""
    called, after, rest = name(line)
    command = find(qmp, COMMANDS, called)
    if command is _INFO and rest:
        called, after, rest = name(after)
        command = find(qmp, INFO, called)
    if command is None:
        return f"unknown command: '{line.removesuffix(after)}'\n"
    try:
        return await command.run(qmp, *values(command.names, command.parameters, rest))
    except Complaint as complaint:
        return f'{complaint.text}Try "help {line.removesuffix(after)}" for more information\n'
    except Error as error:
        return "Error: " + "".join(f"{each}\n" for each in error.lines)


async def _help(qmp: Qmp, text: str | None) -> str:
    try:
        wanted = words(text or "")
    except ValueError:
        return ""
    if not wanted:
        return _usages(qmp, COMMANDS)
    command = find(qmp, COMMANDS, wanted[0])
    if command is _INFO:
        if len(wanted) == 1:
            return await _info(qmp)
        command = find(qmp, INFO, wanted[1])
        return f"unknown command: 'info {wanted[1]}'\n" if command is None else command.usage("info ")
    return f"unknown command: '{wanted[0]}'\n" if command is None else command.usage()


async def _info(qmp: Qmp) -> str:
    return _usages(qmp, INFO, "info ")


def _usages(qmp: Qmp, table: tuple[Command, ...], prefix: str = "") -> str:
    return "".join(command.usage(prefix) for command in table if command.is_here(qmp))


_INFO: Final = Command("info", "[what]", "tell something; alone: what there is to ask for", _info)

#: All commands; what `info` takes is in a table of its own.
COMMANDS: Final = (
    Command("help|?", "[command]", "what there is, or what a command takes", _help, (Rest(optional=True),)),
    _INFO,
    *ACTIONS,
)
