"""Cuts bytes into JSON tokens, as QEMU's reader does.

The lexer is a state machine written down as a table: for each state the bytes
that keep it (a regular expression, so that long strings are skipped at C's
speed) and, for every other byte, the state that follows or how the token ends.
It knows nothing about values; :mod:`qmpd.qjson.values` puts them
together.

The dialect is JSON (RFC 8259) with strings in single quotes and ``\\'`` added.
What is no token at all becomes an error token that reaches up to and includes
the first byte that does not fit.  After it the lexer is in *recovery*: it
ignores what follows, until a byte comes that may be the start of something
sound (one of ``{}[]:,``, CR or LF).  0xFE, 0xFF and control characters are
errors wherever they stand, which is why a client may send 0xFF to bring the
stream into a known state.  Learnt by talking to QEMU 10.0.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import IntEnum, auto
from typing import Final, NamedTuple

#: More bytes than this in one token, or in all the tokens of one value, are refused.
MAXIMUM_SIZE: Final = 64 * 1024 * 1024


class Kind(IntEnum):
    """What a token is."""

    PUNCTUATION = auto()
    STRING = auto()
    INTEGER = auto()
    FLOAT = auto()
    KEYWORD = auto()
    ERROR = auto()
    TOO_LONG = auto()


class State(IntEnum):
    """Where in a token the lexer is."""

    START = auto()
    RECOVERY = auto()
    DOUBLE_QUOTED = auto()
    DOUBLE_QUOTED_ESCAPE = auto()
    SINGLE_QUOTED = auto()
    SINGLE_QUOTED_ESCAPE = auto()
    KEYWORD = auto()
    MINUS = auto()
    ZERO = auto()
    DIGITS = auto()
    POINT = auto()
    FRACTION = auto()
    EXPONENT = auto()
    EXPONENT_SIGN = auto()
    EXPONENT_DIGITS = auto()


class End(NamedTuple):
    """The end of a token.

    :param kind: what the token was.
    :param inclusive: whether the byte at hand belongs to it.
    """

    kind: Kind
    inclusive: bool


_Step = State | End


class _Row(NamedTuple):
    """One state's line in the table: the bytes that keep it, and what each byte leads to."""

    run: re.Pattern[bytes] | None
    steps: tuple[_Step, ...]


_PUNCTUATION: Final = b"{}[]:,"
_DIGITS: Final = b"0123456789"
_LETTERS: Final = b"abcdefghijklmnopqrstuvwxyz"
#: Bytes that are refused even inside strings and while recovering.
_NEVER: Final = bytes(range(0x20)) + b"\xfe\xff"

_ERROR: Final = End(Kind.ERROR, inclusive=True)

_START: Final[dict[bytes, _Step]] = {
    b" \t\r\n": State.START,
    _PUNCTUATION: End(Kind.PUNCTUATION, inclusive=True),
    b'"': State.DOUBLE_QUOTED,
    b"'": State.SINGLE_QUOTED,
    _LETTERS: State.KEYWORD,
    b"-": State.MINUS,
    b"123456789": State.DIGITS,
    b"0": State.ZERO,
}


def _row(run: bytes | None, otherwise: _Step, steps: dict[bytes, _Step]) -> _Row:
    table = [otherwise] * 256
    for some, step in steps.items():
        for byte in some:
            table[byte] = step
    return _Row(re.compile(run) if run is not None else None, tuple(table))


def _quoted(quote: bytes, escape: State) -> _Row:
    run = rb"[^\\\x00-\x1f\xfe\xff" + quote + rb"]*+"
    return _row(run, _ERROR, {quote: End(Kind.STRING, inclusive=True), b"\\": escape})


_INTEGER: Final = End(Kind.INTEGER, inclusive=False)
_FLOAT: Final = End(Kind.FLOAT, inclusive=False)

