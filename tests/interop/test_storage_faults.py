"""The storage under an export fails, or is cut short: NBD clients hear of it as they do from QEMU.

Each conversation is held with qmpd and with qemu-storage-daemon on the same
kind of disk with the same faults, and the answers are compared.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import served_disks
from daemons import QMPD, STORAGE_DAEMON, RunningDaemon
from nbd_wire import (
    BLOCK_STATUS,
    CACHE,
    DF,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Reply,
    Wire,
)

StartDaemon = Callable[..., RunningDaemon]

MIB: Final = 1 << 20
#: From here on the storage fails.
BAD: Final = 1 << 30
SIZE: Final = BAD + MIB
FAILING: Final = (sys.executable, str(Path(__file__).parent.parent / "failing_storage.py"))
EIO, ENOSPC = 5, 28

# The NBD document, "Structured reply types".
OFFSET_DATA: Final = 1
OFFSET_HOLE: Final = 2


def start_pair(start_daemon: StartDaemon, kind: str, size: int, *faults: str) -> list[RunningDaemon]:
    """qmpd and qemu-storage-daemon, each with a fresh disk of this kind as the writable export "disk".

    :param faults: options of failing_storage.py.
    """
    maker = served_disks.start(start_daemon, name="maker")
    served_disks.add_node(maker, kind, "disk", size)
    options = served_disks.luks_options(maker, "disk")
    image = Path(options["file"]["filename"])
    maker.kill()
    pair = []
    for name, program in (("qmpd", QMPD), ("qemu", STORAGE_DAEMON)):
        copy = image.with_name(f"{name}.img")
        # Holes from end to end, as the image is.
        copy.touch()
        os.truncate(copy, size)
        daemon = start_daemon(
            *served_disks.SECRET,
            *("--nbd-server", f"addr.type=unix,addr.path={name}.nbd"),
            name=name,
            program=(*FAILING, *faults, "--", *program) if faults else program,
        )
        file = {"driver": "file", "filename": str(copy), "discard": "unmap"}
        node: dict[str, Any] = {"driver": "raw", "node-name": "disk", "file": file, "discard": "unmap"}
        if kind == "luks":
            node |= options | {"file": file}
        daemon.execute("blockdev-add", node)
        served_disks.export(daemon, "disk")
        pair.append(daemon)
    return pair


def client_of(daemon: RunningDaemon) -> Wire:
    wire = Wire(daemon.directory / f"{daemon.socket.stem}.nbd")
    wire.negotiate(structured=True)
    wire.meta("disk", "base:allocation")
    wire.go("disk")
    return wire


def contents(chunks: list[Reply], offset: int, length: int) -> bytes | int:
    """What a READ brought, with holes filled in, or the number of its error."""
    data = bytearray(length)
    for chunk in chunks:
        if chunk.error:
            return chunk.error
        if chunk.kind == OFFSET_DATA:
            (at,) = struct.unpack_from(">Q", chunk.data)
            data[at - offset : at - offset + len(chunk.data) - 8] = chunk.data[8:]
        elif chunk.kind == OFFSET_HOLE:
            assert len(chunk.data) == 12
    return bytes(data)


def read(wire: Wire, offset: int, length: int) -> bytes | int:
    wire.request(READ, offset, length)
    return contents(wire.chunks(), offset, length)


#: What is asked of a disk that fails from BAD on.
REQUESTS: Final[dict[str, Callable[[Wire], Any]]] = {
    "a good write": lambda wire: wire.ask(WRITE, 0, 4096, b"x" * 4096).error,
    "write": lambda wire: wire.ask(WRITE, BAD, 4096, b"x" * 4096).error,
    "long write": lambda wire: wire.ask(WRITE, BAD + 512, 512 << 10, b"x" * (512 << 10)).error,
    "odd write": lambda wire: wire.ask(WRITE, BAD + 3, 5, b"x" * 5).error,
    "write with FUA": lambda wire: wire.ask(WRITE, 8192, 512, b"y" * 512, flags=FUA).error,
    # Without DF QEMU hangs up on a client when it can't read.
    "read": lambda wire: wire.ask(READ, BAD, 4096, flags=DF).error,
    "good read": lambda wire: wire.ask(READ, 0, 512).error,
    "zeroes": lambda wire: wire.ask(WRITE_ZEROES, BAD, 4096).error,
    "zeroes without a hole": lambda wire: wire.ask(WRITE_ZEROES, BAD, 4096, flags=NO_HOLE).error,
    "trim": lambda wire: wire.ask(TRIM, BAD, 4096).error,
    "flush": lambda wire: wire.ask(FLUSH).error,
    "read at last": lambda wire: read(wire, 0, 4096) == b"x" * 4096,
}

FAULTS: Final = (
    ("raw", "ENOSPC", "write,allocate"),
    ("raw", "EDQUOT", "write,allocate"),
    ("raw", "EFBIG", "write,allocate"),
    ("raw", "EIO", "read,write,allocate,flush"),
    ("raw", "EIO", "flush"),
    ("raw", "ENOMEM", "read,write"),
    ("raw", "EPERM", "write,allocate"),
    ("raw", "EROFS", "write,allocate"),
    ("raw", "EOVERFLOW", "write"),
    ("raw", "EOPNOTSUPP", "allocate"),
    ("raw", "EINVAL", "write"),
    ("luks", "ENOSPC", "write,allocate"),
    ("luks", "EIO", "read,write,allocate,flush"),
)


@pytest.mark.peer("qemu-storage-daemon")
@pytest.mark.parametrize(("kind", "error", "calls"), FAULTS)
def test_the_storages_errors_reach_clients_as_from_qemu(
    start_daemon: StartDaemon, kind: str, error: str, calls: str
) -> None:
    faults = ("--error", error, "--of", calls, "--from", str(BAD))
    # QEMU's luks has no discard, whatever the file below can.
    requests = {what: ask for what, ask in REQUESTS.items() if (kind, what) != ("luks", "trim")}
    answers = []
    for daemon in start_pair(start_daemon, kind, SIZE, *faults):
        with client_of(daemon) as wire:
            answers.append({what: ask(wire) for what, ask in requests.items()})
        daemon.assert_alive()
    ours, theirs = answers
    assert ours == theirs
    assert (ours["a good write"], ours["good read"], ours["read at last"]) == (0, 0, True)
    # Without the means to punch holes nothing fails: zeroes are written, and trims do nothing.
    failed = {what for what, number in ours.items() if what != "read at last" and number}
    assert bool(failed) is (error != "EOPNOTSUPP")


@pytest.mark.parametrize("kind", served_disks.KINDS)
def test_a_failing_read_or_readahead_is_told_and_the_session_goes_on(
    start_daemon: StartDaemon, kind: str
) -> None:
    """Where QEMU hangs up, and where it does not even try."""
    faults = ("--error", "EIO", "--of", "read", "--from", str(BAD))
    daemon = served_disks.start(start_daemon, program=(*FAILING, *faults, "--", *QMPD))
    served_disks.serve(daemon, kind, "disk", SIZE)
    with served_disks.payload(daemon, "disk").open("r+b") as image:
        # A hole would not be read.
        image.seek(BAD)
        image.write(b"x" * MIB)
    for dialect in ({}, {"structured": True}, {"extended": True}):
        with Wire(daemon.directory / "nbd.sock") as wire:
            wire.negotiate(**dialect)
            wire.go("disk")
            assert wire.ask(READ, BAD, 4096).error == EIO
            # It is read in pieces, and those before the bad one may have been sent.
            if dialect:
                assert wire.ask(READ, BAD - 2 * MIB, 3 * MIB).error == EIO
            assert wire.ask(CACHE, BAD, 4096).error == EIO
            assert wire.ask(READ, 0, 512).error == 0
    daemon.assert_alive()


@pytest.mark.peer("qemu-storage-daemon")
@pytest.mark.parametrize("kind", served_disks.KINDS)
def test_a_file_that_can_not_grow_is_no_space_left(start_daemon: StartDaemon, kind: str) -> None:
    """A write that is cut short by the limit, and those behind it."""
    answers = []
    for daemon in start_pair(start_daemon, kind, 2 * MIB, "--largest", str(MIB)):
        os.truncate(daemon.directory / f"{daemon.socket.stem}.img", 0)
        with client_of(daemon) as wire:
            asked = [
                wire.ask(WRITE, MIB - 4096, 4096, b"x" * 4096).error,
                wire.ask(WRITE, MIB - 4096, 8192, b"x" * 8192).error,
                wire.ask(WRITE, MIB, 512, b"x" * 512).error,
                wire.ask(WRITE_ZEROES, MIB, 4096, flags=NO_HOLE).error,
                wire.ask(FLUSH).error,
                read(wire, MIB - 4096, 4096) == b"x" * 4096,
            ]
        answers.append(asked)
        daemon.assert_alive()
    assert answers[0] == answers[1]
    assert answers[0][:3] == [0, ENOSPC, ENOSPC]


@pytest.mark.peer("qemu-storage-daemon")
def test_a_file_cut_short_under_an_export_is_as_with_qemu(start_daemon: StartDaemon) -> None:
    answers = []
    for daemon in start_pair(start_daemon, "raw", MIB):
        image = daemon.directory / f"{daemon.socket.stem}.img"
        image.write_bytes(b"x" * MIB)
        with client_of(daemon) as wire:
            os.truncate(image, 4096)

            def status(wire: Wire = wire) -> bytes:
                wire.request(BLOCK_STATUS, 0, MIB)
                return wire.chunks()[-1].data

            answers.append(
                [
                    # What is gone reads as zeroes, and is a hole.
                    *(read(wire, 0, 8192) == b"x" * 4096 + bytes(4096), read(wire, MIB - 512, 512)),
                    *(status(), wire.ask(CACHE, 8192, 4096).error),
                    # To trim it does not bring it back; zeroes and data do, as far as they reach.
                    *(wire.ask(TRIM, 8192, 4096).error, image.stat().st_size),
                    *(wire.ask(WRITE_ZEROES, 16384, 4096, flags=NO_HOLE).error, image.stat().st_size),
                    *(wire.ask(WRITE, 65536, 4096, b"w" * 4096).error, image.stat().st_size),
                    *(read(wire, 60000, 8192), status(), wire.ask(FLUSH).error),
                    # To clients it has the size that it had.
                    wire.ask(READ, MIB, 1).error,
                ]
            )
            with client_of(daemon) as late:
                answers[-1].append(read(late, MIB - 4096, 4096))
        daemon.assert_alive()
    assert answers[0] == answers[1]
    assert answers[0][0] is True
    assert answers[0][9] == 69632


@pytest.mark.peer("qemu-storage-daemon")
def test_an_encrypted_file_cut_short_is_as_with_qemu(start_daemon: StartDaemon) -> None:
    """The zeroes behind the file's end are taken for ciphertext; what was left is still there."""
    answers = []
    for daemon in start_pair(start_daemon, "luks", MIB):
        image = daemon.directory / f"{daemon.socket.stem}.img"
        with client_of(daemon) as wire:
            assert wire.ask(WRITE, 0, 65536, b"x" * 65536).error == 0
            os.truncate(image, 4096)
            answers.append(
                [
                    *(read(wire, 0, 8192), read(wire, MIB - 512, 512)),
                    *(wire.ask(WRITE, 65539, 5, b"w" * 5).error, image.stat().st_size),
                    *(read(wire, 65536, 1024), wire.ask(READ, MIB, 1).error),
                ]
            )
        daemon.assert_alive()
    assert answers[0] == answers[1]
    assert answers[0][0][:4096] == b"x" * 4096
