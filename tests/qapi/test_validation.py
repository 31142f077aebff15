from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.errors import Error
from qmpd.qapi import Schema, loads, schema_directory
from qmpd.qapi.schema import load

HUGE = 99999999999999999999999

# What qemu-storage-daemon and qemu-system-x86_64 10.0.2 answered to the same
# mistakes in their own commands.
BLOCKDEV_ADD = [
    ({}, "Parameter 'driver' is missing"),
    ({"node-name": 1}, "Parameter 'driver' is missing"),
    ({"driver": 1}, "Invalid parameter type for 'driver', expected: string"),
    ({"driver": None, "bogus": 1}, "Invalid parameter type for 'driver', expected: string"),
    ({"driver": []}, "Invalid parameter type for 'driver', expected: string"),
    ({"driver": "floppy"}, "Parameter 'driver' does not accept value 'floppy'"),
    ({"driver": "", "bogus": 1}, "Parameter 'driver' does not accept value ''"),
    ({"driver": "raw", "node-name": 1}, "Invalid parameter type for 'node-name', expected: string"),
    ({"driver": "raw", "discard": "x"}, "Parameter 'discard' does not accept value 'x'"),
    ({"driver": "raw", "discard": 1}, "Invalid parameter type for 'discard', expected: string"),
    ({"driver": "raw", "offset": "x"}, "Parameter 'file' is missing"),
    ({"driver": "raw", "file": 1}, "Invalid parameter type for 'file', expected: Ref"),
    ({"driver": "raw", "file": None}, "Invalid parameter type for 'file', expected: Ref"),
    ({"driver": "raw", "file": ["f"]}, "Invalid parameter type for 'file', expected: Ref"),
    ({"driver": "raw", "file": {}}, "Parameter 'file.driver' is missing"),
    ({"driver": "raw", "file": {"driver": 7}}, "Invalid parameter type for 'file.driver', expected: string"),
    ({"driver": "raw", "file": {"driver": "x"}}, "Parameter 'driver' does not accept value 'x'"),
    (
        {"driver": "raw", "file": {"driver": "raw", "file": {"driver": "file"}}},
        "Parameter 'file.file.filename' is missing",
    ),
    (
        {"driver": "raw", "file": {"driver": "null-co", "cache": {"bogus": 1}}},
        "Parameter 'file.cache.bogus' is unexpected",
    ),
    (
        {"driver": "raw", "file": {"driver": "null-co", "zz": 1}, "offset": "a"},
        "Parameter 'file.zz' is unexpected",
    ),
    (
        {"driver": "raw", "file": {"driver": "raw", "file": []}},
        "Invalid parameter type for 'file', expected: Ref",
    ),
    ({"driver": "null-co", "size": "1024"}, "Invalid parameter type for 'size', expected: integer"),
    ({"driver": "null-co", "size": 1.0}, "Invalid parameter type for 'size', expected: integer"),
    ({"driver": "null-co", "size": True}, "Invalid parameter type for 'size', expected: integer"),
    ({"driver": "null-co", "size": 1 << 63}, "Invalid parameter type for 'size', expected: integer"),
    ({"driver": "null-co", "size": HUGE}, "Invalid parameter type for 'size', expected: integer"),
    ({"driver": "null-co", "latency-ns": "soon"}, "Parameter 'latency-ns' expects uint64"),
    ({"driver": "null-co", "latency-ns": True}, "Parameter 'latency-ns' expects uint64"),
    ({"driver": "null-co", "latency-ns": 1 << 64}, "Parameter 'latency-ns' expects uint64"),
    ({"driver": "null-co", "latency-ns": (1 << 64) - 1}, None),
    ({"driver": "null-co", "latency-ns": -1}, None),
    ({"driver": "null-co", "latency-ns": -(1 << 63) - 1}, "Parameter 'latency-ns' expects uint64"),
    ({"driver": "null-co", "read-zeroes": 1}, "Invalid parameter type for 'read-zeroes', expected: boolean"),
    (
        {"driver": "null-co", "read-zeroes": "on"},
        "Invalid parameter type for 'read-zeroes', expected: boolean",
    ),
    ({"driver": "null-co", "cache": False}, "Invalid parameter type for 'cache', expected: object"),
    ({"driver": "null-co", "cache": []}, "Invalid parameter type for 'cache', expected: object"),
    (
        {"driver": "null-co", "cache": {"direct": "off"}},
        "Invalid parameter type for 'cache.direct', expected: boolean",
    ),
    (
        {"driver": "null-co", "cache": {"x": 2, "direct": 1}},
        "Invalid parameter type for 'cache.direct', expected: boolean",
    ),
    ({"driver": "null-co", "cache": {"x": 2}, "y": 1}, "Parameter 'cache.x' is unexpected"),
    (
        {"driver": "null-co", "cache": {"x": 2}, "discard": "foo"},
        "Parameter 'discard' does not accept value 'foo'",
    ),
    ({"driver": "null-co", "cache": {"x": 2}, "size": "q"}, "Parameter 'cache.x' is unexpected"),
    ({"driver": "null-co", "bogus": 1, "size": "x"}, "Invalid parameter type for 'size', expected: integer"),
    (
        {"driver": "null-co", "latency-ns": "y", "size": "x"},
        "Invalid parameter type for 'size', expected: integer",
    ),
    ({"driver": "null-co", "filename": "x"}, "Parameter 'filename' is unexpected"),
    ({"driver": "null-co", "": 1}, "Parameter '' is unexpected"),
    ({"driver": "null-co", "a.b": 1}, "Parameter 'a.b' is unexpected"),
    ({"driver": "plain"}, None),
    ({"driver": "plain", "size": 1}, "Parameter 'size' is unexpected"),
    ({"driver": "quorum", "children": [1]}, "Invalid parameter type for 'null', expected: Ref"),
    ({"driver": "quorum", "children": ["a", {"driver": "raw"}]}, "Parameter 'children[1].file' is missing"),
    (
        {"driver": "quorum", "children": ["a", {"driver": "x"}]},
        "Parameter 'driver' does not accept value 'x'",
    ),
    ({"driver": "quorum", "children": {}}, "Invalid parameter type for 'children', expected: array"),
    (
        {"driver": "quorum", "children": ["a", {"driver": "null-co", "zz": 1}], "vote-threshold": "a"},
        "Parameter 'children[1].zz' is unexpected",
    ),
    ({"driver": "quorum", "children": ["a"]}, "Parameter 'vote-threshold' is missing"),
    ({"driver": "qcow2", "file": "f", "backing": None}, None),
    (
        {"driver": "qcow2", "file": "f", "backing": 3},
        "Invalid parameter type for 'backing', expected: RefOrNull",
    ),
    (
        {"driver": "qcow2", "file": "f", "overlap-check": 1},
        "Invalid parameter type for 'overlap-check', expected: OverlapChecks",
    ),
    (
        {"driver": "qcow2", "file": "f", "overlap-check": "some"},
        "Parameter 'overlap-check' does not accept value 'some'",
    ),
    (
        {"driver": "qcow2", "file": "f", "overlap-check": {"template": "x"}},
        "Parameter 'template' does not accept value 'x'",
    ),
    ({"driver": "qcow2", "file": "f", "encrypt": {}}, "Parameter 'encrypt.format' is missing"),
    (
        {"driver": "qcow2", "file": "f", "encrypt": {"format": "rot13"}},
        "Parameter 'format' does not accept value 'rot13'",
    ),
    (
        {"driver": "qcow2", "file": "f", "encrypt": {"format": "luks", "bogus": 1}},
        "Parameter 'encrypt.bogus' is unexpected",
    ),
    ({"driver": "qcow2", "file": "f", "encrypt": {"format": "aes"}}, None),
]

