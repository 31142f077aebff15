from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbd_wire import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EXTENDED_REQUEST,
    FLUSH,
    FUA,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    REQUEST,
    TRIM,
    WRITE,
    WRITE_ZEROES,
)

from qmpd.export.nbd.budget import PIECE, Budget, Share
from qmpd.export.nbd.handshake import Agreement, Disconnect
from qmpd.export.nbd.transmission import (
    BUFFER_SIZE,
    LONG,
    PIECE_OF_LONG,
    Request,
    RequestError,
    Requests,
    TooLong,
    check,
    dialect,
)

SIMPLE = Agreement("disk", False, False, ())
STRUCTURED = Agreement("disk", True, False, (0,))
EXTENDED = Agreement("disk", True, True, (0,))

EPERM, EINVAL = 1, 22
MIB = 1 << 20


def request(
    command: int, offset: int = 0, data: bytes = b"", *, length: int | None = None, flags: int = 0
) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">IHHQQI", REQUEST, flags, command, 7, offset, size) + data


def feed(requests: Requests, data: bytes) -> None:
    while data:
        buffer = requests.get_buffer()
        taken = min(len(buffer), len(data))
        buffer[:taken] = data[:taken]
        requests.buffer_updated(taken)
        data = data[taken:]


def take_all(requests: Requests) -> list[tuple[int, int, bytes]]:
    taken = []
    while (one := requests.next()) is not None:
        taken.append((one.command, one.offset, bytes(one.payload)))
    return taken


@given(
    st.lists(
        st.tuples(st.sampled_from([READ, WRITE, FLUSH, TRIM]), st.integers(0, 9), st.binary(max_size=300))
    ),
    st.data(),
)
def test_requests_are_the_same_however_their_bytes_are_cut(
    wanted: list[tuple[int, int, bytes]], data: st.DataObject
) -> None:
    wanted = [(command, offset, payload if command == WRITE else b"") for command, offset, payload in wanted]
    stream = b"".join(request(*one) for one in wanted)
    early = data.draw(st.integers(0, len(stream)))
    requests = Requests(extended=False, received=stream[:early])
    taken = take_all(requests)
    stream = stream[early:]
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        feed(requests, stream[:cut])
        taken += take_all(requests)
        stream = stream[cut:]
    assert taken == wanted


@pytest.mark.parametrize("size", [1, 4096, 100_000, 300_000, 5 * MIB])
def test_long_payloads_arrive_whole_and_what_follows_too(size: int) -> None:
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    requests = Requests(extended=False)
    stream = request(WRITE, 5, payload) + request(READ, 6, length=9)
    taken = []
    for start in range(0, len(stream), 50_000):
        feed(requests, stream[start : start + 50_000])
        taken += take_all(requests)
    assert taken == [(WRITE, 5, payload), (READ, 6, b"")]


