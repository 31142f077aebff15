from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.qapi import SchemaError, load
from qmpd.qapi.parser import parse_file, parse_text
from qmpd.qapi.resolve import resolve


def test_definitions_come_in_the_order_of_the_text_with_comments_ignored() -> None:
    expressions, _ = parse_text(
        "# a comment\n{ 'struct': 'B', 'data': {} } # another\n{ 'enum': 'A', 'data': [ 'x' ] }\n"
    )
    assert [(each.kind, each.name) for each in expressions] == [("struct", "B"), ("enum", "A")]


def test_documentation_is_split_into_body_members_and_sections() -> None:
    expressions, _ = parse_text(
        """
##
# = A heading that documents nothing
##

##
# @T:
#
# Two lines
# of text.
#
# Another paragraph.
#
# @a: first
#     and more
#
# Features:
#
# @deprecated: not this
#
# Since: 1.0
##
{ 'struct': 'T', 'data': { 'a': 'int' }, 'features': [ 'deprecated' ] }
"""
    )
    documentation = expressions[0].documentation
    assert documentation is not None
    assert documentation.body == "Two lines of text.\n\nAnother paragraph."
    assert documentation.members == {"a": "first and more", "deprecated": "not this"}


def test_each_file_is_included_once_and_relative_to_the_one_that_includes_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "qapi-schema.json").write_text(
        "{ 'include': 'sub/one.json' } { 'include': 'sub/two.json' } { 'enum': 'C', 'data': [ 'c' ] }"
    )
    (tmp_path / "sub" / "one.json").write_text("{ 'include': 'two.json' } { 'enum': 'A', 'data': [ 'a' ] }")
    (tmp_path / "sub" / "two.json").write_text("{ 'enum': 'B', 'data': [ 'b' ] }")
    expressions, _ = parse_file(tmp_path / "qapi-schema.json")
    assert [each.name for each in expressions] == ["B", "A", "C"]


def test_an_inclusion_loop_is_refused_at_the_include(tmp_path: Path) -> None:
    (tmp_path / "qapi-schema.json").write_text("{ 'include': 'other.json' }")
    (tmp_path / "other.json").write_text("\n { 'include': 'qapi-schema.json' }")
    with pytest.raises(SchemaError, match=r"other\.json:2:4: inclusion loop for qapi-schema\.json"):
        load(tmp_path)


def test_a_missing_file_is_named_at_its_include(tmp_path: Path) -> None:
    (tmp_path / "qapi-schema.json").write_text("{ 'include': 'gone.json' }")
    with pytest.raises(SchemaError, match=r"qapi-schema\.json:1:3: can't read schema file .*gone\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{ 'struct': 'A'", "s:1:16: expected ',' or '}'"),
        ("{ 'struct' 'A' }", "s:1:12: expected ':'"),
        ("\n\n  @", "s:3:3: stray '@'"),
        ("{ 'a\n", "s:1:3: missing closing quote"),
        ("{ 'struct': 'A', 'struct': 'B' }", "s:1:18: duplicate key 'struct'"),
        ("{ 'enum': 'A', 'data': [ 'x' 'y' ] }", "s:1:30: expected ',' or ']'"),
        ("{ 'enum': 'A', 'data': null }", "s:1:24: expected '{', '[', string, or boolean"),
        ("{ 1: 2 }", "s:1:3: stray '1'"),
        ("'x'", "s:1:1: expected '{'"),
        ("{ 'enum': '\\n', 'data': [] }", "s:1:11: a string holds printable ASCII without backslash"),
        ("{ 'data': {} }", "s:1:1: expression needs one of the keys"),
        ("{ 'enum': 'A', 'struct': 'B', 'data': [] }", "s:1:1: expression has both 'enum' and 'struct'"),
        ("{ 'struct': 'A', 'data': {}, 'bogus': true }", "s:1:30: struct 'A' has unknown key 'bogus'"),
        ("{ 'struct': 'A' }", "s:1:1: struct 'A' misses key 'data'"),
        ("{ 'struct': 'A', 'data': {}, 'if': 'X' }", "s:1:30: 'if' conditions are not supported"),
        (
            "{ 'struct': 'A', 'data': { 'a': { 'type': 'int', 'if': 'X' } } }",
            "s:1:50: 'if' conditions are not supported",
        ),
        ("{ 'pragma': { 'doc-required': 'yes' } }", "s:1:15: pragma 'doc-required' must be boolean"),
        ("{ 'pragma': { 'bogus': true } }", "s:1:15: unknown pragma 'bogus'"),
        ("{ 'include': [] }", "s:1:3: value of 'include' must be a string"),
        ("##\n# @A:\n", "s:1:1: documentation comment must end with '##'"),
        (
            "##\n# @A:\n##\n{ 'enum': 'B', 'data': [] }",
            "s:1:1: documentation for 'A' stands before 'B'",
        ),
        ("##\n# @A:\n##\n", "s:1:1: documentation for 'A' is not followed by its definition"),
        (
            "##\n# @A:\n# @x: 1\n# @x: 2\n##\n{ 'struct': 'A', 'data': { 'x': 'int' } }",
            "s:1:1: 'x' is documented twice",
        ),
        (
            "##\n# @A:\n# @y: what\n##\n{ 'struct': 'A', 'data': { 'x': 'int' } }",
            "s:1:1: documentation of 'A' describes 'y', which it does not have",
        ),
        (
            "{ 'pragma': { 'doc-required': true } }\n{ 'enum': 'B', 'data': [] }",
            "s:2:1: documentation comment required for enum 'B'",
        ),
        ("{ 'a': " + "[" * 100, "s:1:72: nested deeper than 64 levels"),
    ],
)
def test_a_mistake_in_the_text_is_named_with_its_place(text: str, error: str) -> None:
    with pytest.raises(SchemaError) as caught:
        resolve(parse_text(text, "s")[0])
    assert str(caught.value).startswith(error)


