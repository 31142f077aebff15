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
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple


class Location:
    """A place in a schema file.

    Places are wanted only for errors, so this is no more than a token's number until somebody looks.
    """

    __slots__ = ("_number", "_text")

    def __init__(self, text: _Text, number: int) -> None:
        self._text = text
        self._number = number

    @property
    def file(self) -> str:
        """The file's path, or what else a text is called."""
        return self._text.name

    def __str__(self) -> str:
        line, column = self._text.line_and_column(self._number)
        return f"{self.file}:{line}:{column}"


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
    """A file's text as tokens, strings all of them, which tell what they are by their first character.

    The last one is the empty string at the end of the text.
    """

    def __init__(self, name: str, characters: str) -> None:
        self.name = name
        self.tokens: list[str] = _TOKEN.findall(characters)
        self._characters = characters

    def line_and_column(self, number: int) -> tuple[int, int]:
        """Return where a token begins; both count from 1."""
        before = self._characters[: self._offset(number)]
        return before.count("\n") + 1, len(before) - before.rfind("\n")

    def fault(self, number: int) -> str | None:
        """Return what is wrong with a token itself; None if it is one of the language."""
        if self.tokens[number] == "#":
            return "documentation comment must end with '##'"
        if self.tokens[number] == "'":
            if _CLOSED.match(self._characters, self._offset(number)):
                return "a string holds printable ASCII without backslash"
            return "missing closing quote"
        if _STRAY.fullmatch(self.tokens[number]):
            return f"stray {self.tokens[number]!r}"
        return None

    def _offset(self, number: int) -> int:
        return next(islice(_TOKEN.finditer(self._characters), number, None)).start(1)


class Table(dict[str, Any]):
    """An object of the schema language that knows where it and its keys stand."""

    __slots__ = ("_number", "_numbers", "_text")

    def __init__(self, text: _Text, number: int) -> None:
        super().__init__()
        self._text = text
        self._number = number
        self._numbers: dict[str, int] = {}

    def place(self, key: str, number: int) -> None:
        """Remember which token a key is."""
        self._numbers[key] = number

    @property
    def location(self) -> Location:
        """The place of the opening brace."""
        return Location(self._text, self._number)

    def where(self, key: str) -> Location:
        """Return the place of a key, or of the table if it has no such key."""
        return Location(self._text, self._numbers.get(key, self._number))


class Sequence(list[Any]):
    """A list of the schema language that knows where its elements stand."""

    __slots__ = ("_numbers", "_text")

    def __init__(self, text: _Text) -> None:
        super().__init__()
        self._text = text
        self._numbers: list[int] = []

    def place(self, number: int) -> None:
        """Remember the first token of the element that is appended next."""
        self._numbers.append(number)

    def where(self, index: int) -> Location:
        """Return the place of an element."""
        return Location(self._text, self._numbers[index])


class Documentation(NamedTuple):
    """A documentation comment.

    :param symbol: the definition that it names in its first line.
    :param body: the text up to the first described member or section.
    :param members: the text of each described member or feature.
    """

    location: Location
    symbol: str
    body: str
    members: Mapping[str, str]


class Expression(NamedTuple):
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

