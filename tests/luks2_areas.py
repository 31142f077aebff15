"""LUKS2 headers with keyslots, for tests of these, by the functions that `luks_volumes.py` has for LUKS1.

The volume key is short and the key derivation quick there as here.  The keyslots area has room for as many
keys as a test wants.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import luks_volumes
import orjson
from luks_volumes import ITERATIONS, SPEC, Passwords, carried_out, extent

from qmpd.crypto import luks
from qmpd.crypto.luks import Luks2
from qmpd.crypto.luks2 import Header
from qmpd.crypto.luks2_binary import BinaryHeader
from qmpd.crypto.luks2_kdf import Kdf
from qmpd.crypto.luks2_keyslots import NEW_SIZE, formatting
from qmpd.crypto.plan import Plan
from qmpd.crypto.steps import run

COSTS: Final = Kdf("pbkdf2", bytes(32), ITERATIONS)

#: What a key takes in the keyslots area, in bytes.
KEY_AREA: Final = 64 << 10

#: How many keys a volume has room for if a test says nothing else: eight, and one more while it changes.
ROOM: Final = 9


def packed(binary: BinaryHeader, metadata: dict[str, Any]) -> bytes:
    """Both copies of a header."""
    text = orjson.dumps(metadata)
    return binary.pack(text, secondary=False) + binary.pack(text, secondary=True)


def new_area(*, detached: bool, room: int = ROOM) -> bytes:
    """A volume that `base` in slot 0 opens.

    :param room: for so many keys.
    """
    header, key, plan = run(formatting(SPEC, "sha256", b"base", COSTS, ITERATIONS, detached=detached))
    key.wipe()
    metadata = copy.deepcopy(header.metadata)
    metadata["config"]["keyslots_size"] = str(room * KEY_AREA)
    length = 2 * NEW_SIZE + room * KEY_AREA
    if not detached:
        metadata["segments"]["0"]["offset"] = str(length)
    area = carried_out(bytes(16 << 20), plan)[:length]
    return packed(header.binary, metadata) + area[2 * NEW_SIZE :]


def read(area: bytes, *, detached: bool) -> Luks2:
    """The header."""
    reader = luks.reading(detached=detached)
    offset, length = next(reader)
    header: luks.LuksHeader | None = None
    while header is None:
        try:
            offset, length = reader.send(area[offset : offset + length].ljust(length, b"\0"))
        except StopIteration as end:
            header = end.value
    assert isinstance(header, Luks2)
    return header


def filled(area: bytes, passwords: Passwords, *, detached: bool) -> bytes:
    """The same volume with these passphrases and no other; `base` is in its slot 0."""
    for slot, password in sorted(passwords.items(), reverse=True):
        area = carried_out(area, activation(area, [slot], b"base", password, detached=detached)[1])
    if 0 not in passwords:
        area = carried_out(area, erasure(area, [0], detached=detached))
    assert read(area, detached=detached).active_slots == sorted(passwords)
    return area


def activation(
    area: bytes, slots: list[int], known: bytes, password: bytes, *, detached: bool
) -> tuple[Luks2, Plan]:
    """The plan that puts `password` into slots of a volume that `known` opens."""
    header = read(area, detached=detached)
    for slot in header.active_slots:
        found = run(header.unlocking(slot, known, area[slice(*extent(header, slot))]))
        if found is not None:
            with found as key:
                return run(header.activating(slots, key.data, password, COSTS))
    raise AssertionError(f"{known!r} opens nothing")


def erasure(area: bytes, slots: list[int], *, detached: bool) -> Plan:
    """The plan that takes the keys out of slots."""
    return read(area, detached=detached).erasing(slots)[1]


class Judge(luks_volumes.Judge):
    """Says which passphrases open a volume."""

    def header(self, area: bytes) -> Luks2:
        return read(area, detached=self.detached)


def with_metadata(area: bytes, metadata: dict[str, Any], *, sequence: int | None = None) -> bytes:
    """The same volume with other metadata, in both copies."""
    binary = header_of(area).binary
    if sequence is not None:
        binary = BinaryHeader(binary.size, sequence, binary.label, binary.checksum_hash, binary.uuid, "")
    return packed(binary, metadata) + area[2 * binary.size :]


def header_of(area: bytes) -> Header:
    """What the copy says that counts."""
    return read(area, detached=True).header
