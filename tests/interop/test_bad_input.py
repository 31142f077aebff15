"""What is wrong with an image is said in QEMU's words, and nothing half-made stays behind.

The table below is QEMU's own answers; one test holds qmpd to it, another one
asks qemu-storage-daemon, so that the table can't drift from the truth.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import QMPD, STORAGE_DAEMON, CommandError, RunningDaemon

Mutation = Callable[[bytes], bytes]

# Offsets in a LUKS1 header, from the "LUKS On-Disk Format Specification", version 1.2.3, section 2.
VERSION: Final = 6
CIPHER_NAME: Final = 8
CIPHER_MODE: Final = 40
HASH: Final = 72
PAYLOAD_OFFSET: Final = 104
KEY_BYTES: Final = 108
DIGEST: Final = 112
DIGEST_SALT: Final = 132
DIGEST_ITERATIONS: Final = 164
SLOT_0: Final = 208
SLOT_SIZE: Final = 48
SLOT_ITERATIONS: Final = 4
SLOT_SALT: Final = 8
SLOT_MATERIAL: Final = 40
SLOT_STRIPES: Final = 44
KEY_MATERIAL: Final = 4096


def number(offset: int, value: int) -> Mutation:
    """Put a 32-bit number there."""
    return lambda header: header[:offset] + struct.pack(">I", value) + header[offset + 4 :]


def short(offset: int, value: int) -> Mutation:
    """Put a 16-bit number there."""
    return lambda header: header[:offset] + struct.pack(">H", value) + header[offset + 2 :]


def text(offset: int, value: str) -> Mutation:
    """Fill the 32-byte text field there."""
    return lambda header: header[:offset] + value.encode().ljust(32, b"\0") + header[offset + 32 :]


def flip(offset: int) -> Mutation:
    """Flip the lowest bit there."""
    return lambda header: header[:offset] + bytes([header[offset] ^ 1]) + header[offset + 1 :]


def cut(length: int) -> Mutation:
    """Keep only the first *length* bytes."""
    return lambda header: header[:length]


NOT_LUKS: Final = "Volume is not in LUKS format"
NO_SLOT: Final = "Invalid password, cannot unlock any keyslot"
BEYOND: Final = "Could not refresh total sector count: Input/output error"
OVERLAP: Final = "Keyslots 0 and 1 are overlapping in the header"

#: What is done to a good header of aes-128, xts-plain64, sha256, and what QEMU 10.0.2 says to it.
HEADERS: Final[dict[str, tuple[Mutation, str]]] = {
    "another magic": (flip(0), NOT_LUKS),
    "all zeroes": (lambda header: bytes(len(header)), NOT_LUKS),
    "version 0": (short(VERSION, 0), "LUKS version 0 is not supported"),
    "version 2": (short(VERSION, 2), "LUKS version 2 is not supported"),
    "version 3": (short(VERSION, 3), "LUKS version 3 is not supported"),
    "unknown cipher": (text(CIPHER_NAME, "rot13"), "Algorithm 'rot13' with key size 16 bytes not supported"),
    "endless cipher": (text(CIPHER_NAME, "a" * 32), "LUKS header cipher name is not NUL terminated"),
    "mode without ivgen": (text(CIPHER_MODE, "xts"), "Unexpected cipher mode string format 'xts'"),
    "unknown mode": (text(CIPHER_MODE, "zzz-plain64"), "Cipher mode 'zzz' not supported"),
    "unknown ivgen": (text(CIPHER_MODE, "xts-zzz"), "IV generator 'zzz' not supported"),
    "essiv without hash": (text(CIPHER_MODE, "cbc-essiv"), "Missing IV generator hash specification"),
    "essiv unknown hash": (text(CIPHER_MODE, "cbc-essiv:zzz"), "Hash algorithm 'zzz' not supported"),
    "endless mode": (text(CIPHER_MODE, "x" * 32), "LUKS header cipher mode is not NUL terminated"),
    "unknown hash": (text(HASH, "md99"), "Hash algorithm 'md99' not supported"),
    "endless hash": (text(HASH, "h" * 32), "LUKS header hash spec is not NUL terminated"),
    "payload far beyond the file": (number(PAYLOAD_OFFSET, 0xFFFFFFFF), BEYOND),
    "payload a sector beyond the file": (number(PAYLOAD_OFFSET, 2049), BEYOND),
    "no key bytes": (number(KEY_BYTES, 0), "Algorithm 'aes' with key size 0 bytes not supported"),
    "too few key bytes": (number(KEY_BYTES, 16), "Algorithm 'aes' with key size 8 bytes not supported"),
    "one key byte too many": (number(KEY_BYTES, 33), OVERLAP),
    "absurdly many key bytes": (number(KEY_BYTES, 0xFFFFFFFF), OVERLAP),
    "digest of no iterations": (number(DIGEST_ITERATIONS, 0), "LUKS key iteration count is zero"),
    "digest flipped": (flip(DIGEST), NO_SLOT),
    "digest salt flipped": (flip(DIGEST_SALT), NO_SLOT),
    "slot neither on nor off": (number(SLOT_0, 7), "Keyslot 0 state (active/disable) is corrupted"),
    "slot of no iterations": (number(SLOT_0 + SLOT_ITERATIONS, 0), "Keyslot 0 iteration count is zero"),
    "no stripes": (number(SLOT_0 + SLOT_STRIPES, 0), "Keyslot 0 is corrupted (stripes 0 != 4000)"),
    "a stripe too many": (
        number(SLOT_0 + SLOT_STRIPES, 4001),
        "Keyslot 0 is corrupted (stripes 4001 != 4000)",
    ),
    "absurdly many stripes": (
        number(SLOT_0 + SLOT_STRIPES, 0xFFFFFFFF),
        "Keyslot 0 is corrupted (stripes -1 != 4000)",
    ),
    "slot inside the header": (
        number(SLOT_0 + SLOT_MATERIAL, 1),
        "Keyslot 0 is overlapping with the LUKS header",
    ),
    "slots overlap": (number(SLOT_0 + SLOT_SIZE + SLOT_MATERIAL, 8), OVERLAP),
    "slot beyond the file": (number(SLOT_0 + SLOT_MATERIAL, 0x7FFFFFFF), NO_SLOT),
    "slot switched off": (number(SLOT_0, 0xDEAD), NO_SLOT),
    "slot salt flipped": (flip(SLOT_0 + SLOT_SALT), NO_SLOT),
    "key material flipped": (flip(KEY_MATERIAL + 777), NO_SLOT),
    "empty": (cut(0), NOT_LUKS),
    "cut in the header": (cut(100), "LUKS key iteration count is zero"),
    "cut after the header": (cut(592), NO_SLOT),
    "cut in the key material": (cut(KEY_MATERIAL + 64000), NO_SLOT),
}

#: What qmpd says where QEMU knows less.
OURS: Final[dict[str, str]] = {"version 2": "Both LUKS2 headers are damaged"}

#: File names that can't be opened, and what QEMU says to each; the files are made by `images`.
FILES: Final[dict[str, str]] = {
    "directory": "Could not open 'directory': Is a directory",
    "fifo": "'file' driver requires 'fifo' to be a regular file",
    "/dev/null": "'file' driver requires '/dev/null' to be a regular file",
    "loop": "Could not open 'loop': Too many levels of symbolic links",
    "missing.img": "Could not open 'missing.img': No such file or directory",
    "x" * 300: f"Could not open '{'x' * 300}': File name too long",
}

#: Wrong options next to good files, and what QEMU says to each; None takes an option away.
OPTIONS: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "wrong passphrase": ({"key-secret": "wrong"}, NO_SLOT),
    "no such secret": ({"key-secret": "nobody"}, "No secret with id 'nobody'"),
    "no secret given": ({"key-secret": None}, "Parameter 'key-secret' is required for cipher"),
    "no payload": ({"file": None}, "Parameter 'file' is missing"),
    "payload as header": ({"header": {"driver": "file", "filename": "payload.raw"}}, NOT_LUKS),
    "header forgotten": ({"header": None}, NOT_LUKS),
    "header as payload": (
        {"header": None, "file": {"driver": "file", "filename": "header.img"}},
        "LUKS payload is overlapping with the header",
    ),
    "a number as header": ({"header": 7}, "Invalid parameter type for 'header', expected: BlockdevRef"),
    "a node that is not there": (
        {"header": "nobody"},
        "Cannot find device='nobody' nor node-name='nobody'",
    ),
    "a name that is no name": ({"node-name": "1luks"}, "Invalid node-name: '1luks'"),
}

SECRETS: Final = ("--object", "secret,id=right,data=abc123", "--object", "secret,id=wrong,data=xyz")
WHOLE: Final[dict[str, Any]] = {
    "driver": "luks",
    "node-name": "luks",
    "key-secret": "right",
    "file": {"driver": "file", "filename": "payload.raw"},
    "header": {"driver": "file", "filename": "header.img"},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a good detached header, its payload, and things that are no images."""
    directory = tmp_path_factory.mktemp("images")
    (directory / "header.img").touch()
    (directory / "payload.raw").touch()
    os.truncate(directory / "payload.raw", 1 << 20)
    (directory / "directory").mkdir()
    os.mkfifo(directory / "fifo")
    (directory / "loop").symlink_to("loop")
    daemon = RunningDaemon(QMPD, SECRETS, directory)
    try:
        daemon.execute("blockdev-add", {"driver": "file", "node-name": "header", "filename": "header.img"})
        options = {
            "driver": "luks",
            "header": "header",
            "size": 0,
            "key-secret": "right",
            "cipher-alg": "aes-128",
            "hash-alg": "sha256",
            "iter-time": 1,
        }
        assert daemon.monitor.run_job("blockdev-create", "create", options) is None
    finally:
        daemon.kill()
    return directory