# Fragments of the language, so that random texts get past the first token.
_WORDS = (
    "{ } [ ] , : 'struct' 'union' 'alternate' 'enum' 'command' 'event' 'data' 'base' 'discriminator' "
    "'features' 'returns' 'boxed' 'gen' true false 'A' 'B' 'int' 'str' 'x' '*x' 'type' 'name' 'if' null "
    "'pragma' 'include' 'any' '"
)
_FRAGMENTS = st.sampled_from([*_WORDS.split(" "), "##\n# @A:\n##\n", "# c\n", "\n"])


@settings(deadline=None)
@given(st.lists(_FRAGMENTS, max_size=40).map(" ".join) | st.text(max_size=80))
def test_any_text_is_a_schema_or_a_schema_error(text: str) -> None:
    with suppress(SchemaError):
        resolve(parse_text(text)[0])


_NAMES = st.sampled_from(["A", "B", "C", "int", "str", "any", "null", "x"])
_TYPES = _NAMES | st.lists(_NAMES, max_size=2) | st.fixed_dictionaries({"type": _NAMES})
_MEMBERS = st.dictionaries(st.sampled_from(["a", "*b", "x-c", "d_e", "d-e", "", "*"]), _TYPES, max_size=3)
_DATA = _MEMBERS | _NAMES | st.lists(_NAMES | st.fixed_dictionaries({"name": _NAMES}), max_size=3)
_DEFINITIONS = st.fixed_dictionaries(
    {"data": _DATA},
    optional={
        "base": _MEMBERS | _NAMES,
        "discriminator": st.sampled_from(["a", "b", "x"]),
        "features": st.lists(st.sampled_from(["deprecated", "f"]), max_size=2),
        "returns": _TYPES,
        "boxed": st.booleans(),
        "gen": st.booleans(),
    },
)
_KINDS = st.sampled_from(["struct", "union", "alternate", "enum", "command", "event"])


@settings(deadline=None)
@given(st.lists(st.tuples(_KINDS, _NAMES, _DEFINITIONS), max_size=5))
def test_well_formed_definitions_are_a_schema_or_a_schema_error(definitions: list[tuple]) -> None:
    text = "\n".join(repr({kind: name} | rest) for kind, name, rest in definitions)
    text = text.replace("True", "true").replace("False", "false")
    with suppress(SchemaError):
        resolve(parse_text(text)[0])
