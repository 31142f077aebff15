from __future__ import annotations

import json
import os
import random
import subprocess
from contextlib import suppress
from typing import Any, Final

import pytest
from daemons import PATIENCE, STORAGE_DAEMON
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.qjson import JSONError, JSONStream, located, parse_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Below U+FDD0 there are no noncharacters, which QEMU refuses; lone surrogates everybody does.
    | st.text(st.characters(max_codepoint=0xFDCF, exclude_categories=["Cs"]), max_size=8),
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
    with suppress(JSONError):
        parse_json(text)


def test_single_quotes_make_strings_too() -> None:
    assert parse_json("""{'a': 'it\\'s "x"', "b": "'"}""") == {"a": 'it\'s "x"', "b": "'"}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "Expecting a JSON value"),
        (" ", "Expecting a JSON value"),
        ("{", "JSON parse error, premature EOI"),
        ('{"a":1,', "JSON parse error, premature EOI"),
        ('{"a":[}', "JSON parse error, expecting value"),
        ('{"a":1,"a":2', "JSON parse error, duplicate key"),
        ('{"a":nul', "JSON parse error, invalid keyword 'nul'"),
        ('{"a":"x', "JSON parse error, stray '\"x'"),
        ('{"a":"x\\', "JSON parse error, stray '\"x\\'"),
        ('{"a":1.', "JSON parse error, stray '1.'"),
        ('{"a":1}@', "Expecting at most one JSON value"),
        ('{"a":"\udcff"}', "JSON parse error, stray '\"\ufffd'"),
        ('{"a":"\udce2\udc82"}', "JSON parse error, invalid UTF-8 sequence in string"),
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
    with pytest.raises(JSONError) as caught:
        parse_json(text)
    assert caught.value.desc == error


def test_nesting_up_to_the_limit_is_read() -> None:
    value = parse_json("[" * 1024 + "]" * 1024)
    for _ in range(1023):
        value = value[0]
    assert value == []


# Many values in a text


def found(text: str) -> list[tuple[int, Any]]:
    """What a text holds; an error as its description without the beginning that most have."""
    return [
        (line, value.desc.removeprefix("JSON parse error, ") if isinstance(value, JSONError) else value)
        for line, value in located(text)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t\r\n", []),
        ('{"a": [1, {}]} [2]\n3', [(1, {"a": [1, {}]}), (1, [2]), (2, 3)]),
        ('\n{"a":\n1}{"b":\n2}\n{"c": 3}\n', [(2, {"a": 1}), (3, {"b": 2}), (5, {"c": 3})]),
        # One error for each thing that is wrong, where it is wrong; the next object is read.
        ('{"a":\nnul,\n"b": {}} {}', [(2, "invalid keyword 'nul'"), (3, {})]),
        ('{"a": [NaN, "b", {}], "c": 1}\n{}', [(1, "stray 'N'"), (2, {})]),
        ("# three words here\n{}\n", [(1, "stray '#'"), (2, {})]),
        ('{}}}]{"a": 1}', [(1, {}), (1, "expecting value"), (1, {"a": 1})]),
        # What was left open is given up at a line that begins like it.
        ('{"a": 1\n{"b": 2}\n', [(2, "expected separator in dict"), (2, {"b": 2})]),
        ('  {"a": "x}\n  {"b": 2}\n', [(1, "stray '\"x}\n'"), (2, {"b": 2})]),
        ('{"a": "x}\n  y {"b": 2}\n{"c": 3}', [(1, "stray '\"x}\n'"), (3, {"c": 3})]),
        ('{"a": [}\n{"b": 2}\n{"c": 3}', [(1, "expecting value"), (2, {"b": 2}), (3, {"c": 3})]),
        ('"x\n{"a": 1}\n[2]', [(1, "stray '\"x\n'"), (2, {"a": 1}), (3, [2])]),
        # But a deeper one belongs to what is wrong, as does any that would be sound there.
        ('{"a": nul, "b": [\n  {"c": 1}\n]}\n{}', [(1, "invalid keyword 'nul'"), (4, {})]),
        ('{"a": [\n{"b": 1}\n]}', [(1, {"a": [{"b": 1}]})]),
        # The end comes too early for what begins here, not for what was wrong before.
        ('{}\n{"a":\n\n[1,\n', [(1, {}), (2, "premature EOI")]),
        ('{"a": nul,\n', [(1, "invalid keyword 'nul'")]),
        ('{"a":\n"b', [(2, "stray '\"b'")]),
    ],
)
def test_values_and_errors_are_found_with_their_lines(text: str, expected: list[tuple[int, Any]]) -> None:
    assert found(text) == expected


@settings(deadline=None)
@given(st.text(st.sampled_from("{}[]:,\"'\n 1ae\\"), max_size=60))
def test_in_a_text_without_errors_is_found_what_a_stream_of_it_gives(text: str) -> None:
    values = [value for _, value in located(text)]
    given_by_stream = JSONStream().feed(text.encode() + b"\n")
    if not any(isinstance(value, JSONError) for value in values):
        assert values == given_by_stream


# Against the peer

PIECES: Final = (
    *"{}[],:\"'\\01-.x@/é\t\n",
    *("e5", "1.5", "nul", "true", "null", '"a"', "'b'", '"a":1,', '"a":[', '"a":{', "{}", "[1,2]"),
    *(r'"\u12"', r'"\ud83d"', r'"\x"'),
    # Bytes that are not UTF-8.
    *("\udcff", "\udce2"),
)


def refusal(text: str) -> str | None:
    """What qemu-storage-daemon finds wrong with the JSON of an option, if anything."""
    # The second option ends it whatever it thinks of the first.
    arguments = [*STORAGE_DAEMON, "--blockdev", text, "--blockdev", "nope"]
    result = subprocess.run(
        arguments,
        capture_output=True,
        errors="replace",
        timeout=PATIENCE,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    begin = f"--blockdev {text.encode(errors='surrogateescape').decode(errors='replace')}: "
    _, found_it, desc = result.stderr.partition(begin)
    assert found_it, result.stderr
    return desc.removesuffix("\n") if desc.startswith(("JSON ", "Expecting ")) else None


@pytest.mark.peer("qemu-storage-daemon")
def test_an_option_in_broken_json_is_refused_as_qemu_refuses_it() -> None:
    # A run that passed passes again; QMPD_FUZZ_SEED looks elsewhere.
    seed = int(os.environ.get("QMPD_FUZZ_SEED", "1"))
    choice = random.Random(seed)
    for _ in range(150):
        text = "{" + "".join(choice.choices(PIECES, k=choice.randint(0, 8)))
        try:
            parse_json(text)
        except JSONError as error:
            own: str | None = error.desc
        else:
            own = None
        assert own == refusal(text), f"{text!r} (seed {seed})"
