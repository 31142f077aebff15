"""The stream's dialect and errors.  What is expected here was seen in qemu-storage-daemon 10.0.2."""

from __future__ import annotations

import pytest

from qmpd.qjson import JSONError, JSONStream, lexer, values

PARSE = "JSON parse error, "


def outcome(value):
    return value.desc.removeprefix(PARSE) if isinstance(value, JSONError) else ("value", value)


def outcomes(data: bytes, stream: JSONStream | None = None):
    return [outcome(value) for value in (stream or JSONStream()).feed(data)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"1 ", 1),
        (b"-0 ", 0),
        (b"1.5 ", 1.5),
        (b"1e+5 ", 100000.0),
        (b"1e01 ", 10.0),
        (b"18446744073709551615 ", 18446744073709551615),
        (b"-9223372036854775808 ", -9223372036854775808),
        (b"1e400 ", float("inf")),
        (b"true ", True),
        (b"null ", None),
        (b"'a\"b'", 'a"b'),
        (b'"a\'b"', "a'b"),
        (rb"'\''", "'"),
        (rb'"\b\f\n\r\t\/\\\""', '\b\f\n\r\t/\\"'),
        (rb'"\ud83d\ude00 \u00E9"', "\U0001f600 é"),
        (rb'"\u0000"', "\0"),
        (b'"\xc0\x80"', "\0"),
        (b'"\x7f%s"', "\x7f%s"),
        (b"{'a': [1, {}], \"b\"\n:\t'c'}", {"a": [1, {}], "b": "c"}),
    ],
)
def test_a_value_of_the_dialect_is_read(data, expected):
    assert outcomes(data) == [("value", expected)]


@pytest.mark.parametrize(
    ("text", "double"), [("18446744073709551616", 2.0**64), ("-9223372036854775809", -(2.0**63))]
)
def test_an_integer_over_64_bits_becomes_a_double(text, double):
    for request in (f'{{"id": {text}}}', f"{{'id': {text}}}"):
        (value,) = JSONStream().feed(request.encode())
        assert value == {"id": double}
        assert isinstance(value["id"], float)


def test_a_number_of_many_digits_is_a_double():
    assert outcomes(b"[" + b"9" * 5000 + b"]") == [("value", [float("inf")])]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"hello\n", ["invalid keyword 'hello'"]),
        (b"truefalse ", ["invalid keyword 'truefalse'"]),
        (b"NaN ", ["stray 'N'"]),
        (b"True ", ["stray 'T'"]),
        (b"-Infinity ", ["stray '-I'"]),
        (b"01 ", ["stray '01'"]),
        (b"-01 ", ["stray '-01'"]),
        (b"012 3 ", ["stray '01'"]),
        (b"0x10 ", [("value", 0), "invalid keyword 'x'", ("value", 10)]),
        (b"0e0 ", [("value", 0), "invalid keyword 'e'", ("value", 0)]),
        (b'{"a":0e0}', ["expected separator in dict"]),
        (b"1. ", ["stray '1. '"]),
        (b"1.e5 ", ["stray '1.e'"]),
        (b"1e+ ", ["stray '1e+ '"]),
        (b"1.5.5 ", [("value", 1.5), "stray '.'"]),
        (b"- ", ["stray '- '"]),
        (b"-[]", ["stray '-['", "expecting value"]),
        (b"+1\n", ["stray '+'"]),
        (b"%p\n", ["stray '%'"]),
        (b"// no\n{}", ["stray '/'", ("value", {})]),
        (b"\xef\xbb\xbf{}", ["stray '\ufffd'", ("value", {})]),
        (b"\x00", ["stray ''"]),
        (b'"a\tb"\n', ["stray '\"a\t'"]),
        (b'"\xe2\x82\x01', ["stray '\"\ufffd\x01'"]),
        (b'"\x80\x80\xf8\x88\x80\x80\x80\x01', ["stray '\"\ufffd\ufffd\ufffd\x01'"]),
        (rb'"\x41"', ["invalid escape sequence in string"]),
        (rb'"\u12"', ['\\u12" is not a valid Unicode character']),
        (rb'"\u\u0041"', ["\\u\\u00 is not a valid Unicode character"]),
        (rb'"\ud83d\u0041"', ["\\ud83d is not a valid Unicode character"]),
        (rb'"\ude00"', ["\\ude00 is not a valid Unicode character"]),
        (rb'"\ud83f\udfff"', ["\\ud83f\\udfff is not a valid Unicode character"]),
        (rb'{"a": "\uffff"}', ["\\uffff is not a valid Unicode character"]),
        (b'{"a": "\xef\xbf\xbf"}', ["invalid UTF-8 sequence in string"]),
        (b'"\xed\xa0\x80"', ["invalid UTF-8 sequence in string"]),
        (b'"\\x\x80"', ["invalid escape sequence in string"]),
        (b'"\x80\\x"', ["invalid UTF-8 sequence in string"]),
        (b"}", ["expecting value"]),
        (b"{]}", ["expecting value", "expecting value"]),
        (b'{"a":1}}', [("value", {"a": 1}), "expecting value"]),
        (b'{"a": 1]', ["expected separator in dict"]),
        (b'{"a": 1 "b": 2}', ["expected separator in dict"]),
        (b"[1 2]", ["expected separator in list"]),
        (b'{"a" 1}', ["missing : in object pair"]),
        (b"{1: 2}", ["key is not a string in object"]),
        (b"{[]: 2}", ["key is not a string in object"]),
        (b"{nul: 2}", ["invalid keyword 'nul'"]),
        (b'{"a": 1,}', ["expecting value"]),
        (b"[1,]", ["expecting value"]),
        (b'{"a":1,"a":2}\n', ["duplicate key"]),
        (b'{"a":1,"a":nul}', ["invalid keyword 'nul'"]),
        (b'{"a":{"b":1,"\\u0062":2}}\n', ["duplicate key"]),
        (b'{"a/b":"c:d","a\\/b":2}\n', ["duplicate key"]),
        (b'{"a":"\\":","a":2}\n', ["duplicate key"]),
        (b'{"a":[{"b":1},{"b":1,"b":2}]}\n', ["duplicate key"]),
    ],
)
def test_an_error_has_the_wording_and_the_number_of_replies_that_qemu_gives(data, expected):
    assert outcomes(data) == expected


