"""Detached LUKS1 headers between qmpd, QEMU and cryptsetup: each opens what another made.

The grid has every cipher with every mode and IV generator; the passphrase hash
goes round so that each meets every mode and generator.  Two corners are not
everybody's: QEMU 10.0 aborts on a 24-byte key (aes-192 with cbc: the stripes
fill no whole number of sectors), and cryptsetup has no XTS with 24-byte keys
(aes-192 with xts).  Each of them is judged by the other.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from daemons import CommandError, RunningDaemon

StartDaemon = Callable[..., RunningDaemon]

PASSPHRASE: Final = "abc123"
SIZE: Final = 1 << 20

#: The plaintext: (offset, length, byte).  First sector, its neighbour, a run over
#: several sectors, a run longer than any tile, the last sector; zeroes between.
PIECES: Final = (
    (0, 512, 0x11),
    (512, 512, 0x22),
    (4096, 12288, 0x33),
    (65536, 524288, 0x44),
    (SIZE - 512, 512, 0x55),
)


@dataclass(frozen=True)
class Spec:
    """How a volume is encrypted, in QAPI's names."""

    algorithm: str
    mode: str
    ivgen: str
    hash: str
    essiv_hash: str = "sha256"

    def __str__(self) -> str:
        return f"{self.algorithm}-{self.header_mode}-{self.hash}"

    @property
    def key_bits(self) -> int:
        """The bits of the volume key; XTS has two keys."""
        return int(self.algorithm.removeprefix("aes-")) * (2 if self.mode == "xts" else 1)

    @property
    def header_mode(self) -> str:
        """Cipher mode and generator as the header has them."""
        return f"{self.mode}-{self.ivgen}" + (f":{self.essiv_hash}" if self.ivgen == "essiv" else "")

    @property
    def qemu_aborts(self) -> bool:
        return self.key_bits == 192

    @property
    def cryptsetup_lacks_it(self) -> bool:
        return self.key_bits == 384

    def create_options(self) -> dict[str, Any]:
        """What blockdev-create takes for a detached header on the node 'header'."""
        options: dict[str, Any] = {
            "driver": "luks",
            "header": "header",
            "size": 0,
            "key-secret": "sec0",
            "cipher-alg": self.algorithm,
            "cipher-mode": self.mode,
            "ivgen-alg": self.ivgen,
            "hash-alg": self.hash,
            "iter-time": 1,
        }
        if self.ivgen == "essiv":
            options["ivgen-hash-alg"] = self.essiv_hash
        return options


HASHES: Final = ("sha1", "sha224", "sha256", "sha384", "sha512", "sm3")

#: For each row of the grid a hash of ESSIV: those whose length is that of an AES key.
ESSIV_HASHES: Final = ("sha256", "md5", "sm3", "sha256", "sha256", "md5")

ROWS: Final = tuple(
    (algorithm, mode) for mode in ("xts", "cbc") for algorithm in ("aes-128", "aes-192", "aes-256")
)
GRID: Final = tuple(
    Spec(algorithm, mode, ivgen, HASHES[(row + 2 * column) % 6], ESSIV_HASHES[row])
    for row, (algorithm, mode) in enumerate(ROWS)
    for column, ivgen in enumerate(("plain", "plain64", "essiv"))
)