OTHERS = [
    ("nothing", {"x": 1}, "Parameter 'x' is unexpected"),
    ("maybe", {"flat": "yes"}, "Invalid parameter type for 'flat', expected: boolean"),
    ("create", {"options": 1, "job-id": 1}, "Invalid parameter type for 'job-id', expected: string"),
    ("create", {"job-id": "j"}, "Parameter 'options' is missing"),
    ("create", {"job-id": "j", "options": []}, "Invalid parameter type for 'options', expected: object"),
    ("create", {"job-id": "j", "options": {"size": 1}}, "Parameter 'options.driver' is missing"),
    (
        "create",
        {"job-id": "j", "options": {"driver": "plain", "x": 1}, "y": 1},
        "Parameter 'options.x' is unexpected",
    ),
    ("create", {"job-id": "j", "options": {"driver": "plain"}, "y": 1}, "Parameter 'y' is unexpected"),
    ("negotiate", {"enable": "oob"}, "Invalid parameter type for 'enable', expected: array"),
    ("negotiate", {"enable": ["time-travel"]}, "Parameter 'null' does not accept value 'time-travel'"),
    ("negotiate", {"enable": ["oob", 1]}, "Invalid parameter type for 'enable[1]', expected: string"),
    ("count", {"u16": 70000}, "Parameter 'u16' expects uint16_t"),
    ("count", {"u16": -1}, "Parameter 'u16' expects uint16_t"),
    ("count", {"u16": 1.0}, "Parameter 'u16' expects uint64"),
    ("count", {"u16": "a"}, "Parameter 'u16' expects uint64"),
    ("count", {"u16": HUGE}, "Parameter 'u16' expects uint64"),
    ("count", {"u32": 1 << 32}, "Parameter 'u32' expects uint32_t"),
    ("count", {"u8": 256}, "Parameter 'u8' expects uint8_t"),
    ("count", {"u16s": [1, 65536]}, "Parameter 'null' expects uint16_t"),
    ("count", {"u16s": [1, "a"]}, "Parameter 'u16s[1]' expects uint64"),
    ("count", {"i8": 128}, "Parameter 'i8' expects int8_t"),
    ("count", {"i8": 1 << 63}, "Invalid parameter type for 'i8', expected: integer"),
    ("count", {"i8": "a"}, "Invalid parameter type for 'i8', expected: integer"),
    ("count", {"size": "4k"}, "Parameter 'size' expects uint64"),
    ("count", {"size": -1}, None),
    ("count", {"size": -(1 << 63) - 1}, "Parameter 'size' expects uint64"),
    ("count", {"number": 1, "any": None, "nothing": None}, None),
    ("count", {"number": 1.5, "any": [{}]}, None),
    ("count", {"number": True}, "Invalid parameter type for 'number', expected: number"),
    ("count", {"nothing": 0}, "Invalid parameter type for 'nothing', expected: null"),
    ("count", {"either": 1}, None),
    ("count", {"either": ["x"]}, None),
    ("count", {"either": True}, "Invalid parameter type for 'either', expected: IntOrText"),
    ("count", {"either": 1.5}, "Invalid parameter type for 'either', expected: integer"),
    ("count", {"lists": [{"names": ["a"]}, {}]}, "Parameter 'lists[1].names' is missing"),
    (
        "count",
        {"lists": [{"names": ["a", 1]}]},
        "Invalid parameter type for 'lists[0].names[1]', expected: string",
    ),
    ("count", {"lists": [3]}, "Invalid parameter type for 'lists[0]', expected: object"),
]