_TABLE: Final[dict[State, _Row]] = {
    State.START: _row(rb"[ \t\r\n]*+", _ERROR, _START),
    # Whatever could begin a value is not trusted here, except the punctuation.
    State.RECOVERY: _row(
        rb"[^\x00-\x08\n-\x1f\xfe\xff{}\[\]:,]*+",
        State.RECOVERY,
        {_NEVER: _ERROR, b"\r\n": State.START, _PUNCTUATION: End(Kind.PUNCTUATION, inclusive=True)},
    ),
    State.DOUBLE_QUOTED: _quoted(b'"', State.DOUBLE_QUOTED_ESCAPE),
    State.DOUBLE_QUOTED_ESCAPE: _row(None, State.DOUBLE_QUOTED, {_NEVER: _ERROR}),
    State.SINGLE_QUOTED: _quoted(b"'", State.SINGLE_QUOTED_ESCAPE),
    State.SINGLE_QUOTED_ESCAPE: _row(None, State.SINGLE_QUOTED, {_NEVER: _ERROR}),
    State.KEYWORD: _row(rb"[a-z]*+", End(Kind.KEYWORD, inclusive=False), {}),
    State.MINUS: _row(None, _ERROR, {b"0": State.ZERO, b"123456789": State.DIGITS}),
    # No exponent after a bare zero: QEMU reads 0e5 as three tokens.
    State.ZERO: _row(None, _INTEGER, {_DIGITS: _ERROR, b".": State.POINT}),
    State.DIGITS: _row(rb"[0-9]*+", _INTEGER, {b".": State.POINT, b"eE": State.EXPONENT}),
    State.POINT: _row(None, _ERROR, {_DIGITS: State.FRACTION}),
    State.FRACTION: _row(rb"[0-9]*+", _FLOAT, {b"eE": State.EXPONENT}),
    State.EXPONENT: _row(None, _ERROR, {_DIGITS: State.EXPONENT_DIGITS, b"+-": State.EXPONENT_SIGN}),
    State.EXPONENT_SIGN: _row(None, _ERROR, {_DIGITS: State.EXPONENT_DIGITS}),
    State.EXPONENT_DIGITS: _row(rb"[0-9]*+", _FLOAT, {}),
}

#: A token that is wholly there and needs no look at its bytes: most of them are such.
_EASY: Final = re.compile(rb"""[ \t\r\n]*+(?:([{}\[\]:,])|"[^"\\\x00-\x1f\xfe\xff]*+")""")


class Lexer:
    """Bytes in, tokens out; remembers an unfinished token between two calls.

    :param token: called with each token's kind and its bytes, quotes included.
        A token over :data:`MAXIMUM_SIZE` is given as `Kind.TOO_LONG` without its
        bytes, and the lexer starts afresh with the byte after the one too many.
    """

    def __init__(self, token: Callable[[Kind, bytes], None]) -> None:
        self._token = token
        self._state = State.START
        # Not a list of pieces: a client may send one byte at a time.
        self._unfinished = bytearray()

    @property
    def idle(self) -> bool:
        """Whether the next byte would be the first one of a token."""
        return self._state is State.START

    def finish(self) -> None:
        """Take note that nothing more comes: an unfinished token ends here, for better or worse."""
        if self._state is not State.START and self._state is not State.RECOVERY:
            # What a NUL would do, which keeps no token going and is sound in none.
            step = _TABLE[self._state].steps[0]
            assert isinstance(step, End), "no state goes on after a NUL"
            text = bytes(self._unfinished)
            self._unfinished.clear()
            self._token(step.kind, text)
        self._state = State.START

    def feed(self, data: bytes) -> None:
        """Cut up more of the input; nothing is raised, errors are tokens."""
        state = self._state
        position = begin = 0
        size = len(data)
        while True:
            while state is State.START and (easy := _EASY.match(data, position)):
                kind = Kind.PUNCTUATION if easy.lastindex else Kind.STRING
                position = easy.end()
                self._token(kind, easy[1] or easy[0].lstrip())
            row = _TABLE[state]
            if row.run is not None:
                position = row.run.match(data, position).end()  # type: ignore[union-attr]  # may be empty
            if state is State.START or state is State.RECOVERY:
                begin = position
            elif len(self._unfinished) + position - begin > MAXIMUM_SIZE:
                position = begin + MAXIMUM_SIZE + 1 - len(self._unfinished)
                self._unfinished.clear()
                state, begin = State.START, position
                self._token(Kind.TOO_LONG, b"")
                continue
            if position >= size:
                break
            step = row.steps[data[position]]
            if isinstance(step, State):
                state = step
                position += 1
                continue
            if step.inclusive:
                position += 1
            text = data[begin:position]
            if self._unfinished:
                text = bytes(self._unfinished) + text
                self._unfinished.clear()
            begin = position
            state = State.RECOVERY if step.kind is Kind.ERROR else State.START
            self._token(step.kind, text)
        self._unfinished += data[begin:]
        self._state = state
