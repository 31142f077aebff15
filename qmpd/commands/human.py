"""The few commands of the text monitor that qmpd has, for `human-monitor-command`.

A line is words and quoted strings; a command takes options of one letter, then
its parameters.  What it says goes into the reply with CR LF line ends, as
QEMU's monitor writes them.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from qmpd.block.backend import Backend
from qmpd.block.node import Node
from qmpd.block.permissions import Permission
from qmpd.block.qemu_io import QemuIO
from qmpd.commands.parts import Parts
from qmpd.errors import Error

_SPACE: Final = " \t\n\r\v\f"
_ESCAPES: Final[Mapping[str, str]] = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter of a command.

    :param expected: what its absence is complained about as; None if it may be absent.
    """

    expected: str | None


@dataclass(frozen=True, slots=True)
class _Command:
    """A command of the text monitor."""

    name: str
    options: str
    parameters: tuple[_Parameter, ...]
    usage: str
    run: Callable[[Parts, frozenset[str], list[str]], Awaitable[str]]


class _Complaint(Exception):
    """A line that does not fit its command."""


async def execute(parts: Parts, line: str) -> str:
    """Execute a line; returns what it has to say."""
    name, rest = _word(line)
    if not name:
        return ""
    table = _COMMANDS
    full_name = name
    if name == "info":
        sub, after = _word(rest)
        if not sub:
            return _crlf("".join(f"{command.usage}\n" for command in _INFO.values()))
        full_name, name, rest, table = f"info {sub}", sub, after, _INFO
    command = table.get(name)
    if command is None:
        return f"unknown command: '{full_name}'\r\n"
    try:
        options, words = _arguments(command, rest)
    except _Complaint as complaint:
        return _crlf(f'{command.name}: {complaint}\nTry "help {full_name}" for more information\n')
    return _crlf(await command.run(parts, options, words))


def _crlf(text: str) -> str:
    return text.replace("\n", "\r\n")


# -- reading a line


def _word(text: str) -> tuple[str, str]:
    """The first word, and the rest."""
    text = text.lstrip(_SPACE)
    end = next((index for index, each in enumerate(text) if each in _SPACE), len(text))
    return text[:end], text[end:]


def _string(text: str) -> tuple[str, str]:
    """The first word or quoted string, and the rest.

    :raise ValueError: if the quotes do not end, or there is a wrong escape in them.
    """
    text = text.lstrip(_SPACE)
    if not text.startswith('"'):
        return _word(text)
    value = ""
    index = 1
    while index < len(text) and text[index] != '"':
        if text[index] == "\\":
            index += 1
            if text[index : index + 1] not in _ESCAPES or index >= len(text):
                raise ValueError("wrong escape")
            value += _ESCAPES[text[index]]
        else:
            value += text[index]
        index += 1
    if index >= len(text):
        raise ValueError("no end")
    return value, text[index + 1 :]


def _arguments(command: _Command, text: str) -> tuple[frozenset[str], list[str]]:
    options = set[str]()
    while command.options and (text := text.lstrip(_SPACE)).startswith("-"):
        option, rest = _word(text)
        if len(option) != 2 or option[1] not in command.options:
            raise _Complaint(f"unsupported option {option[:2]}")
        options.add(option)
        text = rest
    words: list[str] = []
    for parameter in command.parameters:
        if not text.strip(_SPACE):
            if parameter.expected is not None:
                raise _Complaint(f"{parameter.expected} expected")
            break
        try:
            word, text = _string(text)
        except ValueError:
            raise _Complaint(f"{parameter.expected or 'string'} expected") from None
        words.append(word)
    if text.strip(_SPACE):
        raise _Complaint("extraneous characters at the end of line")
    return frozenset(options), words


# -- the commands


async def _qemu_io(parts: Parts, options: frozenset[str], words: list[str]) -> str:
    name, line = words
    try:
        if "-d" in options:
            return await _on(parts, parts.devices.backend(name), line)
        if parts.graph.find(name) is None and (disk := parts.devices.disk(name)) is not None:
            # Not in QEMU: the plain id of a device means its disk.
            return await _on(parts, disk, line)
        node = parts.graph.lookup(None, name)
    except Error as error:
        return f"Error: {error.desc}\n"
    with Backend(parts.graph, perm=Permission.nothing()).use(node) as backend:
        return await _on(parts, backend, line)


async def _on(parts: Parts, backend: Backend, line: str) -> str:
    try:
        await QemuIO(backend, parts.stdout, sys.stderr).execute(line)
    except Error as error:
        return "".join(f"{line}\n" for line in error.lines)
    return ""


async def _help(parts: Parts, options: frozenset[str], words: list[str]) -> str:
    if not words:
        return "".join(f"{command.usage}\n" for command in _COMMANDS.values())
    command = _COMMANDS.get(words[0])
    return f"{command.usage}\n" if command else f"unknown command: '{words[0]}'\n"


async def _info_block(parts: Parts, options: frozenset[str], words: list[str]) -> str:
    """All disks, or the nodes; with a name, one of the nodes."""
    if words:
        node = parts.graph.find(words[0])
        return "" if node is None else _describe(node, None)
    if "-n" in options:
        return "\n".join(_describe(node, None) for node in parts.graph.nodes())
    return "\n".join(_describe(disk.node, disk.qdev) for disk in parts.graph.disks())


def _describe(node: Node, attached_to: str | None) -> str:
    traits = [node.driver]
    traits += ["read-only"] if node.read_only else []
    traits += ["encrypted"] if node.encrypted else []
    cache = "writeback"
    cache += ", direct" if node.node_options.direct else ""
    cache += ", ignore flushes" if node.node_options.no_flush else ""
    lines = [f"{node.name}: {node.filename} ({', '.join(traits)})"]
    if attached_to is not None:
        lines.append(f"    Attached to:      {attached_to}")
    lines.append(f"    Cache mode:       {cache}")
    if node.node_options.detect_zeroes != "off":
        lines.append(f"    Detect zeroes:    {node.node_options.detect_zeroes}")
    return "".join(f"{line}\n" for line in lines)


async def _info_block_jobs(parts: Parts, options: frozenset[str], words: list[str]) -> str:
    """Jobs that belong to a node: there are none yet."""
    return "No active jobs\n"


async def _info_version(parts: Parts, options: frozenset[str], words: list[str]) -> str:
    number = parts.version["qemu"]
    return f"{number['major']}.{number['minor']}.{number['micro']}{parts.version['package']}\n"


_ANY: Final = _Parameter(None)

_COMMANDS: Final[Mapping[str, _Command]] = {
    "help": _Command("help", "", (_ANY,), "help [command] -- say what there is", _help),
    "?": _Command("?", "", (_ANY,), "? [command] -- the same as help", _help),
    "qemu-io": _Command(
        "qemu-io",
        "d",
        (_Parameter("block device name"), _Parameter("string")),
        'qemu-io [-d] node "command" -- move data of a node; with -d, of a device by its id',
        _qemu_io,
    ),
}

_INFO: Final[Mapping[str, _Command]] = {
    "block": _Command(
        "block", "nv", (_ANY,), "info block [-n] [node] -- disks, or nodes with -n", _info_block
    ),
    "block-jobs": _Command("block-jobs", "", (), "info block-jobs -- jobs of nodes", _info_block_jobs),
    "version": _Command("version", "", (), "info version -- the version", _info_version),
}