#: QEMU measures its KDF for 2.6 s whenever it creates: a few, with every cipher, mode and
#: generator, and with the one hash that cryptsetup refuses.
FEW: Final = (
    Spec("aes-256", "xts", "plain64", "sha256"),
    Spec("aes-192", "xts", "essiv", "sha1", "md5"),
    Spec("aes-128", "cbc", "essiv", "md5"),
    Spec("aes-256", "cbc", "plain", "sha512"),
)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with an empty header file, a payload of zeroes and the passphrase."""
    (tmp_path / "header.img").touch()
    with (tmp_path / "payload.raw").open("wb") as payload:
        payload.truncate(SIZE)
    (tmp_path / "passphrase").write_text(PASSPHRASE)
    return tmp_path


def run(*command: str, directory: Path) -> str:
    """Run a program and return what it prints; the test fails with its errors if it fails."""
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def plaintext() -> bytes:
    whole = bytearray(SIZE)
    for offset, length, byte in PIECES:
        whole[offset : offset + length] = bytes([byte]) * length
    return bytes(whole)


SECRET: Final = ("--object", f"secret,id=sec0,data={PASSPHRASE}")
HEADER: Final = ("--blockdev", "driver=file,node-name=header,filename=header.img")
DISK: Final = (
    *SECRET,
    *HEADER,
    "--blockdev",
    "driver=file,node-name=payload,filename=payload.raw",
    "--blockdev",
    "driver=luks,node-name=disk,file=payload,header=header,key-secret=sec0",
)


def create_header(daemon: RunningDaemon, spec: Spec) -> None:
    """Make a detached header with *daemon*, and end it."""
    assert daemon.monitor.run_job("blockdev-create", "create", spec.create_options()) is None
    assert daemon.quit() == 0


def cryptsetup_creates_header(spec: Spec, directory: Path) -> None:
    (directory / "header.img").unlink()  # cryptsetup makes a file that is large enough
    run(
        *("cryptsetup", "luksFormat", "--batch-mode", "--type", "luks1"),
        *("--cipher", f"aes-{spec.header_mode}", "--key-size", str(spec.key_bits), "--hash", spec.hash),
        *("--pbkdf-force-iterations", "1000", "--key-file", "passphrase"),
        *("--header", "header.img", "payload.raw"),
        directory=directory,
    )


def assert_cryptsetup_opens(spec: Spec, directory: Path) -> None:
    dump = run("cryptsetup", "luksDump", "header.img", directory=directory)
    fields = dict(re.findall(r"^([A-Z][A-Za-z ]+):\s*(.*)$", dump, re.MULTILINE))
    assert fields["Version"] == "1"
    assert fields["Cipher name"] == "aes"
    assert fields["Cipher mode"] == spec.header_mode
    assert fields["Hash spec"] == spec.hash
    assert fields["MK bits"] == str(spec.key_bits)
    assert fields["Payload offset"] == "0"
    run(
        *("cryptsetup", "open", "--test-passphrase", "--key-file", "passphrase"),
        *("--header", "header.img", "payload.raw"),
        directory=directory,
    )


def qmpd_writes(start_daemon: StartDaemon) -> None:
    """Write the plaintext through qmpd, piece by piece."""
    daemon = start_daemon(*DISK, name="writer")
    for offset, length, byte in ((0, SIZE, 0), *PIECES):
        answer = daemon.qemu_io("disk", f"write -P {byte} {offset} {length}")
        assert f"wrote {length}/{length} bytes at offset {offset}" in answer
    assert daemon.quit() == 0


def assert_qmpd_reads(start_daemon: StartDaemon) -> None:
    """Read every piece, and a zero between two of them, through qmpd."""
    daemon = start_daemon(*DISK, name="reader")
    for offset, length, byte in (*PIECES, (1024, 3072, 0)):
        answer = daemon.qemu_io("disk", f"read -P {byte} {offset} {length}")
        assert f"read {length}/{length} bytes at offset {offset}" in answer
        assert "verification failed" not in answer
    assert daemon.quit() == 0


def qemu_exports(start_storage_daemon: StartDaemon) -> str:
    """Export the disk from qemu-storage-daemon and return the export's URI."""
    daemon = start_storage_daemon(
        *DISK,
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on"),
    )
    return f"nbd+unix:///disk?socket={daemon.directory}/nbd.sock"


def assert_qemu_reads(start_storage_daemon: StartDaemon, directory: Path) -> None:
    run("nbdcopy", qemu_exports(start_storage_daemon), "read-back.raw", directory=directory)
    assert (directory / "read-back.raw").read_bytes() == plaintext()


def qemu_writes(start_storage_daemon: StartDaemon, directory: Path) -> None:
    (directory / "plain.raw").write_bytes(plaintext())
    run("nbdcopy", "--flush", "plain.raw", qemu_exports(start_storage_daemon), directory=directory)


@pytest.mark.peer("cryptsetup", "qemu-storage-daemon", "nbdcopy")
@pytest.mark.parametrize("spec", GRID, ids=str)
def test_what_qmpd_makes_and_writes_the_others_open_and_read(
    files: Path, spec: Spec, start_daemon: StartDaemon, start_storage_daemon: StartDaemon
) -> None:
    create_header(start_daemon(*SECRET, *HEADER), spec)
    if not spec.cryptsetup_lacks_it:
        assert_cryptsetup_opens(spec, files)
    qmpd_writes(start_daemon)
    if not spec.qemu_aborts:
        assert_qemu_reads(start_storage_daemon, files)
    assert_qmpd_reads(start_daemon)


@pytest.mark.peer("cryptsetup", "qemu-storage-daemon", "nbdcopy")
@pytest.mark.parametrize("spec", [spec for spec in GRID if not spec.cryptsetup_lacks_it], ids=str)
def test_what_cryptsetup_makes_and_qemu_writes_qmpd_reads(
    files: Path, spec: Spec, start_daemon: StartDaemon, start_storage_daemon: StartDaemon
) -> None:
    cryptsetup_creates_header(spec, files)
    if spec.qemu_aborts:
        qmpd_writes(start_daemon)
        assert (files / "payload.raw").read_bytes() == encrypted_cbc(spec, files)
    else:
        qemu_writes(start_storage_daemon, files)
    assert_qmpd_reads(start_daemon)


@pytest.mark.peer("qemu-storage-daemon", "nbdcopy")
@pytest.mark.parametrize("spec", FEW, ids=str)
def test_what_qemu_makes_and_writes_qmpd_reads(
    files: Path, spec: Spec, start_daemon: StartDaemon, start_storage_daemon: StartDaemon
) -> None:
    create_header(start_storage_daemon(*SECRET, *HEADER, name="maker"), spec)
    qemu_writes(start_storage_daemon, files)
    assert_qmpd_reads(start_daemon)


