"""LUKS2: what the metadata says, and unlocking.

The metadata is a JSON object of keyslots, digests, segments, tokens and a
config.  A *keyslot* is an area in which a key lies, split and encrypted as in
LUKS1, under a key that a passphrase and a key derivation function give.  A
*digest* says of a key whether it is the right one, which keyslots hold it, and
which segments it is for.  A *segment* is a run of the payload's bytes with a
cipher.

:class:`Header` holds the JSON as it was read beside what was understood of it,
so that whatever nobody here knows about (tokens, keyslots of other kinds,
further members) is written back as it was.  The metadata comes from whoever
wrote the volume: every number is checked before it is used.

Source: LUKS2 On-Disk Format Specification 1.1, section 3.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

import orjson

from qmpd.crypto import antiforensic, kdf
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks2_binary import BinaryHeader, Copy
from qmpd.crypto.luks2_kdf import Kdf
from qmpd.crypto.memory import Buffer, KeyBuffer, KeyMemory, wiped_on_failure
from qmpd.crypto.sectors import SECTOR, SectorCipher
from qmpd.crypto.steps import Steps
from qmpd.errors import Error

#: How many keyslots there may be (section 3.2: cryptsetup's bound), and tokens, digests, segments.
SLOTS: Final = 32

STRIPES: Final = 4000

#: A keyslot's area begins and ends at multiples of this many bytes (section 3.2).
AREA_ALIGNMENT: Final = 4096

#: How deeply the metadata may be nested (cryptsetup's bound), and of how many objects and lists it may
#: consist: far more than 32 of each kind need, and few enough to be read at once.
MAX_DEPTH: Final = 32
MAX_CONTAINERS: Final = 1 << 14

#: The longest key, in bytes (cryptsetup's bound).
MAX_KEY_BYTES: Final = 512

#: The shortest digest: that of the shortest hash.  That of a LUKS1 header has 20 bytes, whatever the hash.
MIN_DIGEST_BYTES: Final = 16

#: The largest keyslots area, in bytes (cryptsetup's bound).
MAX_KEYSLOTS_BYTES: Final = 128 << 20

#: Requirements that would have to be understood (section 3.6), and what they mean.
_REQUIREMENTS: Final[Mapping[str, str]] = {
    "online-reencrypt": "an online reencryption is not finished",
    "online-reencrypt-v2": "an online reencryption is not finished",
    "online-reencrypt-v3": "an online reencryption is not finished",
    "offline-reencrypt": "an offline reencryption is not finished",
}

Random = Callable[[int], bytes]

_DECIMAL: Final = re.compile(r"0|[1-9][0-9]{0,19}")
_MAX_OFFSET: Final = (1 << 63) - 1

#: Costs are looked at when it comes to derive a key, so that a slot that costs too much keeps no other one
#: from opening.
_MAX_COST: Final = (1 << 63) - 1


@dataclass(frozen=True)
class Area:
    """Where a key lies.

    :param offset: from the beginning of the header, in bytes.
    :param size: in bytes.
    :param encryption: the cipher, as in "aes-xts-plain64".
    :param key_bytes: length of the cipher's key.
    """

    offset: int
    size: int
    encryption: str
    key_bytes: int


@dataclass(frozen=True)
class Keyslot:
    """A keyslot of type "luks2".

    :param key_bytes: length of the key in it.
    :param stripes: of the anti-forensic splitter, and `af_hash` its hash.
    :param kdf: turns a passphrase into the area's key.
    :param priority: 0 to be tried only when it is asked for, 1, or 2 to be tried first.
    """

    number: int
    key_bytes: int
    stripes: int
    af_hash: str
    area: Area
    kdf: Kdf
    priority: int = 1

    @property
    def material_bytes(self) -> int:
        """Length of the key material, in whole sectors."""
        return -(-self.key_bytes * self.stripes // SECTOR) * SECTOR


@dataclass(frozen=True)
class Digest:
    """A digest of type "pbkdf2".

    :param keyslots: the numbers of the slots with its key.
    :param segments: those of the segments that the key is for.
    """

    number: int
    hash_name: str
    iterations: int
    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)
    keyslots: frozenset[int]
    segments: frozenset[int]

    def fits(self, key: Buffer) -> bool:
        """Whether `key` is the one.

        It may take long and releases the interpreter lock: call it in a worker thread.

        :raise Error: it would take too long.
        """
        if self.iterations > kdf.MAX_ITERATIONS:
            raise Error(
                f"LUKS2 digest iteration count {self.iterations} is more than the "
                f"{kdf.MAX_ITERATIONS} allowed"
            )
        found = kdf.pbkdf2(self.hash_name, key, self.salt, self.iterations, len(self.digest))
        return hmac.compare_digest(found, self.digest)


@dataclass(frozen=True)
class Segment:
    """A run of the payload, of type "crypt".

    :param offset: where it is on the payload's volume, in bytes.
    :param size: in bytes; None if it goes to the end of the volume.
    :param iv_tweak: the first sector's number, in units of 512 bytes.
    :param encryption: the cipher, as in "aes-xts-plain64".
    :param sector_size: bytes that have an IV of their own.
    """

    number: int
    offset: int
    size: int | None
    iv_tweak: int
    encryption: str
    sector_size: int

    def spec(self, key_bytes: int) -> CipherSpec:
        """The cipher, for a key of this length.

        :raise Error: no such cipher.
        """
        return cipher_spec(self.encryption, key_bytes)


def cipher_spec(encryption: str, key_bytes: int) -> CipherSpec:
    """The cipher that a name such as "aes-xts-plain64" means.

    :raise Error: no such cipher.
    """
    name, dash, mode = encryption.partition("-")
    if not dash:
        raise Error(f"LUKS2 cipher '{encryption}' is not supported")
    return CipherSpec.from_header(name, mode, key_bytes)


@dataclass(frozen=True)
class Header:
    """What a LUKS2 header says.

    :param binary: the binary header.
    :param metadata: the JSON object, to be changed only by copying.
    :param keyslots: those of a known kind, by number.
    :param digests: by number.
    :param segments: in the order in which they make the payload.
    :param offset: where the copy is that counts, in bytes, 0 for the primary one; not what it says.
    """

    binary: BinaryHeader
    metadata: dict[str, Any] = field(repr=False)
    keyslots: Mapping[int, Keyslot]
    digests: Mapping[int, Digest]
    segments: tuple[Segment, ...]
    offset: int = field(default=0, compare=False)

    @classmethod
    def parse(cls, copy: Copy) -> Header:
        """Read the metadata of a copy.

        :raise Error: what is wrong with it.
        """
        return replace(parse_metadata(copy.header, copy.json), offset=copy.offset)

    @property
    def keyslots_offset(self) -> int:
        """Where the area of keyslots begins, in bytes."""
        return 2 * self.binary.size

    @property
    def keyslots_bytes(self) -> int:
        """How long it is."""
        return int(self.metadata["config"]["keyslots_size"])

    @property
    def key_bytes(self) -> int:
        """Length of the volume key, as the slots with it say.

        :raise Error: there is none, or they don't agree.
        """
        lengths = {
            slot.key_bytes for number, slot in self.keyslots.items() if number in self.volume_digest.keyslots
        }
        if len(lengths) != 1:
            raise Error("LUKS2 metadata: the keyslots do not say how long the volume key is")
        return lengths.pop()

    @property
    def tokens(self) -> list[tuple[int, str, frozenset[int]]]:
        """Number and type of each token, and the slots whose passphrases it is for, as far as they are said.

        Nobody has looked at tokens when the metadata was read, for they concern nobody here.
        """
        found = []
        for name, token in self.metadata["tokens"].items():
            if isinstance(token, dict) and _DECIMAL.fullmatch(name) and int(name) < SLOTS:
                kind, slots = token.get("type"), token.get("keyslots")
                known = frozenset(
                    int(slot)
                    for slot in (slots if isinstance(slots, list) else ())
                    if isinstance(slot, str) and _DECIMAL.fullmatch(slot)
                )
                found.append((int(name), kind if isinstance(kind, str) else "", known))
        return sorted(found, key=lambda token: token[0])

    @property
    def volume_digest(self) -> Digest:
        """The digest of the volume key."""
        return next(digest for digest in self.digests.values() if digest.segments)

    @property
    def volume_slots(self) -> list[Keyslot]:
        """The slots with the volume key, in the order in which they are tried.

        A slot that is to be ignored is not among them.
        """
        slots = [
            slot
            for number, slot in sorted(self.keyslots.items())
            if number in self.volume_digest.keyslots and slot.priority
        ]
        return sorted(slots, key=lambda slot: -slot.priority)

    def payload_bytes(self, volume_bytes: int) -> int:
        """How long the payload is on a volume of `volume_bytes` bytes.

        :raise Error: the volume is too short.
        """
        last = self.segments[-1]
        before = sum(segment.size or 0 for segment in self.segments)
        end = last.offset + (last.size or 0)
        if volume_bytes < end:
            raise Error("Could not refresh total sector count: Input/output error")
        if last.size is not None:
            return before
        largest = max(segment.sector_size for segment in self.segments)
        return before + (volume_bytes - last.offset) // largest * largest


def unlocking(
    keyslot: Keyslot, digest: Digest, password: Buffer, material: Buffer, *, memory: KeyMemory | None = None
) -> Steps[KeyBuffer | None]:
    """Try a passphrase on a keyslot (section 3.2 and 3.4), in steps.

    :param digest: says whether the key is the right one.
    :param material: the bytes of the area; what is missing counts as zeroes.
    :param memory: where the key is to be; by default in a page of its own.
    :returns: the key, for the caller to wipe, or None if the passphrase is not the one.
    :raise Error: something of the slot is not supported, or costs too much.
    """
    length = keyslot.material_bytes
    memory = memory or KeyMemory()
    yield
    with _area_cipher(keyslot, password, memory) as cipher, memory.take(length) as stripes:
        yield
        cipher.decrypt_into(bytes(material[:length]).ljust(length, b"\0"), 0, stripes.data)
        key = yield from antiforensic.merging(
            keyslot.af_hash, stripes.data, keyslot.key_bytes, keyslot.stripes, memory
        )
    with wiped_on_failure(key):
        yield
        fits = digest.fits(key.data)
    if fits:
        return key
    key.wipe()
    return None


def sealing(keyslot: Keyslot, key: Buffer, password: Buffer, random: Random) -> Steps[bytes]:
    """Make the key material with which `password` opens a keyslot, in steps.

    :param key: what the slot shall hold.
    :param random: gives as many random bytes as it is asked for.
    :returns: what belongs into the area, whole sectors.
    """
    yield
    with _area_cipher(keyslot, password, KeyMemory()) as cipher:
        material = yield from antiforensic.splitting(
            keyslot.af_hash, key, keyslot.stripes, random, length=keyslot.material_bytes
        )
        with material:
            return bytes(cipher.encrypt(material.data, 0))


@contextmanager
def _area_cipher(keyslot: Keyslot, password: Buffer, memory: KeyMemory) -> Iterator[SectorCipher]:
    """The cipher of a slot's area, with the key that `password` gives."""
    spec = cipher_spec(keyslot.area.encryption, keyslot.area.key_bytes)
    with memory.take(keyslot.area.key_bytes) as derived:
        keyslot.kdf.derive_into(password, derived.data)
        cipher = SectorCipher(spec, derived.data, memory=memory, secret_data=True)
    try:
        yield cipher
    finally:
        cipher.close()


