"""The command line as ``getopt_long`` reads it, in qemu-storage-daemon's spelling.

:func:`scan` cuts the arguments into options: abbreviations, ``--key value``
and ``--key=value``, glibc's words for what is wrong.  What a value means is
read elsewhere: by the schema, or by :mod:`qmpd.cli.chardev_options`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from qmpd.errors import Error


class OptionError(Error):
    """An argument that is no option of ours, or an option without its value."""


class Nameless(Error):
    """What is wrong with an option of an emulator is only seen when QEMU no longer knows the option."""


class Answered(Exception):
    """An option was a question, and this is the answer; the program ends well."""


@dataclass(frozen=True)
class Option:
    """One option, or an argument that belongs to none (its name is then empty).

    :param name: the full name, without dashes, however it was abbreviated.
    :param value: its value; empty if it takes none.
    :param text: the arguments it was made of, for messages; None if these are to name none.
    """

    name: str
    value: str
    text: str | None


#: Where the passphrase of a secret begins, in either spelling of an option.
_DATA: Final = re.compile(r"""(\bdata["']?\s*[=:])""")
_QUOTED: Final = re.compile(r"'([^']+)'")

#: Options that may hold a passphrase; an emulator's program has a second name for some of them.
_OBJECTS: Final = ("emulator-object", "memory-backend", "object")


@contextmanager
def naming(option: Option) -> Iterator[None]:
    """Put the option in front of what is wrong with it, but no passphrase."""
    try:
        yield
    except Error as error:
        text, desc = option.text, error.desc
        if text is not None and option.name in _OBJECTS:
            text, desc = _without_passphrase(text, desc)
        named = text is not None and not isinstance(error, Nameless)
        raise Error(f"{text}: {desc}" if named else desc, error.hint) from None


def _without_passphrase(text: str, desc: str) -> tuple[str, str]:
    """The text of an ``--object`` and what is wrong with it, less all that may be of a passphrase.

    QEMU repeats both as they are.  A comma that was not doubled makes the rest of
    a passphrase look like further parameters, so nothing after ``data`` is shown,
    and of it the description may quote only names of parameters.
    """
    head, found, tail = [*_DATA.split(text, maxsplit=1), "", ""][:3]
    if not found:
        return text, desc

    def quoted(match: re.Match[str]) -> str:
        word = match[1]
        is_name = re.search(rf"""{re.escape(word)}["']?\s*[=:]""", tail)
        return match[0] if is_name or word not in tail else "'...'"

    return f"{head}{found}...", _QUOTED.sub(quoted, desc)


#: qemu-storage-daemon's options in its order, and whether they take a value.
STORAGE_DAEMON_OPTIONS: Final[Mapping[str, bool]] = {
    "blockdev": True,
    "chardev": True,
    "daemonize": False,
    "export": True,
    "help": False,
    "monitor": True,
    "nbd-server": True,
    "object": True,
    "pidfile": True,
    "trace": True,
    "version": False,
}

#: What qmpd has besides.
OWN_OPTIONS: Final[Mapping[str, bool]] = {
    "cipher-processes": True,
    "device": True,
    "device-exports": True,
    "log": True,
    "loop": True,
    "pbkdf-memory-max": True,
    "qmp": True,
}

ALL_OPTIONS: Final[Mapping[str, bool]] = {**STORAGE_DAEMON_OPTIONS, **OWN_OPTIONS}

SHORT_OPTIONS: Final[Mapping[str, str]] = {"h": "help", "T": "trace", "V": "version"}


def scan(arguments: Sequence[str]) -> Iterator[Option]:
    """Cut the arguments (without the program's name) into options, lazily and in order.

    What follows ``--`` is ignored, as qemu-storage-daemon does.

    :raise OptionError: in glibc's words, when the wrong argument is reached.
    """
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--":
            return
        if argument.startswith("--"):
            yield _long_option(argument, waiting)
        elif argument.startswith("-") and argument != "-":
            yield from _short_options(argument, waiting)
        else:
            yield Option("", argument, argument)


def _long_option(argument: str, waiting: Iterator[str]) -> Option:
    written, equals, value = argument[2:].partition("=")
    name = _full_name(written, argument)
    if not ALL_OPTIONS[name]:
        if equals:
            raise OptionError(f"option '--{name}' doesn't allow an argument")
        return Option(name, "", argument)
    if equals:
        return Option(name, value, argument)
    following = next(waiting, None)
    if following is None:
        raise OptionError(f"option '--{name}' requires an argument")
    return Option(name, following, f"{argument} {following}")


def _full_name(written: str, argument: str) -> str:
    """Complete an abbreviation; what is unique for qemu-storage-daemon stays so beside our own options."""
    if written in ALL_OPTIONS:
        return written
    for names in (STORAGE_DAEMON_OPTIONS, ALL_OPTIONS):
        possible = [name for name in names if name.startswith(written)]
        if len(possible) == 1:
            return possible[0]
        if possible:
            choice = " ".join(f"'--{name}'" for name in possible)
            raise OptionError(f"option '{argument}' is ambiguous; possibilities: {choice}")
    raise OptionError(f"unrecognized option '{argument}'")


def _short_options(argument: str, waiting: Iterator[str]) -> Iterator[Option]:
    """Read a cluster such as ``-hV``; ``-T`` takes the rest of it, or the next argument, as its value."""
    for position, letter in enumerate(argument[1:], start=2):
        name = SHORT_OPTIONS.get(letter)
        if name is None:
            raise OptionError(f"invalid option -- '{letter}'")
        if not ALL_OPTIONS[name]:
            yield Option(name, "", argument)
            continue
        if attached := argument[position:]:
            yield Option(name, attached, argument)
            return
        following = next(waiting, None)
        if following is None:
            raise OptionError(f"option requires an argument -- '{letter}'")
        yield Option(name, following, f"{argument} {following}")
        return
