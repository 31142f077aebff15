from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from qmpd.errors import Error
from qmpd.qapi import Schema, load, loads, schema_directory
from qmpd.qapi.json_schema import ALTERNATE, UNION


def without_our_words(schema: Any) -> Any:
    """Drop our two words, so that nothing but the standard's can decide."""
    if isinstance(schema, dict):
        return {
            key: without_our_words(value) for key, value in schema.items() if key not in (UNION, ALTERNATE)
        }
    if isinstance(schema, list):
        return [without_our_words(each) for each in schema]
    return schema


@pytest.fixture(scope="module")
def standard(schema: Schema) -> Draft202012Validator:
    return Draft202012Validator(without_our_words(schema.json_schema()))


VALUES: list[Any] = [
    None,
    True,
    -1,
    1,
    70000,
    1 << 63,
    1 << 64,
    1.5,
    "raw",
    "none",
    "",
    [],
    ["oob"],
    ["a", 1],
    {},
    {"driver": "null-co"},
    {"driver": "raw", "file": "x"},
    {"driver": "raw", "file": {"driver": "null-co", "size": "1"}},
    {"driver": "plain", "bogus": 1},
    {"format": "luks", "key-secret": "s"},
    {"template": "all"},
]

NAMES = (
    "driver node-name discard cache file offset length size latency-ns children vote-threshold backing "
    "overlap-check encrypt job-id options flat enable u8 u64 i8 number u16s nothing any either bogus"
)
ARGUMENTS = st.dictionaries(
    st.sampled_from(NAMES.split(" ")),
    st.sampled_from(VALUES)
    | st.sampled_from(["file", "null-co", "quorum", "qcow2", "old", "plain", "ignore"]),
    max_size=4,
)


@settings(deadline=None)
@given(st.sampled_from(["blockdev-add", "create", "nothing", "maybe", "negotiate", "count"]), ARGUMENTS)
def test_the_export_in_standard_words_decides_as_the_daemon_does(
    schema: Schema, standard: Draft202012Validator, name: str, arguments: dict[str, Any]
) -> None:
    try:
        schema.commands[name].validate(arguments)
        accepted = True
    except Error:
        accepted = False
    assert standard.is_valid({"execute": name, "arguments": arguments}) is accepted


@pytest.mark.parametrize(
    ("request_", "valid"),
    [
        ({"execute": "nothing"}, True),
        ({"exec-oob": "nothing", "id": [1]}, True),
        ({"exec-oob": "maybe"}, False),
        ({"execute": "nothing", "exec-oob": "nothing"}, False),
        ({"execute": "gone"}, False),
        ({"execute": "create"}, False),
        ({"execute": "nothing", "argument": {}}, False),
        ({"execute": "nothing", "arguments": []}, False),
        ({"execute": "device_add", "arguments": {"driver": "x", "anything": 1}}, True),
        ({}, False),
    ],
)
def test_the_document_describes_a_command_as_it_is_sent(
    standard: Draft202012Validator, request_: dict[str, Any], valid: bool
) -> None:
    assert standard.is_valid(request_) is valid


def test_every_type_command_and_event_has_a_definition(schema: Schema) -> None:
    definitions = schema.json_schema()["$defs"]
    assert {*schema.commands, *schema.events} <= definitions.keys()
    assert {name for name in schema.types if not name.startswith("[")} <= definitions.keys()


def test_documentation_and_deprecation_reach_the_export(schema: Schema) -> None:
    definitions = schema.json_schema()["$defs"]
    assert definitions["Options"]["description"] == "A node of the graph."
    assert definitions["Options:raw"]["properties"]["driver"]["description"] == "what kind of node"


def test_what_is_exported_is_what_is_enforced() -> None:
    # A word changed in the export's own definition changes what is taken.
    schema = loads("{ 'struct': 'Cache', 'data': { '*direct': 'bool' } }")
    schema.validate("Cache", {})
    schema.json_schema()["$defs"]["Cache"]["required"] = ["direct"]
    with pytest.raises(Error, match="Parameter 'direct' is missing"):
        schema.validate("Cache", {})


def test_the_shipped_export_is_valid_json_schema() -> None:
    document = json.loads(json.dumps(load(schema_directory()).json_schema()))
    Draft202012Validator.check_schema(document)
    validator = Draft202012Validator(document)
    good = {"driver": "luks", "node-name": "l", "file": "p", "header": {"driver": "file", "filename": "h"}}
    assert validator.is_valid({"execute": "blockdev-add", "arguments": good})
    assert not validator.is_valid(
        {"execute": "blockdev-add", "arguments": good | {"header": {"driver": "file"}}}
    )
