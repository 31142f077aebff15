from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbd_wire import (
    ABORT,
    EXPORT_NAME,
    EXTENDED,
    GO,
    IHAVEOPT,
    INFO,
    LIST,
    LIST_META,
    SET_META,
    STARTTLS,
    STRUCTURED,
    name_data,
)

from qmpd.export.nbd.handshake import MAX_OPTION, Handshake, Offer, State

DISK = Offer("disk", "a disk", 1 << 20, 0x0D6D, 1)
SECTORS = Offer("sectors", None, 1 << 20, 0x0D6D, 512, ("base:allocation", "qemu:allocation-depth"))

ACK, SERVER, INFO_REPLY, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, BLOCK_SIZE_REQD, TOO_BIG, EXT_HEADER_REQD = (
    (1 << 31) + number for number in (1, 2, 3, 5, 6, 8, 9, 10)
)


def begin(*, tls: bool = False, flags: int = 3) -> Handshake:
    handshake = Handshake(lambda: {"disk": DISK, "sectors": SECTORS}, tls=tls)
    assert handshake.receive(struct.pack(">I", flags)) == b""
    return handshake


def option(number: int, data: bytes = b"") -> bytes:
    return IHAVEOPT + struct.pack(">II", number, len(data)) + data


def parse(output: bytes) -> list[tuple[int, bytes]]:
    replies = []
    while output:
        magic, _, kind, length = struct.unpack_from(">QIII", output)
        assert magic == 0x3E889045565A9
        replies.append((kind, output[20 : 20 + length]))
        output = output[20 + length :]
    return replies


def ask(handshake: Handshake, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    return parse(handshake.receive(option(number, data)))


def go_data(name: str, *wanted: int) -> bytes:
    return name_data(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def meta_data(name: str, *queries: str) -> bytes:
    return name_data(name) + struct.pack(">I", len(queries)) + b"".join(map(name_data, queries))


def test_the_greeting_is_fixed_newstyle() -> None:
    assert Handshake(dict).greeting() == b"NBDMAGICIHAVEOPT\x00\x03"


def test_go_tells_about_the_export_and_settles_it() -> None:
    handshake = begin()
    assert ask(handshake, GO, go_data("disk", 1, 3)) == [
        (INFO_REPLY, b"\0\1disk"),
        (INFO_REPLY, b"\0\2a disk"),
        (INFO_REPLY, struct.pack(">HIII", 3, 1, 4096, 32 << 20)),
        (INFO_REPLY, struct.pack(">HQH", 0, 1 << 20, 0x0D6D)),
        (ACK, b""),
    ]
    assert handshake.state is State.TRANSMISSION
    assert handshake.agreement is not None
    assert handshake.agreement.export == "disk"


def test_requests_that_come_with_the_last_option_are_kept() -> None:
    handshake = begin()
    handshake.receive(option(GO, go_data("disk")) + b"first request")
    assert handshake.rest() == b"first request"


def test_every_byte_may_come_alone() -> None:
    handshake = Handshake(lambda: {"disk": DISK})
    conversation = struct.pack(">I", 3) + option(LIST) + option(GO, go_data("disk"))
    output = b"".join(handshake.receive(bytes([byte])) for byte in conversation)
    assert [kind for kind, _ in parse(output)] == [SERVER, ACK, 3, 3, 3, ACK]


def test_list_names_all_exports_with_their_descriptions() -> None:
    assert ask(begin(), LIST) == [
        (SERVER, b"\0\0\0\4diska disk"),
        (SERVER, b"\0\0\0\7sectors"),
        (ACK, b""),
    ]


def test_structured_replies_bring_the_flag_for_unfragmented_reads() -> None:
    handshake = begin()
    ask(handshake, STRUCTURED)
    assert ask(handshake, INFO, go_data("disk"))[-2] == (3, struct.pack(">HQH", 0, 1 << 20, 0x0DED))


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (STRUCTURED, STRUCTURED, INVALID),
        (EXTENDED, EXTENDED, INVALID),
        (EXTENDED, STRUCTURED, EXT_HEADER_REQD),
        (STRUCTURED, EXTENDED, ACK),
    ],
)
def test_ways_of_replying_are_negotiated_once(first: int, second: int, kind: int) -> None:
    handshake = begin()
    assert ask(handshake, first)[-1][0] == ACK
    assert ask(handshake, second)[-1][0] == kind


def test_info_wants_a_client_that_knows_block_sizes_where_they_matter() -> None:
    assert ask(begin(), INFO, go_data("sectors"))[-1][0] == BLOCK_SIZE_REQD
    assert ask(begin(), INFO, go_data("sectors", 3))[-1][0] == ACK


def test_a_client_that_goes_without_block_sizes_is_served_at_any() -> None:
    assert ask(begin(), GO, go_data("sectors"))[0] == (3, struct.pack(">HIII", 3, 1, 4096, 32 << 20))


@pytest.mark.parametrize(("flags", "zeroes"), [(3, 0), (1, 124), (0, 124)])
def test_export_name_is_answered_with_size_and_flags(flags: int, zeroes: int) -> None:
    handshake = begin(flags=flags)
    answer = handshake.receive(option(EXPORT_NAME, b"disk"))
    assert answer == struct.pack(">QH", 1 << 20, 0x0D6D) + bytes(zeroes)
    assert handshake.state is State.TRANSMISSION


@pytest.mark.parametrize(
    "data",
    [
        option(EXPORT_NAME, b"nope"),
        option(EXPORT_NAME, b"x" * 4097),
        b"IHAVEOPX" + bytes(8),
        IHAVEOPT + struct.pack(">II", 99, (32 << 20) + 1),
        option(EXTENDED) + option(EXPORT_NAME, b"disk"),
    ],
    ids=["unknown export", "long name", "bad magic", "endless option", "export name with extended headers"],
)
def test_who_breaks_the_protocol_is_disconnected(data: bytes) -> None:
    handshake = begin()
    handshake.receive(data)
    assert handshake.state is State.CLOSED
    assert handshake.problem


