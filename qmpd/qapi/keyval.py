"""Options on the command line: ``driver=raw,file.driver=file,file.filename=a,,b``.

:func:`parse` turns the text into nested dicts and lists of strings; a doubled
comma stands for one in a value, a key's parts are separated by dots, and parts
that are numbers make a list.  What a string means depends on the type that is
wanted, so :func:`convert` turns strings into numbers and booleans by type; what
cannot be turned stays a string, for validation to refuse.

Learnt from ``qemu-storage-daemon``'s behaviour and errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from qmpd.errors import Error
from qmpd.qapi.types import AlternateType, BuiltinType, EnumType, ListType, ObjectType, Type

#: The longest part of a key, in characters.
LONGEST_PART: Final = 127

_HELP: Final = frozenset({"help", "?"})
_PART: Final = re.compile(r"(__[A-Za-z0-9.-]+_)?[A-Za-z][A-Za-z0-9_-]*")
_INDEX: Final = re.compile(r"[0-9]+")
#: A key ends where a comma or an equals sign does.
_KEY: Final = re.compile(r"[^,=]*")
_VALUE: Final = re.compile(r"(?:[^,]|,,)*")


class HelpRequested(Error):
    """The option asks for help (``secret,help``).

    :param options: what else it says, as :func:`parse` returns it.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__("Help is not available for this option")
        self.options = options


def _parts(key: str) -> list[str]:
    """Split a key into its parts.

    :raise Error: a part is no name and no number, or the first one is a number.
    """
    parts: list[str] = []
    rest = key
    while True:
        match = (_INDEX.match(rest) if parts else None) or _PART.match(rest)
        if match is None or (match.end() < len(rest) and rest[match.end()] != "."):
            raise Error(f"Invalid parameter '{key}'")
        if match.end() > LONGEST_PART:
            raise Error(f"Parameter '{match[0]}' is too long")
        parts.append(match[0])
        if match.end() == len(rest):
            return parts
        rest = rest[match.end() + 1 :]


def _put(options: dict[str, Any], parts: list[str], value: str) -> None:
    """Enter a value; a later one for the same key wins."""
    container = options
    for depth, part in enumerate(parts[:-1], 1):
        container = container.setdefault(part, {})
        if not isinstance(container, dict):
            raise Error(f"Parameters '{'.'.join(parts[:depth])}.*' used inconsistently")
    if isinstance(container.get(parts[-1]), dict):
        raise Error(f"Parameters '{'.'.join(parts)}.*' used inconsistently")
    container[parts[-1]] = value


def _with_lists(options: Any, path: str) -> Any:
    """Turn each dict whose keys are all numbers into a list."""
    if not isinstance(options, dict):
        return options
    prefix = f"{path}." if path else ""
    inside = {key: _with_lists(value, prefix + key) for key, value in options.items()}
    numbers = [key for key in inside if _INDEX.fullmatch(key)]
    if not numbers:
        return inside
    if len(numbers) < len(inside):
        raise Error(f"Parameters '{path}.*' used inconsistently")
    # The keys may be spelled with leading zeros; comparing lengths keeps absurd ones short.
    by_index = {key.lstrip("0") or "0": value for key, value in inside.items()}
    elements = []
    for index in range(len(by_index)):
        if str(index) not in by_index:
            raise Error(f"Parameter '{path}.{index}' missing")
        elements.append(by_index[str(index)])
    return elements


def parse(text: str, implied_key: str | None = None) -> dict[str, Any]:
    """Read ``key=value,...``.

    :param implied_key: the key of a first value that stands without one.
    :return: nested dicts and lists; every value is a string.
    :raise Error: in QEMU's words.
    :raise HelpRequested: a parameter is ``help`` or ``?``.
    """
    options: dict[str, Any] = {}
    wants_help = False
    offset = 0
    while offset < len(text):
        match = _KEY.match(text, offset)
        assert match is not None, "a key may be empty"
        key, end = match[0], match.end()
        is_first = offset == 0
        if text[end : end + 1] != "=":
            offset = end + 1
            if key in _HELP:
                wants_help = True
            elif is_first and implied_key is not None and key:
                options[implied_key] = key
            else:
                _parts(key)
                raise Error(f"Expected '=' after parameter '{key}'")
            continue
        parts = _parts(key)
        value = _VALUE.match(text, end + 1)
        assert value is not None, "a value may be empty"
        _put(options, parts, value[0].replace(",,", ","))
        offset = value.end() + 1
    nested: dict[str, Any] = _with_lists(options, "")
    if wants_help:
        raise HelpRequested(nested)
    return nested