# -- reading the metadata


class _Member:
    """A value somewhere in the metadata, with its place for messages."""

    def __init__(self, value: Any, place: str) -> None:
        self.value = value
        self.place = place

    def refuse(self, what: str) -> Error:
        return Error(f"LUKS2 metadata: {self.place} {what}")

    def __getitem__(self, name: str) -> _Member:
        members = self.object()
        if name not in members:
            raise self.refuse(f"has no '{name}'")
        return _Member(members[name], f"{self.place}.{name}")

    def get(self, name: str) -> _Member | None:
        return self[name] if name in self.object() else None

    def object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.refuse("is no object")
        return self.value

    def numbered(self) -> Iterator[tuple[int, _Member]]:
        """The members of an object whose names are numbers, in their order."""
        for name in sorted(self.object(), key=lambda name: (len(name), name)):
            if not _DECIMAL.fullmatch(name) or int(name) >= SLOTS:
                raise self.refuse(f"has a member '{name[:40]}' that is no number below {SLOTS}")
            yield int(name), self[name]

    def text(self) -> str:
        # Whoever reads it in C takes a NUL for the end.
        if not isinstance(self.value, str) or not self.value or "\0" in self.value:
            raise self.refuse("is no string, or an empty one")
        return self.value

    def decimal(self, most: int = _MAX_OFFSET) -> int:
        """A number that is written as a string, for JSON's own have 53 bits."""
        if not _DECIMAL.fullmatch(self.text()) or int(self.value) > most:
            raise self.refuse("is no number that can be")
        return int(self.value)

    def integer(self, least: int, most: int) -> int:
        if type(self.value) is not int or not least <= self.value <= most:
            raise self.refuse(f"is no number from {least} to {most}")
        return self.value

    def base64(self, most: int) -> bytes:
        try:
            data = base64.b64decode(self.text(), validate=True)
        except (binascii.Error, ValueError):
            raise self.refuse("is not base64") from None
        if not 0 < len(data) <= most:
            raise self.refuse(f"has a length of {len(data)} bytes, and may have from 1 to {most}")
        return data

    def numbers(self, known: Mapping[int, Any], what: str) -> frozenset[int]:
        """A list of numbers, written as strings, of things that are there."""
        if not isinstance(self.value, list):
            raise self.refuse("is no list")
        found = set()
        for name in self.value:
            if not isinstance(name, str) or not _DECIMAL.fullmatch(name) or int(name) not in known:
                raise self.refuse(f"names a {what} that is not there")
            found.add(int(name))
        return frozenset(found)


