"""Puts tokens together to JSON values, with QEMU's rules and wording.

QEMU collects tokens until braces and brackets balance, or there are more
closing ones than opening ones, and only then looks what they mean.  Here each
token is understood as it comes, so that nothing has to be kept twice; but the
outcome (the value, or the first error) is given out at the same point, because
a client can see where that is: ``{"a": [}`` swallows what follows, for the
bracket is still open.

A syntax error inside balanced tokens gives one error and no value.  An error
token from the lexer throws away what was collected, and so do the limits on
size, number and nesting.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import IntEnum, auto
from typing import Any, Final

from qmpd.errors import Error
from qmpd.qjson.lexer import MAXIMUM_SIZE, Kind

#: More tokens than this in one value are refused.
MAXIMUM_TOKENS: Final = 1 << 21
#: Objects and arrays may stand inside each other so deep.
MAXIMUM_NESTING: Final = 1024

#: QEMU shows the whole of a stray token, which may have 64 MiB; we stop here.
_SHOWN_OF_STRAY: Final = 64 * 1024
#: QEMU formats the part after "JSON parse error, " in a buffer of this size.
_SHOWN_OF_MESSAGE: Final = 1023


class JSONError(Error):
    """What came is not JSON.  Over QMP: a reply without an id, in order with the others."""


class _Expecting(IntEnum):
    """What may come next."""

    TOP = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    MEMBER = auto()
    MEMBER_SEPARATOR = auto()
    FIRST_ITEM = auto()
    ITEM = auto()
    ITEM_SEPARATOR = auto()


#: The places where no value is expected, and what is said if the right punctuation is not there.
_NO_VALUE: Final = {
    _Expecting.COLON: "missing : in object pair",
    _Expecting.MEMBER_SEPARATOR: "expected separator in dict",
    _Expecting.ITEM_SEPARATOR: "expected separator in list",
}

#: Punctuation that only moves on.
_MOVES: Final = {
    (_Expecting.COLON, b":"): _Expecting.MEMBER,
    (_Expecting.MEMBER_SEPARATOR, b","): _Expecting.KEY,
    (_Expecting.ITEM_SEPARATOR, b","): _Expecting.ITEM,
}

#: Punctuation that completes the container at hand.
_CLOSES: Final = frozenset(
    {
        (_Expecting.FIRST_KEY, b"}"),
        (_Expecting.MEMBER_SEPARATOR, b"}"),
        (_Expecting.FIRST_ITEM, b"]"),
        (_Expecting.ITEM_SEPARATOR, b"]"),
    }
)

_KEYWORDS: Final[dict[bytes, Any]] = {b"true": True, b"false": False, b"null": None}

_ESCAPES: Final = {
    b'"': '"',
    b"'": "'",
    b"\\": "\\",
    b"/": "/",
    b"b": "\b",
    b"f": "\f",
    b"n": "\n",
    b"r": "\r",
    b"t": "\t",
}

_UNICODE: Final = re.compile(rb"\\u([0-9a-fA-F]{4})")
#: Unicode's noncharacters: U+FDD0..U+FDEF and the last two of each plane.
_NONCHARACTER: Final = re.compile(
    "[\ufdd0-\ufdef"
    + "".join(chr(plane | last) for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF))
    + "]"
)
#: A sequence as its first byte announces it, with as many of its other bytes as are there.
_SEQUENCE: Final = re.compile(
    rb"[\x00-\x7f]++|[\xc0-\xdf][\x80-\xbf]?|[\xe0-\xef][\x80-\xbf]{0,2}|[\xf0-\xf7][\x80-\xbf]{0,3}"
    rb"|[\xf8-\xfb][\x80-\xbf]{0,4}|[\xfc-\xfd][\x80-\xbf]{0,5}|[\x80-\xbf\xfe\xff]"
)


def _decode(data: bytes) -> str:
    """Modified UTF-8 (U+0000 may be C0 80) to text, without surrogates and noncharacters.

    :raise ValueError: for anything else.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        # Sound, since C0 is no part of any other sequence.
        text = data.replace(b"\xc0\x80", b"\0").decode()
    if not data.isascii() and _NONCHARACTER.search(text):
        raise ValueError("noncharacter")
    return text


def displayed(data: bytes) -> str:
    """Bytes from a client as QEMU shows them in an error.

    Each sequence that is not UTF-8 becomes one U+FFFD.  What follows a NUL is not shown.
    """

    def one(sequence: bytes) -> str:
        try:
            return _decode(sequence)
        except ValueError:
            return "\ufffd"

    return "".join(one(sequence) for sequence in _SEQUENCE.findall(data.partition(b"\0")[0]))


def _string(token: bytes) -> str:
    """The text of a string token, which is given with its quotes.

    :raise JSONError: if there is an escape that does not exist or bytes that are not UTF-8,
        whichever comes first.
    """
    pieces: list[str] = []
    position, end = 1, len(token) - 1
    while True:
        escape = token.find(b"\\", position, end)
        try:
            pieces.append(_decode(token[position : escape if escape >= 0 else end]))
        except ValueError:
            raise JSONError("JSON parse error, invalid UTF-8 sequence in string") from None
        if escape < 0:
            return "".join(pieces)
        character = token[escape + 1 : escape + 2]
        if character == b"u":
            text, position = _unicode_escape(token, escape)
            pieces.append(text)
        elif character in _ESCAPES:
            pieces.append(_ESCAPES[character])
            position = escape + 2
        else:
            raise JSONError("JSON parse error, invalid escape sequence in string")


