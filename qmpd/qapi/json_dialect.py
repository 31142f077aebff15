"""The JSON that QEMU reads: RFC 8259, and strings in single quotes as well.

For whole texts, such as an option on the command line or a file of commands;
what arrives on a socket in pieces is the monitor's business.  Differences from
Python's own parser: single quotes, no NaN, a duplicate key is an error, and
errors are in QEMU's words.  Nesting is limited, and the parser keeps its own
stack, so no text can exhaust the interpreter's.
"""

from __future__ import annotations

import re
from typing import Any, Final

from qmpd.errors import Error

#: As in QEMU.
DEEPEST: Final = 1024

_SPACE: Final = re.compile(r"[ \t\r\n]*")
_TOKEN: Final = re.compile(
    r"""
      (?P<punctuation>[{}\[\]:,])
    | (?P<string>"(?:[^"\\\x00-\x1f]|\\.)*"|'(?:[^'\\\x00-\x1f]|\\.)*')
    | (?P<float>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+))
    | (?P<integer>-?(?:0|[1-9][0-9]*)(?![0-9.eE]))
    | (?P<keyword>[a-z]+)
    """,
    re.VERBOSE,
)
_STRAY: Final = re.compile(r"""["'][^\x00-\x1f]*[\x00-\x1f]?|-?[0-9]+[.eE]?|.""", re.DOTALL)
_ESCAPE: Final = re.compile(r"\\(u[0-9A-Fa-f]{4}|.)", re.DOTALL)
_ESCAPED: Final = {
    '"': '"',
    "'": "'",
    "\\": "\\",
    "/": "/",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
}
_KEYWORDS: Final = {"true": True, "false": False, "null": None}
_SURROGATES: Final = re.compile("([\ud800-\udbff][\udc00-\udfff])")


class JSONError(Error):
    """The text is not JSON.

    :param offset: where in the text the parser stopped, in characters.
    """

    def __init__(self, desc: str, offset: int) -> None:
        super().__init__(desc)
        self.offset = offset


def _string(token: str, offset: int) -> str:
    inside = token[1:-1]
    if "\\" not in inside:
        return inside

    def unescape(match: re.Match[str]) -> str:
        code = match[1]
        if code in _ESCAPED:
            return _ESCAPED[code]
        if len(code) != 5:
            raise JSONError("JSON parse error, invalid escape sequence in string", offset)
        if code == "u0000":
            raise JSONError("JSON parse error, \\u0000 is not a valid Unicode character", offset)
        return chr(int(code[1:], 16))

    text = _SURROGATES.sub(
        lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"),
        _ESCAPE.sub(unescape, inside),
    )
    for character in text:
        if "\ud800" <= character <= "\udfff":
            raise JSONError(
                f"JSON parse error, \\u{ord(character):04x} is not a valid Unicode character", offset
            )
    return text


class _Parser:
    """One value's parse; ``stack`` holds the objects and lists that are still open."""

    def __init__(self, text: str, offset: int) -> None:
        self._text = text
        self.offset = offset

    def _token(self) -> tuple[str, str, int]:
        space = _SPACE.match(self._text, self.offset)
        assert space is not None, "it may be empty"
        start = space.end()
        if start == len(self._text):
            raise JSONError("JSON parse error, premature EOI", start)
        match = _TOKEN.match(self._text, start)
        if match is None:
            stray = _STRAY.match(self._text, start)
            assert stray is not None, "there is a character"
            raise JSONError(f"JSON parse error, stray '{stray[0]}'", start)
        self.offset = match.end()
        return str(match.lastgroup), match[0], start

    def _scalar(self, kind: str, token: str, start: int) -> Any:
        match kind:
            case "string":
                return _string(token, start)
            case "integer":
                # A number longer than any integer type is refused by its type; Python
                # limits the digits that it converts, so such a one becomes a float.
                return int(token) if len(token) < 400 else float(token)
            case "float":
                return float(token)
            case "keyword" if token in _KEYWORDS:
                return _KEYWORDS[token]
            case "keyword":
                raise JSONError(f"JSON parse error, invalid keyword '{token}'", start)
        raise JSONError("JSON parse error, expecting value", start)

    def _key(self, container: dict[str, Any], kind: str, token: str, start: int) -> str:
        if kind == "keyword" and token not in _KEYWORDS:
            raise JSONError(f"JSON parse error, invalid keyword '{token}'", start)
        if kind != "string":
            raise JSONError("JSON parse error, key is not a string in object", start)
        key = _string(token, start)
        _, colon, place = self._token()
        if colon != ":":
            raise JSONError("JSON parse error, missing : in object pair", place)
        if key in container:
            raise JSONError("JSON parse error, duplicate key", start)
        return key

    def value(self) -> Any:
        stack: list[tuple[Any, str]] = []
        while True:
            kind, token, start = self._token()
            opened = kind == "punctuation" and token in "{["
            value: Any
            if opened:
                if len(stack) == DEEPEST:
                    raise JSONError("JSON nesting depth limit exceeded", start)
                value = {} if token == "{" else []
            else:
                value = self._scalar(kind, token, start)
            # Put the value where it belongs, then go on to the place of the next one.
            while True:
                if opened:
                    key = self._first(value)
                    if key is not None:
                        stack.append((value, key))
                        break
                    opened = False
                if not stack:
                    return value
                container, key = stack.pop()
                if isinstance(container, dict):
                    container[key] = value
                else:
                    container.append(value)
                key = self._next(container)
                if key is not None:
                    stack.append((container, key))
                    break
                value = container

    def _first(self, container: Any) -> str | None:
        """Read up to the first value of an opened container; None if it is empty."""
        before = self.offset
        kind, token, start = self._token()
        if token == ("}" if isinstance(container, dict) else "]") and kind == "punctuation":
            return None
        if isinstance(container, dict):
            return self._key(container, kind, token, start)
        self.offset = before
        return ""

    def _next(self, container: Any) -> str | None:
        """Read up to the next value of a container; None at its end."""
        kind, token, start = self._token()
        is_object = isinstance(container, dict)
        if kind == "punctuation" and token == ("}" if is_object else "]"):
            return None
        if kind != "punctuation" or token != ",":
            what = "dict" if is_object else "list"
            raise JSONError(f"JSON parse error, expected separator in {what}", start)
        if not is_object:
            return ""
        kind, token, start = self._token()
        if kind == "punctuation":
            raise JSONError("JSON parse error, expecting value", start)
        return self._key(container, kind, token, start)


def skip_space(text: str, offset: int) -> int:
    """Return the offset of the next character that is not white space, or the text's length."""
    space = _SPACE.match(text, offset)
    return space.end() if space else offset


def parse_prefix(text: str, offset: int = 0) -> tuple[Any, int]:
    """Read one value that begins at an offset.

    :return: the value, and the offset behind it.
    :raise JSONError: there is none.
    """
    parser = _Parser(text, offset)
    value = parser.value()
    return value, parser.offset


def parse_json(text: str) -> Any:
    """Read a text that is one value.

    :raise JSONError: it is not.
    """
    value, end = parse_prefix(text)
    end = skip_space(text, end)
    if end < len(text):
        raise JSONError("Expecting at most one JSON value", end)
    return value
