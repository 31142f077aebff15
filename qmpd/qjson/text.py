"""Whole texts: one value (an option on the command line), or many with the numbers of their lines.

:func:`parse_json` says of a text what ``qemu-storage-daemon --blockdev TEXT``
says of it.  The first error counts, and the end of the text ends a token and,
too early, a value.  Seen in version 10.0.2.

:func:`located` is for texts that people write, where one slip must not hide the
next.  On a socket an open bracket swallows everything up to its counterpart, and
a stray character makes an error of each of the tokens after it.  Here there is
one error, and reading goes on at the next object: the next brace outside of what
was begun, or one that begins a line and stands no deeper than what was begun.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any, NamedTuple

from qmpd.qjson.lexer import Kind, Lexer
from qmpd.qjson.stream import whole_object
from qmpd.qjson.values import Assembler, JSONError


def _encoded(text: str) -> bytes:
    # Bytes in an argument that are not UTF-8 are what they were before Python made a string of them.
    return text.encode(errors="surrogateescape")


def parse_json(text: str) -> Any:
    """Read a text that is one value.

    :raise JSONError: it is not.
    """
    given: list[Any] = []
    assembler = Assembler(given.append)
    lexer = Lexer(assembler.token)
    lexer.feed(_encoded(text))
    lexer.finish()
    assembler.finish()
    if not given:
        raise JSONError("Expecting a JSON value")
    if isinstance(given[0], JSONError):
        raise given[0]
    if len(given) > 1:
        raise JSONError("Expecting at most one JSON value")
    return given[0]


class Located(NamedTuple):
    """Something found in a text.

    :param line: from 1; where a value begins, or where the text stops making sense.
        If it ends too early, this is where the unfinished value begins.
    :param value: the value, or the :class:`JSONError`.
    """

    line: int
    value: Any


class _Reader:
    """Lines in, values and errors out."""

    def __init__(self) -> None:
        self.found: list[Located] = []
        self._lexer = Lexer(self._token)
        self._assembler = Assembler(self._give)
        self._line = 0
        self._indentation = 0
        #: Whether no token of the line has been seen yet.
        self._at_first = True
        #: Where the value at hand begins.
        self._begin = 0
        self._begin_indentation = 0
        #: Opening braces and brackets less closing ones, since the value began.
        self._depth = 0
        #: There was an error, and no place yet from where to go on.
        self._failed = False

    def feed(self, line: bytes) -> None:
        """Take the next line, with the character that ends it."""
        # No token goes on from one line to the next, nor does the lexer's mistrust after an error.
        self._lexer.finish()
        self._line += 1
        if line.startswith(b"{") and self._assembler.idle:
            value = whole_object(line)
            if value is not None:
                self._begin_anew()
                self.found.append(Located(self._line, value))
                return
        self._indentation = len(line) - len(line.lstrip(b" \t"))
        self._at_first = True
        self._lexer.feed(line)

    def finish(self) -> None:
        """Take note that this was the last line."""
        self._lexer.finish()
        self._line = self._begin
        self._assembler.finish()

    def _token(self, kind: Kind, text: bytes) -> None:
        outside = self._depth <= 0
        at_first, self._at_first = self._at_first, False
        self._take(kind, text)
        if self._failed and kind is Kind.PUNCTUATION and text == b"{":
            # This brace may be the very token that did not fit.
            no_deeper = at_first and self._indentation <= self._begin_indentation
            if outside or no_deeper:
                self._begin_anew()
                self._take(kind, text)

    def _begin_anew(self) -> None:
        self._assembler = Assembler(self._give)
        self._depth = 0
        self._failed = False

    def _take(self, kind: Kind, text: bytes) -> None:
        if kind is Kind.PUNCTUATION:
            self._depth += (text in b"{[") - (text in b"}]")
        if self._failed:
            return
        if self._assembler.idle:
            self._begin, self._begin_indentation = self._line, self._indentation
        self._assembler.token(kind, text)
        if self._assembler.error is not None:
            self._give(self._assembler.error)

    def _give(self, value: Any) -> None:
        if isinstance(value, JSONError):
            if not self._failed:
                self.found.append(Located(self._line, value))
            self._failed = True
        else:
            self.found.append(Located(self._begin, value))


def located(text: str) -> Iterator[Located]:
    """Read a text of any number of values, one after the other; nothing is raised."""
    reader = _Reader()
    for line in BytesIO(_encoded(text)):
        reader.feed(line)
        yield from reader.found
        reader.found.clear()
    reader.finish()
    yield from reader.found
