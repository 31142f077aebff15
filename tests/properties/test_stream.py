"""Mutated and broken input: the stream never fails, always recovers, and says what QEMU says."""

from __future__ import annotations

import json
import os
import random
import re
import socket
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.errors import Error
from qmpd.monitor.dispatch import Dispatcher, Reply
from qmpd.monitor.encode import encode
from qmpd.monitor.session import Session
from qmpd.qjson import JSONError, JSONStream

#: Requests and fragments from which broken input is made; no command that changes anything.
SEEDS = [
    b'{"execute": "query-jobs"}\n',
    b'{"execute":\n "query-jobs",\r\n\t"id": 1\n}\n',
    b"{'execute': 'query-jobs', 'id': 'it\\'s \"quoted\"'}",
    b'{"execute": "query-jobs", "id": {"a": [1, -2.5e+3, true, null, {"b": "\\u00e9\\ud83d\\ude00"}]}}\n',
    b'{"execute": "query-jobs", "id": "caf\xc3\xa9 \xf0\x9f\x98\x80 \xc0\x80", "arguments": {}}\n',
    b'{"execute": "query-jobs"}{"execute": "nope", "id": 18446744073709551616} []',
    b'[[[{"a": [[], {}, [1, 2]]}]]]\n',
    b'{"a": {"a": 1, "b": {"a": 2}}, "b": 0, "c": -0.0}\n',
]
FRAGMENTS = [
    *(b"{ } [ ] : , \" ' \\ \n \r \t - + . 0 1 9 e E % @ / # a true false null nul".split(b" ")),
    *(
        bytes([byte])
        for byte in (0, 1, 0x1F, 0x20, 0x7F, 0x80, 0xBF, 0xC0, 0xE2, 0xED, 0xF0, 0xF5, 0xFE, 0xFF)
    ),
    *(
        b'\\u0041 \\ud83d \\ude00 \\uffff \\u12 \\x "a":1, "a":1,"a":2 01 0x10 1.5 1e5 1e 1. .5 0e0 -0'.split(
            b" "
        )
    ),
    *(b'"execute" "id" "arguments" "query-jobs" \xef\xbf\xbf \xef\xb7\x90 \xed\xa0\x80 \xc0\x80'.split(b" ")),
    b"{{[",
    b"]}}",
    b'{"execute": "query-jobs", "id": 7}',
]


def mutated(choice: random.Random) -> bytes:
    """A seed or two with a few bytes or fragments put in, taken out or put elsewhere."""
    data = b"".join(choice.choices(SEEDS, k=choice.randint(1, 2)))
    for _ in range(choice.randint(0, 6)):
        position = choice.randrange(len(data) + 1)
        end = position + choice.choice((0, 0, 0, 1, 2, 10))
        data = data[:position] + choice.choice([*FRAGMENTS, b""]) + data[end:]
    return data


broken = st.one_of(
    st.binary(max_size=200),
    st.randoms(use_true_random=False).map(mutated),
    st.lists(st.sampled_from([*SEEDS, *FRAGMENTS]), max_size=12).map(b"".join),
)


def outcomes(stream: JSONStream, *pieces: bytes) -> list[str]:
    """What the stream gives, in a form that can be compared (1 is not 1.0, nor True)."""
    given = [value for piece in pieces for value in stream.feed(piece)]
    return [f"error: {value.desc}" if isinstance(value, JSONError) else repr(value) for value in given]


@given(broken)
def test_after_0xff_a_good_command_is_read_whatever_came_before(data):
    stream = JSONStream()
    stream.feed(data)
    assert outcomes(stream, b"\xff\n", b'{"execute":"query-jobs"}\n')[-1] == "{'execute': 'query-jobs'}"


@given(broken, st.lists(st.integers(0, 400), max_size=8))
def test_where_the_stream_is_cut_makes_no_difference(data, cuts):
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    pieces = [data[begin:end] for begin, end in pairwise(places)]
    assert outcomes(JSONStream(), *pieces) == outcomes(JSONStream(), data)


@given(broken)
def test_the_fast_way_gives_what_the_slow_one_gives(data):
    # A byte at a time no line is ever whole, so everything goes through the lexer.
    bytewise = [data[position : position + 1] for position in range(len(data))]
    assert outcomes(JSONStream(), data) == outcomes(JSONStream(), *bytewise)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(json_values, st.booleans())
def test_what_is_written_is_read_back(value, pretty):
    text = encode({"id": value}, pretty=pretty)
    if b"inf" in text or any(ord(c) & 0xFFFE == 0xFFFE or "\ufdd0" <= c <= "\ufdef" for c in str(value)):
        return
    assert JSONStream().feed(text) == [{"id": value}]


# Against the peer


class QueryJobs:
    """The one command that is used here; qemu-storage-daemon has it as well."""

    allow_oob = False
    success_response = True
    returns_number = False

    def validate(self, arguments: dict[str, Any], /) -> None:
        for member in arguments:
            raise Error(f"Parameter '{member}' is unexpected")


class Negotiation(QueryJobs):
    def validate(self, arguments: dict[str, Any], /) -> None:
        pass


class OneCommand:
    commands = {"query-jobs": QueryJobs(), "qmp_capabilities": Negotiation()}  # noqa: RUF012


def our_replies(data: bytes) -> list[bytes]:
    schema = OneCommand()
    dispatcher = Dispatcher(schema, {"query-jobs": lambda arguments: []})
    session = Session(schema, {})
    session.negotiate()
    replies = []
    for message in session.receive(data):
        reply = dispatcher.begin(session, message)
        assert isinstance(reply, Reply)
        replies.append(encode(reply.message, may_have_doubles=reply.may_have_doubles))
    return replies


def their_replies(connection: socket.socket, data: bytes, number: int) -> list[bytes]:
    """The peer's replies to this input, which must end with a reset."""
    end = b'"the end of %d"' % number
    connection.sendall(data + b'{"execute": "query-jobs", "id": %s}' % end)
    answer = b""
    while end not in answer:
        received = connection.recv(1 << 16)
        assert received, "the peer closed the connection"
        answer += received
    return answer.splitlines(keepends=True)[:-1]


def comparable(reply: bytes) -> str:
    """A reply without what is arbitrary: the order of members, and which of several faults is named."""
    text = reply.decode()
    assert text.endswith("\r\n")
    text = re.sub(r"QMP input (member|lacks) .*?\"}}", r'fault in a request"}}', text)
    text = re.sub(r"Parameter '.*' is unexpected", "Parameter is unexpected", text)
    return json.dumps(json.loads(re.sub(r"(?<![a-z])inf\b", "Infinity", text)), sort_keys=True)


@pytest.mark.peer("qemu-storage-daemon")
def test_every_broken_input_is_answered_as_qemu_answers_it(start_storage_daemon):
    connection = start_storage_daemon().monitor.socket
    # A run that passed passes again; QMPD_FUZZ_SEED looks elsewhere.
    seed = int(os.environ.get("QMPD_FUZZ_SEED", "1"))
    choice = random.Random(seed)
    for number in range(400):
        data = mutated(choice) + b"\xff\n"
        theirs = [comparable(reply) for reply in their_replies(connection, data, number)]
        ours = [comparable(reply) for reply in our_replies(data)]
        assert ours == theirs, f"{data!r} (seed {seed})"