def test_many_requests_may_wait_in_the_buffer() -> None:
    requests = Requests(extended=False)
    one = request(READ, 1, length=1)
    sent = 0
    while not requests.full:
        buffer = requests.get_buffer()
        chunk = (one * (len(buffer) // len(one) + 2))[sent % len(one) :][: len(buffer)]
        buffer[: len(chunk)] = chunk
        requests.buffer_updated(len(chunk))
        sent += len(chunk)
    assert len(take_all(requests)) == sent // len(one)
    assert len(requests.get_buffer()) > 0


def test_what_is_no_request_disconnects() -> None:
    requests = Requests(extended=False, received=struct.pack(">IHHQQI", EXTENDED_REQUEST, 0, 0, 7, 0, 0))
    with pytest.raises(Disconnect):
        requests.next()


def test_an_endless_payload_is_not_waited_for() -> None:
    requests = Requests(extended=False, received=request(WRITE, length=32 * MIB + 1))
    with pytest.raises(TooLong) as caught:
        requests.next()
    assert caught.value.request.cookie == 7


def test_an_extended_request_of_another_kind_may_have_a_payload_which_is_passed_over() -> None:
    header = struct.pack(">IHHQQQ", EXTENDED_REQUEST, PAYLOAD_LEN, READ, 7, 0, 4)
    requests = Requests(extended=True, received=header + b"pppp" + header)
    first = requests.next()
    assert first is not None
    assert first.command == READ
    with pytest.raises(RequestError):
        check(first, EXTENDED, MIB, writable=True)


@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_end_the_session_or_are_requests(data: bytes, extended: bool) -> None:
    requests = Requests(extended=extended)
    magic = struct.pack(">I", EXTENDED_REQUEST if extended else REQUEST)
    for stream in (data, magic + data):
        feed(requests, stream)
        try:
            while (one := requests.next()) is not None:
                check(one, EXTENDED if extended else SIMPLE, MIB, writable=True)
        except (Disconnect, TooLong):
            return
        except RequestError:
            continue


def checked(
    command: int,
    offset: int,
    length: int,
    *,
    flags: int = 0,
    agreement: Agreement = STRUCTURED,
    writable: bool = True,
) -> int:
    """The error that a request gets; 0 for none."""
    try:
        check(Request(flags, command, 7, offset, length, memoryview(b"")), agreement, MIB, writable=writable)
    except RequestError as error:
        return error.number
    return 0


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (READ, EINVAL),
        (WRITE, EINVAL),
        (WRITE_ZEROES, EINVAL),
        (TRIM, EINVAL),
        (CACHE, EINVAL),
        (BLOCK_STATUS, EINVAL),
    ],
)
@pytest.mark.parametrize(("offset", "length"), [(MIB - 8, 16), (MIB, 1), (2**64 - 8, 16), (0, MIB + 1)])
def test_nothing_beyond_the_end_is_served(command: int, number: int, offset: int, length: int) -> None:
    assert checked(command, offset, length) == number


@pytest.mark.parametrize("command", [READ, WRITE, WRITE_ZEROES, TRIM, CACHE, BLOCK_STATUS])
def test_the_last_byte_is_served(command: int) -> None:
    assert checked(command, MIB - 1, 1) == 0


@pytest.mark.parametrize("command", [WRITE, WRITE_ZEROES, TRIM])
def test_a_read_only_export_is_not_written_to(command: int) -> None:
    assert checked(command, 0, 512, writable=False) == EPERM


@pytest.mark.parametrize(
    ("command", "flags", "agreement", "number"),
    [
        (READ, DF, STRUCTURED, 0),
        (READ, DF, SIMPLE, EINVAL),
        (READ, FUA, SIMPLE, 0),
        (READ, REQ_ONE, STRUCTURED, EINVAL),
        (READ, 0x8000, STRUCTURED, EINVAL),
        (READ, PAYLOAD_LEN, EXTENDED, EINVAL),
        (WRITE, PAYLOAD_LEN, EXTENDED, 0),
        (WRITE, PAYLOAD_LEN, STRUCTURED, EINVAL),
        (BLOCK_STATUS, REQ_ONE, STRUCTURED, 0),
        (BLOCK_STATUS, 0, SIMPLE, EINVAL),
        (DISC, 0, STRUCTURED, EINVAL),
        (77, 0, STRUCTURED, EINVAL),
    ],
)
def test_flags_are_for_their_commands_and_for_what_was_negotiated(
    command: int, flags: int, agreement: Agreement, number: int
) -> None:
    assert checked(command, 0, 512, flags=flags, agreement=agreement) == number


def test_data_and_cache_have_the_longest_payload_and_zeroes_have_not() -> None:
    assert checked(READ, 0, 32 * MIB + 1) == EINVAL
    assert checked(CACHE, 0, 32 * MIB + 1) == EINVAL


def test_a_status_of_nothing_is_refused() -> None:
    assert checked(BLOCK_STATUS, 0, 0) == EINVAL


ASKED = Request(0, READ, 0x0102030405060708, 0x1000, 512, memoryview(b""))
COOKIE = bytes(range(1, 9))


def test_simple_replies_are_sixteen_bytes() -> None:
    spoken = dialect(SIMPLE)
    assert spoken.data(ASKED, 0x1000, 512) == bytes.fromhex("6744669800000000") + COOKIE
    assert spoken.error(ASKED, EINVAL, "why") == bytes.fromhex("6744669800000016") + COOKIE