def _unicode_escape(token: bytes, position: int) -> tuple[str, int]:
    """The character that ``\\uXXXX`` (or two of them) at `position` stands for, and where it ends.

    :raise JSONError: showing the escape, which for QEMU is always six bytes or up to the token's end.
    """
    end = position + 6
    if first := _UNICODE.match(token, position):
        code = int(first[1], 16)
        if 0xD800 <= code < 0xDC00 and (second := _UNICODE.match(token, end)):
            low = int(second[1], 16)
            if 0xDC00 <= low < 0xE000:
                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
                end += 6
        character = chr(code)
        if not 0xD800 <= code < 0xE000 and not _NONCHARACTER.match(character):
            return character, end
    shown = displayed(token[position:end])
    raise JSONError(f"JSON parse error, {shown} is not a valid Unicode character")


def _integer(token: bytes) -> int | float:
    """An int if it fits 64 bits, signed or unsigned; otherwise the nearest double."""
    if len(token) <= 20:
        number = int(token)
        if -(1 << 63) <= number < 1 << 64:
            return number
    return float(token)


def _keyword(token: bytes) -> Any:
    if token in _KEYWORDS:
        return _KEYWORDS[token]
    message = f"invalid keyword '{token[:_SHOWN_OF_MESSAGE].decode()}'"[:_SHOWN_OF_MESSAGE]
    raise JSONError(f"JSON parse error, {message}")


_SCALARS: Final[dict[Kind, Callable[[bytes], Any]]] = {
    Kind.STRING: _string,
    Kind.INTEGER: _integer,
    Kind.FLOAT: float,
    Kind.KEYWORD: _keyword,
}


class Assembler:
    """Tokens in, values out.

    :param give: called with each value or :class:`JSONError`.
    """

    def __init__(self, give: Callable[[Any], None]) -> None:
        self._give = give
        self._reset()

    @property
    def idle(self) -> bool:
        """Whether nothing is collected."""
        return self._tokens == 0

    def _reset(self) -> None:
        self._tokens = 0
        self._size = 0
        self._braces = 0
        self._brackets = 0
        #: The first error in what is collected; it is given out when the brackets balance.
        self.error: JSONError | None = None
        self._value: Any = None
        self._expecting = _Expecting.TOP
        self._container: Any = None
        self._key = ""
        #: What to come back to when the container at hand is complete.
        self._outer: list[tuple[Any, str, _Expecting]] = []

    def finish(self) -> None:
        """Take note that nothing more comes: an unfinished value is an error."""
        if not self.idle:
            error = self.error or JSONError("JSON parse error, premature EOI")
            self._reset()
            self._give(error)

    def token(self, kind: Kind, text: bytes) -> None:
        """Take one token from the lexer."""
        if kind is Kind.ERROR:
            self._refuse(f"JSON parse error, stray '{displayed(text[:_SHOWN_OF_STRAY])}'")
            return
        self._tokens += 1
        self._size += len(text)
        punctuation = kind is Kind.PUNCTUATION
        if punctuation:
            self._braces += (text == b"{") - (text == b"}")
            self._brackets += (text == b"[") - (text == b"]")
        if kind is Kind.TOO_LONG or self._size > MAXIMUM_SIZE:
            self._refuse("JSON token size limit exceeded")
        elif self._tokens > MAXIMUM_TOKENS:
            self._refuse("JSON token count limit exceeded")
        elif self._braces + self._brackets > MAXIMUM_NESTING:
            self._refuse("JSON nesting depth limit exceeded")
        else:
            if self.error is None:
                try:
                    self._understand(text if punctuation else None, kind, text)
                except JSONError as error:
                    self.error = error
            if self._braces < 0 or self._brackets < 0 or self._braces == self._brackets == 0:
                outcome = self._value if self.error is None else self.error
                self._reset()
                self._give(outcome)

    def _refuse(self, desc: str) -> None:
        self._reset()
        self._give(JSONError(desc))

    def _understand(self, punctuation: bytes | None, kind: Kind, text: bytes) -> None:
        expecting = self._expecting
        if punctuation is not None:
            if (expecting, punctuation) in _MOVES:
                self._expecting = _MOVES[expecting, punctuation]
                return
            if (expecting, punctuation) in _CLOSES:
                value = self._container
                self._container, self._key, self._expecting = self._outer.pop()
                self._deliver(value)
                return
        if expecting in _NO_VALUE:
            raise JSONError(f"JSON parse error, {_NO_VALUE[expecting]}")
        if punctuation is None:
            self._deliver(_SCALARS[kind](text))
        elif punctuation == b"{":
            self._open({}, _Expecting.FIRST_KEY)
        elif punctuation == b"[":
            self._open([], _Expecting.FIRST_ITEM)
        else:
            raise JSONError("JSON parse error, expecting value")

    def _open(self, container: Any, expecting: _Expecting) -> None:
        self._outer.append((self._container, self._key, self._expecting))
        self._container, self._key, self._expecting = container, "", expecting

    def _deliver(self, value: Any) -> None:
        expecting = self._expecting
        if expecting is _Expecting.TOP:
            self._value = value
        elif expecting is _Expecting.MEMBER:
            # Only now, as QEMU does: an error inside the second value is the one that is reported.
            if self._key in self._container:
                raise JSONError("JSON parse error, duplicate key")
            self._container[self._key] = value
            self._expecting = _Expecting.MEMBER_SEPARATOR
        elif expecting in (_Expecting.ITEM, _Expecting.FIRST_ITEM):
            self._container.append(value)
            self._expecting = _Expecting.ITEM_SEPARATOR
        else:
            if not isinstance(value, str):
                raise JSONError("JSON parse error, key is not a string in object")
            self._key = value
            self._expecting = _Expecting.COLON
