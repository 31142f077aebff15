from __future__ import annotations

import pytest

from qmpd.qapi import Schema, SchemaError, loads
from qmpd.qapi.types import AlternateType, EnumType, ObjectType

ENUM = "{ 'enum': 'E', 'data': [ 'a', 'b' ] } "
STRUCT = "{ 'struct': 'S', 'data': { 'x': 'int' } } "


def test_base_members_stand_before_the_objects_own(schema: Schema) -> None:
    raw = schema.types["OptionsRaw"]
    assert isinstance(raw, ObjectType)
    assert [member.name for member in raw.members] == ["file", "offset", "length"]
    assert [member.optional for member in raw.members] == [False, True, True]


def test_a_union_knows_its_discriminator_and_branches(schema: Schema) -> None:
    options = schema.types["Options"]
    assert isinstance(options, ObjectType)
    assert options.discriminator == "driver"
    assert options.branches["raw"] == "OptionsRaw"
    assert "plain" not in options.branches
    assert options.members[0].doc == "what kind of node"


def test_features_belong_to_values_members_and_commands(schema: Schema) -> None:
    driver = schema.types["Driver"]
    assert isinstance(driver, EnumType)
    assert {value.name: value.features for value in driver.values}["old"] == ("deprecated",)
    assert schema.commands["device_add"].features == ("json-cli",)


def test_commands_and_events_say_how_they_may_be_used(schema: Schema) -> None:
    assert schema.commands["nothing"].allow_oob
    assert not schema.commands["maybe"].allow_oob
    assert schema.commands["maybe"].success_response
    assert set(schema.events) == {"CHANGED", "RESET"}


def test_a_command_knows_whether_its_reply_may_hold_a_floating_point_number(schema: Schema) -> None:
    assert schema.commands["maybe"].returns_number
    assert not schema.commands["nothing"].returns_number


