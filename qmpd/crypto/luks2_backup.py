"""Backups of a LUKS2 header: whether one is of this volume, and how it is put back.

A backup is both copies of the metadata and the areas of the keyslots, at their
places, in a file as long as the header with its keyslots area.  `cryptsetup
luksHeaderBackup` makes the same file but for what nobody needs: where no slot
has its area there are zeroes here, so that no key which was erased on the disk
lives on in a backup.

A header says which volume it is of by the digest of the volume key and by the
segments.  Where such a header can be read, a backup is put back by way of parts
of the keyslots area that no slot uses: the keys come in there, then the
metadata that names them, with the next sequence number, and at last what no slot
uses any more is overwritten.  Wherever that stops, all passphrases from before
open the volume, or all those of the backup.  Keys therefore may lie elsewhere
than in the backup afterwards.

Keys that go are overwritten after the metadata has forgotten them, for until
then they are the only ones.  Without the metadata their salts are gone, and what
is left of them is worth something only together with an old copy of the header.

Source: LUKS2 On-Disk Format Specification 1.1, sections 2.3 and 3.2; the order
of writes is ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import orjson

from qmpd.crypto.luks2 import AREA_ALIGNMENT, Header
from qmpd.crypto.luks2_keyslots import Random, commit, without
from qmpd.crypto.plan import Barrier, Plan, Write
from qmpd.errors import Error

#: Offset and length, in bytes.
Extent = tuple[int, int]

#: Members of the volume key's digest, and what they are called in a refusal.
_IDENTITY: Final[Mapping[str, str]] = {
    "hash_name": "hash",
    "salt": "salt of the volume key's digest",
    "iterations": "iteration count of the volume key's digest",
    "digest": "digest of the volume key",
}


def difference(known: Header, header: Header) -> str | None:
    """What keeps two headers from being of one volume with keyslots in one area, or None."""
    mine, other = known.volume_digest, header.volume_digest
    for member, what in _IDENTITY.items():
        if getattr(mine, member) != getattr(other, member):
            return what
    for what, one, another in (
        ("segments", known.segments, header.segments),
        ("size of the metadata", known.binary.size, header.binary.size),
        ("size of the keyslots area", known.keyslots_bytes, header.keyslots_bytes),
    ):
        if one != another:
            return what
    return None


def two_copies(header: Header, random: Random = os.urandom) -> bytes:
    """Both copies of a header's metadata, with the sequence number that it has."""
    text = orjson.dumps(header.metadata)
    return b"".join(header.binary.pack(text, secondary=which, random=random) for which in (False, True))


def restore_plan(
    present: Header,
    present_materials: Mapping[int, bytes],
    backup: Header,
    materials: Mapping[int, bytes],
    random: Random = os.urandom,
) -> tuple[Header, Plan]:
    """Make a header that can be read that of a backup.

    Only where there is no room for all keys of both some come in when those from before have gone, and some
    passphrases of the backup open nothing in between; never all.

    :param present: the header as it is; of the same volume as `backup` (:func:`difference`).
    :param present_materials: the bytes of the slots' areas, by slot number.
    :param backup: the header of the backup, and `materials` the bytes of its areas.
    :param random: gives as many random bytes as it is asked for.
    :returns: the header as it will be, and what to write.
    :raise Error: there is no room for any key beside those that are there.
    """
    places = {
        slot: _extent(present, slot)[0]
        for slot, material in materials.items()
        if present_materials.get(slot) == material and _same(present, backup, slot)
    }
    pending = [slot for slot in sorted(materials) if slot not in places]
    header = present
    plan: Plan = []
    while True:
        used = _extents(header)
        left = []
        for slot in pending:
            own, size = _extent(backup, slot)
            offset = _free_place(header, used, size, own)
            if offset is None:
                left.append(slot)
                continue
            places[slot] = offset
            used.append((offset, size))
            plan.append(Write(offset, materials[slot]))
        if left and not backup.volume_digest.keyslots & places.keys():
            raise Error("There is no room for the backup's keys beside those in the LUKS2 header")
        if left == pending and header is not present:
            raise Error("There is no room for all of the backup's keys in the keyslots area")
        base = replace(
            backup, binary=replace(backup.binary, sequence=header.binary.sequence), offset=header.offset
        )
        header, steps = commit(base, _placed(backup, places), random)
        plan += [Barrier(), *steps]
        if not left:
            break
        pending = left
    return header, [*plan, *_wiping(present, header, random)]


