"""The QAPI schema language: text to expressions.

A schema file is a sequence of objects in a notation close to JSON: strings are
in single quotes, ``#`` begins a comment, and a block of comment lines between
two lines ``##`` documents the definition that follows it.  Each object is a
definition (struct, union, alternate, enum, command, event), an ``include`` of
another file, or a ``pragma``.

This module knows the notation and nothing about types: it returns every
definition as an :class:`Expression` whose tables remember where they stood,
so that :mod:`qmpd.qapi.resolve` can say in which line a mistake is.  The
language is described in QEMU's documentation, "How to use the QAPI code
generator", section "The QAPI schema language".
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple


class Location(NamedTuple):
    """A place in a schema file; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class SchemaError(Exception):
    """The schema is wrong.

    :param location: where; None if the file itself could not be read.
    :param text: what is wrong there.
    """

    def __init__(self, location: Location | None, text: str) -> None:
        super().__init__(f"{location}: {text}" if location else text)
        self.location = location
        self.text = text


class _Text:
    """A file's text, which turns an offset into a place.

    Places are wanted only for errors, so tables keep offsets.
    """

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def location(self, offset: int) -> Location:
        line = bisect_right(self._starts, offset)
        return Location(self._name, line, offset - self._starts[line - 1] + 1)


class Table(dict[str, Any]):
    """An object of the schema language that knows where it and its keys stand."""

    __slots__ = ("_offset", "_offsets", "_text")

    def __init__(self, text: _Text, offset: int) -> None:
        super().__init__()
        self._text = text
        self._offset = offset
        self._offsets: dict[str, int] = {}

    def place(self, key: str, offset: int) -> None:
        """Remember where a key stands."""
        self._offsets[key] = offset

    @property
    def location(self) -> Location:
        """The place of the opening brace."""
        return self._text.location(self._offset)

    def where(self, key: str) -> Location:
        """Return the place of a key, or of the table if it has no such key."""
        return self._text.location(self._offsets.get(key, self._offset))


class Sequence(list[Any]):
    """A list of the schema language that knows where its elements stand."""

    __slots__ = ("_offsets", "_text")

    def __init__(self, text: _Text) -> None:
        super().__init__()
        self._text = text
        self._offsets: list[int] = []

    def place(self, offset: int) -> None:
        """Remember where the element that is appended next stands."""
        self._offsets.append(offset)

    def where(self, index: int) -> Location:
        """Return the place of an element."""
        return self._text.location(self._offsets[index])


@dataclass(frozen=True, slots=True)
class Documentation:
    """A documentation comment.

    :param symbol: the definition that it names in its first line, or ''.
    :param body: the text up to the first described member or section.
    :param members: the text of each described member or feature.
    """

    location: Location
    symbol: str
    body: str
    members: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Expression:
    """One definition: ``kind`` is 'struct', 'command' ... and ``table`` all that was written."""

    kind: str
    name: str
    table: Table
    documentation: Documentation | None

    @property
    def location(self) -> Location:
        """The place of the definition's opening brace."""
        return self.table.location


@dataclass(slots=True)
class Pragmas:
    """What the schema's ``pragma`` objects ask for.

    The exceptions concern naming rules that this implementation does not
    impose; they are read so that a schema may carry them.
    """

    doc_required: bool = False
    exceptions: dict[str, list[str]] = field(default_factory=dict)


#: What may stand in each kind of definition: (required keys, optional keys).
_DEFINITIONS: Final[Mapping[str, tuple[frozenset[str], frozenset[str]]]] = {
    "enum": (frozenset({"data"}), frozenset({"prefix", "features"})),
    "struct": (frozenset({"data"}), frozenset({"base", "features"})),
    "union": (frozenset({"base", "discriminator", "data"}), frozenset({"features"})),
    "alternate": (frozenset({"data"}), frozenset({"features"})),
    "command": (
        frozenset(),
        frozenset(
            {
                "data",
                "boxed",
                "returns",
                "success-response",
                "gen",
                "allow-oob",
                "allow-preconfig",
                "coroutine",
                "features",
            }
        ),
    ),
    "event": (frozenset(), frozenset({"data", "boxed", "features"})),
}

#: A condition decides at build time what a program knows; this schema is read
#: at run time and describes one program.
NO_CONDITIONS: Final = "'if' conditions are not supported"

_PRAGMA_LISTS: Final = frozenset(
    {
        "command-name-exceptions",
        "command-returns-exceptions",
        "documentation-exceptions",
        "member-name-exceptions",
    }
)

_TOKEN: Final = re.compile(
    r"""
      (?P<space>[ \t\r\n]+)
    | (?P<comment>\#[^\n]*)
    | (?P<punctuation>[{}\[\],:])
    | (?P<string>'[^'\n]*')
    | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
    """,
    re.VERBOSE,
)

#: A string may hold printable ASCII except the backslash: names need no more.
_PLAIN: Final = re.compile(r"[\x20-\x5b\x5d-\x7e]*")
_SYMBOL: Final = re.compile(r"@([^\s:]+):[ \t]*(.*)")
_SECTION: Final = re.compile(r"(Features|Returns|Errors|Since|TODO|Notes?|Examples?):|\.\. [a-z-]+::")
#: Deep enough for any schema, and far from the interpreter's own limit.
_DEEPEST: Final = 64