def refusal(schema: Schema, command: str, arguments: dict[str, Any]) -> str | None:
    try:
        schema.commands[command].validate(arguments)
    except Error as error:
        return error.desc
    return None


@pytest.mark.parametrize(("arguments", "error"), BLOCKDEV_ADD, ids=json.dumps)
def test_a_node_is_refused_for_the_same_reason_as_by_qemu(
    schema: Schema, arguments: dict[str, Any], error: str | None
) -> None:
    assert refusal(schema, "blockdev-add", arguments) == error


@pytest.mark.parametrize(("command", "arguments", "error"), OTHERS, ids=json.dumps)
def test_arguments_are_refused_for_the_same_reason_as_by_qemu(
    schema: Schema, command: str, arguments: dict[str, Any], error: str | None
) -> None:
    assert refusal(schema, command, arguments) == error


def test_a_command_without_arguments_takes_none(schema: Schema) -> None:
    assert refusal(schema, "nothing", {}) is None


def test_a_command_that_checks_its_own_arguments_takes_any_object(schema: Schema) -> None:
    assert refusal(schema, "device_add", {}) is None
    assert refusal(schema, "device_add", {"driver": 1, "bogus": None}) is None


def test_any_named_type_can_be_validated(schema: Schema) -> None:
    schema.validate("Options", {"driver": "plain"})
    schema.validate("Ref", "node")
    schema.validate("[str]", ["a"])
    with pytest.raises(Error, match="Parameter 'filename' is missing"):
        schema.validate("Options", {"driver": "file"})
    with pytest.raises(Error, match="Invalid parameter type for 'null', expected: object"):
        schema.validate("Options", 1)
    with pytest.raises(KeyError):
        schema.validate("Gone", {})


