"""Messages to bytes, as QEMU writes them.

One message a line, ended by CR LF; ``", "`` and ``": "`` between members; everything
outside ASCII, and DEL, as ``\\u00E9`` with upper-case digits; doubles with printf's
``%.17g``, so 0.1 is ``0.10000000000000001`` and 1.0 is ``1``.  In pretty mode the message
is spread over lines, with four spaces for each level and CR LF after each line; an
empty object or array takes two of them.

The standard library's C encoder does the work where it can: its output differs from
QEMU's only in doubles, in the case of ``\\u`` escapes, and in DEL.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

_LINE_END: Final = "\r\n"
_NOTHING: Final = object()

_compact: Final[Callable[[Any], str]] = json.JSONEncoder(check_circular=False).encode
_quoted: Final[Callable[[str], str]] = json.encoder.encode_basestring_ascii

#: An escape: a surrogate pair, any other \uXXXX, or a short one (so that an escaped backslash is skipped).
_ESCAPE: Final = re.compile(r"\\(?:u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})|u([0-9a-f]{4})|.)")


def _escape_as_qemu(found: re.Match[str]) -> str:
    high, low, single = found.groups()
    if high:
        return f"\\u{high.upper()}\\u{low.upper()}"
    if single is None:
        return found[0]
    # A lone surrogate stands for a byte of a file name that is not UTF-8; QEMU writes U+FFFD for it.
    return "\\uFFFD" if "d800" <= single <= "dfff" else f"\\u{single.upper()}"


def _respelled(text: str) -> str:
    """The C encoder's output with its escapes spelled as QEMU does."""
    if "\\u" in text:
        text = _ESCAPE.sub(_escape_as_qemu, text)
    if "\x7f" in text:
        text = text.replace("\x7f", "\\u007F")
    return text


def _has_double(value: Any) -> bool:
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, float):
            return True
        if isinstance(one, Mapping):
            pending.extend(one.values())
        elif isinstance(one, list | tuple):
            pending.extend(one)
    return False


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.17g}"
    return _compact(value)


def _members(value: Any) -> tuple[str, str, list[tuple[str, Any]]] | None:
    """How a container is opened and closed, and what is in it; None for a scalar."""
    if isinstance(value, Mapping):
        return "{", "}", [(_quoted(key) + ": ", item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return "[", "]", [("", item) for item in value]
    return None


def _written(value: Any, *, pretty: bool) -> str:
    """A value as text, the slow way.

    Not recursive: an id may be nested 1,024 deep, which is more than Python's stack takes.
    """
    newline = _LINE_END if pretty else ""
    indent = "    " if pretty else ""
    separator = "," if pretty else ", "
    pieces: list[str] = []
    # What is still to be written, last first: text, the value after it, and that value's level.
    pending: list[tuple[str, Any, int]] = [("", value, 0)]
    while pending:
        text, one, level = pending.pop()
        pieces.append(text)
        if one is _NOTHING:
            continue
        container = _members(one)
        if container is None:
            pieces.append(_scalar(one))
            continue
        opening, closing, members = container
        pieces.append(opening)
        pending.append((newline + indent * level + closing, _NOTHING, level))
        start = newline + indent * (level + 1)
        for number in reversed(range(len(members))):
            key, member = members[number]
            pending.append((f"{separator if number else ''}{start}{key}", member, level + 1))
    return "".join(pieces)


def encode(message: Any, *, pretty: bool = False, may_have_doubles: bool = True) -> bytes:
    """One message as it goes on the wire, line end included.

    :param message: plain JSON values; a NaN can't come from a client and is written as `nan`,
        an infinity as `inf`, as QEMU does.
    :param pretty: over several lines.
    :param may_have_doubles: False saves the search for them, where the schema says that there are none.
    """
    if pretty or (may_have_doubles and _has_double(message)):
        text = _written(message, pretty=pretty)
    else:
        try:
            text = _compact(message)
        except RecursionError:
            text = _written(message, pretty=False)
    return (_respelled(text) + _LINE_END).encode("ascii")


def success(value: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to a command that was done.

    :param value: what the command returns.
    :param request: the request as it came, whose id is echoed if there is one.
    """
    reply: dict[str, Any] = {"return": value}
    if "id" in request:
        reply["id"] = request["id"]
    return reply


def failure(error_class: str, desc: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to a command that was refused; its id stands in front, where it differs from success."""
    reply: dict[str, Any] = {"id": request["id"]} if "id" in request else {}
    reply["error"] = {"class": error_class, "desc": desc}
    return reply


def event(name: str, data: Mapping[str, Any], nanoseconds: int | None = None) -> dict[str, Any]:
    """An event, which happened now.

    :param data: left out on the wire if it is empty, as QEMU does for events without members.
    :param nanoseconds: since the epoch, if it was not now.
    """
    microseconds = (time.time_ns() if nanoseconds is None else nanoseconds) // 1000
    seconds, microseconds = divmod(microseconds, 1_000_000)
    message: dict[str, Any] = {
        "timestamp": {"seconds": seconds, "microseconds": microseconds},
        "event": name,
    }
    if data:
        message["data"] = data
    return message
