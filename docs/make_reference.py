#!/usr/bin/env python3
"""Write docs/qmp-reference.md: every command, event and type, out of the schema's own comments.

python docs/make_reference.py            # writes the file
python docs/make_reference.py --check    # fails if the file is not what would be written
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

CHECKOUT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from qmpd.qapi import STORAGE_SCHEMA, SYSTEM_SCHEMA, schema_directory  # noqa: E402
from qmpd.qapi.parser import Expression, parse_file  # noqa: E402

TARGET: Final = CHECKOUT / "docs" / "qmp-reference.md"

HEAD: Final = """\
# QMP reference

Every command, event and type that a client of qmpd can meet.  This page is written by
`docs/make_reference.py` out of the comments in `schema/`; change them, not this page.

A member in *italics* may be left out.  A section says so if only the emulator,
`qmpd-system-x86_64`, has what is in it; all else is in both programs.
"""

EMULATOR_ONLY: Final = "Only `qmpd-system-x86_64` has these."

#: The kinds of definitions that get a heading, and what they are called there.
KINDS: Final[Mapping[str, str]] = {
    "command": "command",
    "event": "event",
    "struct": "object",
    "union": "object with branches",
    "alternate": "alternate",
    "enum": "enumeration",
}


def anchor(name: str) -> str:
    """Return the fragment that Markdown renderers give to a heading with this name in code quotes."""
    return re.sub(r"[^\w-]", "", name.lower())


class Page:
    """Renders definitions as Markdown; knows all names, so as to link them.

    :param in_both: the names of the files whose definitions both programs have.
    """

    def __init__(self, expressions: list[Expression], in_both: set[str]) -> None:
        self.expressions = expressions
        self.in_both = in_both
        self.names = {expression.name for expression in expressions}

    def text(self) -> str:
        """Return the whole page."""
        by_file: dict[str, list[Expression]] = {}
        for expression in self.expressions:
            by_file.setdefault(file_of(expression), []).append(expression)
        lines = [HEAD]
        for file, expressions in by_file.items():
            lines += [f"## {title(file)}", ""]
            if file not in self.in_both:
                lines += [EMULATOR_ONLY, ""]
            for expression in expressions:
                lines += self.definition(expression)
        return "\n".join(lines).rstrip() + "\n"

    def definition(self, expression: Expression) -> Iterator[str]:
        """Yield the lines about one definition."""
        table = expression.table
        documentation = expression.documentation
        assert documentation is not None, f"{expression.name} is not explained"
        yield f"### `{expression.name}`"
        yield ""
        kind = KINDS[expression.kind].capitalize()
        base = table.get("base")
        extends = f", extends {self.type(base)}" if isinstance(base, str) else ""
        yield f"*{kind}{extends}.* {self.prose(documentation.body)}"
        yield ""
        explained = dict(documentation.members)
        items = list(self.members(table, expression.kind, explained))
        features = [
            feature if isinstance(feature, str) else feature["name"] for feature in table.get("features", ())
        ]
        items += [
            f"- feature `{name}`: {self.prose(explained[name])}" for name in features if name in explained
        ]
        if items:
            yield from items
            yield ""
        if "returns" in table:
            yield f"Returns {self.type(table['returns'])}."
            yield ""

    def members(self, table: Mapping[str, Any], kind: str, explained: Mapping[str, str]) -> Iterator[str]:
        """Yield an item for each member, value, alternative or branch."""
        data = table.get("data", {})
        if kind == "enum":
            for value in data:
                plain = {"name": value} if isinstance(value, str) else value
                yield f"- `{plain['name']}`{marks(plain)}: {self.prose(explained[plain['name']])}"
            return
        if isinstance(data, str):
            yield f"- the members of {self.type(data)}"
            return
        base = table.get("base")
        own = {**base} if isinstance(base, Mapping) else {}
        if kind != "union":
            own |= data
        for written, value in own.items():
            detail = value if isinstance(value, Mapping) else {"type": value}
            name = written.removeprefix("*")
            shown = f"*`{name}`*" if written.startswith("*") else f"`{name}`"
            yield f"- {shown} ({self.type(detail['type'])}){marks(detail)}: {self.prose(explained[name])}"
        if kind == "union":
            for case, branch in data.items():
                yield f"- if `{table['discriminator']}` is `{case}`: the members of {self.type(branch)}"

    def type(self, written: Any) -> str:
        """Return a type as it is written in the schema, linked if it has a place on this page."""
        if isinstance(written, Mapping):
            return self.type(written["type"])
        if isinstance(written, list):
            return f"list of {self.type(written[0])}"
        return f"[`{written}`](#{anchor(written)})" if written in self.names else f"`{written}`"

    def prose(self, text: str) -> str:
        """Turn a comment's markup into Markdown's: ``@name`` and double quotes become code."""
        text = text.replace("``", "`")
        return re.sub(
            r"@([A-Za-z_][\w-]*)",
            lambda found: self.type(found[1]),
            text,
        )


def file_of(expression: Expression) -> str:
    """Return the name of the schema file that a definition is in."""
    return Path(expression.location.file).name


def title(file: str) -> str:
    """Return the heading in the first comment of a schema file."""
    text = (Path(schema_directory()) / file).read_text(encoding="utf-8")
    found = re.search(r"^# = (.*)$", text, re.M)
    assert found is not None, f"{file} has no title"
    return found[1]


def marks(detail: Mapping[str, Any]) -> str:
    """Return the features of a member or a value, such as ", deprecated"."""
    return "".join(f", {feature}" for feature in detail.get("features", ()))


def main(arguments: list[str]) -> int:
    """Write the page, or compare it with the file."""
    common, _ = parse_file(Path(schema_directory()) / STORAGE_SCHEMA)
    expressions, _ = parse_file(Path(schema_directory()) / SYSTEM_SCHEMA)
    text = Page(expressions, {file_of(expression) for expression in common}).text()
    if "--check" in arguments:
        if TARGET.read_text(encoding="utf-8") != text:
            print(f"{TARGET.name} is out of date: run docs/make_reference.py", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