def parse_metadata(binary: BinaryHeader, text: bytes) -> Header:
    """Read the JSON text of a header.

    :raise Error: what is wrong with it.
    """
    root = _Member(_loaded(text), "the object")
    config = root["config"]
    _check_config(binary, config)
    keyslots: dict[int, Keyslot | None] = dict(_keyslots(binary, config, root["keyslots"]))
    segments = list(_segments(root["segments"]))
    digests_ = {
        number: digest
        for number, member in root["digests"].numbered()
        if (digest := _digest(number, member, keyslots, {s.number: s for s in segments})) is not None
    }
    root["tokens"].object()
    _check_segments(segments, digests_)
    usable = {number: slot for number, slot in keyslots.items() if slot is not None}
    return Header(binary, root.object(), usable, digests_, tuple(segments))


def _loaded(text: bytes) -> Any:
    """The object that the text is, if it can't lead anybody astray who copies it or looks through it."""
    if text[:1] != b"{" or text[-1:] != b"}":
        raise Error("LUKS2 metadata is not a JSON object")
    if text.count(b"{") + text.count(b"[") > MAX_CONTAINERS:
        raise Error(f"LUKS2 metadata consists of more than {MAX_CONTAINERS} objects and lists")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise Error("LUKS2 metadata is not JSON") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (member for one in level for member in (one.values() if isinstance(one, dict) else one))
        level = [member for member in inner if isinstance(member, dict | list)]
    if level:
        raise Error(f"LUKS2 metadata is nested more than {MAX_DEPTH} levels deep")
    return value


