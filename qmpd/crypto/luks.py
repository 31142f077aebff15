"""LUKS headers of both versions in one shape, for whoever does not care which it is.

:func:`reading` finds out the version and gives a :class:`LuksHeader`: the slots
with their key material, the payload's segments with their ciphers, and the
computations that unlock a slot and that change some.  What the two formats
are is in :mod:`qmpd.crypto.luks1` and :mod:`qmpd.crypto.luks2`.

Nothing here does I/O: reading asks for extents, and changing gives a plan.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Self

from qmpd.crypto import (
    luks1,
    luks1_backup,
    luks1_keyslots,
    luks2,
    luks2_backup,
    luks2_binary,
    luks2_kdf,
    luks2_keyslots,
)
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks1 import HEAD_BYTES
from qmpd.crypto.luks2_binary import BINARY_BYTES
from qmpd.crypto.luks2_kdf import Kdf
from qmpd.crypto.memory import Buffer, KeyBuffer, KeyMemory
from qmpd.crypto.plan import Plan, Write
from qmpd.crypto.sectors import SECTOR
from qmpd.crypto.steps import Steps
from qmpd.errors import Error

Random = Callable[[int], bytes]

#: Offset and length, in bytes from the beginning of the header's area.
Extent = tuple[int, int]

#: Headers of both versions begin so; the second begins its second copy otherwise.
_MAGICS: Final = (luks2_binary.MAGIC, luks2_binary.SECONDARY_MAGIC)

#: More than this of a volume no header's beginning takes.
MOST_BEGINNING_BYTES: Final = 2 * luks2_binary.SIZES[-1]


@dataclass(frozen=True)
class PayloadSegment:
    """A run of the payload with one cipher.

    :param offset: where it is on the payload's volume, in bytes.
    :param size: in bytes; None if it goes to the end of the volume.
    :param first_sector: what the first sector's IV is made of, in units of 512 bytes.
    :param sector_size: bytes that have an IV of their own.
    """

    offset: int
    size: int | None
    spec: CipherSpec
    first_sector: int
    sector_size: int


@dataclass(frozen=True)
class KdfChoice:
    """How a new key is to be derived.

    :param milliseconds: how long that may take here.
    :param kind: "pbkdf2", "argon2i" or "argon2id"; None for what is usual.
    :param memory: the most memory of argon2, in KiB; None for what is usual.
    :param cpus: argon2's lanes; None for what is usual.
    :param limit: more memory than this nobody may ask for, in KiB.
    """

    milliseconds: int
    kind: str | None = None
    memory: int | None = None
    cpus: int | None = None
    limit: int = luks2_kdf.MAX_MEMORY

    @property
    def most_memory(self) -> int:
        """What a derivation may take, in KiB."""
        if self.kind == "pbkdf2":
            return 0
        return min(self.memory or luks2_kdf.usual_memory(), self.limit)


class LuksHeader(ABC):
    """A header, as it was read."""

    version: ClassVar[int]

    #: How many keyslots there can be.
    slot_count: ClassVar[int]

    @property
    @abstractmethod
    def uuid(self) -> str:
        """The volume's UUID, as text."""

    @property
    @abstractmethod
    def key_bytes(self) -> int:
        """Length of the volume key."""

    @property
    @abstractmethod
    def active_slots(self) -> list[int]:
        """The numbers of the slots in use."""

    @property
    def volume_slots(self) -> list[int]:
        """Those of them that hold the volume key."""
        return self.active_slots

    @property
    def tried_slots(self) -> list[int]:
        """Those that a passphrase is tried on, in this order."""
        return self.active_slots

    @property
    def listed_slots(self) -> list[int]:
        """Those that are told of whoever looks at the header."""
        return self.active_slots

    @abstractmethod
    def material_extent(self, slot: int) -> Extent:
        """Where the key material of a slot in use is."""

    @property
    @abstractmethod
    def segments(self) -> tuple[PayloadSegment, ...]:
        """What the payload consists of, in its order.

        :raise Error: a cipher is not supported.
        """

    @abstractmethod
    def payload_bytes(self, volume_bytes: int) -> int:
        """How long the payload is on a volume of `volume_bytes` bytes.

        :raise Error: the volume ends before the payload begins.
        """

    @abstractmethod
    def is_of_same_volume(self, other: LuksHeader) -> bool:
        """Whether they differ in nothing but their keyslots."""

    @property
    @abstractmethod
    def length(self) -> int:
        """How long the header is with all of its slots, in bytes."""

    @abstractmethod
    def key_area_end(self, volume_bytes: int) -> int:
        """Where the key area ends at the latest, in bytes from the beginning of the header.

        :param volume_bytes: how long the header's volume is.
        """

    @abstractmethod
    def derivation(self, slot: int) -> Kdf:
        """How the key of a slot in use is derived.

        :raise Error: the slot is of a kind that is not supported.
        """

    @abstractmethod
    def unlocking(
        self, slot: int, password: Buffer, material: Buffer, memory: KeyMemory | None = None
    ) -> Steps[KeyBuffer | None]:
        """Try a passphrase on a slot, in steps.

        :param material: the bytes at :meth:`material_extent`.
        :param memory: where the volume key is to be; by default in a page of its own.
        :returns: the volume key, for the caller to wipe, or None if it is not the one.
        :raise Error: it would take too long, or something is not supported.
        """

    @abstractmethod
    def fitting(self, key: Buffer) -> Steps[bool]:
        """Whether this is the volume key, in steps."""

    @abstractmethod
    def calibrating(self, choice: KdfChoice) -> Steps[Kdf]:
        """The costs of a new slot's derivation, in steps.

        :raise Error: the format has no such derivation.
        """

    @abstractmethod
    def activating(
        self, slots: Sequence[int], key: Buffer, password: Buffer, costs: Kdf, random: Random = os.urandom
    ) -> Steps[tuple[Self, Plan]]:
        """Put the volume key into slots, so that `password` opens each of them; in steps.

        :returns: the header as it will be, and what to write.
        """

    @abstractmethod
    def erasing(self, slots: Sequence[int], random: Random = os.urandom) -> tuple[Self, Plan]:
        """Take the keys out of slots; returns as :meth:`activating`."""

    @property
    @abstractmethod
    def digest_derivation(self) -> Kdf:
        """How the digest is derived that says whether a key is the volume key."""

    @abstractmethod
    def derived_bytes(self, slot: int | None) -> int:
        """How many bytes are derived for a slot in use, or with None for the digest."""

    # -- backups

    @property
    @abstractmethod
    def beginning_bytes(self) -> int:
        """How much of the header's volume says something, other than key material."""

    @abstractmethod
    def is_foreign(self, beginning: Buffer) -> bool:
        """Whether what can't be read is not this header, damaged, but that of another volume."""

    @abstractmethod
    def says_as(self, other: LuksHeader) -> bool:
        """Whether both say the same, wherever it is written."""

    @abstractmethod
    def difference(self, other: LuksHeader) -> str | None:
        """What keeps two headers from being of one volume with keyslots in one area, or None."""

    @abstractmethod
    def backup_image(self, beginning: Buffer, random: Random = os.urandom) -> bytes:
        """What a backup begins with.

        :param beginning: the first :attr:`beginning_bytes` bytes of the volume with this header.
        """

    @abstractmethod
    def restoring(
        self,
        there: Mapping[int, bytes],
        backup: LuksHeader,
        materials: Mapping[int, bytes],
        random: Random = os.urandom,
    ) -> tuple[LuksHeader, Plan]:
        """Make this header's slots those of a backup.

        :param there: the key material of the slots in use, by slot number; `materials` is that of the backup.
        :param backup: one without :meth:`difference`.
        :returns: the header as it will be, and what to write.
        :raise Error: there is no room to do it safely.
        """

    @abstractmethod
    def rewriting(
        self, backup: LuksHeader, materials: Mapping[int, bytes], random: Random = os.urandom
    ) -> tuple[LuksHeader, Plan]:
        """Put a backup where this header was and can't be read any more; otherwise as :meth:`restoring`."""

    def free_slot(self) -> int | None:
        """The first slot that is not in use, if there is one."""
        active = self.active_slots
        return next((number for number in range(self.slot_count) if number not in active), None)