class _Token(NamedTuple):
    kind: str
    text: str
    offset: int


class _Source:
    """One file's text as tokens with one token of look-ahead."""

    def __init__(self, name: str, text: str) -> None:
        self.text = _Text(name, text)
        self._characters = text
        self._tokens = self._scan()
        self.token = next(self._tokens)

    def error(self, token: _Token, text: str) -> SchemaError:
        """Make the error for a token."""
        return SchemaError(self.text.location(token.offset), text)

    def _scan(self) -> Iterator[_Token]:
        characters, offset, match_token = self._characters, 0, _TOKEN.match
        while offset < len(characters):
            match = match_token(characters, offset)
            if match is None:
                what = characters[offset]
                text = "missing closing quote" if what == "'" else f"stray {what!r}"
                raise SchemaError(self.text.location(offset), text)
            kind = match.lastgroup
            end = match.end()
            if kind == "punctuation" or kind == "word":
                yield _Token(kind, match.group(), offset)
            elif kind == "string":
                text = match.group()
                if not _PLAIN.fullmatch(text):
                    raise SchemaError(
                        self.text.location(offset), "a string holds printable ASCII without backslash"
                    )
                yield _Token(kind, text[1:-1], offset)
            elif kind == "comment" and match.group().rstrip() == "##" and self._begins_line(offset):
                end = self._end_of_documentation(offset, end)
                yield _Token("documentation", characters[offset:end], offset)
            offset = end
        yield _Token("end", "end of file", len(characters))

    def _begins_line(self, offset: int) -> bool:
        return offset == 0 or self._characters[offset - 1] == "\n"

    def _end_of_documentation(self, opening: int, offset: int) -> int:
        characters = self._characters
        while offset < len(characters):
            start = offset + 1
            end = characters.find("\n", start)
            end = len(characters) if end < 0 else end
            line = characters[start:end].rstrip()
            if line == "##":
                return end
            if not line.startswith("#"):
                break
            offset = end
        raise SchemaError(self.text.location(opening), "documentation comment must end with '##'")

    def advance(self) -> _Token:
        token = self.token
        if token.kind != "end":
            self.token = next(self._tokens)
        return token

    def expect(self, text: str, instead: str) -> _Token:
        if self.token.kind == "punctuation" and self.token.text == text:
            return self.advance()
        raise self.error(self.token, f"expected {instead}")

    def at(self, text: str) -> bool:
        return self.token.kind == "punctuation" and self.token.text == text


def _value(source: _Source, depth: int) -> Any:
    token = source.token
    if depth > _DEEPEST:
        raise source.error(token, f"nested deeper than {_DEEPEST} levels")
    if source.at("{"):
        return _table(source, depth)
    if source.at("["):
        return _sequence(source, depth)
    if token.kind == "string":
        return source.advance().text
    if token.kind == "word" and token.text in ("true", "false"):
        return source.advance().text == "true"
    raise source.error(token, "expected '{', '[', string, or boolean")


def _table(source: _Source, depth: int) -> Table:
    table = Table(source.text, source.expect("{", "'{'").offset)
    if source.at("}"):
        source.advance()
        return table
    while True:
        key = source.token
        if key.kind != "string":
            raise source.error(key, "expected string or '}'" if not table else "expected string")
        source.advance()
        source.expect(":", "':'")
        if key.text in table:
            raise source.error(key, f"duplicate key '{key.text}'")
        table[key.text] = _value(source, depth + 1)
        table.place(key.text, key.offset)
        if source.at("}"):
            source.advance()
            return table
        source.expect(",", "',' or '}'")


def _sequence(source: _Source, depth: int) -> Sequence:
    source.expect("[", "'['")
    sequence = Sequence(source.text)
    if source.at("]"):
        source.advance()
        return sequence
    while True:
        sequence.place(source.token.offset)
        sequence.append(_value(source, depth + 1))
        if source.at("]"):
            source.advance()
            return sequence
        source.expect(",", "',' or ']'")


def _documentation(token: _Token, source: _Source) -> Documentation:
    """Split a documentation comment into its body and its members' texts."""
    symbol = ""
    body: list[str] = []
    members: dict[str, list[str]] = {}
    target = body
    location = source.text.location(token.offset)
    for raw in token.text.split("\n")[1:-1]:
        line = raw[1:].removeprefix(" ")
        described = _SYMBOL.match(line) if line.startswith("@") else None
        if described and not symbol and not any(body):
            symbol = described[1]
            body.append(described[2])
        elif described and symbol:
            if described[1] in members:
                raise source.error(token, f"'{described[1]}' is documented twice")
            target = members[described[1]] = [described[2]]
        elif _SECTION.match(line):
            # A section is for readers of the file; only its heading ends what came before.
            target = []
        else:
            target.append(line.strip())
    return Documentation(
        location, symbol, _paragraph(body), {name: _paragraph(text) for name, text in members.items()}
    )