#: One token, after space and the comments that document nothing.  A string may hold printable ASCII except
#: the backslash: names need no more.  A character that begins no token is one by itself, so nothing is passed
#: over; so is the quote of a faulty string, and the first '#' of a documentation comment without an end.
_TOKEN: Final = re.compile(
    r"""
    (?: [ \t\r\n]+ | (?! ^\#\#[^\S\n]*$ ) \#[^\n]* )*
    (
      [{}\[\],:]
    | '[\x20-\x26\x28-\x5b\x5d-\x7e]*'
    | [A-Za-z_][A-Za-z0-9_]*
    | ^\#\#[^\S\n]*\n (?:\#[^\n]*\n)*? \#\#[^\S\n]*$
    | .
    | \Z
    )
    """,
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
_CLOSED: Final = re.compile(r"'[^'\n]*'")
_STRAY: Final = re.compile(r"[^{}\[\],:A-Za-z_]")

#: What a line of a documentation comment begins with.
_MARGIN: Final = re.compile(r"\n# ?")
#: The definition, a member or feature, or a section.
_HEADING: Final = re.compile(
    r"\n(?:@([^\s:]+):|(?:Features|Returns|Errors|Since|TODO|Notes?|Examples?):|\.\. [a-z-]+::)"
)
_EMPTY_LINES: Final = re.compile(r"\n\s*\n")
#: Deep enough for any schema, and far from the interpreter's own limit.
_DEEPEST: Final = 64


class _Source:
    """One file's tokens, of which the first that is not yet taken can be seen."""

    def __init__(self, name: str, text: str) -> None:
        self.text = _Text(name, text)
        self._tokens = self.text.tokens
        self.number = 0
        self.token = self._tokens[0]

    def error(self, number: int, text: str) -> SchemaError:
        """Make the error for a token, which may be none of the language at all."""
        return SchemaError(Location(self.text, number), self.text.fault(number) or text)

    def advance(self) -> int:
        """Take the token; return its number."""
        number = self.number
        self.number = number + 1
        self.token = self._tokens[number + 1]
        return number

    def expect(self, text: str, instead: str) -> int:
        """Take a punctuation character; return its number."""
        if self.token == text:
            return self.advance()
        raise self.error(self.number, f"expected {instead}")


def _value(source: _Source, depth: int) -> Any:
    token = source.token
    if depth > _DEEPEST:
        raise source.error(source.number, f"nested deeper than {_DEEPEST} levels")
    if len(token) > 1 and token[0] == "'":
        source.advance()
        return token[1:-1]
    if token == "{":
        return _table(source, depth)
    if token == "[":
        return _sequence(source, depth)
    if token in ("true", "false"):
        source.advance()
        return token == "true"
    raise source.error(source.number, "expected '{', '[', string, or boolean")


def _table(source: _Source, depth: int) -> Table:
    table = Table(source.text, source.expect("{", "'{'"))
    if source.token == "}":
        source.advance()
        return table
    while True:
        token = source.token
        if len(token) < 2 or token[0] != "'":
            raise source.error(source.number, "expected string or '}'" if not table else "expected string")
        number = source.advance()
        source.expect(":", "':'")
        key = token[1:-1]
        if key in table:
            raise source.error(number, f"duplicate key '{key}'")
        table[key] = _value(source, depth + 1)
        table.place(key, number)
        if source.token == "}":
            source.advance()
            return table
        source.expect(",", "',' or '}'")


def _sequence(source: _Source, depth: int) -> Sequence:
    source.expect("[", "'['")
    sequence = Sequence(source.text)
    if source.token == "]":
        source.advance()
        return sequence
    while True:
        sequence.place(source.number)
        sequence.append(_value(source, depth + 1))
        if source.token == "]":
            source.advance()
            return sequence
        source.expect(",", "',' or ']'")


def _documentation(source: _Source) -> Documentation | None:
    """Take a documentation comment; None if it names no definition, but stands for itself."""
    comment = source.token
    number = source.advance()
    text = _MARGIN.sub("\n", comment[comment.index("\n") : comment.rindex("\n")])
    headings = list(_HEADING.finditer(text))
    if not headings or not headings[0][1] or text[: headings[0].start()].strip():
        return None
    ends = [*(heading.start() for heading in headings[1:]), len(text)]
    # A section is for readers of the file; only its heading ends what came before.
    described = [
        (heading[1], _paragraphs(text[heading.end() : end]))
        for heading, end in zip(headings, ends, strict=True)
        if heading[1]
    ]
    (symbol, body), *members = described
    texts: dict[str, str] = {}
    for name, member_text in members:
        if name in texts:
            raise source.error(number, f"'{name}' is documented twice")
        texts[name] = member_text
    return Documentation(Location(source.text, number), symbol, body, texts)


def _paragraphs(text: str) -> str:
    """Join lines into paragraphs, one line each, empty lines between them."""
    return "\n\n".join(" ".join(part.split()) for part in _EMPTY_LINES.split(text.strip()))


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
        while source.token:
            if source.token.startswith("##"):
                self._unused(documentation)
                documentation = _documentation(source)
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
        if documentation:
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
        if documentation and documentation.symbol != name:
            raise SchemaError(
                documentation.location, f"documentation for '{documentation.symbol}' stands before '{name}'"
            )
        if self.pragmas.doc_required and not documentation:
            raise SchemaError(table.location, f"documentation comment required for {kind} '{name}'")
        return Expression(kind, name, table, documentation)


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