def daemons_over(images: Path, program: tuple[str, ...], name: str) -> Iterator[RunningDaemon]:
    """Run *program* in the directory of the images."""
    daemon = RunningDaemon(program, SECRETS, images, name)
    yield daemon
    daemon.kill()


@pytest.fixture(scope="module")
def qmpd(images: Path) -> Iterator[RunningDaemon]:
    yield from daemons_over(images, QMPD, "qmpd")


@pytest.fixture(scope="module")
def qemu(images: Path) -> Iterator[RunningDaemon]:
    yield from daemons_over(images, STORAGE_DAEMON, "qemu")


def refusal(daemon: RunningDaemon, **changes: Any) -> str:
    """Return what *daemon* says to the whole disk with *changes*."""
    options = {name: value for name, value in {**WHOLE, **changes}.items() if value is not None}
    with pytest.raises(CommandError) as refused:
        daemon.execute("blockdev-add", options)
    return refused.value.desc


def refusal_of_header(daemon: RunningDaemon, images: Path, mutation: str) -> str:
    mutate, _ = HEADERS[mutation]
    (images / "bad.img").write_bytes(mutate((images / "header.img").read_bytes()))
    return refusal(daemon, header={"driver": "file", "filename": "bad.img"})


def assert_untouched(daemon: RunningDaemon) -> None:
    """Fail if a node was left, or if the good disk can't be opened as ever."""
    assert daemon.node_names() == set()
    daemon.execute("blockdev-add", WHOLE)
    daemon.execute("blockdev-del", {"node-name": "luks"})
    daemon.assert_alive()


