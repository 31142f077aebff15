from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.errors import Error
from qmpd.qapi import HelpRequested, Schema
from qmpd.qapi.keyval import parse


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("file,node-name=n", {"driver": "file", "node-name": "n"}),
        ("driver=raw,file.driver=x,file.a.b=c", {"driver": "raw", "file": {"driver": "x", "a": {"b": "c"}}}),
        ("raw,", {"driver": "raw"}),
        ("raw,a=1,,2,b=,,", {"driver": "raw", "a": "1,2", "b": ","}),
        ("raw,a=,b=x=y", {"driver": "raw", "a": "", "b": "x=y"}),
        ("raw,a=1,a=2", {"driver": "raw", "a": "2"}),
        ("x,c.1=b,c.0=a,c.02.z=d", {"driver": "x", "c": ["a", "b", {"z": "d"}]}),
        ("x,__com.redhat_a.b=1", {"driver": "x", "__com.redhat_a": {"b": "1"}}),
        ("a=" + "v" * 1000, {"a": "v" * 1000}),
    ],
)
def test_options_become_nested_strings(text: str, options: dict[str, Any]) -> None:
    assert parse(text, "driver") == options


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("x,foo", "Expected '=' after parameter 'foo'"),
        ("a=3,secret,id=x", "Expected '=' after parameter 'secret'"),
        (",", "Invalid parameter ''"),
        ("=x", "Invalid parameter ''"),
        ("x,,y", "Invalid parameter ''"),
        ("x,.a=1", "Invalid parameter '.a'"),
        ("x,a.=1", "Invalid parameter 'a.'"),
        ("x,a..b=1", "Invalid parameter 'a..b'"),
        ("x,1a=1", "Invalid parameter '1a'"),
        ("x,a.1b=1", "Invalid parameter 'a.1b'"),
        ("x,_a=1", "Invalid parameter '_a'"),
        ("x,a b=1", "Invalid parameter 'a b'"),
        ("x,0=1", "Invalid parameter '0'"),
        ("x,x.y=1,x=2", "Parameters 'x.*' used inconsistently"),
        ("x,x=2,x.y=1", "Parameters 'x.*' used inconsistently"),
        ("x,c.0=a,c.x=b", "Parameters 'c.*' used inconsistently"),
        ("x,c.0=a,c.2=b", "Parameter 'c.1' missing"),
        ("x,c.9999999999=a", "Parameter 'c.0' missing"),
        ("x," + "a" * 128 + "=1", f"Parameter '{'a' * 128}' is too long"),
    ],
)
def test_a_malformed_option_is_refused_in_qemus_words(text: str, error: str) -> None:
    with pytest.raises(Error) as caught:
        parse(text, "driver")
    assert caught.value.desc == error


@pytest.mark.parametrize("text", ["help", "?", "secret,help", "secret,id=x,?"])
def test_a_question_for_help_is_told_apart(text: str) -> None:
    with pytest.raises(HelpRequested, match="Help is not available for this option"):
        parse(text, "qom-type")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (
            "null-co,size=0x10,latency-ns=010,read-zeroes=on",
            {"driver": "null-co", "size": 16, "latency-ns": 8, "read-zeroes": True},
        ),
        ("null-co,size= +12", {"driver": "null-co", "size": 12}),
        ("null-co,size=-9223372036854775808", {"driver": "null-co", "size": -(1 << 63)}),
        ("null-co,node-name=12", {"driver": "null-co", "node-name": "12"}),
        ("null-co,cache.direct=off", {"driver": "null-co", "cache": {"direct": False}}),
        ("raw,file=x,length=1.5k", {"driver": "raw", "file": "x", "length": 1536}),
        ("raw,file=x,length=4G", {"driver": "raw", "file": "x", "length": 4 << 30}),
        ("raw,file=x,length=512B", {"driver": "raw", "file": "x", "length": 512}),
        ("raw,file=x,length=.5K", {"driver": "raw", "file": "x", "length": 512}),
        ("raw,file=x,length=010", {"driver": "raw", "file": "x", "length": 10}),
        ("raw,file=x,length=0x200", {"driver": "raw", "file": "x", "length": 512}),
        ("raw,file=x,length=15E", {"driver": "raw", "file": "x", "length": 15 << 60}),
        (
            "raw,file.driver=null-co,file.size=1",
            {"driver": "raw", "file": {"driver": "null-co", "size": 1}},
        ),
        (
            "quorum,children.0=a,children.1.driver=null-co,children.1.size=2,vote-threshold=1",
            {"driver": "quorum", "children": ["a", {"driver": "null-co", "size": 2}], "vote-threshold": 1},
        ),
        ("qcow2,file=f,overlap-check=none", {"driver": "qcow2", "file": "f", "overlap-check": "none"}),
        ("{'driver': 'null-co', \"size\": 1}", {"driver": "null-co", "size": 1}),
    ],
)
def test_an_option_is_read_by_the_types_that_it_names(
    schema: Schema, text: str, options: dict[str, Any]
) -> None:
    assert schema.from_option("Options", text, "driver") == options


