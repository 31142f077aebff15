"""Messages on the wire.  What is expected here was seen in qemu-storage-daemon 10.0.2."""

from __future__ import annotations

import json

import pytest

from qmpd.monitor.encode import encode, event, failure, success


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({}, "{}"),
        ([1, "two", None, True], '[1, "two", null, true]'),
        ({"a": {"b": 1}, "c": 2}, '{"a": {"b": 1}, "c": 2}'),
        ("é", r'"\u00E9"'),
        ("\U0001f600", r'"\uD83D\uDE00"'),
        ("\x7f\x80\u2028", r'"\u007F\u0080\u2028"'),
        ("\b\f\n\r\t\x00\x1f", r'"\b\f\n\r\t\u0000\u001F"'),
        ('"\\/', r'"\"\\/"'),
        ("\\u00e9", r'"\\u00e9"'),
        ("\\é", r'"\\\u00E9"'),
        ("\udc80", r'"\uFFFD"'),
        (0.1, "0.10000000000000001"),
        (100.0, "100"),
        (1e15, "1000000000000000"),
        (1e17, "1e+17"),
        (-0.0, "-0"),
        (float("inf"), "inf"),
        (5e-324, "4.9406564584124654e-324"),
        (18446744073709551615, "18446744073709551615"),
    ],
)
def test_a_value_is_spelled_as_qemu_does(value, text):
    assert encode({"return": value}) == f'{{"return": {text}}}\r\n'.encode()


def test_pretty_mode_gives_every_bracket_a_line():
    message = {"return": {}, "id": {"a": [], "c": [1, {"x": 1.5, "y": "é"}]}}
    assert encode(message, pretty=True).decode().split("\r\n") == [
        "{",
        '    "return": {',
        "    },",
        '    "id": {',
        '        "a": [',
        "        ],",
        '        "c": [',
        "            1,",
        "            {",
        '                "x": 1.5,',
        '                "y": "\\u00E9"',
        "            }",
        "        ]",
        "    }",
        "}",
        "",
    ]


@pytest.mark.parametrize("pretty", [False, True])
@pytest.mark.parametrize("innermost", ["é", 0.5])
def test_a_value_as_deep_as_the_stream_takes_it_is_written(pretty, innermost):
    value = innermost
    for _ in range(1023):
        value = [value]
    text = encode({"id": value}, pretty=pretty)
    assert text.count(b"[") == text.count(b"]") == 1023


def test_the_id_follows_the_return_and_precedes_the_error():
    assert list(success(1, {"id": None})) == ["return", "id"]
    assert list(failure("GenericError", "no", {"id": 1})) == ["id", "error"]
    assert list(success(1, {})) == ["return"]
    assert list(failure("GenericError", "no", {})) == ["error"]


def test_an_event_has_its_time_first_and_no_data_if_there_is_none():
    message = event("RESET", {"guest": False}, nanoseconds=1_234_567_891_999)
    assert json.dumps(message) == (
        '{"timestamp": {"seconds": 1234, "microseconds": 567891}, "event": "RESET", "data": {"guest": false}}'
    )
    assert list(event("STOP", {})) == ["timestamp", "event"]