# What strings mean

_INTEGER: Final = re.compile(r"\s*([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))")
_SIZE: Final = re.compile(r"\s*\+?(?:0[xX]([0-9a-fA-F]+)|([0-9]*)(\.[0-9]*)?([bBkKmMgGtTpPeE]?))")
_SUFFIXES: Final = "BKMGTPE"
#: What a boolean may be written as.
SWITCH: Final[Mapping[str, bool]] = dict.fromkeys(("on", "yes", "true", "y"), True) | dict.fromkeys(
    ("off", "no", "false", "n"), False
)
#: More digits than any integer type holds, fewer than Python minds.
_MOST_DIGITS: Final = 100


def _integer(text: str, type_: BuiltinType) -> int | None:
    """Read an integer as C does: decimal, 0x hexadecimal, 0 octal, white space in front."""
    match = _INTEGER.fullmatch(text) if len(text) <= _MOST_DIGITS else None
    if match is None:
        return None
    sign, hexadecimal, octal, decimal = match.groups()
    magnitude = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    value = -magnitude if sign == "-" else magnitude
    widest = (1 << 63) - 1 if type_.name.startswith("int") else (1 << 64) - 1
    return value if -(1 << 63) <= value <= widest else None


def read_size(text: str) -> int | None:
    """Read bytes: decimal with a fraction and a suffix B, K, M, G, T, P or E, or 0x hexadecimal.

    :return: None if it is no such thing, or has more than 64 bits.
    """
    match = _SIZE.fullmatch(text) if len(text) <= _MOST_DIGITS else None
    if match is None:
        return None
    hexadecimal, whole, fraction, suffix = match.groups()
    if hexadecimal:
        size = int(hexadecimal, 16)
    else:
        digits = (fraction or "")[1:]
        if not whole and not digits:
            return None
        unit = 1 << 10 * _SUFFIXES.index(suffix.upper() or "B")
        if unit == 1 and digits.strip("0"):
            return None
        # Half a byte and more is rounded up; exact, as a float is not.
        scale = int("1" + "0" * len(digits))
        size = int(whole or "0") * unit + (2 * int(digits or "0") * unit + scale) // (2 * scale)
    return size if size < 1 << 64 else None


def _size(text: str, type_: BuiltinType) -> int | None:
    return read_size(text)


def _number(text: str, type_: BuiltinType) -> int | float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def _boolean(text: str, type_: BuiltinType) -> bool | None:
    return SWITCH.get(text)


_READERS: Final[Mapping[str, Callable[[str, BuiltinType], int | float | bool | None]]] = {
    "int": _integer,
    "number": _number,
    "boolean": _boolean,
}


def convert(types: Mapping[str, Type], type_name: str, value: Any) -> Any:
    """Turn strings into what a type wants, wherever they stand.

    Strings that mean nothing to the type, values that are no strings and
    members that the type does not have stay as they are.
    """
    type_ = types[type_name]
    match type_:
        case BuiltinType():
            if not isinstance(value, str):
                return value
            reader = _size if type_.name == "size" else _READERS.get(type_.json_type)
            read = reader(value, type_) if reader else None
            return value if read is None else read
        case ListType() if isinstance(value, list):
            return [convert(types, type_.element, element) for element in value]
        case ObjectType() if isinstance(value, dict):
            return _convert_members(types, type_, value)
        case AlternateType():
            # A string is a string here if it may be one; otherwise nothing says what it is.
            for member in type_.members:
                alternative = types[member.type]
                if (isinstance(value, dict) and isinstance(alternative, ObjectType)) or (
                    isinstance(value, list) and isinstance(alternative, ListType)
                ):
                    return convert(types, member.type, value)
        case EnumType():
            pass
    return value


def _convert_members(types: Mapping[str, Type], type_: ObjectType, value: dict[str, Any]) -> dict[str, Any]:
    wanted = {member.name: member.type for member in type_.members}
    converted = {
        name: convert(types, wanted[name], each) if name in wanted else each for name, each in value.items()
    }
    if type_.discriminator is not None:
        choice = value.get(type_.discriminator)
        branch = (
            types[type_.branches[choice]] if isinstance(choice, str) and choice in type_.branches else None
        )
        if isinstance(branch, ObjectType):
            # The base's members are none of the branch's, so they pass through unchanged.
            return _convert_members(types, branch, converted)
    return converted