def test_unknown_client_flags_end_the_conversation() -> None:
    handshake = Handshake(dict)
    handshake.receive(b"\0\0\0\4")
    assert handshake.state is State.CLOSED


def test_abort_is_acknowledged_before_the_end() -> None:
    handshake = begin()
    assert ask(handshake, ABORT) == [(ACK, b"")]
    assert handshake.state is State.CLOSED
    assert handshake.problem is None


@pytest.mark.parametrize(
    ("number", "data", "kind"),
    [
        (99, b"abc", UNSUP),
        (LIST, b"x", INVALID),
        (LIST, b"x" * (MAX_OPTION + 1), INVALID),
        (STRUCTURED, b"x", INVALID),
        (GO, b"x" * (MAX_OPTION + 1), TOO_BIG),
        (GO, b"", INVALID),
        (GO, go_data("nope"), UNKNOWN),
        (GO, go_data("x" * 5000), INVALID),
        (GO, b"\0\0\0\xffab\0\0", INVALID),
        (GO, go_data("disk") + b"z", INVALID),
        (GO, name_data("disk") + b"\0\2\0\1", INVALID),
        (GO, go_data("di\0k"), INVALID),
        (GO, b"\0\0\0\1\xff\0\0", UNKNOWN),
        (SET_META, meta_data("disk"), INVALID),
        (STARTTLS, b"", POLICY),
    ],
)
def test_a_refused_option_leaves_the_haggling_where_it_was(number: int, data: bytes, kind: int) -> None:
    handshake = begin()
    assert [reply[0] for reply in ask(handshake, number, data)] == [kind]
    assert ask(handshake, LIST)[-1] == (ACK, b"")


def test_a_long_option_is_passed_over_without_being_kept() -> None:
    handshake = begin()
    handshake.receive(IHAVEOPT + struct.pack(">II", GO, 32 << 20))
    for _ in range(32):
        handshake.receive(bytes(1 << 20))
        assert len(handshake._input) == 0
    assert handshake.state is State.OPTION


@pytest.mark.parametrize(
    ("queries", "listed"),
    [
        ([], [b"base:allocation", b"qemu:allocation-depth"]),
        (["base:"], [b"base:allocation"]),
        (["qemu:", "base:allocation"], [b"base:allocation", b"qemu:allocation-depth"]),
        (["x:"], []),
        (["base:x", "allocation", "", "y" * 5000], []),
    ],
)
def test_metadata_contexts_are_listed_by_name_and_namespace(queries: list[str], listed: list[bytes]) -> None:
    handshake = begin()
    ask(handshake, STRUCTURED)
    replies = ask(handshake, LIST_META, meta_data("sectors", *queries))
    assert replies == [*((META, bytes(4) + name) for name in listed), (ACK, b"")]


def test_metadata_contexts_are_chosen_by_their_full_names() -> None:
    handshake = begin()
    ask(handshake, STRUCTURED)
    replies = ask(handshake, SET_META, meta_data("sectors", "qemu:allocation-depth", "base:"))
    assert replies == [(META, b"\0\0\0\1qemu:allocation-depth"), (ACK, b"")]
    ask(handshake, GO, go_data("sectors"))
    assert handshake.agreement is not None
    assert handshake.agreement.contexts == (1,)


def test_contexts_of_another_export_are_forgotten() -> None:
    handshake = begin()
    ask(handshake, STRUCTURED)
    ask(handshake, SET_META, meta_data("sectors", "base:allocation"))
    ask(handshake, GO, go_data("disk"))
    assert handshake.agreement is not None
    assert handshake.agreement.contexts == ()


def test_with_tls_nothing_is_told_in_the_clear() -> None:
    handshake = begin(tls=True)
    for number in (LIST, INFO, GO, STRUCTURED, 99):
        assert [kind for kind, _ in ask(handshake, number)] == [TLS_REQD]
    assert ask(handshake, STARTTLS) == [(ACK, b"")]
    assert handshake.state is State.TLS
    handshake.secured()
    assert ask(handshake, STARTTLS)[0][0] == INVALID
    assert ask(handshake, LIST)[-1][0] == ACK


def test_plain_text_behind_starttls_is_no_part_of_the_secured_session() -> None:
    handshake = begin(tls=True)
    handshake.receive(option(STARTTLS) + option(LIST))
    assert handshake.state is State.CLOSED


def test_an_export_name_in_the_clear_disconnects_where_tls_is_required() -> None:
    handshake = begin(tls=True)
    handshake.receive(option(EXPORT_NAME, b"disk"))
    assert handshake.state is State.CLOSED


OPTIONS = st.builds(option, st.integers(0, 12), st.binary(max_size=40))
VALID = st.sampled_from(
    [option(STRUCTURED), option(EXTENDED), option(LIST), option(INFO, go_data("disk", 3))]
)


@given(st.lists(st.one_of(OPTIONS, VALID, st.binary(max_size=60))), st.integers(0, 2**32 - 1), st.booleans())
def test_random_bytes_in_any_state_do_no_harm(pieces: list[bytes], flags: int, tls: bool) -> None:
    handshake = Handshake(lambda: {"disk": DISK, "sectors": SECTORS}, tls=tls)
    handshake.receive(struct.pack(">I", flags & 3 if flags % 7 else flags))
    for piece in pieces:
        if handshake.waiting:
            break
        handshake.receive(piece)
        assert len(handshake._input) <= MAX_OPTION
    assert handshake.state in State