@pytest.mark.parametrize("mutation", HEADERS)
def test_a_bad_header_is_refused_in_qemus_words(qmpd: RunningDaemon, images: Path, mutation: str) -> None:
    words = OURS.get(mutation, HEADERS[mutation][1])
    assert refusal_of_header(qmpd, images, mutation) == words
    assert_untouched(qmpd)


@pytest.mark.parametrize("filename", FILES, ids=lambda name: name[:20])
@pytest.mark.parametrize("child", ["file", "header"])
def test_what_is_no_image_file_is_refused_in_qemus_words(
    qmpd: RunningDaemon, child: str, filename: str
) -> None:
    assert refusal(qmpd, **{child: {"driver": "file", "filename": filename}}) == FILES[filename]
    assert_untouched(qmpd)


@pytest.mark.parametrize("mistake", OPTIONS)
def test_a_mistake_in_the_options_is_refused_in_qemus_words(qmpd: RunningDaemon, mistake: str) -> None:
    changes, words = OPTIONS[mistake]
    assert refusal(qmpd, **changes) == words
    assert_untouched(qmpd)


@pytest.mark.peer("qemu-storage-daemon")
def test_these_are_qemus_words(qemu: RunningDaemon, images: Path) -> None:
    said = {mutation: refusal_of_header(qemu, images, mutation) for mutation in HEADERS}
    assert said == {mutation: words for mutation, (_, words) in HEADERS.items()}
    said = {name: refusal(qemu, header={"driver": "file", "filename": name}) for name in FILES}
    assert said == FILES
    said = {mistake: refusal(qemu, **changes) for mistake, (changes, _) in OPTIONS.items()}
    assert said == {mistake: words for mistake, (_, words) in OPTIONS.items()}