def _check_config(binary: BinaryHeader, config: _Member) -> None:
    if config["json_size"].decimal() != binary.json_bytes:
        raise config.refuse("says another size of the JSON area than the binary header")
    size = config["keyslots_size"]
    if size.decimal(MAX_KEYSLOTS_BYTES) % AREA_ALIGNMENT:
        raise size.refuse(f"is no multiple of {AREA_ALIGNMENT}")
    requirements = config.get("requirements")
    mandatory = None if requirements is None else requirements.get("mandatory")
    if mandatory is None:
        return
    if not isinstance(mandatory.value, list):
        raise mandatory.refuse("is no list")
    for name in mandatory.value:
        shown = name if isinstance(name, str) else "that is no string"
        meaning = _REQUIREMENTS.get(shown, "it is not known here")
        raise Error(f"LUKS2 requirement '{shown[:80]}' is not supported: {meaning}")


def _keyslots(binary: BinaryHeader, config: _Member, member: _Member) -> Iterator[tuple[int, Keyslot | None]]:
    """The keyslots by number; None for one of a kind that is not known."""
    first = 2 * binary.size
    end = first + config["keyslots_size"].decimal()
    extents: list[tuple[int, int, int]] = []
    for number, slot in member.numbered():
        area = slot["area"]
        offset, size = area["offset"].decimal(), area["size"].decimal()
        if offset < first or offset + size > end:
            raise area.refuse("is not inside the area of keyslots")
        for other, start, length in extents:
            if offset < start + length and start < offset + size:
                raise area.refuse(f"overlaps with that of keyslot {other}")
        extents.append((number, offset, size))
        if slot["type"].text() != "luks2":
            yield number, None
            continue
        yield number, _keyslot(number, slot, area, offset, size)