def test_an_open_bracket_swallows_what_follows():
    stream = JSONStream()
    assert outcomes(b'{"a": [}', stream) == []
    assert outcomes(b'{"execute": "x"}', stream) == []
    assert outcomes(b"]", stream) == ["expecting value"]


@pytest.mark.parametrize(
    "start", [b'{"a": "', b"{'a", b"[1, 2", b'"\\', b"-", b"12", b"@ x", b"", b"[[[", b"%"]
)
def test_0xff_and_a_newline_bring_the_stream_into_a_known_state(start):
    stream = JSONStream()
    stream.feed(start)
    assert isinstance(stream.feed(b"\xff\n")[-1], JSONError)
    assert stream.feed(b'{"a":1}\n') == [{"a": 1}]


def test_a_long_keyword_is_cut_where_qemu_cuts_it():
    (error,) = JSONStream().feed(b"a" * 5000 + b"\n")
    assert len(error.desc) == len(PARSE) + 1023


def test_nesting_of_1024_is_read_and_one_more_is_refused():
    (value,) = JSONStream().feed(b'{"a":' + b"[" * 1023 + b"]" * 1023 + b"}")
    assert list(value) == ["a"]
    assert outcomes(b"[" * 1025 + b",1 ") == [
        "JSON nesting depth limit exceeded",
        "expecting value",
        ("value", 1),
    ]


def test_a_token_too_many_is_refused(monkeypatch):
    monkeypatch.setattr(values, "MAXIMUM_TOKENS", 8)
    assert outcomes(b"[1,2,3,]") == ["expecting value"]
    assert outcomes(b"[1,2,3,4] 5 ") == ["JSON token count limit exceeded", ("value", 5)]


def test_an_endless_token_is_refused_at_the_limit_and_the_stream_goes_on(monkeypatch):
    monkeypatch.setattr(lexer, "MAXIMUM_SIZE", 100)
    stream = JSONStream()
    assert outcomes(b'["' + b"a" * 99, stream) == []
    assert outcomes(b"a", stream) == ["JSON token size limit exceeded"]
    assert outcomes(b"bc 1 ", stream) == ["invalid keyword 'bc'", ("value", 1)]


def test_the_tokens_of_a_value_together_may_not_exceed_the_limit(monkeypatch):
    monkeypatch.setattr(values, "MAXIMUM_SIZE", 100)
    assert outcomes(b'["' + b"a" * 60 + b'","' + b"b" * 60 + b'"\n') == ["JSON token size limit exceeded"]


def test_a_stray_token_is_not_echoed_without_bound():
    (error,) = JSONStream().feed(b'"' + b"a" * 1_000_000 + b"\x01")
    assert len(error.desc) < 100_000