def test_an_absurd_iteration_count_is_refused(qmpd: RunningDaemon, images: Path) -> None:
    """Where QEMU would compute for hours, with every client waiting."""
    for offset in (DIGEST_ITERATIONS, SLOT_0 + SLOT_ITERATIONS):
        good = (images / "header.img").read_bytes()
        (images / "bad.img").write_bytes(number(offset, 0xFFFFFFFF)(good))
        said = refusal(qmpd, header={"driver": "file", "filename": "bad.img"})
        assert "iteration" in said
        assert "4294967295" in said
        assert_untouched(qmpd)


@pytest.mark.parametrize("child", ["file", "header"])
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, images: Path, child: str) -> None:
    for name in ("header.img", "payload.raw"):
        shutil.copy(images / name, tmp_path)
    (tmp_path / "unreadable.img").touch(mode=0)
    # Root reads everything: its daemon gives that privilege away first.
    without_privilege = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", *QMPD)
    daemon = RunningDaemon(without_privilege if os.geteuid() == 0 else QMPD, SECRETS, tmp_path)
    try:
        said = refusal(daemon, **{child: {"driver": "file", "filename": "unreadable.img"}})
        assert said == "Could not open 'unreadable.img': Permission denied"
        assert_untouched(daemon)
    finally:
        daemon.kill()


def test_an_odd_payload_is_served_in_whole_sectors(qmpd: RunningDaemon, images: Path) -> None:
    """A payload of 1,234 bytes has two whole sectors and a rest; nothing beyond can be reached."""
    (images / "odd.raw").write_bytes(bytes(1234))
    qmpd.execute("blockdev-add", {**WHOLE, "file": {"driver": "file", "filename": "odd.raw"}})
    assert "read 512/512 bytes at offset 512" in qmpd.qemu_io("luks", "read 512 512")
    assert "Input/output error" in qmpd.qemu_io("luks", "read 4096 512")
    qmpd.execute("blockdev-del", {"node-name": "luks"})
    assert_untouched(qmpd)


def test_a_thousand_refusals_leave_no_memory_behind(qmpd: RunningDaemon, images: Path) -> None:
    def refuse(times: int) -> None:
        for _ in range(times):
            refusal(qmpd, header={"driver": "file", "filename": "directory"})
            refusal(qmpd, file={"driver": "file", "filename": "missing.img"})

    refuse(50)
    before = qmpd.resident_memory()
    refuse(500)
    assert qmpd.resident_memory() - before < 4 << 20
    assert_untouched(qmpd)


def test_a_node_in_use_is_neither_deleted_nor_made_twice(qmpd: RunningDaemon, images: Path) -> None:
    qmpd.execute("blockdev-add", {"driver": "file", "node-name": "header", "filename": "header.img"})
    qmpd.execute("blockdev-add", {**WHOLE, "header": "header"})
    try:
        with pytest.raises(CommandError, match="Block device header is in use"):
            qmpd.execute("blockdev-del", {"node-name": "header"})
        assert "Duplicate nodes with node-name='luks'" in refusal(qmpd)
    finally:
        qmpd.execute("blockdev-del", {"node-name": "luks"})
        qmpd.execute("blockdev-del", {"node-name": "header"})
    assert_untouched(qmpd)