def _keyslot(number: int, slot: _Member, area: _Member, offset: int, size: int) -> Keyslot:
    af = slot["af"]
    if area["type"].text() != "raw":
        raise area.refuse("is of a type that is not known")
    if af["type"].text() != "luks1":
        raise af.refuse("is of a type that is not known")
    priority = slot.get("priority")
    keyslot = Keyslot(
        number=number,
        key_bytes=slot["key_size"].integer(1, MAX_KEY_BYTES),
        stripes=af["stripes"].integer(1, STRIPES),
        af_hash=af["hash"].text(),
        area=Area(offset, size, area["encryption"].text(), area["key_size"].integer(1, MAX_KEY_BYTES)),
        kdf=_kdf(slot["kdf"]),
        priority=1 if priority is None else priority.integer(0, 2),
    )
    if keyslot.material_bytes > size:
        raise area.refuse("is too small for the key")
    return keyslot


def _kdf(member: _Member) -> Kdf:
    kind = member["type"].text()
    salt = member["salt"].base64(64)
    if kind == "pbkdf2":
        return Kdf(
            kind, salt, hash_name=member["hash"].text(), iterations=member["iterations"].integer(1, _MAX_COST)
        )
    if kind in ("argon2i", "argon2id"):
        return Kdf(
            kind,
            salt,
            iterations=member["time"].integer(1, _MAX_COST),
            memory=member["memory"].integer(1, _MAX_COST),
            cpus=member["cpus"].integer(1, _MAX_COST),
        )
    raise member.refuse("is of a type that is not known")


def _digest(
    number: int, member: _Member, keyslots: Mapping[int, Any], segments: Mapping[int, Segment]
) -> Digest | None:
    slots = member["keyslots"].numbers(keyslots, "keyslot")
    parts = member["segments"].numbers(segments, "segment")
    if member["type"].text() != "pbkdf2":
        return None
    hash_name, value = member["hash"].text(), member["digest"].base64(512)
    if len(value) < MIN_DIGEST_BYTES:
        raise member["digest"].refuse("is too short to know a key by")
    return Digest(
        number=number,
        hash_name=hash_name,
        iterations=member["iterations"].integer(1, _MAX_COST),
        salt=member["salt"].base64(512),
        digest=value,
        keyslots=slots,
        segments=parts,
    )


def _segments(member: _Member) -> Iterator[Segment]:
    for number, segment in member.numbered():
        flags = segment.get("flags")
        if flags is not None and flags.value:
            raise flags.refuse("is of a reencryption that is not finished")
        if segment["type"].text() != "crypt":
            raise segment.refuse(f"is of the type '{segment['type'].text()[:40]}', which is not supported")
        if segment.get("integrity") is not None:
            raise segment.refuse("is authenticated, which is not supported")
        sector_size = segment["sector_size"].integer(512, 4096)
        if sector_size & (sector_size - 1):
            raise segment["sector_size"].refuse("is no power of two")
        size = segment["size"]
        length = None if size.value == "dynamic" else size.decimal()
        offset = segment["offset"].decimal()
        if length == 0 or (length or 0) % sector_size or offset % SECTOR:
            raise segment.refuse("does not consist of whole sectors")
        if length is not None and offset + length > _MAX_OFFSET:
            raise segment.refuse("ends where nothing can be")
        # With a smaller bound than the format has no sector's number goes beyond 64 bits.
        tweak = segment["iv_tweak"].decimal()
        if tweak % (sector_size // SECTOR):
            raise segment["iv_tweak"].refuse(f"is within a sector of {sector_size} bytes")
        yield Segment(
            number,
            offset,
            length,
            tweak,
            segment["encryption"].text(),
            sector_size,
        )


def _check_segments(segments: list[Segment], digests_: Mapping[int, Digest]) -> None:
    """See that the segments follow one another in whole sectors, and that one key is for all of them."""
    if not segments:
        raise Error("LUKS2 metadata: there is no segment")
    # As the disk shows sectors of one size, the others' have to lie in them.
    largest = max(segment.sector_size for segment in segments)
    for segment in segments:
        if (segment.size or 0) % largest:
            raise Error(
                f"LUKS2 metadata: segment {segment.number} does not consist of sectors of {largest} bytes"
            )
    for segment, following in pairwise(segments):
        if segment.size is None or following.offset != segment.offset + segment.size:
            raise Error(
                f"LUKS2 metadata: segment {following.number} does not follow segment {segment.number}"
            )
    wanted = frozenset(segment.number for segment in segments)
    for_segments = [digest for digest in digests_.values() if digest.segments]
    if len(for_segments) != 1 or for_segments[0].segments != wanted:
        raise Error("LUKS2 metadata: there is not one digest of a volume key for all segments")
