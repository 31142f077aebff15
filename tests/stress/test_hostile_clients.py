"""NBD clients that send what is no NBD, or more of it than they may, in every state of a session.

Each of them is answered with an error or cut off; a client beside them and
the monitor are served on, the disk stays as it is, and memory stays flat.
The random bytes are the same in every run.
"""

from __future__ import annotations

import random
import select
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import certificates
import pytest
import served_disks
from daemons import PATIENCE, QMPD, RunningDaemon
from nbd_wire import (
    BLOCK_STATUS,
    CACHE,
    DF,
    EXPORT_NAME,
    EXTENDED_REQUEST,
    FAST_ZERO,
    FLUSH,
    FUA,
    GO,
    IHAVEOPT,
    INFO,
    LIST,
    LIST_META,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    REQUEST,
    SET_META,
    STARTTLS,
    STRUCTURED,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Wire,
    name_data,
)

SIZE: Final = 1 << 20
#: Seconds for which a daemon that has got everything may be silent, before it is told that this was all.
LINGER: Final = 0.01
#: What may be resident beyond what was before, in bytes, whatever was sent.
ROOM: Final = 24 << 20
CONTENTS: Final = random.Random(3).randbytes(SIZE)


def flags(_: Wire) -> None:
    pass


def options(wire: Wire) -> None:
    wire.send(b"\0\0\0\3")


def options_unfixed(wire: Wire) -> None:
    wire.send(b"\0\0\0\0")


def after_structured(wire: Wire) -> None:
    options(wire)
    wire.negotiate(structured=True)


def after_meta(wire: Wire) -> None:
    after_structured(wire)
    wire.meta("disk", "base:allocation")


def after_extended(wire: Wire) -> None:
    options(wire)
    wire.negotiate(extended=True)


def after_info(wire: Wire) -> None:
    options(wire)
    wire.go("disk", option=INFO)


def simple(wire: Wire) -> None:
    options(wire)
    wire.go("disk")


def structured(wire: Wire) -> None:
    after_meta(wire)
    wire.go("disk")


def extended(wire: Wire) -> None:
    after_extended(wire)
    wire.meta("disk", "base:allocation")
    wire.go("disk")


def old_style(wire: Wire) -> None:
    options(wire)
    wire.send_option(EXPORT_NAME, b"disk")
    wire.take(10)


