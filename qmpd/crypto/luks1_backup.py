"""Backups of a LUKS1 header: what belongs into one, whether one is of this volume, and how it is put back.

A backup is the header and the key material of the slots in use, at their
places, in a file as long as the header with all its slots.  `cryptsetup
luksHeaderBackup` makes the same file but for what nobody needs: where no slot
in use has its key material there are zeroes here, so that no key which was
erased on the disk lives on in a backup.

A header says which volume it is of by everything but its slots: above all by
the digest of the volume key.  A backup can be put back if it agrees in all of
that with the header that the volume was opened with, its UUID apart, and has
its slots at the same places; then it can be done slot by slot, in whole
sectors and in an order that leaves the volume with a passphrase wherever it
stops (:func:`restore_plan`).

Source: LUKS On-Disk Format Specification 1.2.3, section 3.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from qmpd.crypto.luks1 import HEAD_BYTES, HEADER_BYTES, SECTOR, Header
from qmpd.crypto.luks1_keyslots import HEADER_SECTORS_BYTES, Image, Random, free_slot
from qmpd.crypto.memory import Buffer
from qmpd.crypto.plan import Barrier, Plan, Write

#: Members of a header, and what they are called in a refusal.
_IDENTITY: Final[Mapping[str, str]] = {
    "cipher_name": "cipher",
    "cipher_mode": "cipher mode",
    "key_bytes": "key size",
    "hash_name": "hash",
    "payload_offset": "payload offset",
    "digest_salt": "salt of the volume key's digest",
    "digest_iterations": "iteration count of the volume key's digest",
    "digest": "digest of the volume key",
}


def difference(known: Header, header: Header) -> str | None:
    """What keeps two headers from being of one volume, or None."""
    for member, what in _IDENTITY.items():
        if getattr(known, member) != getattr(header, member):
            return what
    places = [slot.key_offset for slot in known.slots]
    return None if places == [slot.key_offset for slot in header.slots] else "place of the keyslots"


def backup_image(sectors: Buffer) -> bytes:
    """What a backup begins with.

    :param sectors: the first :data:`HEADER_SECTORS_BYTES` bytes of the header's volume.
    """
    return bytes(sectors[:HEADER_BYTES]).ljust(HEADER_SECTORS_BYTES, b"\0")


def restore_plan(
    present: Header,
    sectors: Buffer,
    present_materials: Mapping[int, bytes],
    backup: Header,
    backup_sectors: Buffer,
    materials: Mapping[int, bytes],
    random: Random = os.urandom,
) -> tuple[Header, Plan]:
    """Make the slots of a header that can be read those of a backup.

    Wherever the plan is stopped, the header can be read.  First all keys of the
    backup come in: into their slots where these are free, else into a spare
    slot.  Up to there every passphrase that opened the volume opens it, from
    there on every one of the backup.  Then slots that hold another key than in
    the backup are replaced, and at last keys go that the backup has not.  Only
    where more slots are to be replaced than are free some of them get their key
    when the others have theirs, and some passphrases of either kind open nothing
    in between; never all.

    :param present: the header as it is; of the same volume as `backup` (:func:`difference`).
    :param sectors: the first :data:`HEADER_SECTORS_BYTES` bytes of its volume.
    :param present_materials: the key material of the slots in use, by slot number.
    :param backup: the header of the backup; so are the other two.
    :param random: gives as many random bytes as it is asked for.
    :returns: the header as it will be, and what to write.
    """
    image = Image(present, sectors)
    wanted = backup.active_slots
    same = [
        slot
        for slot in wanted
        if present.slots[slot] == backup.slots[slot] and present_materials[slot] == materials[slot]
    ]
    clashing = [slot for slot in wanted if present.slots[slot].active and slot not in same]
    plan: Plan = []
    for slot in wanted:
        if not present.slots[slot].active:
            plan += image.copy(slot, backup.slots[slot], materials[slot])
    spares: list[int] = []
    for slot in clashing:
        spare = free_slot(image.header)
        if spare is not None:
            plan += image.copy(spare, backup.slots[slot], materials[slot])
            spares.append(spare)
    for slot in clashing:
        plan += image.clear(slot)
        plan += image.copy(slot, backup.slots[slot], materials[slot])
    for slot in (*spares, *(slot for slot in present.active_slots if slot not in wanted)):
        plan += image.erase(slot, random)
    if present.uuid != backup.uuid:
        plan += image.set_head(bytes(backup_sectors[:HEAD_BYTES]))
    return image.header, plan


def rewrite_plan(
    known: Header,
    backup: Header,
    backup_sectors: Buffer,
    materials: Mapping[int, bytes],
    random: Random = os.urandom,
) -> tuple[Header, Plan]:
    """Put a backup where no header of the volume can be read any more.

    The key material comes first, and the header's first sector last, so that
    there is a header when it is whole.  Then the key material of those slots is
    overwritten which were in use as far as is known, and are not in the backup.

    :param known: the header as it was known last.
    :param backup: the header of the backup; `backup_sectors` and `materials` as of :func:`restore_plan`.
    :returns: the header as it will be, and what to write.
    """
    plan: Plan = [Write(backup.material_extent(slot)[0], materials[slot]) for slot in backup.active_slots]
    image = backup_image(backup_sectors)
    plan += [Barrier(), Write(SECTOR, image[SECTOR:]), Barrier(), Write(0, image[:SECTOR]), Barrier()]
    for slot in known.active_slots:
        if not backup.slots[slot].active:
            offset, length = known.material_extent(slot)
            plan += [Write(offset, random(length)), Barrier()]
    return backup, plan