@dataclass(frozen=True)
class Luks1(LuksHeader):
    """A LUKS1 header.

    :param header: what it says.
    :param sectors: the sectors on which it is.
    """

    header: luks1.Header
    sectors: bytes

    version = 1
    slot_count = luks1.SLOTS

    @property
    def uuid(self) -> str:
        """The volume's UUID, as text."""
        return self.header.uuid

    @property
    def key_bytes(self) -> int:
        """Length of the volume key."""
        return self.header.key_bytes

    @property
    def active_slots(self) -> list[int]:
        """The numbers of the slots in use."""
        return self.header.active_slots

    @property
    def listed_slots(self) -> list[int]:
        """All of them, for the header has them all."""
        return list(range(self.slot_count))

    def material_extent(self, slot: int) -> Extent:
        """Where the key material of a slot is, in use or not."""
        return self.header.material_extent(slot)

    @property
    def segments(self) -> tuple[PayloadSegment, ...]:
        """One, to the end of the volume."""
        offset = self.header.payload_offset * SECTOR
        return (PayloadSegment(offset, None, self.header.spec, 0, SECTOR),)

    def payload_bytes(self, volume_bytes: int) -> int:
        """How long the payload is."""
        return self.header.payload_bytes(volume_bytes)

    def is_of_same_volume(self, other: LuksHeader) -> bool:
        """Whether they differ in nothing but their keyslots."""
        return isinstance(other, Luks1) and replace(other.header, slots=self.header.slots) == self.header

    @property
    def length(self) -> int:
        """Up to the end of the last slot, in whole 4 KiB."""
        return self.header.header_length()

    def key_area_end(self, volume_bytes: int) -> int:
        """Where the payload begins; a detached header may have been cut off behind the last slot in use."""
        if self.header.payload_offset:
            return self.header.payload_offset * SECTOR
        usual = luks1.new_header(self.header.spec, self.header.hash_name, detached=True)
        return max(volume_bytes, usual.header_length())

    def derivation(self, slot: int) -> Kdf:
        """PBKDF2."""
        keyslot = self.header.slots[slot]
        return Kdf("pbkdf2", keyslot.salt, keyslot.iterations, self.header.hash_name)

    def unlocking(
        self, slot: int, password: Buffer, material: Buffer, memory: KeyMemory | None = None
    ) -> Steps[KeyBuffer | None]:
        """Try a passphrase on a slot, in steps."""
        return luks1.unlocking(self.header, slot, password, material, memory=memory)

    def fitting(self, key: Buffer) -> Steps[bool]:
        """Whether this is the volume key, in steps."""
        return luks1.checking_digest(self.header, key)

    def calibrating(self, choice: KdfChoice) -> Steps[Kdf]:
        """The iterations of PBKDF2, in steps."""
        if choice.kind not in (None, "pbkdf2"):
            raise Error(f"LUKS1 has no '{choice.kind}', only 'pbkdf2'")
        return (
            yield from luks2_kdf.calibrating(
                "pbkdf2", choice.milliseconds, self.key_bytes, hash_name=self.header.hash_name
            )
        )

    def activating(
        self, slots: Sequence[int], key: Buffer, password: Buffer, costs: Kdf, random: Random = os.urandom
    ) -> Steps[tuple[Luks1, Plan]]:
        """Put the volume key into slots, in steps."""
        header, plan = yield from luks1_keyslots.activating(
            self.header, self.sectors, slots, key, password, costs.iterations, random
        )
        return self.after(plan, header), plan

    def erasing(self, slots: Sequence[int], random: Random = os.urandom) -> tuple[Luks1, Plan]:
        """Take the keys out of slots."""
        header, plan = luks1_keyslots.erase_plan(self.header, self.sectors, slots, random)
        return self.after(plan, header), plan

    @property
    def digest_derivation(self) -> Kdf:
        """PBKDF2."""
        said = self.header
        return Kdf("pbkdf2", said.digest_salt, said.digest_iterations, said.hash_name)

    def derived_bytes(self, slot: int | None) -> int:
        """As many as the volume key has."""
        return len(self.header.digest) if slot is None else self.key_bytes

    @property
    def beginning_bytes(self) -> int:
        """Two sectors."""
        return luks1_keyslots.HEADER_SECTORS_BYTES

    def is_foreign(self, beginning: Buffer) -> bool:
        """Whether another header begins here."""
        raw = bytes(beginning[:HEAD_BYTES])
        return raw.startswith(_MAGICS) and raw != self.header.pack()[:HEAD_BYTES]

    def says_as(self, other: LuksHeader) -> bool:
        """Whether both say the same."""
        return isinstance(other, Luks1) and other.header == self.header

    def difference(self, other: LuksHeader) -> str | None:
        """What keeps two headers from being of one volume, or None."""
        return luks1_backup.difference(self.header, other.header) if isinstance(other, Luks1) else "version"

    def backup_image(self, beginning: Buffer, random: Random = os.urandom) -> bytes:
        """The header, and zeroes behind it."""
        return luks1_backup.backup_image(beginning)

    def restoring(
        self,
        there: Mapping[int, bytes],
        backup: LuksHeader,
        materials: Mapping[int, bytes],
        random: Random = os.urandom,
    ) -> tuple[Luks1, Plan]:
        """Make the slots those of a backup, one by one."""
        assert isinstance(backup, Luks1), "headers without a difference have one version"
        header, plan = luks1_backup.restore_plan(
            self.header, self.sectors, there, backup.header, backup.sectors, materials, random
        )
        return self.after(plan, header), plan

    def rewriting(
        self, backup: LuksHeader, materials: Mapping[int, bytes], random: Random = os.urandom
    ) -> tuple[Luks1, Plan]:
        """Put a backup where this header was."""
        assert isinstance(backup, Luks1), "headers without a difference have one version"
        header, plan = luks1_backup.rewrite_plan(
            self.header, backup.header, backup.sectors, materials, random
        )
        return self.after(plan, header), plan

    def after(self, plan: Plan, header: luks1.Header) -> Luks1:
        """What is there when a plan has been carried out that makes this header of it."""
        sectors = bytearray(self.sectors)
        for step in plan:
            if isinstance(step, Write) and step.offset < len(sectors):
                sectors[step.offset : step.offset + len(step.data)] = step.data
        return Luks1(header, bytes(sectors))


