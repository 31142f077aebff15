"""LUKS1 headers and payloads between `qmpd.crypto` and its peers, cipher by cipher.

Every cipher, mode, IV generator and hash occurs on both sides, pairwise as far
as the peers allow it: QEMU 10.0 aborts on aes-192 with cbc (whose key material
is no whole number of sectors), and cryptsetup has no aes-192 with xts and no
hash beside an IV generator that needs none, both of which QEMU makes.
"""

from __future__ import annotations

import random
import re
import subprocess
from pathlib import Path

import pytest

from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks1 import (
    HEADER_BYTES,
    SECTOR,
    SLOTS,
    Header,
    Write,
    formatting,
    unlocking,
)
from qmpd.crypto.sectors import SectorCipher
from qmpd.crypto.steps import run as run_steps

PASSWORD = "abc123"
PAYLOAD_BYTES = 1 << 20
SECRET = ["--object", f"secret,id=s,data={PASSWORD}"]


def run(*command: str, password: bool = False) -> str:
    done = subprocess.run(
        command, input=PASSWORD if password else "", capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def qemu_io(volume: Path, *lines: str, header: Path | None = None) -> None:
    """Do these lines of qemu-io through QEMU's luks driver."""
    image = f"driver=luks,key-secret=s,file.filename={volume}"
    if header is not None:
        image += f",header.driver=file,header.filename={header}"
    commands = [word for line in lines for word in ("-c", line)]
    output = run("qemu-io", *SECRET, "--image-opts", image, *commands)
    assert "verification failed" not in output
    assert "failed:" not in output


def unlocked(volume: Path, slot: int, *, detached: bool = False) -> tuple[Header, SectorCipher]:
    data = volume.read_bytes()
    header = Header.parse(data[:HEADER_BYTES], detached=detached)
    for number in range(SLOTS):
        offset, length = header.material_extent(number)
        key = run_steps(unlocking(header, number, PASSWORD.encode(), data[offset : offset + length]))
        assert (key is not None) == (number == slot)
        if key is not None:
            cipher = SectorCipher(header.spec, key.data)
    return header, cipher


def payloads_agree(volume: Path, header: Header, cipher: SectorCipher) -> None:
    """What QEMU writes we read, and what we write QEMU reads, in one tile and across several."""
    qemu_io(
        volume, "write -P 0x11 0 512", "write -P 0x5a 64k 300k", f"write -P 0x33 {PAYLOAD_BYTES - 512} 512"
    )
    start = header.payload_offset * SECTOR
    data = bytearray(volume.read_bytes())
    plain = cipher.decrypt(data[start : start + PAYLOAD_BYTES], 0)
    assert plain[:512] == b"\x11" * 512
    assert plain[65536 : 65536 + 300 * 1024] == b"\x5a" * (300 * 1024)
    assert plain[-512:] == b"\x33" * 512
    for sector, count, byte in ((3, 1, 0x44), (700, 800, 0x66)):
        here = start + sector * SECTOR
        data[here : here + count * SECTOR] = cipher.encrypt(bytes([byte]) * (count * SECTOR), sector)
    volume.write_bytes(data)
    qemu_io(
        volume,
        "read -P 0x11 0 512",
        "read -P 0x44 1536 512",
        f"read -P 0x66 {700 * SECTOR} {800 * SECTOR}",
        f"read -P 0x33 {PAYLOAD_BYTES - 512} 512",
    )


@pytest.mark.peer("cryptsetup", "qemu-io")
@pytest.mark.parametrize(
    ("cipher_name", "key_bits", "hash_name", "slot"),
    [
        ("aes-xts-plain64", 512, "sha256", 0),
        ("aes-xts-plain64", 256, "sha512", 1),
        ("aes-xts-plain", 512, "sha1", 2),
        ("aes-xts-essiv:sha256", 512, "sha256", 3),
        ("aes-cbc-essiv:sha256", 256, "sha512", 4),
        ("aes-cbc-essiv:sha256", 128, "sha1", 5),
        ("aes-cbc-essiv:sha256", 192, "sha256", 6),
        ("aes-cbc-plain", 192, "sha512", 7),
        ("aes-cbc-plain64", 128, "sha256", 0),
        ("aes-cbc-plain", 256, "sha1", 0),
    ],
)
def test_what_cryptsetup_formats_is_unlocked(
    tmp_path: Path, cipher_name: str, key_bits: int, hash_name: str, slot: int
) -> None:
    volume = tmp_path / "volume"
    with volume.open("wb") as file:
        file.truncate(4 << 20)
    options = ["--type", "luks1", "-q", "--pbkdf-force-iterations", "1000"]
    layout = ["-c", cipher_name, "-s", str(key_bits), "-h", hash_name, "-S", str(slot)]
    run("cryptsetup", "luksFormat", *options, *layout, str(volume), "-d", "-", password=True)
    header, cipher = unlocked(volume, slot)
    assert header.key_bytes * 8 == key_bits
    assert "-".join((header.cipher_name, header.cipher_mode)) == cipher_name
    assert header.pack() == volume.read_bytes()[:HEADER_BYTES]
    if key_bits != 192:  # which QEMU does not survive
        payload = header.payload_offset * SECTOR + PAYLOAD_BYTES
        with volume.open("r+b") as file:
            file.truncate(payload)
        payloads_agree(volume, header, cipher)


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize(
    ("algorithm", "mode", "ivgen", "ivgen_hash", "hash_name"),
    [
        ("aes-256", "xts", "plain64", None, "sha256"),
        ("aes-192", "xts", "essiv", "sha256", "sha1"),
        ("aes-128", "xts", "plain", "sha256", "sha512"),
        ("aes-128", "cbc", "essiv", "sha256", "sha256"),
        ("aes-256", "cbc", "plain64", None, "sha512"),
        ("aes-256", "cbc", "plain", None, "sha1"),
    ],
)
def test_what_qemu_img_creates_is_unlocked(
    tmp_path: Path, algorithm: str, mode: str, ivgen: str, ivgen_hash: str | None, hash_name: str
) -> None:
    volume = tmp_path / "volume"
    options = f"key-secret=s,cipher-alg={algorithm},cipher-mode={mode},ivgen-alg={ivgen}"
    options += f",hash-alg={hash_name},iter-time=10"
    if ivgen_hash is not None:
        options += f",ivgen-hash-alg={ivgen_hash}"
    run("qemu-img", "create", "-q", "-f", "luks", *SECRET, "-o", options, str(volume), str(PAYLOAD_BYTES))
    header, cipher = unlocked(volume, 0)
    assert header.spec == CipherSpec(algorithm, mode, ivgen, ivgen_hash)
    assert header.pack() == volume.read_bytes()[:HEADER_BYTES]
    # The same geometry as ours, byte for byte but for what is random or measured.
    ours, _, _ = run_steps(
        formatting(
            header.spec,
            hash_name,
            b"",
            header.slots[0].iterations,
            header.digest_iterations,
            uuid=header.uuid,
        )
    )
    assert without_random(ours.pack()) == without_random(header.pack())
    assert header.payload_bytes(volume.stat().st_size) == PAYLOAD_BYTES
    payloads_agree(volume, header, cipher)


def without_random(packed: bytes) -> bytes:
    """Blank the digest, its salt and the salt of slot 0."""
    digest, slot_salt = slice(112, 164), slice(216, 248)
    data = bytearray(packed)
    for part in (digest, slot_salt):
        data[part] = bytes(part.stop - part.start)
    return bytes(data)


OURS = [
    CipherSpec("aes-128", "xts", "plain64"),
    CipherSpec("aes-256", "xts", "plain"),
    CipherSpec("aes-192", "xts", "plain64"),
    CipherSpec("aes-256", "xts", "essiv", "sha256"),
    CipherSpec("aes-128", "cbc", "plain64", "sha1"),
    CipherSpec("aes-192", "cbc", "plain"),
    CipherSpec("aes-192", "cbc", "essiv", "sha256"),
    CipherSpec("aes-256", "cbc", "essiv", "sha256"),
]


def known_to_cryptsetup(spec: CipherSpec) -> bool:
    """Without a device mapper it has neither AES-192-XTS nor a hash beside an IV rule that needs none."""
    if (spec.algorithm, spec.mode) == ("aes-192", "xts"):
        return False
    return spec.ivgen == "essiv" or spec.ivgen_hash is None


@pytest.mark.peer("cryptsetup", "qemu-io")
@pytest.mark.parametrize(
    ("spec", "hash_name"),
    [(spec, ("sha256", "sha1", "sha512")[number % 3]) for number, spec in enumerate(OURS)],
    ids=lambda value: (
        f"{value.algorithm}-{value.header_names()[1]}" if isinstance(value, CipherSpec) else value
    ),
)
@pytest.mark.parametrize("detached", [False, True], ids=["inline", "detached"])
def test_what_we_format_is_opened_by_the_peers(
    tmp_path: Path, spec: CipherSpec, hash_name: str, detached: bool
) -> None:
    header, key, plan = run_steps(
        formatting(spec, hash_name, PASSWORD.encode(), 1000, 1000, detached=detached)
    )
    volume = tmp_path / "header"
    with volume.open("w+b") as file:
        file.truncate(header.header_length() + (0 if detached else PAYLOAD_BYTES))
        for step in plan:
            if isinstance(step, Write):
                file.seek(step.offset)
                file.write(step.data)

    shown = run("cryptsetup", "luksDump", str(volume))
    said = dict(re.findall(r"^([A-Z][A-Za-z ]*):\s*(.*?)\s*$", shown, re.MULTILINE))
    assert said["Cipher name"] == "aes"
    assert said["Cipher mode"] == spec.header_names()[1]
    assert said["Hash spec"] == hash_name
    assert said["Payload offset"] == str(header.payload_offset)
    assert said["MK bits"] == str(spec.key_bytes * 8)
    assert said["UUID"] == header.uuid
    assert shown.count("ENABLED") == 1
    if known_to_cryptsetup(spec):
        test = ["open", "--test-passphrase", "--type", "luks1", str(volume), "-d", "-"]
        run("cryptsetup", *test, password=True)
    if (spec.algorithm, spec.mode) == ("aes-192", "cbc"):  # which QEMU does not survive
        return
    cipher = SectorCipher(spec, key.data)
    if not detached:
        payloads_agree(volume, header, cipher)
        return
    payload = tmp_path / "payload"
    plain = random.Random(1).randbytes(512) + b"\x77" * (PAYLOAD_BYTES - 512)
    payload.write_bytes(cipher.encrypt(plain, 0))
    qemu_io(payload, f"read -P 0x77 512 {PAYLOAD_BYTES - 512}", "write -P 0x12 4k 4k", header=volume)
    assert cipher.decrypt(payload.read_bytes(), 0)[4096:8192] == b"\x12" * 4096
