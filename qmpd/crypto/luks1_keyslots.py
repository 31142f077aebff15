"""Changing the keyslots of a LUKS1 header: what to write, in which order.

Functions here are given the header and the sectors on which it lies, and
return the header as it is afterwards and a plan.  Wherever a plan is stopped,
be it in the middle of a write (of whole sectors: a disk writes a sector or
does not), the header can be read, and what opened the volume before or what
opens it afterwards does open it:

- A key comes in by its material first, then the slot's salt and iterations,
  and at last the word that says that the slot is active.  The last two are one
  write where they are on one sector, as they are for all slots but one.
- A key goes by its salt: the slot's description is overwritten first, in one
  sector, and without the salt the passphrase is worth nothing.  Then the key
  material is overwritten with random bytes, which is what counts where somebody
  has a copy of the old header.
- A slot in use gets another key by way of a free slot, which holds the new key
  while the slot itself can't be used.  If no slot is free the other seven
  remain meanwhile, but neither the old nor the new passphrase opens the volume
  if that is interrupted.

Nothing but the descriptions of the slots concerned changes in the header's
sectors, whatever else is there.

Source: LUKS On-Disk Format Specification 1.2.3, sections 3 and 4.1 to 4.3.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from qmpd.crypto.luks1 import (
    HEADER_BYTES,
    SALT_BYTES,
    SECTOR,
    SLOTS,
    Header,
    Keyslot,
    sealing,
    slot_extent,
)
from qmpd.crypto.memory import Buffer
from qmpd.crypto.plan import Barrier, Plan, Write
from qmpd.crypto.steps import Steps

#: The sectors on which a header lies, in bytes.
HEADER_SECTORS_BYTES: Final = -(-HEADER_BYTES // SECTOR) * SECTOR

Random = Callable[[int], bytes]


def activating(
    header: Header,
    sectors: Buffer,
    slots: Sequence[int],
    key: Buffer,
    password: Buffer,
    iterations: int,
    random: Random = os.urandom,
) -> Steps[tuple[Header, Plan]]:
    """Put `key` into slots, so that `password` opens each of them.

    If a slot is in use, its key is lost.  The new one lies in a free slot until the first of them has it.

    It is done in steps, and each slot takes as long as unlocking it.

    :param header: what :meth:`Header.parse` made of `sectors`.
    :param sectors: the first :data:`HEADER_SECTORS_BYTES` bytes of the header's volume.
    :param slots: the slots' numbers.
    :param key: the volume key.
    :param iterations: of the slots' PBKDF2.
    :param random: gives as many random bytes as it is asked for.
    :returns: the header as it will be, and what to write.
    """
    image = _Image(header, sectors)
    plan: Plan = []
    for slot in slots:
        salt = random(SALT_BYTES)
        described = replace(header.slots[slot], active=True, iterations=iterations, salt=salt)
        material = yield from sealing(header.with_slot(slot, described), slot, key, password, random)
        in_use = header.slots[slot].active
        spare = _free_slot(image.header) if in_use and slot == slots[0] else None
        if spare is not None:
            # The same salt, iterations and key material are the same key in any slot.
            plan += image.put(spare, iterations, salt, material)
        if in_use:
            plan += image.clear(slot)
        plan += image.put(slot, iterations, salt, material)
        if spare is not None:
            plan += image.erase(spare, random)
    return image.header, plan


def erase_plan(
    header: Header, sectors: Buffer, slots: Sequence[int], random: Random = os.urandom
) -> tuple[Header, Plan]:
    """Take the keys out of slots; parameters and result as of :func:`activating`."""
    image = _Image(header, sectors)
    plan: Plan = []
    for slot in slots:
        plan += image.erase(slot, random)
    return image.header, plan


def _free_slot(header: Header) -> int | None:
    """The last slot that is not in use, if there is one."""
    return next((number for number in reversed(range(SLOTS)) if not header.slots[number].active), None)


class _Image:
    """The header's sectors as they become in the course of a plan."""

    def __init__(self, header: Header, sectors: Buffer) -> None:
        self.header = header
        self._sectors = bytearray(sectors[:HEADER_SECTORS_BYTES]).ljust(HEADER_SECTORS_BYTES, b"\0")

    def put(self, slot: int, iterations: int, salt: bytes, material: bytes) -> Plan:
        """Make a slot that is not in use active."""
        described = replace(self.header.slots[slot], active=False, iterations=iterations, salt=salt)
        plan: Plan = [Write(self.header.material_extent(slot)[0], material), Barrier()]
        offset, length = slot_extent(slot)
        if offset // SECTOR != (offset + length - 1) // SECTOR:
            plan += self._describe(slot, described)
        return plan + self._describe(slot, replace(described, active=True))

    def clear(self, slot: int) -> Plan:
        """Make a slot inactive, and forget its salt."""
        blank = replace(self.header.slots[slot], active=False, iterations=0, salt=bytes(SALT_BYTES))
        return self._describe(slot, blank)

    def erase(self, slot: int, random: Random) -> Plan:
        """Make a slot inactive, and overwrite its key material."""
        offset, length = self.header.material_extent(slot)
        return [*self.clear(slot), Write(offset, random(length)), Barrier()]

    def _describe(self, slot: int, described: Keyslot) -> Plan:
        before = bytes(self._sectors)
        offset, length = slot_extent(slot)
        self._sectors[offset : offset + length] = described.pack()
        self.header = self.header.with_slot(slot, described)
        return [*self._changed(before), Barrier()]

    def _changed(self, before: bytes) -> Iterator[Write]:
        for start in range(0, len(before), SECTOR):
            sector = bytes(self._sectors[start : start + SECTOR])
            if sector != before[start : start + SECTOR]:
                yield Write(start, sector)