def rewrite_plan(
    known: Header, backup: Header, materials: Mapping[int, bytes], random: Random = os.urandom
) -> tuple[Header, Plan]:
    """Put a backup where no header of the volume can be read any more.

    The key material comes first; then whatever is left of old copies goes, lest one of them is newer than
    what comes; then both copies.  At last what slots of the known header used, and none does any more, is
    overwritten.

    :param known: the header as it was known last.
    :param backup: the header of the backup, and `materials` the bytes of its areas.
    :returns: the header as it will be, and what to write.
    """
    sequence = max(known.binary.sequence, backup.binary.sequence)
    base = replace(backup, binary=replace(backup.binary, sequence=sequence))
    header, steps = commit(base, backup.metadata, random)
    plan: Plan = []
    end = header.keyslots_offset + header.keyslots_bytes
    if all(sum(extent) <= end - AREA_ALIGNMENT for extent in _extents(header)):
        # Of a volume that ends before the keyslots area does, cryptsetup says that it is none.
        plan.append(Write(end - AREA_ALIGNMENT, bytes(AREA_ALIGNMENT)))
    plan += [Write(_extent(backup, slot)[0], material) for slot, material in materials.items()]
    plan += [Barrier(), Write(0, bytes(header.keyslots_offset)), Barrier(), *steps]
    return header, [*plan, *_wiping(known, header, random)]


def _same(present: Header, backup: Header, slot: int) -> bool:
    """Whether a slot has the same salt and costs in both, wherever its area is."""
    return bool(_described(present, slot) == _described(backup, slot))


def _described(header: Header, slot: int) -> Any:
    """What decides which passphrase opens a slot; None if it is not there."""
    described = header.metadata["keyslots"].get(str(slot))
    if described is None:
        return None
    area = {name: value for name, value in described["area"].items() if name != "offset"}
    return {**described, "area": area, "priority": None}


def _placed(backup: Header, places: Mapping[int, int]) -> dict[str, Any]:
    """The backup's metadata with those slots that have a place."""
    names = backup.metadata["keyslots"]
    metadata = without(backup.metadata, [int(name) for name in names if int(name) not in places])
    for slot, offset in places.items():
        metadata["keyslots"][str(slot)]["area"]["offset"] = str(offset)
    return metadata


def _extent(header: Header, slot: int) -> Extent:
    area = header.metadata["keyslots"][str(slot)]["area"]
    return int(area["offset"]), int(area["size"])


def _extents(header: Header) -> list[Extent]:
    return [_extent(header, int(name)) for name in header.metadata["keyslots"]]


def _free_place(header: Header, used: Iterable[Extent], size: int, wanted: int) -> int | None:
    """Where `size` bytes have room in the keyslots area, at `wanted` if possible."""
    used = sorted(used)
    end = header.keyslots_offset + header.keyslots_bytes
    candidates = [wanted, header.keyslots_offset]
    candidates += [-(-(offset + length) // AREA_ALIGNMENT) * AREA_ALIGNMENT for offset, length in used]
    for place in candidates:
        if place + size <= end and all(
            place + size <= offset or offset + length <= place for offset, length in used
        ):
            return place
    return None


def _wiping(before: Header, after: Header, random: Random) -> Plan:
    """Overwrite what slots used before, and none uses afterwards."""
    plan: Plan = [
        Write(offset, random(length)) for offset, length in subtracted(_extents(before), _extents(after))
    ]
    return [*plan, Barrier()] if plan else []


def subtracted(extents: Iterable[Extent], taken: Iterable[Extent]) -> list[Extent]:
    """What of `extents` is not in `taken`."""
    rest = list(extents)
    for start, size in taken:
        parts: list[Extent] = []
        for offset, length in rest:
            before = min(offset + length, start) - offset
            after = offset + length - max(offset, start + size)
            if before > 0:
                parts.append((offset, before))
            if after > 0:
                parts.append((offset + length - after, after))
        rest = parts
    return rest