def test_structured_replies_are_chunks() -> None:
    spoken = dialect(STRUCTURED)
    head = bytes.fromhex("668e33ef")
    assert spoken.data(ASKED, 0x1000, 512) == head + b"\0\1\0\1" + COOKIE + struct.pack(">IQ", 520, 0x1000)
    assert spoken.data(ASKED, 0x1000, 256, done=False)[4:8] == b"\0\0\0\1"
    assert spoken.data(ASKED, 0, 0) == head + b"\0\1\0\0" + COOKIE + bytes(4)
    assert (
        spoken.error(ASKED, EINVAL, "why") == head + b"\0\1\x80\1" + COOKIE + b"\0\0\0\x09\0\0\0\x16\0\3why"
    )
    status = spoken.status(ASKED, 5, [(512, 3), (1024, 0)], done=True)
    assert status == head + b"\0\1\0\5" + COOKIE + struct.pack(">IIIIII", 20, 5, 512, 3, 1024, 0)


def test_extended_replies_repeat_the_offset_and_have_long_extents() -> None:
    spoken = dialect(EXTENDED)
    head = bytes.fromhex("6e8a278c")
    at = struct.pack(">Q", 0x1000)
    assert spoken.success(ASKED) == head + b"\0\1\0\0" + COOKIE + at + bytes(8)
    assert spoken.data(ASKED, 0x1000, 512) == head + b"\0\1\0\1" + COOKIE + at + struct.pack(
        ">QQ", 520, 0x1000
    )
    status = spoken.status(ASKED, 5, [(1 << 40, 3)], done=False)
    assert status == head + b"\0\0\0\6" + COOKIE + at + struct.pack(">QIIQQ", 24, 5, 1, 1 << 40, 3)


@given(st.integers(1, 300), st.integers(0, 2000), st.integers(4096, 99_999), st.booleans())
def test_payloads_without_room_come_in_pieces_through_space_that_others_use(
    kibibytes: int, offset: int, cut: int, crowded: bool
) -> None:
    budget = Budget(PIECE)
    share, other = budget.enter(), budget.enter()
    if crowded:
        other.take(PIECE)
    space = memoryview(bytearray(BUFFER_SIZE))
    requests = Requests(extended=False, space=space, share=share)
    wanted = [
        (WRITE, offset, os.urandom(kibibytes * 1024)),
        (READ, 3, b""),
        (WRITE, 77, os.urandom(PIECE + 5)),
        (FLUSH, 0, b""),
    ]
    stream = b"".join(request(*one) for one in wanted)
    taken: list[tuple[int, int, bytes]] = []
    for start in range(0, len(stream), cut):
        data = stream[start : start + cut]
        while data:
            buffer = requests.get_buffer()
            length = min(len(buffer), len(data))
            buffer[:length] = data[:length]
            requests.buffer_updated(length)
            data = data[length:]
            taken += put_together(requests, share, taken)
            requests.settle()
            space[:] = bytes([0xEE]) * len(space)
    assert taken == wanted
    assert share.held == 0


def put_together(
    requests: Requests, share: Share, before: list[tuple[int, int, bytes]]
) -> list[tuple[int, int, bytes]]:
    """The further ones; pieces that come first belong to the last one of `before`."""
    new: list[tuple[int, int, bytes]] = []
    while (one := requests.next()) is not None:
        size = len(one.payload)
        if one.command == PIECE_OF_LONG:
            into = new or before
            command, offset, payload = into[-1]
            assert one.offset == offset + len(payload)
            into[-1] = command, offset, payload + bytes(one.payload)
        else:
            new.append((one.command & LONG - 1, one.offset, bytes(one.payload)))
        share.give(size)
    return new


def test_without_memory_it_waits_for_its_own_requests_and_what_is_dropped_is_given_back() -> None:
    share = Budget(PIECE).enter()
    requests = Requests(extended=False, share=share)
    feed(requests, request(WRITE, 0, bytes(4096)))
    first = requests.next()
    assert first is not None
    share.take(PIECE - 4096)
    feed(requests, request(WRITE, 0, bytes(4096), length=200_000))
    header = requests.next()
    assert header is not None
    assert (header.command, header.length) == (LONG | WRITE, 200_000)
    assert requests.next() is None
    assert requests.starved
    share.give(PIECE)
    assert requests.next() is None
    assert not requests.starved
    assert share.held == 200_000
    requests.drop()
    assert share.held == 0