def test_event_data_is_validated(schema: Schema) -> None:
    schema.events["CHANGED"].validate({"id": "x", "status": "all"})
    schema.events["RESET"].validate({})
    with pytest.raises(Error, match="Parameter 'id' is missing"):
        schema.events["CHANGED"].validate({})


def test_a_branch_may_be_a_union_of_its_own() -> None:
    schema = loads(
        """
        { 'enum': 'A', 'data': [ 'x', 'y' ] } { 'enum': 'B', 'data': [ 'p', 'q' ] }
        { 'struct': 'P', 'data': { 'n': 'int' } }
        { 'union': 'Inner', 'base': { 'b': 'B' }, 'discriminator': 'b', 'data': { 'p': 'P' } }
        { 'union': 'Outer', 'base': { 'a': 'A', '*z': 'str' }, 'discriminator': 'a',
          'data': { 'x': 'Inner' } }
        """
    )
    schema.validate("Outer", {"a": "x", "b": "p", "n": 1, "z": "text"})
    schema.validate("Outer", {"a": "x", "b": "q"})
    schema.validate("Outer", {"a": "y"})
    for value, error in [
        ({"a": "x", "b": "p"}, "Parameter 'n' is missing"),
        ({"a": "x", "b": "q", "n": 1}, "Parameter 'n' is unexpected"),
        ({"a": "x"}, "Parameter 'b' is missing"),
        ({"a": "x", "b": "o"}, "Parameter 'b' does not accept value 'o'"),
        ({"a": "y", "b": "p"}, "Parameter 'b' is unexpected"),
        ({"a": "x", "z": 1}, "Invalid parameter type for 'z', expected: string"),
    ]:
        with pytest.raises(Error, match=error):
            schema.validate("Outer", value)


@pytest.fixture
def usual_recursion_limit() -> Iterator[None]:
    """The interpreter's own limit, whatever other tests have made of it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("usual_recursion_limit")
def test_values_nested_too_deeply_are_refused_and_do_no_harm(schema: Schema) -> None:
    options: dict[str, Any] = {"driver": "null-co"}
    for _ in range(1000):
        options = {"driver": "raw", "file": options}
    assert refusal(schema, "blockdev-add", options) == "JSON nesting depth limit exceeded"


def test_ten_nested_nodes_are_not_too_deep(schema: Schema) -> None:
    options: dict[str, Any] = {"driver": "null-co"}
    for _ in range(10):
        options = {"driver": "raw", "file": options}
    assert refusal(schema, "blockdev-add", options) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None)
@given(
    st.sampled_from(["blockdev-add", "create", "count", "negotiate", "device_add", "maybe"]),
    st.dictionaries(
        st.sampled_from(["driver", "file", "options", "job-id", "enable", "u8", "any", "cache", "flat", "x"]),
        JSON | st.sampled_from(["raw", "null-co", {"driver": "raw"}]),
        max_size=4,
    ),
)
def test_any_arguments_are_taken_or_refused_and_never_changed(
    schema: Schema, command: str, arguments: dict[str, Any]
) -> None:
    before = repr(arguments)
    error = refusal(schema, command, arguments)
    assert error is None or error.startswith(("Parameter ", "Invalid parameter type for "))
    assert repr(arguments) == before


def test_the_shipped_schema_loads_and_takes_the_detached_header_sequence() -> None:
    shipped = load(schema_directory())
    for command, arguments in [
        ("object-add", {"qom-type": "secret", "id": "sec0", "data": "abc123"}),
        ("blockdev-add", {"node-name": "hs", "driver": "file", "filename": "/path/header.img"}),
        ("blockdev-add", {"node-name": "hf", "driver": "raw", "file": "hs"}),
        (
            "blockdev-add",
            {"node-name": "l", "driver": "luks", "file": "p", "header": "hf", "key-secret": "sec0"},
        ),
        ("device_add", {"driver": "virtio-blk-pci", "num-queues": "1", "drive": "l", "id": "d"}),
    ]:
        assert refusal(shipped, command, arguments) is None