@dataclass(frozen=True)
class Luks2(LuksHeader):
    """A LUKS2 header.

    :param header: what the copy says that counts.
    :param damaged: what is wrong with the copies that do not; the next change repairs them.
    """

    header: luks2.Header
    damaged: tuple[str, ...] = ()

    version = 2
    slot_count = luks2.SLOTS

    @property
    def uuid(self) -> str:
        """The volume's UUID, as text."""
        return self.header.binary.uuid

    @property
    def key_bytes(self) -> int:
        """Length of the volume key: what the slots with it say."""
        return self.header.key_bytes

    @property
    def active_slots(self) -> list[int]:
        """The numbers of all slots that are there."""
        return sorted(int(name) for name in self.header.metadata["keyslots"])

    @property
    def volume_slots(self) -> list[int]:
        """Those that the volume key's digest names."""
        return sorted(self.header.volume_digest.keyslots)

    @property
    def tried_slots(self) -> list[int]:
        """Those with the volume key that are not to be ignored, the preferred ones first."""
        return [slot.number for slot in self.header.volume_slots]

    def material_extent(self, slot: int) -> Extent:
        """Where the key material of a slot is."""
        area = self.header.metadata["keyslots"][str(slot)]["area"]
        return int(area["offset"]), int(area["size"])

    @property
    def segments(self) -> tuple[PayloadSegment, ...]:
        """Those of the metadata."""
        length = self.key_bytes
        return tuple(
            PayloadSegment(one.offset, one.size, one.spec(length), one.iv_tweak, one.sector_size)
            for one in self.header.segments
        )

    def payload_bytes(self, volume_bytes: int) -> int:
        """How long the payload is."""
        return self.header.payload_bytes(volume_bytes)

    def is_of_same_volume(self, other: LuksHeader) -> bool:
        """Whether the volume key and what it is for are the same."""
        if not isinstance(other, Luks2) or other.uuid != self.uuid:
            return False
        mine, others = self.header.volume_digest, other.header.volume_digest
        return (mine.hash_name, mine.iterations, mine.salt, mine.digest) == (
            others.hash_name,
            others.iterations,
            others.salt,
            others.digest,
        ) and self.header.segments == other.header.segments

    @property
    def length(self) -> int:
        """With the keyslots area."""
        return self.header.keyslots_offset + self.header.keyslots_bytes

    def key_area_end(self, volume_bytes: int) -> int:
        """Where the keyslots area ends."""
        return self.length

    def derivation(self, slot: int) -> Kdf:
        """What the slot says."""
        return self._keyslot(slot).kdf

    def unlocking(
        self, slot: int, password: Buffer, material: Buffer, memory: KeyMemory | None = None
    ) -> Steps[KeyBuffer | None]:
        """Try a passphrase on a slot, in steps; a slot without the volume key never opens."""
        if slot not in self.header.volume_digest.keyslots:
            return None
        return (
            yield from luks2.unlocking(
                self._keyslot(slot), self.header.volume_digest, password, material, memory=memory
            )
        )

    def _keyslot(self, slot: int) -> luks2.Keyslot:
        keyslot = self.header.keyslots.get(slot)
        if keyslot is None:
            raise Error(f"Keyslot {slot} is of a type that is not supported")
        return keyslot

    def fitting(self, key: Buffer) -> Steps[bool]:
        """Whether this is the volume key, in steps."""
        yield
        return self.header.volume_digest.fits(key)

    def calibrating(self, choice: KdfChoice) -> Steps[Kdf]:
        """The costs of a new slot's derivation, in steps."""
        return calibrating_version_2(choice, self.header.volume_digest.hash_name)

    def activating(
        self, slots: Sequence[int], key: Buffer, password: Buffer, costs: Kdf, random: Random = os.urandom
    ) -> Steps[tuple[Luks2, Plan]]:
        """Put the volume key into slots, in steps."""
        header, plan = yield from luks2_keyslots.activating(self.header, slots, key, password, costs, random)
        return Luks2(header), plan

    def erasing(self, slots: Sequence[int], random: Random = os.urandom) -> tuple[Luks2, Plan]:
        """Take the keys out of slots."""
        there = [slot for slot in slots if slot in self.active_slots]
        header, plan = luks2_keyslots.erase_plan(self.header, there, random)
        return Luks2(header), plan

    @property
    def digest_derivation(self) -> Kdf:
        """PBKDF2."""
        digest = self.header.volume_digest
        return Kdf("pbkdf2", digest.salt, digest.iterations, digest.hash_name)

    def derived_bytes(self, slot: int | None) -> int:
        """As many as the cipher of the slot's area wants."""
        return len(self.header.volume_digest.digest) if slot is None else self._keyslot(slot).area.key_bytes

    @property
    def beginning_bytes(self) -> int:
        """Both copies."""
        return self.header.keyslots_offset

    def is_foreign(self, beginning: Buffer) -> bool:
        """Whether a header with another UUID begins here."""
        raw = bytes(beginning[:BINARY_BYTES])
        return raw.startswith(_MAGICS) and luks2_binary.claimed_uuid(raw) != self.uuid

    def says_as(self, other: LuksHeader) -> bool:
        """Whether both say the same; a damaged copy says nothing."""
        return isinstance(other, Luks2) and other.header == self.header

    def difference(self, other: LuksHeader) -> str | None:
        """What keeps two headers from being of one volume, or None."""
        return luks2_backup.difference(self.header, other.header) if isinstance(other, Luks2) else "version"

    def backup_image(self, beginning: Buffer, random: Random = os.urandom) -> bytes:
        """Both copies as they are; if one is damaged, two good ones."""
        if self.damaged:
            return luks2_backup.two_copies(self.header, random)
        return bytes(beginning[: self.beginning_bytes])

    def restoring(
        self,
        there: Mapping[int, bytes],
        backup: LuksHeader,
        materials: Mapping[int, bytes],
        random: Random = os.urandom,
    ) -> tuple[Luks2, Plan]:
        """Make the metadata those of a backup, with the keys in areas that were free."""
        assert isinstance(backup, Luks2), "headers without a difference have one version"
        header, plan = luks2_backup.restore_plan(self.header, there, backup.header, materials, random)
        return Luks2(header), plan

    def rewriting(
        self, backup: LuksHeader, materials: Mapping[int, bytes], random: Random = os.urandom
    ) -> tuple[Luks2, Plan]:
        """Put a backup where this header was."""
        assert isinstance(backup, Luks2), "headers without a difference have one version"
        header, plan = luks2_backup.rewrite_plan(self.header, backup.header, materials, random)
        return Luks2(header), plan