def _paragraph(lines: list[str]) -> str:
    """Join lines into paragraphs, one line each, empty lines between them."""
    text = "\n".join(lines).strip()
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text))


class _Reader:
    """Reads a file and what it includes, each file once."""

    def __init__(self) -> None:
        self.expressions: list[Expression] = []
        self.pragmas = Pragmas()
        self._seen: set[Path] = set()

    def file(self, path: Path, location: Location | None, chain: tuple[Path, ...]) -> None:
        real = path.resolve()
        if real in chain:
            raise SchemaError(location, f"inclusion loop for {path.name}")
        if real in self._seen:
            return
        self._seen.add(real)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise SchemaError(location, f"can't read schema file '{path}': {reason}") from None
        self.text(str(path), text, path.parent, (*chain, real))

    def text(self, name: str, text: str, directory: Path, chain: tuple[Path, ...]) -> None:
        source = _Source(name, text)
        documentation: Documentation | None = None
        while source.token.kind != "end":
            if source.token.kind == "documentation":
                self._unused(documentation)
                documentation = _documentation(source.advance(), source)
                continue
            table = _table(source, 0)
            if "include" in table:
                self._unused(documentation)
                self._include(table, directory, chain)
            elif "pragma" in table:
                self._unused(documentation)
                self._pragma(table)
            else:
                self.expressions.append(self._definition(table, documentation))
            documentation = None
        self._unused(documentation)

    @staticmethod
    def _unused(documentation: Documentation | None) -> None:
        if documentation and documentation.symbol:
            raise SchemaError(
                documentation.location,
                f"documentation for '{documentation.symbol}' is not followed by its definition",
            )

    def _include(self, table: Table, directory: Path, chain: tuple[Path, ...]) -> None:
        target = table["include"]
        if len(table) > 1:
            raise SchemaError(table.location, "invalid 'include' directive: it must stand alone")
        if not isinstance(target, str) or not target:
            raise SchemaError(table.where("include"), "value of 'include' must be a string")
        self.file(directory / target, table.where("include"), chain)

    def _pragma(self, table: Table) -> None:
        pragmas = table["pragma"]
        if len(table) > 1:
            raise SchemaError(table.location, "invalid 'pragma' directive: it must stand alone")
        if not isinstance(pragmas, Table):
            raise SchemaError(table.where("pragma"), "value of 'pragma' must be an object")
        for name, value in pragmas.items():
            if name == "doc-required":
                if not isinstance(value, bool):
                    raise SchemaError(pragmas.where(name), f"pragma '{name}' must be boolean")
                self.pragmas.doc_required = value
            elif name in _PRAGMA_LISTS:
                if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                    raise SchemaError(pragmas.where(name), f"pragma '{name}' must be a list of strings")
                self.pragmas.exceptions.setdefault(name, []).extend(value)
            else:
                raise SchemaError(pragmas.where(name), f"unknown pragma '{name}'")

    def _definition(self, table: Table, documentation: Documentation | None) -> Expression:
        kinds = [kind for kind in _DEFINITIONS if kind in table]
        if not kinds:
            raise SchemaError(
                table.location, f"expression needs one of the keys {', '.join(sorted(_DEFINITIONS))}"
            )
        kind = kinds[0]
        if len(kinds) > 1:
            raise SchemaError(table.location, f"expression has both '{kinds[0]}' and '{kinds[1]}'")
        name = table[kind]
        if not isinstance(name, str):
            raise SchemaError(table.where(kind), f"'{kind}' key must have a string value")
        required, optional = _DEFINITIONS[kind]
        for key in table:
            if key == "if":
                raise SchemaError(table.where(key), NO_CONDITIONS)
            if key != kind and key not in required and key not in optional:
                raise SchemaError(table.where(key), f"{kind} '{name}' has unknown key '{key}'")
        for key in sorted(required):
            if key not in table:
                raise SchemaError(table.location, f"{kind} '{name}' misses key '{key}'")
        if documentation and documentation.symbol and documentation.symbol != name:
            raise SchemaError(
                documentation.location, f"documentation for '{documentation.symbol}' stands before '{name}'"
            )
        if self.pragmas.doc_required and not (documentation and documentation.symbol):
            raise SchemaError(table.location, f"documentation comment required for {kind} '{name}'")
        described = documentation if documentation and documentation.symbol else None
        return Expression(kind, name, table, described)


def parse_file(path: str | Path) -> tuple[list[Expression], Pragmas]:
    """Read a schema file and everything that it includes.

    :return: the definitions in the order in which they are met, and the pragmas.
    :raise SchemaError: if a file can't be read or is not in the schema language.
    """
    reader = _Reader()
    reader.file(Path(path), None, ())
    return reader.expressions, reader.pragmas


def parse_text(
    text: str, name: str = "<text>", directory: str | Path = "."
) -> tuple[list[Expression], Pragmas]:
    """Read a schema from a string; ``name`` stands in its errors.

    :raise SchemaError: as :func:`parse_file`.
    """
    reader = _Reader()
    reader.text(name, text, Path(directory), ())
    return reader.expressions, reader.pragmas