def test_a_type_may_be_used_before_it_stands_in_the_text(schema: Schema) -> None:
    assert isinstance(schema.types["Ref"], AlternateType)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{ 'struct': 'int', 'data': {} }", "built-in type 'int' is already defined"),
        ("{ 'struct': 'a', 'data': {} }", "struct has an invalid name 'a': it must be in CamelCase"),
        ("{ 'command': 'Foo' }", "command has an invalid name 'Foo': it must be in lower case"),
        ("{ 'event': 'foo' }", "event has an invalid name 'foo': it must be in UPPER_CASE"),
        (STRUCT + STRUCT, "'S' is already defined at t:1:1"),
        ("{ 'struct': 'A', 'data': { 'x': 'Gone' } }", "member 'x' of struct 'A' uses unknown type 'Gone'"),
        ("{ 'struct': 'A', 'data': { 'x': ['int', 'str'] } }", "a list type holds exactly one type name"),
        ("{ 'struct': 'A', 'data': { '9': 'int' } }", "member '9' of struct 'A' has an invalid name '9'"),
        ("{ 'struct': 'A', 'data': { 'x': 'int', '*x': 'int' } }", "collides with member 'x'"),
        ("{ 'struct': 'A', 'data': { 'a-b': 'int', 'a_b': 'int' } }", "collides with member 'a-b'"),
        (
            STRUCT + "{ 'struct': 'A', 'base': 'S', 'data': { '*x': 'int' } }",
            "member 'x' of struct 'A' collides with base member 'x'",
        ),
        ("{ 'struct': 'A', 'base': 'A', 'data': {} }", "object 'A' contains itself"),
        (ENUM + "{ 'struct': 'A', 'base': 'E', 'data': {} }", "must be a struct, 'E' is not"),
        ("{ 'enum': 'A', 'data': [ 'x', 'x' ] }", "duplicate value 'x' of enum 'A'"),
        ("{ 'enum': 'A', 'data': {} }", "'data' of enum 'A' must be a list"),
        (
            ENUM
            + STRUCT
            + "{ 'union': 'U', 'base': { 'e': 'E' }, 'discriminator': 'f', 'data': { 'a': 'S' } }",
            "discriminator 'f' is not a member of 'base' of union 'U'",
        ),
        (
            STRUCT + "{ 'union': 'U', 'base': { 'e': 'str' }, 'discriminator': 'e', 'data': { 'a': 'S' } }",
            "discriminator 'e' of union 'U' must be of enum type",
        ),
        (
            ENUM
            + STRUCT
            + "{ 'union': 'U', 'base': { '*e': 'E' }, 'discriminator': 'e', 'data': { 'a': 'S' } }",
            "discriminator 'e' of union 'U' must not be optional",
        ),
        (
            ENUM
            + STRUCT
            + "{ 'union': 'U', 'base': { 'e': 'E' }, 'discriminator': 'e', 'data': { 'c': 'S' } }",
            "branch 'c' of union 'U' is not a value of enum 'E'",
        ),
        (
            ENUM + "{ 'union': 'U', 'base': { 'e': 'E' }, 'discriminator': 'e', 'data': { 'a': 'int' } }",
            "branch 'a' of union 'U' must be a struct or union, 'int' is not",
        ),
        (
            ENUM
            + STRUCT
            + "{ 'union': 'U', 'base': { 'e': 'E', 'x': 'int' }, 'discriminator': 'e',"
            + " 'data': { 'a': 'S' } }",
            "member 'x' of 'S' collides with base member 'x' of union 'U'",
        ),
        (
            ENUM + "{ 'union': 'U', 'base': { 'e': 'E' }, 'discriminator': 'e', 'data': {} }",
            "union 'U' has no branches",
        ),
        (
            ENUM + "{ 'alternate': 'A', 'data': { 'e': 'E', 's': 'str' } }",
            "alternative 's' of alternate 'A' can't be distinguished from 'e'",
        ),
        (
            "{ 'alternate': 'A', 'data': { 'i': 'int', 'n': 'number' } }",
            "alternative 'n' of alternate 'A' can't be distinguished from 'i'",
        ),
        ("{ 'alternate': 'A', 'data': { 'a': 'any' } }", "cannot be of type 'any'"),
        ("{ 'alternate': 'A', 'data': { 'a': 'A' } }", "cannot be an alternate"),
        ("{ 'alternate': 'A', 'data': {} }", "must be an object with members"),
        ("{ 'command': 'c', 'data': 'int' }", "must be a struct or union, 'int' is not"),
        ("{ 'command': 'c', 'boxed': true }", "'boxed' of command 'c' needs 'data'"),
        ("{ 'command': 'c', 'gen': true }", "flag 'gen' of command 'c' may only be false"),
        ("{ 'command': 'c', 'allow-oob': false }", "flag 'allow-oob' of command 'c' may only be true"),
        ("{ 'command': 'c', 'allow-oob': true, 'coroutine': true }", "exclude each other"),
        ("{ 'command': 'c', 'returns': 'Gone' }", "'returns' of command 'c' uses unknown type 'Gone'"),
        ("{ 'event': 'E', 'features': [ 'a', 'a' ] }", "duplicate feature 'a'"),
        ("{ 'command': 'd' } { 'struct': 'A', 'data': { 'x': 'd' } }", "uses unknown type 'd'"),
    ],
)
def test_a_definition_that_breaks_a_rule_is_refused_with_its_place(text: str, error: str) -> None:
    with pytest.raises(SchemaError) as caught:
        loads(text, "t")
    assert error in str(caught.value)
    assert str(caught.value).startswith("t:1:")


def test_a_union_can_be_arguments_only_if_boxed() -> None:
    union = (
        ENUM + STRUCT + "{ 'union': 'U', 'base': { 'e': 'E' }, 'discriminator': 'e', 'data': { 'a': 'S' } }"
    )
    with pytest.raises(SchemaError, match="only if it is boxed"):
        loads(union + "{ 'command': 'c', 'data': 'U' }")
    loads(union + "{ 'command': 'c', 'data': 'U', 'boxed': true }")