def calibrating_version_2(choice: KdfChoice, hash_name: str) -> Steps[Kdf]:
    """The costs of a derivation for LUKS2, in steps.

    :param hash_name: of PBKDF2.
    """
    return luks2_kdf.calibrating(
        choice.kind or "argon2id",
        choice.milliseconds,
        _MEASURED_KEY_BYTES,
        hash_name=hash_name,
        memory=choice.most_memory,
        cpus=choice.cpus or luks2_kdf.usual_cpus(),
    )


#: For how long a key a derivation is measured: a LUKS2 header without keyslots does not say.
_MEASURED_KEY_BYTES: Final = 64


# -- reading


def reading(*, detached: bool = False, only_version_1: bool = False) -> Generator[Extent, Buffer, LuksHeader]:
    """Read a header: yields extents that are wanted, is sent their bytes, returns the header.

    What lies behind the end of the volume counts as zeroes.  A volume whose beginning was overwritten
    is LUKS2 if there is a whole secondary header where one may be.

    :param detached: the payload is on another volume.
    :param only_version_1: there may be no other one, as inside of qcow2.
    :raise Error: what is wrong, for LUKS1 in QEMU's words.
    """
    beginning = bytes((yield 0, luks1.HEADER_BYTES))
    magic, version = beginning[:6], int.from_bytes(beginning[6:8], "big")
    if only_version_1 or (magic == luks2_binary.MAGIC and version == Luks1.version):
        header = luks1.Header.parse(beginning, detached=detached)
        return Luks1(header, bytes((yield 0, luks1_keyslots.HEADER_SECTORS_BYTES)))
    copies: list[luks2_binary.Copy | None] = []
    damaged: list[str] = []
    size = luks2_binary.claimed_size(beginning, 0)
    if size is None:
        copies.append(None)
        damaged.append("There is no primary LUKS2 header")
    else:
        copies.append(_copy((yield 0, size), 0, damaged))
    # A damaged primary header may be wrong about the place of the other one, too.
    places = luks2_binary.SIZES if size is None or copies[0] is None else (size,)
    found = None
    for offset in places:
        claimed = luks2_binary.claimed_size((yield offset, 16), offset)
        if claimed is not None:
            found = _copy((yield offset, claimed), offset, damaged)
            if found is not None:
                break
    if found is None and magic != luks2_binary.MAGIC:
        # Nothing says that it is LUKS2 at all.
        raise Error(luks1.NOT_LUKS)
    if found is None and version != luks2_binary.VERSION:
        luks1.Header.parse(beginning)  # says that there is no such version
    if found is None and not any("secondary" in text for text in damaged):
        damaged.append("There is no secondary LUKS2 header")
    chosen = luks2_binary.choose(copies[0], found)
    if copies[0] is not None and found is not None:
        if copies[0].header.sequence != found.header.sequence:
            older = "primary" if chosen is found else "secondary"
            damaged.append(f"The {older} LUKS2 header is of an earlier change")
        elif (copies[0].header, copies[0].json) != (found.header, found.json):
            damaged.append("The secondary LUKS2 header differs from the primary one, which counts")
    header2 = luks2.Header.parse(chosen)
    if not detached and header2.segments[0].offset < header2.keyslots_offset + header2.keyslots_bytes:
        raise Error("LUKS payload is overlapping with the header")
    return Luks2(header2, tuple(damaged))


def parse(data: Buffer, *, detached: bool = False) -> LuksHeader:
    """Read the header at the beginning of `data`; what lies behind its end counts as zeroes.

    :param detached: as of :func:`reading`.
    :raise Error: what is wrong.
    """
    reader = reading(detached=detached)
    offset, length = next(reader)
    while True:
        try:
            offset, length = reader.send(bytes(data[offset : offset + length]).ljust(length, b"\0"))
        except StopIteration as end:
            header: LuksHeader = end.value
            return header


def _copy(data: Buffer, offset: int, damaged: list[str]) -> luks2_binary.Copy | None:
    try:
        return luks2_binary.parse_copy(data, offset)
    except Error as error:
        damaged.append(error.desc)
        return None
