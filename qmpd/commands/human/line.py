"""A line of the text monitor: words, quoted strings, options of one letter, sizes, and the rest as it is.

A command says what it takes as a row of parameters; each reads its part of the
line and leaves the rest to the next one.  So options come in the order in
which the command has them, and one that comes too late is a word.

Learnt from ``qemu-system-x86_64``'s behaviour and errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qmpd.qapi.keyval import read_size

_SPACE: Final = " \t\n\r\v\f"
#: A command's name ends where something else begins, or at a slash.
_NAME: Final = re.compile(r"[^ \t\n\r\v\f/]*")
_WORD: Final = re.compile(r"[^ \t\n\r\v\f]*")
_ESCAPES: Final[Mapping[str, str]] = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
#: A number with a unit behind it, as far as it goes.
_SIZE: Final = re.compile(r"\s*\+?(?:0[xX][0-9a-fA-F]+|(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[bBkKmMgGtTpPeE]?)")
#: What may stand behind a decimal number only.
_UNITS: Final = tuple(".kKmMgGtTpP")
_SIZE_MAX: Final = (1 << 63) - 1
_NUMBER: Final = re.compile(r"([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_NUMBER_MAX: Final = (1 << 64) - 1
#: Where one of these follows, a number is part of a calculation.
_OPERATORS: Final = tuple("+-*/%&|^")


class Complaint(Exception):
    """A line that does not fit its command.

    :param text: the reply, line ends included.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass(frozen=True, slots=True)
class Flag:
    """An option of one letter: True or False."""

    letter: str


@dataclass(frozen=True, slots=True)
class Word:
    """A word or a quoted string; None if it may be absent and is.

    :param expected: what its absence is complained about as.
    """

    expected: str = "string"
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Rest:
    """The rest of the line, trailing blanks and all; None if it may be absent and is."""

    optional: bool = False


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes; a number without a unit is in MiB."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A word of ``key=value,...``, for :mod:`qmpd.qapi.settings` to read; empty if it is absent."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number, decimal, octal (``010``) or hexadecimal (``0x10``); what QEMU would calculate is refused."""


Parameter = Flag | Word | Rest | Size | Settings | Number
Value = bool | int | str | None


def name(text: str) -> tuple[str, str, str]:
    """The name that a text begins with, what follows it, and that again without the blanks in front."""
    text = text.lstrip(_SPACE)
    match = _NAME.match(text)
    assert match is not None, "a name may be empty"
    after = text[match.end() :]
    return match[0], after, after.lstrip(_SPACE)


def is_blank(text: str) -> bool:
    """Whether there is nothing in it."""
    return not text.strip(_SPACE)


def words(text: str) -> list[str]:
    """The words and quoted strings of a text.

    :raise ValueError: if quotes do not end, or there is a wrong escape in them.
    """
    found = []
    while not is_blank(text):
        word, text = _string(text)
        found.append(word)
    return found


def values(command: str, parameters: Sequence[Parameter], text: str) -> list[Value]:
    """Read what a command takes.

    :param command: its name, for complaints.
    :raise Complaint: if that is not what it takes.
    """
    found: list[Value] = []
    for index, parameter in enumerate(parameters):
        value, text = _value(command, parameter, parameters[index + 1 :], text.lstrip(_SPACE))
        found.append(value)
    if not is_blank(text):
        raise Complaint(f"{command}: extraneous characters at the end of line\n")
    return found


def _value(command: str, parameter: Parameter, later: Sequence[Parameter], text: str) -> tuple[Value, str]:
    match parameter:
        case Flag():
            return _flag(command, parameter, later, text)
        case Word() | Rest() if parameter.optional and not text:
            return None, text
        case Word():
            return _expected(command, parameter.expected, text)
        case Rest():
            return (text or _expected(command, "string", text)[0]), ""
        case Settings() if not text:
            return "", text
        case Settings():
            try:
                return _string(text)
            except ValueError:
                raise Complaint("") from None
        case Size():
            return _size(text)
        case Number():
            return _number(text)


def _flag(command: str, flag: Flag, later: Sequence[Parameter], text: str) -> tuple[bool, str]:
    if not text.startswith("-"):
        return False, text
    letter = text[1:2]
    if letter == flag.letter:
        return True, text[2:]
    if letter and Flag(letter) in later:
        return False, text
    # QEMU's line ends where there is no letter, line end and all.
    raise Complaint(f"{command}: unsupported option -{letter}" + ("\n" if letter else ""))


def _expected(command: str, expected: str, text: str) -> tuple[str, str]:
    try:
        if text:
            return _string(text)
    except ValueError:
        pass
    raise Complaint(f"{command}: {expected} expected\n")


def _size(text: str) -> tuple[int, str]:
    match = _SIZE.match(text)
    size = None
    if match is not None:
        written, rest = match[0], text[match.end() :]
        if "x" in written.lower():
            # Hexadecimal digits have no unit and no fraction.
            size = None if rest[:1] in _UNITS else (read_size(written) or 0) << 20
        else:
            size = read_size(written + ("M" if written[-1] in "0123456789." else ""))
    if match is None or size is None or size > _SIZE_MAX:
        raise Complaint("invalid size\n")
    return size, text[match.end() :]


def _number(text: str) -> tuple[int, str]:
    match = _NUMBER.match(text)
    if match is None:
        wrong = text.removeprefix("-").removeprefix("+")[:1]
        what = f"invalid char '{wrong}' in" if wrong else "unexpected end of"
        raise Complaint(f"{what} expression\n")
    sign, digits = match.groups()
    base = 16 if digits[1:2] in ("x", "X") else 8 if digits.startswith("0") else 10
    number = int(digits, base)
    if number > _NUMBER_MAX:
        raise Complaint("number too large\n")
    rest = text[match.end() :]
    if rest.lstrip(_SPACE).startswith(_OPERATORS):
        raise Complaint("numbers are not calculated here\n")
    return -number if sign == "-" else number, rest


def _string(text: str) -> tuple[str, str]:
    """The first word or quoted string, and the rest.

    :raise ValueError: if the quotes do not end, or there is a wrong escape in them.
    """
    text = text.lstrip(_SPACE)
    if not text.startswith('"'):
        match = _WORD.match(text)
        assert match is not None, "a word may be empty"
        return match[0], text[match.end() :]
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