# As qemu-storage-daemon 10.0.2 answered on its command line.
@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "Parameter 'driver' is missing"),
        ("node-name=n", "Parameter 'driver' is missing"),
        ("driver=x", "Parameter 'driver' does not accept value 'x'"),
        ("driver.x=raw", "Parameters 'driver.*' are unexpected"),
        ("null-co,size=1k", "Parameter 'size' expects integer"),
        ("null-co,size=08", "Parameter 'size' expects integer"),
        ("null-co,size=12 ", "Parameter 'size' expects integer"),
        ("null-co,size=1.0", "Parameter 'size' expects integer"),
        ("null-co,size=", "Parameter 'size' expects integer"),
        ("null-co,size=0x", "Parameter 'size' expects integer"),
        ("null-co,size=9223372036854775808", "Parameter 'size' expects integer"),
        ("null-co,latency-ns=x", "Parameter 'latency-ns' expects integer"),
        ("null-co,latency-ns=18446744073709551616", "Parameter 'latency-ns' expects integer"),
        ("null-co,read-zeroes=True", "Parameter 'read-zeroes' expects 'on' or 'off'"),
        ("null-co,read-zeroes=1", "Parameter 'read-zeroes' expects 'on' or 'off'"),
        ("null-co,cache.direct=maybe", "Parameter 'cache.direct' expects 'on' or 'off'"),
        ("null-co,cache=x", "Invalid parameter type for 'cache', expected: object"),
        ("null-co,cache.x=on", "Parameter 'cache.x' is unexpected"),
        ("null-co,x.y=on", "Parameter 'x' is unexpected"),
        ("null-co,size.a=3", "Parameters 'size.*' are unexpected"),
        ("null-co,node-name.0=n", "Parameters 'node-name.*' are unexpected"),
        ("null-co,discard.a=3", "Parameters 'discard.*' are unexpected"),
        ("null-co,discard=foo", "Parameter 'discard' does not accept value 'foo'"),
        ("raw,file.0=x", "Invalid parameter type for 'file', expected: Ref"),
        ("raw,file.driver=null-co,file.size=x", "Parameter 'file.size' expects integer"),
        ("raw,file=x,length=1.5", "Parameter 'length' expects size"),
        ("raw,file=x,length=-1", "Parameter 'length' expects size"),
        ("raw,file=x,length=4KB", "Parameter 'length' expects size"),
        ("raw,file=x,length=0x200k", "Parameter 'length' expects size"),
        ("raw,file=x,length=1e3", "Parameter 'length' expects size"),
        ("raw,file=x,length=16E", "Parameter 'length' expects size"),
        ("raw,file=x,length=", "Parameter 'length' expects size"),
        ("raw,file=x,length=512 ", "Parameter 'length' expects size"),
        ("quorum,children=a", "Invalid parameter type for 'children', expected: array"),
        ("quorum,children.x=a", "Invalid parameter type for 'children', expected: array"),
        ("quorum,children.0.0=a", "Invalid parameter type for 'null', expected: Ref"),
        (
            "quorum,children.0.driver=null-co,children.0.size=zz",
            "Parameter 'children.0.size' expects integer",
        ),
        ("quorum,children.0.driver=null-co,children.0.zz=1", "Parameter 'children.0.zz' is unexpected"),
        ('{"driver":"null-co","size":"1"}', "Invalid parameter type for 'size', expected: integer"),
        ('{"driver":"null-co"', "JSON parse error, premature EOI"),
    ],
)
def test_an_option_is_refused_for_the_same_reason_as_by_qemu(schema: Schema, text: str, error: str) -> None:
    with pytest.raises(Error) as caught:
        schema.from_option("Options", text, "driver")
    assert caught.value.desc == error


@pytest.mark.parametrize(
    ("text", "error"),
    [("u16=70000", "Parameter 'u16' expects uint16_t"), ("u16=-1", "Parameter 'u16' expects uint16_t")],
)
def test_a_narrow_integer_is_refused_by_its_range(schema: Schema, text: str, error: str) -> None:
    with pytest.raises(Error) as caught:
        schema.from_option("Numbers", text)
    assert caught.value.desc == error


def test_strings_of_classic_clients_become_numbers_and_booleans(schema: Schema) -> None:
    given_ = {
        "driver": "null-co",
        "size": "2",
        "read-zeroes": "on",
        "node-name": "7",
        "cache": {"direct": "off"},
    }
    before = repr(given_)
    assert schema.coerce("Options", given_) == {
        "driver": "null-co",
        "size": 2,
        "read-zeroes": True,
        "node-name": "7",
        "cache": {"direct": False},
    }
    assert repr(given_) == before


def test_what_cannot_be_turned_is_left_for_validation(schema: Schema) -> None:
    odd = {"driver": "null-co", "size": "many", "read-zeroes": 1, "bogus": "1"}
    assert schema.coerce("Options", odd) == odd
    assert schema.coerce("Numbers", {"number": "1.5", "u8": 7}) == {"number": 1.5, "u8": 7}


KEYS = st.sampled_from(["a", "b.c", "b.0", "b.1", "driver", "size", "cache.direct", "0", "help", "x..y", ""])


@settings(deadline=None)
@given(
    st.text(st.sampled_from("ab01.,=? -x"), max_size=20)
    | st.lists(st.tuples(KEYS, st.text(st.sampled_from("a1,=."), max_size=3)).map("=".join)).map(",".join)
)
def test_any_option_is_taken_or_refused(schema: Schema, text: str) -> None:
    with suppress(Error):
        schema.from_option("Options", text, "driver")


@settings(deadline=None)
@given(
    st.dictionaries(st.from_regex(r"[a-z][a-z0-9-]{0,5}", fullmatch=True), st.text(max_size=8), max_size=4)
)
def test_doubling_commas_carries_any_value(values: dict[str, str]) -> None:
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in values.items())
    assert parse(text) == values
