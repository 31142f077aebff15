from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qmpd.qapi.json_dialect import parse_json, parse_prefix

from qmpd.errors import Error

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # NUL has no place in QEMU's strings, and a lone surrogate in nobody's.
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(VALUES, st.booleans())
def test_what_json_writes_is_read_back(value: Any, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only)) == value


@settings(deadline=None)
@given(st.text(st.sampled_from("{}[],:'\"\\u0019-.eE truefalsnd\n"), max_size=25))
def test_any_text_is_a_value_or_an_error(text: str) -> None:
    with suppress(Error):
        parse_json(text)


def test_single_quotes_make_strings_too() -> None:
    assert parse_json("""{'a': 'it\\'s "x"', "b": "'"}""") == {"a": 'it\'s "x"', "b": "'"}


def test_values_can_follow_each_other() -> None:
    assert parse_prefix('{"a": [1, {}]} [2]') == ({"a": [1, {}]}, 14)
    assert parse_prefix('{"a": [1, {}]} [2]', 14) == ([2], 18)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "JSON parse error, premature EOI"),
        ('{"a":1}{"b":2}', "Expecting at most one JSON value"),
        ('{"a":1}]', "Expecting at most one JSON value"),
        ('{"a":1,"a":2}', "JSON parse error, duplicate key"),
        ('{"a":1,}', "JSON parse error, expecting value"),
        ('{"a":[1,]}', "JSON parse error, expecting value"),
        ('{"a":}', "JSON parse error, expecting value"),
        ('{"a" "b"}', "JSON parse error, missing : in object pair"),
        ('{"a"}', "JSON parse error, missing : in object pair"),
        ('{"a":1 "b":2}', "JSON parse error, expected separator in dict"),
        ('{"a":[1 2]}', "JSON parse error, expected separator in list"),
        ("{1:1}", "JSON parse error, key is not a string in object"),
        ("{a:1}", "JSON parse error, invalid keyword 'a'"),
        ('{"a":nul}', "JSON parse error, invalid keyword 'nul'"),
        ('{"a":NaN}', "JSON parse error, stray 'N'"),
        ('{"a":+1}', "JSON parse error, stray '+'"),
        ('{"a":01}', "JSON parse error, stray '01'"),
        ('{"a":"\\q"}', "JSON parse error, invalid escape sequence in string"),
        ('{"a":"\\ud800"}', "JSON parse error, \\ud800 is not a valid Unicode character"),
        ('{"a":"x\n"}', "JSON parse error, stray '\"x\n'"),
        ("[" * 1025, "JSON nesting depth limit exceeded"),
    ],
)
def test_a_mistake_is_named_in_qemus_words(text: str, error: str) -> None:
    with pytest.raises(Error) as caught:
        parse_json(text)
    assert caught.value.desc == error


def test_nesting_up_to_the_limit_is_read() -> None:
    value = parse_json("[" * 1024 + "]" * 1024)
    for _ in range(1023):
        value = value[0]
    assert value == []
