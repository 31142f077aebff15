"""A stream of JSON, such as QMP is: bytes in, values and errors out, no I/O.

Nearly everything that clients send is one complete strict JSON object on a
line.  Such a line is given to orjson; only the rest (objects over several lines
or several on one, single quotes, errors) goes through the dialect's own lexer
(:mod:`qmpd.qjson.lexer`) and parser (:mod:`qmpd.qjson.values`).

orjson is more tolerant than QEMU in three points, so its answer is only taken
where a cheap check shows that none of them can be at hand:

- it lets duplicate keys pass.  A text has at least as many colons as keys, so if the
  value has as many members as the text has colons, none was lost.  Colons in strings
  spoil that; then only those are counted that have a quote or white space in front of
  them, as every one after a key has;
- it takes noncharacters (U+FFFE and the like), which need ``\\u`` or a byte
  over 0x7F in the text;
- it takes ``0e5``, which makes a double, and doubles are rare in requests.

Measured with Python 3.11 on requests of 28, 186 and 144 bytes (the last with colons in
a string): 1.0, 2.2 and 3.0 us with the checks.  The standard library's C parser with an
`object_pairs_hook` that refuses duplicates took 1.5, 3.0 and 3.2 us, and would need
the other checks as well, and more (NaN, lone surrogates, integers over 64 bits).
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from qmpd.qjson.lexer import Lexer
from qmpd.qjson.values import Assembler

#: Longer lines are for the lexer.  A line of this size can't have too many tokens.
_FAST_LINE: Final = 1 << 20


class _Double(Exception):
    """There is a double in the text, and it may be spelled `0e5`."""


def _members(value: Any) -> int:
    """The number of members of all the objects in an object or array.

    :raise _Double: if there is one.
    """
    number = 0
    if type(value) is dict:
        number = len(value)
        value = value.values()
    for inner in value:
        kind = type(inner)
        if kind is dict or kind is list:
            number += _members(inner)
        elif kind is float:
            raise _Double
    return number


def whole_object(line: bytes) -> dict[str, Any] | None:
    """The object that a line is, if the fast way is sure to see it as QEMU does; otherwise None.

    :param line: it must begin with a brace.
    """
    # Searching for one byte is several times faster than for two.
    if len(line) > _FAST_LINE or not line.isascii() or (b"\\" in line and b"\\u" in line):
        return None
    try:
        value: dict[str, Any] = orjson.loads(line)
        members = _members(value)
    except (orjson.JSONDecodeError, RecursionError, _Double):
        return None
    if members == line.count(b":"):
        return value
    # Strings hold colons, too.  A line has no other white space inside than these two.
    if members == line.count(b'":') + line.count(b" :") + line.count(b"\t:"):
        return value
    return None


class JSONStream:
    """One client's input, from its first byte to its last.

    Memory is bounded by the limits on a value's size (64 MiB), tokens (2**21)
    and nesting (1024).
    """

    def __init__(self) -> None:
        self._given: list[Any] = []
        self._assembler = Assembler(self._give)
        self._lexer = Lexer(self._assembler.token)

    def _give(self, value: Any) -> None:
        self._given.append(value)

    def feed(self, data: bytes) -> list[Any]:
        """Take what has arrived, cut anywhere.

        :return: the values that are complete now, in order; a
            :class:`~qmpd.qjson.values.JSONError` stands among them wherever a client is to be told of one.
        """
        given = self._given = []
        lexer, assembler = self._lexer, self._assembler
        for line in data.splitlines(keepends=True):
            if line[0] == 0x7B and lexer.idle and assembler.idle:
                value = whole_object(line)
                if value is not None:
                    given.append(value)
                    continue
            lexer.feed(line)
        return given
