"""LUKS1: the header, its keyslots, unlocking and formatting.

A header (592 bytes, big-endian; LUKS1 On-Disk Format Specification 1.2.3,
section 3) names a cipher and a hash, holds a digest of the volume key, and
describes eight keyslots.  A keyslot is an area in which the volume key lies,
split by the anti-forensic splitter into 4000 stripes and encrypted, sector by
sector, with a key derived from a passphrase.  The payload begins at
``payload_offset``, or at 0 of another volume if the header is detached.

Functions here take and give bytes; whoever calls them reads and writes.
Making a header gives a plan: what to write, in which order, and where what
was written must have reached the disk.

The refusals of :meth:`Header.parse` are QEMU's, in its wording and its order
(the first fault found is the one that is told):

======================================  =======================================================
what is wrong                           text
======================================  =======================================================
no magic                                Volume is not in LUKS format
another version                         LUKS version 2 is not supported
a name that fills its field             LUKS header cipher name is not NUL terminated
(also "cipher mode", "hash spec")
payload before sector 8                 LUKS payload is overlapping with the header
no iterations of the digest             LUKS key iteration count is zero
slot with other than 4000 stripes       Keyslot 3 is corrupted (stripes 0 != 4000)
slot neither active nor disabled        Keyslot 3 state (active/disable) is corrupted
active slot without iterations          Keyslot 3 iteration count is zero
slot before sector 8                    Keyslot 3 is overlapping with the LUKS header
slot ends after the payload starts      Keyslot 3 is overlapping with the encrypted payload
two slots share sectors                 Keyslots 3 and 5 are overlapping in the header
cipher mode without a dash              Unexpected cipher mode string format 'xts'
hash of the IV rule unknown             Hash algorithm 'foo' not supported
mode unknown                            Cipher mode 'lrw' not supported
cipher unknown, or without such a key   Algorithm 'aes' with key size 17 bytes not supported
the header's hash unknown               Hash algorithm 'foo' not supported
IV rule unknown                         IV generator 'benbi' not supported
essiv without a hash                    Missing IV generator hash specification
essiv's hash is no AES key's length     No AES cipher with key size 20 available
an odd key length in XTS                XTS cipher key length should be a multiple of 2
======================================  =======================================================

A header read from its own volume is not checked against the payload, as in
QEMU.  A volume that ends within the header is read as if zeros followed.

On purpose we differ in this: the sums of offsets and lengths do not wrap at 32
bits, so a slot at sector 4294967295 is past the payload and not before it; and
iteration counts above a bound are refused when it comes to derive a key.
"""

from __future__ import annotations

import hmac
import os
import struct
import uuid as uuids
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from qmpd.crypto import antiforensic, kdf
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.memory import Buffer, KeyBuffer, KeyMemory, random_key, wiped_on_failure
from qmpd.crypto.plan import Barrier, Plan, Write
from qmpd.crypto.sectors import SECTOR, SectorCipher
from qmpd.crypto.steps import Steps
from qmpd.errors import Error

__all__ = [
    "HEADER_BYTES",
    "HEAD_BYTES",
    "INVALID_PASSWORD",
    "NOT_LUKS",
    "SALT_BYTES",
    "SECTOR",
    "SLOTS",
    "STRIPES",
    "Header",
    "Keyslot",
    "checking_digest",
    "formatting",
    "iterations_for",
    "new_header",
    "sealing",
    "slot_extent",
    "unlocking",
]

HEADER_BYTES: Final = 592
SLOTS: Final = 8
STRIPES: Final = 4000
DIGEST_BYTES: Final = 20
SALT_BYTES: Final = 32

#: What QEMU says when there is no header.
NOT_LUKS: Final = "Volume is not in LUKS format"

#: What QEMU says when a passphrase opens no keyslot.
INVALID_PASSWORD: Final = "Invalid password, cannot unlock any keyslot"

#: What QEMU says when the payload's offset is behind the end of the volume that should hold it.
PAYLOAD_BEYOND_VOLUME: Final = "Could not refresh total sector count: Input/output error"