@pytest.mark.peer("cryptsetup")
@pytest.mark.parametrize("slot", range(8))
def test_any_of_the_eight_keyslots_opens_the_disk(files: Path, slot: int, start_daemon: StartDaemon) -> None:
    cryptsetup_creates_header(Spec("aes-256", "xts", "plain64", "sha256"), files)
    (files / "other").write_text("another passphrase")
    if slot != 0:
        key = ("--batch-mode", "--pbkdf-force-iterations", "1000", "--key-file", "passphrase")
        run("cryptsetup", "luksAddKey", *key, f"--key-slot={slot}", "header.img", "other", directory=files)
        run("cryptsetup", "luksKillSlot", "--batch-mode", "header.img", "0", directory=files)
        (files / "passphrase").write_text("another passphrase")
    secret = ("--object", "secret,id=sec0,file=passphrase")
    daemon = start_daemon(*secret, *DISK[2:])
    nodes = daemon.execute("query-named-block-nodes", {"flat": True})
    (node,) = [node for node in nodes if node["node-name"] == "disk"]
    slots = node["image"]["format-specific"]["data"]["slots"]
    assert [number for number, entry in enumerate(slots) if entry["active"]] == [slot]
    assert "read 512/512 bytes" in daemon.qemu_io("disk", "read 0 512")


@pytest.mark.peer("qemu-storage-daemon", "nbdcopy")
@pytest.mark.parametrize("ivgen", ["plain", "plain64"])
def test_sectors_beyond_two_tebibytes_have_the_ivs_that_qemu_gives_them(
    files: Path, ivgen: str, start_daemon: StartDaemon, start_storage_daemon: StartDaemon
) -> None:
    """Sector 2^32 is where plain (32 bits) starts again at zero and plain64 does not."""
    create_header(start_daemon(*SECRET, *HEADER), Spec("aes-128", "xts", ivgen, "sha256"))
    border = 2 << 40
    with (files / "payload.raw").open("r+b") as payload:
        payload.truncate(border + SIZE)
    writer = start_daemon(*DISK, name="writer")
    assert "wrote 1024/1024 bytes" in writer.qemu_io("disk", f"write -P 0x77 {border - 512} 1024")
    assert writer.quit() == 0
    uri = qemu_exports(start_storage_daemon)
    shown = run("qemu-io", "-f", "raw", "-c", f"read -P 0x77 {border - 512} 1024", uri, directory=files)
    assert "read 1024/1024 bytes" in shown
    assert "verification failed" not in shown


@pytest.mark.parametrize(("hash_name", "length"), [("sha1", 20), ("sha512", 64)])
def test_an_essiv_hash_that_fits_no_aes_key_is_refused(
    files: Path, hash_name: str, length: int, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(*SECRET, *HEADER)
    options = {**Spec("aes-256", "cbc", "essiv", "sha256").create_options(), "ivgen-hash-alg": hash_name}
    error = daemon.monitor.run_job("blockdev-create", "create", options)
    assert error == f"No AES cipher with key size {length} available"


def test_a_wrong_passphrase_opens_nothing(files: Path, start_daemon: StartDaemon) -> None:
    create_header(start_daemon(*SECRET, *HEADER), FEW[0])
    daemon = start_daemon("--object", "secret,id=sec0,data=wrong", *DISK[2:6], name="other")
    disk = {"driver": "luks", "node-name": "disk", "file": "payload", "header": "header"}
    with pytest.raises(CommandError, match="Invalid password, cannot unlock any keyslot"):
        daemon.execute("blockdev-add", {**disk, "key-secret": "sec0"})
    assert daemon.node_names() == {"header", "payload"}


def encrypted_cbc(spec: Spec, directory: Path) -> bytes:
    """Encrypt the plaintext as the dm-crypt documentation says, sector by sector.

    Stands in for QEMU where that aborts.  The volume key is cryptsetup's.
    """
    dump = run(
        *("cryptsetup", "luksDump", "--batch-mode", "--dump-volume-key", "--key-file", "passphrase"),
        "header.img",
        directory=directory,
    )
    (shown,) = re.findall(r"MK dump:\s*((?:[0-9a-f]{2}\s+)+)", dump)
    key = bytes.fromhex(shown)
    assert len(key) * 8 == spec.key_bits
    essiv = Cipher(algorithms.AES(hashlib.new(spec.essiv_hash, key).digest()), modes.ECB()).encryptor()
    whole = plaintext()
    sectors = []
    for sector in range(SIZE // 512):
        iv = sector.to_bytes(16, "little")
        if spec.ivgen == "essiv":
            iv = essiv.update(iv)
        encryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
        sectors.append(encryptor.update(whole[sector * 512 : (sector + 1) * 512]))
    return b"".join(sectors)
