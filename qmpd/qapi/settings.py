"""Settings in a dialect of their own: ``server,nowait,path=a,,b``.

QEMU reads some options so, among them character devices' and devices': a bare
``server`` means ``server=on``, ``nowait`` means ``wait=off``, and everything
is flat.  A comma within a value is doubled.

Learnt from ``qemu-storage-daemon``'s behaviour and errors.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from qmpd.errors import Error
from qmpd.qapi.keyval import SWITCH, read_size


class HelpRequested(Exception):
    """The text asks what could be given."""


class Kind(enum.Enum):
    """The type of a setting in the dialect."""

    TEXT = enum.auto()
    SWITCH = enum.auto()
    NUMBER = enum.auto()
    SIZE = enum.auto()


_IDENTIFIER: Final = re.compile(r"[A-Za-z][-A-Za-z0-9._]*\Z")
_ELEMENT: Final = re.compile(r"(?P<key>[^=,]*)(?P<equals>=)?")
_VALUE: Final = re.compile(r"(?:[^,]|,,)*")


def is_identifier(text: str) -> bool:
    """Whether *text* may be the id of an object, a device or a character device."""
    return _IDENTIFIER.match(text) is not None


def _elements(text: str, implied_key: str | None) -> Iterator[tuple[str, str | None]]:
    """Yield keys and values; a bare word has None for a value, a first one may be the implied key's value.

    Commas are doubled inside values.  There is no way to have one in a key.
    """
    position = 0
    while position < len(text):
        element = _ELEMENT.match(text, position)
        assert element is not None, "the pattern matches the empty string too"
        key, value = element["key"], None
        implied = position == 0 and implied_key is not None and not element["equals"]
        if implied or element["equals"]:
            found = _VALUE.match(text, 0 if implied else element.end())
            assert found is not None, "the pattern matches the empty string too"
            position, value = found.end(), found[0].replace(",,", ",")
        else:
            position = element.end()
        if implied and value not in ("help", "?"):
            assert implied_key is not None
            key = implied_key
        elif implied:
            value = None
        position += 1  # the comma
        yield key, value


def parse_settings(
    text: str, known: Mapping[str, Kind] | None, implied_key: str | None = None
) -> dict[str, Any]:
    """Read ``key=value,flag,noflag``; of a key that is given twice the last one counts.

    :param known: the settings there are and their types (``id`` is one everywhere); None takes any, as text.
    :param implied_key: the key of a first value that stands alone.
    :return: strings, booleans and integers by key.
    :raise HelpRequested: there is a bare ``help`` or ``?``.
    :raise Error: in QEMU's words.
    """
    elements = list(_elements(text, implied_key))
    if any(value is None and key in ("help", "?") for key, value in elements):
        raise HelpRequested
    pairs = [(key, value) if value is not None else _flag(key, known or {}) for key, value in elements]
    settings: dict[str, Any] = {}
    # QEMU looks for the id before anything else, and takes the first one.
    for identifier in [value for key, value in pairs if key == "id"][:1]:
        if not is_identifier(identifier):
            raise Error("Parameter 'id' expects an identifier")
        settings["id"] = identifier
    for key, value in pairs:
        if key == "id":
            continue
        if known is None:
            settings[key] = value
        elif key in known:
            settings[key] = _CONVERTERS[known[key]](key, value)
        else:
            raise Error(f"Invalid parameter '{key}'")
    return settings


def _flag(word: str, known: Mapping[str, Kind]) -> tuple[str, str]:
    """Return the setting that a bare word stands for."""
    if word.startswith("no") and word not in known:
        return word[2:], "off"
    return word, "on"


def _switch(key: str, value: str) -> bool:
    try:
        return SWITCH[value]
    except KeyError:
        raise Error(f"Parameter '{key}' expects 'on' or 'off'") from None


def _number(key: str, value: str) -> int:
    # Like strtoull with base 0: a leading 0 means octal.
    digits = re.sub(r"\A([-+]?)0([0-7]+)\Z", r"\g<1>0o\2", value)
    try:
        return int(digits, 0)
    except ValueError:
        raise Error(f"Parameter '{key}' expects a number") from None


def _size(key: str, value: str) -> int:
    if value.startswith("-") and value[1:].isdecimal():
        raise Error(f"Value '{value}' is out of range for parameter '{key}'")
    size = read_size(value)
    if size is None:
        raise Error(
            f"Parameter '{key}' expects a non-negative number below 2^64",
            hint="A suffix k, M, G, T, P or E counts in units of 2^10, 2^20, 2^30 and so on.",
        )
    return size


def _text(key: str, value: str) -> str:
    return value


_CONVERTERS: Final[Mapping[Kind, Callable[[str, str], Any]]] = {
    Kind.TEXT: _text,
    Kind.SWITCH: _switch,
    Kind.NUMBER: _number,
    Kind.SIZE: _size,
}