_MAGIC: Final = b"LUKS\xba\xbe"
_VERSION: Final = 1
_ACTIVE: Final = 0x00AC71F3
_DISABLED: Final = 0x0000DEAD

#: Key material and payload begin at multiples of 4 KiB (specification, section 2.4.2 and appendix B).
_ALIGNMENT: Final = 4096 // SECTOR

#: magic, version, cipher-name, cipher-mode, hash-spec, payload-offset, key-bytes, mk-digest,
#: mk-digest-salt, mk-digest-iter, uuid (specification, figure 1)
_HEADER: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")
#: active, iterations, salt, key-material-offset, stripes (specification, figure 2)
_SLOT: Final = struct.Struct(">II32sII")


#: What stands before the slots' descriptions, in bytes.
HEAD_BYTES: Final = _HEADER.size


def slot_extent(number: int) -> tuple[int, int]:
    """Return ``(offset, length)`` of the description of slot `number` in the header, in bytes."""
    return _HEADER.size + number * _SLOT.size, _SLOT.size


def _sectors(length: int) -> int:
    return -(-length // SECTOR)


def _aligned(sectors: int) -> int:
    return -(-sectors // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Keyslot:
    """One of a header's eight keyslots.

    :param active: whether it holds a key.
    :param iterations: of PBKDF2; 0 where the slot was never used.
    :param salt: 32 bytes.
    :param key_offset: where its key material begins, in sectors.
    :param stripes: of the anti-forensic splitter.
    """

    active: bool
    iterations: int
    salt: bytes = field(repr=False)
    key_offset: int
    stripes: int = STRIPES

    def pack(self) -> bytes:
        """Return the slot's 48 bytes in the header."""
        state = _ACTIVE if self.active else _DISABLED
        return _SLOT.pack(state, self.iterations, self.salt, self.key_offset, self.stripes)


@dataclass(frozen=True)
class Header:
    """A LUKS1 header.

    :param cipher_name: "aes".
    :param cipher_mode: as in "xts-plain64" or "cbc-essiv:sha256".
    :param hash_name: of key derivation, splitter and digest.
    :param payload_offset: in sectors; 0 with a detached header.
    :param key_bytes: length of the volume key.
    :param digest: PBKDF2 of the volume key, 20 bytes.
    :param digest_salt: 32 bytes.
    :param digest_iterations: of the digest's PBKDF2.
    :param uuid: as text, of at most 40 bytes.
    :param slots: eight of them.
    """

    cipher_name: str
    cipher_mode: str
    hash_name: str
    payload_offset: int
    key_bytes: int
    digest: bytes = field(repr=False)
    digest_salt: bytes = field(repr=False)
    digest_iterations: int
    uuid: str
    slots: tuple[Keyslot, ...]

    @classmethod
    def parse(cls, data: Buffer, *, detached: bool = False) -> Header:
        """Read a header from the first bytes of a volume.

        After that the cipher and the hash are known ones, and every slot's
        material lies behind the header, apart from the others', and before
        the payload unless `detached`; it is never longer than 256,000 bytes.

        :param data: the volume's first :data:`HEADER_BYTES` bytes or more;
            if it has fewer, what is missing counts as zeros.
        :param detached: the volume is the header's own, so the payload is not on it.
        :raise Error: see the module.
        """
        raw = bytes(data[:HEADER_BYTES]).ljust(HEADER_BYTES, b"\0")
        magic, version, cipher, mode, hash_spec, *numbers = _HEADER.unpack_from(raw)
        payload_offset, key_bytes, digest, salt, iterations, uuid = numbers
        if magic != _MAGIC:
            raise Error(NOT_LUKS)
        if version != _VERSION:
            raise Error(f"LUKS version {version} is not supported")
        header = cls(
            cipher_name=_text(cipher, "cipher name"),
            cipher_mode=_text(mode, "cipher mode"),
            hash_name=_text(hash_spec, "hash spec"),
            payload_offset=payload_offset,
            key_bytes=key_bytes,
            digest=digest,
            digest_salt=salt,
            digest_iterations=iterations,
            uuid=uuid.partition(b"\0")[0].decode("utf-8", "replace"),
            slots=(),
        )
        if not detached and payload_offset < _aligned(_sectors(HEADER_BYTES)):
            raise Error("LUKS payload is overlapping with the header")
        if iterations == 0:
            raise Error("LUKS key iteration count is zero")
        slots = _parse_slots(raw, key_bytes, None if detached else payload_offset)
        CipherSpec.from_header(header.cipher_name, header.cipher_mode, key_bytes, header.hash_name)
        return replace(header, slots=slots)

    def pack(self) -> bytes:
        """Return the header's :data:`HEADER_BYTES` bytes."""
        return _HEADER.pack(
            _MAGIC,
            _VERSION,
            self.cipher_name.encode(),
            self.cipher_mode.encode(),
            self.hash_name.encode(),
            self.payload_offset,
            self.key_bytes,
            self.digest,
            self.digest_salt,
            self.digest_iterations,
            self.uuid.encode()[:40],
        ) + b"".join(slot.pack() for slot in self.slots)

    def with_slot(self, number: int, slot: Keyslot) -> Header:
        """Return the same header with another slot of this number."""
        return replace(self, slots=(*self.slots[:number], slot, *self.slots[number + 1 :]))

    @property
    def active_slots(self) -> list[int]:
        """The numbers of the slots that hold a key."""
        return [number for number, slot in enumerate(self.slots) if slot.active]

    @property
    def spec(self) -> CipherSpec:
        """The cipher of payload and key material."""
        return CipherSpec.from_header(self.cipher_name, self.cipher_mode, self.key_bytes)

    def material_extent(self, slot: int) -> tuple[int, int]:
        """Return ``(offset, length)`` of the key material of slot number `slot`: bytes, whole sectors."""
        keyslot = self.slots[slot]
        return keyslot.key_offset * SECTOR, _sectors(self.key_bytes * keyslot.stripes) * SECTOR

    def header_length(self) -> int:
        """Return how many bytes the header and all its slots take, in whole 4 KiB.

        This is the size of a detached header that QEMU makes.
        """
        ends = (sum(self.material_extent(slot)) for slot in range(len(self.slots)))
        return _aligned(max(ends) // SECTOR) * SECTOR

    def payload_bytes(self, volume_bytes: int) -> int:
        """Return how long the payload is on a volume of `volume_bytes` bytes.

        :raise Error: the payload's offset is behind the end of the volume.
        """
        payload = volume_bytes - self.payload_offset * SECTOR
        if payload < 0:
            raise Error(PAYLOAD_BEYOND_VOLUME)
        return payload


def _text(raw: bytes, what: str) -> str:
    text, nul, _ = raw.partition(b"\0")
    if not nul:
        raise Error(f"LUKS header {what} is not NUL terminated")
    return text.decode("utf-8", "replace")


def _parse_slots(raw: bytes, key_bytes: int, payload_offset: int | None) -> tuple[Keyslot, ...]:
    """Read and check the slots; `payload_offset` (in sectors) is None if the payload is elsewhere."""
    fields = [_SLOT.unpack_from(raw, _HEADER.size + number * _SLOT.size) for number in range(SLOTS)]
    length = _sectors(key_bytes * STRIPES)
    starts = [offset for *_, offset, _ in fields]
    for number, (state, iterations, _, start, stripes) in enumerate(fields):
        if stripes != STRIPES:
            signed = stripes - (1 << 32) if stripes >= 1 << 31 else stripes
            raise Error(f"Keyslot {number} is corrupted (stripes {signed} != {STRIPES})")
        if state not in (_ACTIVE, _DISABLED):
            raise Error(f"Keyslot {number} state (active/disable) is corrupted")
        if state == _ACTIVE and iterations == 0:
            raise Error(f"Keyslot {number} iteration count is zero")
        if start < _aligned(_sectors(HEADER_BYTES)):
            raise Error(f"Keyslot {number} is overlapping with the LUKS header")
        if payload_offset is not None and start + length > payload_offset:
            raise Error(f"Keyslot {number} is overlapping with the encrypted payload")
        for other in range(number + 1, SLOTS):
            if starts[other] < start + length and start < starts[other] + length:
                raise Error(f"Keyslots {number} and {other} are overlapping in the header")
    return tuple(
        Keyslot(state == _ACTIVE, iterations, salt, start, stripes)
        for state, iterations, salt, start, stripes in fields
    )


def unlocking(
    header: Header,
    slot: int,
    password: Buffer,
    material: Buffer,
    *,
    max_iterations: int = kdf.MAX_ITERATIONS,
    memory: KeyMemory | None = None,
) -> Steps[KeyBuffer | None]:
    """Try a passphrase on one keyslot (specification, section 4.3 and figure 5).

    Its steps are the slot's derivation, pieces of the merge, and the digest's derivation.  They may take long
    and release the interpreter lock: take them in a worker thread.

    :param header: what :meth:`Header.parse` returned.
    :param slot: the slot's number.
    :param password: the passphrase.
    :param material: the bytes at :meth:`Header.material_extent`; if the volume
        ends before, what is missing counts as zeros.
    :param max_iterations: refuse to derive a key with more.
    :param memory: where the volume key is to be; by default in a page of its own.
    :returns: the volume key, for the caller to wipe, or None: the slot is not
        active, or the passphrase is not the one.
    :raise Error: more iterations than `max_iterations`.
    """
    keyslot = header.slots[slot]
    if not keyslot.active:
        return None
    for what, iterations in (
        (f"Keyslot {slot}", keyslot.iterations),
        ("LUKS key", header.digest_iterations),
    ):
        if iterations > max_iterations:
            raise Error(f"{what} iteration count {iterations} is more than the {max_iterations} allowed")
    _, length = header.material_extent(slot)
    material = bytes(material[:length]).ljust(length, b"\0")
    memory = memory or KeyMemory()
    yield
    with _slot_cipher(header, slot, password, memory) as cipher, memory.take(length) as stripes:
        yield
        cipher.decrypt_into(material, 0, stripes.data)
        key = yield from antiforensic.merging(
            header.hash_name, stripes.data, header.key_bytes, keyslot.stripes, memory
        )
    with wiped_on_failure(key):
        fits = yield from checking_digest(header, key.data)
    if fits:
        return key
    key.wipe()
    return None


def checking_digest(header: Header, key: Buffer) -> Steps[bool]:
    """Whether `key` is the volume key of this header (specification, figure 5)."""
    yield
    digest = kdf.pbkdf2(
        header.hash_name, key, header.digest_salt, header.digest_iterations, len(header.digest)
    )
    return hmac.compare_digest(digest, header.digest)


@contextmanager
def _slot_cipher(header: Header, slot: int, password: Buffer, memory: KeyMemory) -> Iterator[SectorCipher]:
    """The cipher of a slot's key material, with the key that `password` gives."""
    keyslot = header.slots[slot]
    with memory.take(header.key_bytes) as derived:
        kdf.pbkdf2_into(header.hash_name, password, keyslot.salt, keyslot.iterations, derived.data)
        cipher = SectorCipher(header.spec, derived.data, memory=memory, secret_data=True)
    try:
        yield cipher
    finally:
        cipher.close()


def iterations_for(hash_name: str, key_bytes: int, milliseconds: int) -> Steps[tuple[int, int]]:
    """Return the PBKDF2 iterations of a keyslot and of the digest that a creation should take.

    The slot's take `milliseconds` on this machine and the digest's an eighth
    of that, which is how QEMU divides ``iter-time``.  Takes some tenths of a
    second.

    :raise Error: no such hash, or too many milliseconds.
    """
    digest = yield from kdf.calibrating(hash_name, milliseconds, DIGEST_BYTES, share=8)
    return (yield from kdf.calibrating(hash_name, milliseconds, key_bytes)), digest


def new_header(
    spec: CipherSpec, hash_name: str, *, detached: bool = False, uuid: str | None = None
) -> Header:
    """Return a header with QEMU's geometry, no slot in use, and a digest of zeros.

    Slots follow one another from sector 8 on at multiples of 4 KiB, and the
    payload comes right after them: with a key of 64 bytes at 2,068,480.

    :param detached: the payload is elsewhere and begins at 0.
    :param uuid: as text; a random one (RFC 9562, version 4) if it is left out.
    """
    cipher_name, cipher_mode = spec.header_names()
    first = _aligned(_sectors(HEADER_BYTES))
    step = _aligned(_sectors(spec.key_bytes * STRIPES))
    return Header(
        cipher_name=cipher_name,
        cipher_mode=cipher_mode,
        hash_name=hash_name,
        payload_offset=0 if detached else first + SLOTS * step,
        key_bytes=spec.key_bytes,
        digest=bytes(DIGEST_BYTES),
        digest_salt=bytes(SALT_BYTES),
        digest_iterations=0,
        uuid=uuid if uuid is not None else str(uuids.uuid4()),
        slots=tuple(Keyslot(False, 0, bytes(SALT_BYTES), first + number * step) for number in range(SLOTS)),
    )


def formatting(
    spec: CipherSpec,
    hash_name: str,
    password: Buffer,
    slot_iterations: int,
    digest_iterations: int,
    *,
    detached: bool = False,
    uuid: str | None = None,
    random: Callable[[int], bytes] = os.urandom,
) -> Steps[tuple[Header, KeyBuffer, Plan]]:
    """Make a volume key and a header with `password` in slot 0 (specification, section 4.1).

    The first write takes away whatever header was there, and the last one
    puts the new one in place, after the key material has reached the disk: an
    interrupted creation leaves nothing that claims to be a LUKS volume.
    Nothing behind :meth:`Header.header_length` is touched.

    Its steps may take long and release the interpreter lock: take them in a worker thread.

    :param slot_iterations: see :func:`iterations_for`; so is `digest_iterations`.
    :param detached: the payload is elsewhere and begins at 0.
    :param uuid: as text; a random one if it is left out.
    :param random: gives as many random bytes as it is asked for; those of keys are overwritten.
    :returns: the header, the volume key for the caller to wipe, and what to
        write to the header's volume in this order.
    :raise Error: no such hash.
    """
    blank = new_header(spec, hash_name, detached=detached, uuid=uuid)
    key = random_key(spec.key_bytes, random)
    with wiped_on_failure(key):
        digest_salt, slot_salt = random(SALT_BYTES), random(SALT_BYTES)
        yield
        digest = kdf.pbkdf2(hash_name, key.data, digest_salt, digest_iterations, DIGEST_BYTES)
        first_slot = replace(blank.slots[0], active=True, iterations=slot_iterations, salt=slot_salt)
        header = replace(
            blank,
            digest=bytes(digest),
            digest_salt=digest_salt,
            digest_iterations=digest_iterations,
        ).with_slot(0, first_slot)
        material = yield from sealing(header, 0, key.data, password, random)
    area = _aligned(_sectors(HEADER_BYTES)) * SECTOR
    plan: Plan = [
        Write(0, bytes(area)),
        Barrier(),
        Write(header.material_extent(0)[0], material),
        Barrier(),
        Write(0, header.pack().ljust(area, b"\0")),
        Barrier(),
    ]
    return header, key, plan


def sealing(
    header: Header,
    slot: int,
    key: Buffer,
    password: Buffer,
    random: Callable[[int], bytes] = os.urandom,
) -> Steps[bytes]:
    """Make the key material with which `password` opens a keyslot (specification, section 4.1 and figure 3).

    :param header: salt and iterations of the slot are the ones to use.
    :param slot: the slot's number.
    :param key: the volume key.
    :param random: gives as many random bytes as it is asked for.
    :returns: what belongs at :meth:`Header.material_extent`.
    """
    _, length = header.material_extent(slot)
    stripes = header.slots[slot].stripes
    yield
    with _slot_cipher(header, slot, password, KeyMemory()) as cipher:
        material = yield from antiforensic.splitting(header.hash_name, key, stripes, random, length=length)
        with material:
            return bytes(cipher.encrypt(material.data, 0))
