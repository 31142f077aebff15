"""Everything in the schema is explained, and every file says under which licence it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from qmpd.qapi import schema_directory

FILES: Final = sorted(Path(schema_directory()).glob("*.json"))

#: A documentation block directly before an expression.
EXPLAINED: Final = re.compile(r"^##\n(?P<doc>(?:^#(?: .*)?\n)+?)##\n(?P<expression>^\{(?:.*\n)+?)(?=\n|\Z)", re.M)
DEFINITION: Final = re.compile(
    r"^\{ '(?:struct|union|alternate|enum|command|event)': '(?P<name>[^']+)'", re.M
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_definition_has_a_block_of_its_own(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    explained = set()
    for block in EXPLAINED.finditer(text):
        name = DEFINITION.match(block["expression"])
        if name is not None:
            assert block["doc"].startswith(f"# @{name['name']}:\n"), f"the block before {name['name']}"
            explained.add(name["name"])
    assert explained == {found["name"] for found in DEFINITION.finditer(text)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_member_is_explained(path: Path) -> None:
    for block in EXPLAINED.finditer(path.read_text(encoding="utf-8")):
        expression = block["expression"]
        name = DEFINITION.match(expression)
        if name is None:
            continue
        if expression.startswith("{ 'enum'"):
            values = re.findall(r"'([^']+)'", expression.partition("'data':")[2])
            members = {value for value in values if value not in ("name", "features", "deprecated")}
        elif expression.startswith("{ 'union'"):
            members = set(re.findall(r"'\*?([^']+)': ", expression.partition("'discriminator'")[0])) - {"union", "base"}
        else:
            data = re.search(r"'data': (\{.*?\})(?:,\n  '|\s*\}\s*\Z)", expression, re.S)
            members = set(re.findall(r"'\*?([^']+)': ", data[1] if data else "")) - {"type", "features"}
        documented = set(re.findall(r"^# @([^ :]+):", block["doc"], re.M)) - {name["name"]}
        assert members <= documented, f"{name['name']}: {members - documented}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_names_its_licence(path: Path) -> None:
    head = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert "# SPDX-License-Identifier: Apache-2.0" in head
