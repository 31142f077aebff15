"""Everything in the schema is explained, and every file says under which licence it is."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from qmpd.qapi import SYSTEM_SCHEMA, load, schema_directory
from qmpd.qapi.types import BUILTINS, QTYPE, AlternateType, EnumType, ObjectType

SCHEMA: Final = load(schema_directory(), SYSTEM_SCHEMA)
FILES: Final = sorted(Path(schema_directory()).glob("*.json"))


def test_every_command_and_event_is_explained() -> None:
    definitions = [*SCHEMA.commands.values(), *SCHEMA.events.values()]
    assert [definition.name for definition in definitions if not definition.doc] == []


def test_every_type_that_has_a_name_is_explained() -> None:
    named = [
        name
        for name in SCHEMA.types
        if name not in BUILTINS and ":" not in name and not name.startswith("[")  # made up by the parser
    ]
    assert len(named) > 50
    assert [name for name in named if not SCHEMA.types[name].doc] == []


def test_every_member_and_value_is_explained() -> None:
    unexplained = []
    for name, type_ in SCHEMA.types.items():
        parts = ()
        if isinstance(type_, ObjectType | AlternateType):
            parts = type_.members
        elif isinstance(type_, EnumType) and type_ is not QTYPE:
            parts = type_.values
        unexplained += [f"{name}.{part.name}" for part in parts if not part.doc]
    assert unexplained == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_names_its_licence(path: Path) -> None:
    head = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert "# SPDX-License-Identifier: Apache-2.0" in head