#: How a client gets into each state; `Wire` has taken the greeting.
STATES: Final[dict[str, Callable[[Wire], None]]] = {
    state.__name__: state
    for state in (
        *(flags, options, options_unfixed, after_structured, after_meta, after_extended, after_info),
        *(simple, structured, extended, old_style),
    )
}
TRANSMISSION: Final = {
    "simple": REQUEST,
    "structured": REQUEST,
    "extended": EXTENDED_REQUEST,
    "old_style": REQUEST,
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    started = []

    def start(*arguments: str) -> RunningDaemon:
        started.append(RunningDaemon(QMPD, arguments, tmp_path_factory.mktemp("hostile")))
        return started[-1]

    daemon = served_disks.start(start)
    served_disks.serve(daemon, "raw", "disk", SIZE)
    served_disks.payload(daemon, "disk").write_bytes(CONTENTS)
    yield daemon
    daemon.kill()


@pytest.fixture(autouse=True)
def others_are_served(daemon: RunningDaemon) -> Iterator[None]:
    before = daemon.resident_memory()
    with Wire(daemon.directory / "nbd.sock", None) as other:
        simple(other)
        yield
        assert other.ask(READ, 4096, 512).error == 0
    daemon.assert_alive()
    assert daemon.resident_memory() - before < ROOM


def play(daemon: RunningDaemon, state: str, data: bytes) -> bytes:
    """Send *data* in this state, as far as the daemon takes it, and return all that it answers."""
    answer = bytearray()
    with Wire(daemon.directory / "nbd.sock", None) as wire:
        STATES[state](wire)
        wire.socket.setblocking(False)
        unsent = memoryview(data)
        silent = False
        while True:
            patience = PATIENCE if unsent or silent else LINGER
            readable, writable, _ = select.select(
                [wire.socket], [wire.socket] if unsent else [], [], patience
            )
            try:
                if readable:
                    received = wire.socket.recv(1 << 16)
                    if not received:
                        return bytes(answer)
                    answer += received
                elif writable:
                    unsent = unsent[wire.socket.send(unsent) :]
                else:
                    assert patience == LINGER, "the daemon neither reads nor answers nor hangs up"
                    wire.socket.shutdown(socket.SHUT_WR)
                    silent = True
            except (BrokenPipeError, ConnectionResetError):
                return bytes(answer)


@pytest.mark.parametrize("state", STATES)
def test_random_bytes_do_no_harm(daemon: RunningDaemon, state: str) -> None:
    choose = random.Random(f"bytes {state}")
    for _ in range(40):
        play(daemon, state, choose.randbytes(choose.choice((1, 4, 15, 27, 28, 33, 5000, 100_000))))
    # What is no request is not taken for one.
    assert served_disks.payload(daemon, "disk").read_bytes() == CONTENTS


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return IHAVEOPT + struct.pack(">II", number, len(data) if length is None else length) + data


GO_DISK: Final = name_data("disk") + b"\0\1\0\3"
META_DISK: Final = name_data("disk") + b"\0\0\0\1" + name_data("base:allocation")


@pytest.mark.parametrize("state", [state for state in STATES if state not in (*TRANSMISSION, "flags")])
def test_options_gone_wrong_do_no_harm(daemon: RunningDaemon, state: str) -> None:
    """Good options with some bytes changed, left out, or put in."""
    choose = random.Random(f"options {state}")
    good = [
        *(option(LIST), option(STRUCTURED), option(INFO, GO_DISK), option(11), option(STARTTLS)),
        *(
            option(LIST_META, META_DISK),
            option(SET_META, META_DISK),
            option(99, b"what"),
            option(GO, GO_DISK),
        ),
    ]
    for _ in range(60):
        data = bytearray(b"".join(choose.choices(good, k=choose.randrange(1, 6))))
        for _ in range(choose.randrange(1, 4)):
            place = choose.randrange(len(data))
            change = choose.randrange(3)
            if change == 0:
                data[place] = choose.choice((0, 1, 0x7F, 0x80, 0xFF, choose.randrange(256)))
            elif change == 1:
                del data[place : place + choose.randrange(1, 5)]
            else:
                data[place:place] = choose.randbytes(choose.randrange(1, 5))
        play(daemon, state, bytes(data))
    # With a changed byte an option may have been GO; but nobody has sent a request to write.
    assert served_disks.payload(daemon, "disk").read_bytes() == CONTENTS


LONG: Final = 32 << 20
OVERSIZED: Final[dict[str, bytes]] = {
    "an option of 4 GiB": option(GO, bytes(1 << 20), 0xFFFFFFFF),
    "an option of more than 32 MiB": option(LIST, bytes(1 << 20), LONG + 1),
    "an unknown option of 32 MiB": option(99, bytes(LONG)),
    "GO of 32 MiB": option(GO, bytes(LONG)),
    "a list of 32 MiB": option(LIST, bytes(LONG)),
    "TLS of 1 MiB": option(STARTTLS, bytes(1 << 20)),
    "a name of 4 GiB": option(GO, b"\xff\xff\xff\xff" + b"n" * 100),
    "a name of 1 MiB": option(GO, name_data("n" * (1 << 20)) + b"\0\0"),
    "an old style name of 1 MiB": option(EXPORT_NAME, b"n" * (1 << 20)),
    "4 billion queries": option(SET_META, name_data("disk") + b"\xff\xff\xff\xff" + name_data("base:")),
    "100,000 queries": option(SET_META, name_data("disk") + struct.pack(">I", 100_000) + bytes(400_000)),
    "65535 requests": option(INFO, name_data("disk") + b"\xff\xff" + bytes(2 * 65535)),
    "100,000 options": option(LIST) * 100_000,
    "30,000 refused options": option(99, b"x") * 30_000,
}


@pytest.mark.parametrize("what", OVERSIZED)
@pytest.mark.parametrize("state", ["options", "after_meta", "after_extended"])
def test_oversized_options_are_refused_or_cut_off(daemon: RunningDaemon, state: str, what: str) -> None:
    answer = play(daemon, state, OVERSIZED[what])
    # An answer, if there is one, begins with the magic of an option's reply.
    assert answer[:8] in (b"", struct.pack(">Q", 0x3E889045565A9))


def header(magic: int, command: int, offset: int, length: int, given: int = 0) -> bytes:
    shape = ">IHHQQQ" if magic == EXTENDED_REQUEST else ">IHHQQI"
    return struct.pack(shape, magic, given, command, 7, offset, length)


@pytest.mark.parametrize("state", TRANSMISSION)
def test_requests_out_of_all_bounds_are_refused(daemon: RunningDaemon, state: str) -> None:
    """Every command, known or not, with lengths and offsets beyond everything, and any flags."""
    magic = TRANSMISSION[state]
    choose = random.Random(f"requests {state}")
    most = 2**64 - 1 if magic == EXTENDED_REQUEST else 2**32 - 1
    lengths = (0, 1, SIZE, SIZE + 1, LONG + 1, 2**31, 2**32 - 1, most)
    offsets = (0, 1, SIZE - 1, SIZE, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
    known = (FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN)
    for command in (READ, FLUSH, CACHE, BLOCK_STATUS, 8, 9, 77, 0xFFFF):
        data = b"".join(
            header(
                magic, command, choose.choice(offsets), choose.choice(lengths), choose.choice((0, 0, *known))
            )
            for _ in range(50)
        )
        assert play(daemon, state, data)
    for command in (TRIM, WRITE_ZEROES):
        # Beyond the end, or of no length: nothing that may be done.
        data = b"".join(
            header(magic, command, offset, length) for offset in offsets[3:] for length in lengths[1:]
        )
        assert play(daemon, state, data)
    for length in lengths[3:]:
        for offset in offsets:
            # A payload that is announced, and does not come as it should.
            play(daemon, state, header(magic, WRITE, offset, length, choose.choice((0, PAYLOAD_LEN))) + b"xx")
    assert served_disks.payload(daemon, "disk").read_bytes() == CONTENTS


@pytest.mark.parametrize("state", TRANSMISSION)
def test_requests_gone_wrong_do_no_harm(daemon: RunningDaemon, state: str) -> None:
    """Good requests with some bytes changed, left out, or put in.  What becomes of the disk is theirs."""
    magic = TRANSMISSION[state]
    choose = random.Random(f"mutations {state}")
    good = [
        *(header(magic, READ, 512, 4096), header(magic, READ, 0, SIZE), header(magic, FLUSH, 0, 0)),
        *(header(magic, BLOCK_STATUS, 0, SIZE), header(magic, CACHE, 0, 4096), header(magic, TRIM, 0, 4096)),
        *(header(magic, WRITE_ZEROES, 0, 4096, NO_HOLE), header(magic, WRITE, 0, 512) + CONTENTS[:512]),
    ]
    try:
        for _ in range(60):
            data = bytearray(b"".join(choose.choices(good, k=choose.randrange(1, 9))))
            for _ in range(choose.randrange(1, 4)):
                place = choose.randrange(len(data))
                change = choose.randrange(3)
                if change == 0:
                    data[place] ^= 1 << choose.randrange(8)
                elif change == 1:
                    del data[place : place + choose.randrange(1, 5)]
                else:
                    data[place:place] = choose.randbytes(choose.randrange(1, 5))
            play(daemon, state, bytes(data))
        assert served_disks.payload(daemon, "disk").stat().st_size == SIZE
    finally:
        served_disks.payload(daemon, "disk").write_bytes(CONTENTS)


@pytest.mark.parametrize("inside", [False, True], ids=["before TLS", "instead of TLS"])
def test_random_bytes_do_no_harm_where_tls_is_wanted(tmp_path: Path, inside: bool) -> None:
    """Before it is started, and where its first message should come."""
    certificates.write(tmp_path / "pki")
    daemon = RunningDaemon(
        QMPD,
        [
            *("--object", f"tls-creds-x509,id=tls,endpoint=server,verify-peer=off,dir={tmp_path / 'pki'}"),
            *("--nbd-server", "addr.type=unix,addr.path=nbd.sock,tls-creds=tls"),
        ],
        tmp_path,
    )
    choose = random.Random(f"TLS {inside}")
    try:
        for _ in range(40):
            with Wire(tmp_path / "nbd.sock") as wire:
                if inside:
                    assert wire.option(STARTTLS)[-1].kind == 1
                try:
                    wire.send(choose.randbytes(choose.choice((1, 5, 16, 3000))))
                    wire.socket.shutdown(socket.SHUT_WR)
                    while wire.socket.recv(1 << 16):
                        pass
                except (BrokenPipeError, ConnectionResetError):
                    pass
        with Wire(tmp_path / "nbd.sock") as wire:
            assert wire.option(STARTTLS)[-1].kind == 1
        daemon.assert_alive()
    finally:
        daemon.kill()


#: Bytes of options whose answers, three times as long, fill any socket's buffer and the daemon's own.
MOST_OPTIONS: Final = 4 << 20


def test_the_answers_to_options_do_not_pile_up(start_daemon: Callable[..., RunningDaemon]) -> None:
    """Who asks on and on and reads nothing is not listened to any more."""
    daemon = served_disks.start(start_daemon, server=",handshake-max-seconds=0")
    served_disks.serve(daemon, "raw", "disk", SIZE)
    before = daemon.resident_memory()
    asked = option(LIST) * 1000
    taken = 0
    with Wire(daemon.directory / "nbd.sock") as wire:
        wire.socket.setblocking(False)
        while taken < MOST_OPTIONS and select.select([], [wire.socket], [], 2)[1]:
            taken += wire.socket.send(asked)
        grown = daemon.resident_memory() - before
    assert taken < MOST_OPTIONS, f"the daemon took {taken} bytes and grew by {grown}"
