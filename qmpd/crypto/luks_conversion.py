"""A LUKS1 header made one of LUKS2, and back: what to write, in which order.

Both versions split and encrypt a key in the same way, so key material stays as
it is, and with it every passphrase; what says where it lies becomes another.
The payload stays where it is, and so do UUID and volume key.

LUKS1 keeps its keyslots from 4 KiB on, LUKS2 from 32 KiB on.  `cryptsetup
convert` moves the whole area, so that between the first write and the last no
passphrase opens anything.  Here it is done in an order that is safe wherever it
stops:

- The key material is copied to where it will be, if that is free.  Where too
  many slots are in use for that it stays in its place, and the keyslots area has
  room for some keys less.
- What lies where LUKS2 has its metadata, slot 0 as a rule, gets into a slot that
  is not in use first.
- Then the other header comes: of LUKS2 the second copy and the JSON text of the
  first, of LUKS1 the second sector, none of which takes away the header that is
  there.  With the first sector of the volume the version changes.
- At last what is left of the old one is overwritten.

With all eight slots of LUKS1 in use nothing is free, and it is done as cryptsetup
does it.  If that is interrupted no passphrase opens anything, and the backup
has to be put back that whoever converts has made before.  On the way to LUKS1
nothing has to move, so that is always safe; but with so many slots that they stay
in their places the first one is not at 4 KiB, where cryptsetup wants it for its
own conversion (all else it does with such a header).

LUKS1 has only some of what LUKS2 has.  What it can't hold is refused where
cryptsetup refuses it: sector sizes, tokens, slots from number 8 on, keys other
than the volume key, argon2, several segments.  Labels and priorities are lost,
as with cryptsetup.

Sources: LUKS On-Disk Format Specification 1.2.3, section 3; LUKS2 On-Disk Format
Specification 1.1, sections 2 and 3; places and refusals from watching cryptsetup 2.6.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import orjson

from qmpd.crypto import luks1, luks2
from qmpd.crypto.luks1 import SALT_BYTES, SECTOR, SLOTS, STRIPES
from qmpd.crypto.luks1_keyslots import HEADER_SECTORS_BYTES, Image
from qmpd.crypto.luks2 import AREA_ALIGNMENT, MAX_KEYSLOTS_BYTES
from qmpd.crypto.luks2_backup import Extent, subtracted
from qmpd.crypto.luks2_binary import BINARY_BYTES, SIZES, BinaryHeader
from qmpd.crypto.luks2_keyslots import Random, commit
from qmpd.crypto.memory import Buffer
from qmpd.crypto.plan import Barrier, Plan, Write
from qmpd.errors import Error

#: Length of a copy of the metadata that is made here, and where the keyslots area begins (cryptsetup's).
_SIZE: Final = SIZES[0]
_AREA: Final = 2 * _SIZE

#: Where LUKS1 has its first keyslot, and how far cryptsetup moves it.
_FIRST: Final = 4096
_SHIFT: Final = _AREA - _FIRST


def to_version_2(
    header: luks1.Header,
    sectors: Buffer,
    materials: Mapping[int, bytes],
    volume_bytes: int,
    random: Random = os.urandom,
) -> tuple[luks2.Header, Plan]:
    """Make a LUKS1 header one of LUKS2.

    :param sectors: the first :data:`HEADER_SECTORS_BYTES` bytes of the header's volume.
    :param materials: the key material of the slots in use, by slot number.
    :param volume_bytes: how long the header's volume is; counts where the payload is on another one.
    :param random: gives as many random bytes as it is asked for.
    :returns: the header as it will be, and what to write.
    :raise Error: there is no room for it.
    """
    if not header.active_slots:
        raise Error("Cannot convert to LUKS2: no keyslot is active")
    length = _area_bytes(header.key_bytes)
    least = _AREA + SLOTS * length
    # A volume that holds nothing but the header can perhaps grow.
    end = header.payload_offset * SECTOR or max(volume_bytes, least)
    end = min(end // AREA_ALIGNMENT * AREA_ALIGNMENT, _AREA + MAX_KEYSLOTS_BYTES)
    if end < least:
        raise Error(f"Cannot convert to LUKS2: its header takes {least} bytes, and there are {end}")
    if any(sum(header.material_extent(slot)) > end for slot in header.active_slots):
        raise Error("Cannot convert to LUKS2: a keyslot ends behind the header's area")
    image = Image(header, sectors)
    there = {slot: header.material_extent(slot) for slot in header.active_slots}
    # If it can't grow that is found out first.
    plan: Plan = [Write(end - SECTOR, bytes(SECTOR))] if volume_bytes < end else []
    # At most one is, for all are longer than what LUKS2 has in front of its keyslots area.
    low = next((slot for slot, (offset, _) in there.items() if offset < _AREA), None)
    spare = next(
        (
            slot
            for slot in reversed(range(SLOTS))
            if slot not in there and _AREA <= header.material_extent(slot)[0] <= end - length
        ),
        None,
    )
    old = list(there.values())
    if low is not None and spare is not None:
        plan += [*image.copy(spare, header.slots[low], materials[low]), *image.clear(low)]
        there[low] = header.material_extent(spare)
        old.append(there[low])
    wanted = {slot: header.material_extent(slot)[0] + _SHIFT for slot in there}
    places = _places(wanted, there.values(), range(_AREA, end, length), length, end)
    if low is None or spare is not None:
        if places is None:
            places = {slot: offset for slot, (offset, _) in there.items()}
            if any(offset % AREA_ALIGNMENT or offset + length > end for offset in places.values()):
                raise Error("Cannot convert to LUKS2: the keyslots do not lie at multiples of 4096 bytes")
    else:
        places = wanted
    # From behind, for where nothing is free a key comes to lie over the one before it.
    moved = sorted((places[slot], slot) for slot in places if places[slot] != there[slot][0])
    plan += [Write(offset, materials[slot]) for offset, slot in reversed(moved)]
    metadata = _metadata(header, places, length, end - _AREA)
    binary = BinaryHeader(_SIZE, 1, "", "sha256", header.uuid, "")
    text = orjson.dumps(metadata)
    converted = luks2.parse_metadata(binary, text)
    primary = binary.pack(text, secondary=False, random=random)
    plan += [
        Barrier(),
        Write(_SIZE, binary.pack(text, secondary=True, random=random)),
        Barrier(),
        Write(BINARY_BYTES, primary[BINARY_BYTES:]),
        Barrier(),
        # Until the rest of what was LUKS1's is overwritten the first copy is damaged, and the second counts.
        Write(0, primary[:SECTOR]),
        Barrier(),
        Write(SECTOR, primary[SECTOR:BINARY_BYTES]),
        Barrier(),
    ]
    return converted, plan + _wiping(
        old, [(0, _AREA), *((place, length) for place in places.values())], random
    )


def to_version_1(
    header: luks2.Header, materials: Mapping[int, bytes], volume_bytes: int, random: Random = os.urandom
) -> tuple[luks1.Header, Plan]:
    """Make a LUKS2 header one of LUKS1; parameters and result as of :func:`to_version_2`.

    :raise Error: LUKS1 can't hold what the header says, or there is no room for eight keyslots.
    """
    _check_for_version_1(header)
    segment, digest = header.segments[0], header.volume_digest
    length = _area_bytes(header.key_bytes)
    end = segment.offset or volume_bytes
    there = {
        slot: (described.area.offset, described.area.size) for slot, described in header.keyslots.items()
    }
    beginning = header.keyslots_offset
    wanted = {slot: offset - _SHIFT for slot, (offset, _) in there.items()}
    cells = [place for place in range(_FIRST, end, length) if place >= beginning]
    wanted = {slot: place if place >= beginning else -1 for slot, place in wanted.items()}
    # Where nothing is free keys stay where they are.
    own = {slot: offset for slot, (offset, _) in there.items() if offset % SECTOR == 0}
    for places in (
        _places(wanted, there.values(), cells, length, end),
        own if len(own) == len(there) else None,
    ):
        everything = None if places is None else _with_the_others(places, length, end)
        if places is not None and everything is not None:
            break
    else:
        raise Error("Cannot convert to LUKS1: there is no room for eight keyslots before the payload")
    cipher_name, _, cipher_mode = segment.encryption.partition("-")
    slots = [luks1.Keyslot(False, 0, bytes(SALT_BYTES), everything[slot] // SECTOR) for slot in range(SLOTS)]
    for slot, described in header.keyslots.items():
        kdf = described.kdf
        slots[slot] = luks1.Keyslot(True, kdf.iterations, kdf.salt, everything[slot] // SECTOR)
    converted = luks1.Header(
        cipher_name=cipher_name,
        cipher_mode=cipher_mode,
        hash_name=digest.hash_name,
        payload_offset=segment.offset // SECTOR,
        key_bytes=header.key_bytes,
        digest=digest.digest[: luks1.DIGEST_BYTES],
        digest_salt=digest.salt,
        digest_iterations=digest.iterations,
        uuid=header.binary.uuid,
        slots=tuple(slots),
    )
    packed = converted.pack().ljust(HEADER_SECTORS_BYTES, b"\0")
    luks1.Header.parse(packed, detached=segment.offset == 0)
    # Both copies have to be whole: for a moment the second is all that there is.
    _, plan = commit(header, header.metadata, random)
    plan += [
        Write(places[slot], materials[slot][: header.keyslots[slot].material_bytes])
        for slot in places
        if places[slot] != there[slot][0]
    ]
    plan += [
        Barrier(),
        Write(SECTOR, packed[SECTOR:]),
        Barrier(),
        Write(0, packed[:SECTOR]),
        Barrier(),
        Write(HEADER_SECTORS_BYTES, bytes(beginning - HEADER_SECTORS_BYTES)),
        Barrier(),
    ]
    used = [(place, length) for place in places.values()]
    return converted, plan + _wiping(there.values(), used, random)


def _check_for_version_1(header: luks2.Header) -> None:
    """Refuse what LUKS1 can't hold.

    :raise Error: what that is.
    """

    def refuse(why: str) -> Error:
        return Error(f"Cannot convert to LUKS1: {why}")

    digest, metadata = header.volume_digest, header.metadata
    if len(header.segments) != 1:
        raise refuse(f"there are {len(header.segments)} segments")
    segment = header.segments[0]
    if segment.sector_size != SECTOR:
        raise refuse(f"the sector size is {segment.sector_size}, not {SECTOR} bytes")
    if segment.size is not None or segment.iv_tweak:
        raise refuse("the segment has a size or an IV tweak of its own")
    if metadata["tokens"]:
        raise refuse(f"the LUKS2 header contains {len(metadata['tokens'])} token(s)")
    numbers = sorted(int(name) for name in metadata["keyslots"])
    for number in numbers:
        if number >= SLOTS:
            raise refuse(f"keyslot {number} is over the maximum of {SLOTS}")
        if number not in digest.keyslots:
            raise refuse(f"keyslot {number} holds another key than the volume key")
        if number not in header.keyslots or not _fits_version_1(header, header.keyslots[number]):
            raise refuse(f"keyslot {number} is not LUKS1 compatible")
    if not numbers:
        raise refuse("no keyslot is active")
    if (
        len(metadata["digests"]) != 1
        or len(digest.digest) < luks1.DIGEST_BYTES
        or len(digest.salt) != SALT_BYTES
    ):
        raise refuse("the digests are not LUKS1 compatible")


def _fits_version_1(header: luks2.Header, slot: luks2.Keyslot) -> bool:
    kdf, hash_name = slot.kdf, header.volume_digest.hash_name
    return (
        kdf.kind == "pbkdf2"
        and kdf.hash_name == slot.af_hash == hash_name
        and kdf.iterations < 1 << 32
        and len(kdf.salt) == SALT_BYTES
        and slot.stripes == STRIPES
        and slot.area.encryption == header.segments[0].encryption
        and slot.area.key_bytes == slot.key_bytes
    )


def _metadata(
    header: luks1.Header, places: Mapping[int, int], length: int, area_bytes: int
) -> dict[str, Any]:
    """What a LUKS1 header says, as cryptsetup says it in LUKS2."""
    encryption = f"{header.cipher_name}-{header.cipher_mode}"
    return {
        "keyslots": {
            str(slot): {
                "type": "luks2",
                "key_size": header.key_bytes,
                "kdf": {
                    "type": "pbkdf2",
                    "hash": header.hash_name,
                    "iterations": header.slots[slot].iterations,
                    "salt": _base64(header.slots[slot].salt),
                },
                "af": {"type": "luks1", "hash": header.hash_name, "stripes": STRIPES},
                "area": {
                    "type": "raw",
                    "encryption": encryption,
                    "key_size": header.key_bytes,
                    "offset": str(offset),
                    "size": str(length),
                },
            }
            for slot, offset in sorted(places.items())
        },
        "tokens": {},
        "segments": {
            "0": {
                "type": "crypt",
                "offset": str(header.payload_offset * SECTOR),
                "iv_tweak": "0",
                "size": "dynamic",
                "encryption": encryption,
                "sector_size": SECTOR,
            }
        },
        "digests": {
            "0": {
                "type": "pbkdf2",
                "keyslots": [str(slot) for slot in sorted(places)],
                "segments": ["0"],
                "hash": header.hash_name,
                "salt": _base64(header.digest_salt),
                "digest": _base64(header.digest),
                "iterations": header.digest_iterations,
            }
        },
        "config": {"json_size": str(_SIZE - BINARY_BYTES), "keyslots_size": str(area_bytes)},
    }


# -- places


def _area_bytes(key_bytes: int) -> int:
    """What a slot's key material takes, in whole 4 KiB."""
    return -(-key_bytes * STRIPES // AREA_ALIGNMENT) * AREA_ALIGNMENT


def _places(
    wanted: Mapping[int, int], used: Iterable[Extent], cells: Sequence[int], length: int, end: int
) -> dict[int, int] | None:
    """Free places for slots, each where it is wanted if possible; None if there are not enough."""
    taken = list(used)
    places = {}
    for slot, first in wanted.items():
        place = next((place for place in (first, *cells) if _is_free(place, length, end, taken)), None)
        if place is None:
            return None
        places[slot] = place
        taken.append((place, length))
    return places


def _with_the_others(places: Mapping[int, int], length: int, end: int) -> dict[int, int] | None:
    """Places for the slots of LUKS1 that are not in use as well; None if there is no room."""
    taken = [(place, length) for place in places.values()]
    rest = {slot: _FIRST + slot * length for slot in range(SLOTS) if slot not in places}
    behind = [place + length for place in places.values()]
    cells = sorted([*range(_FIRST, end, length), *range(_AREA, end, length), *behind])
    others = _places(rest, taken, cells, length, end)
    return None if others is None else {**others, **places}


def _is_free(place: int, length: int, end: int, taken: Iterable[Extent]) -> bool:
    return (
        place >= _FIRST
        and place + length <= end
        and all(place + length <= offset or offset + size <= place for offset, size in taken)
    )


def _wiping(old: Iterable[Extent], new: Iterable[Extent], random: Random) -> Plan:
    plan: Plan = [Write(offset, random(size)) for offset, size in subtracted(old, new)]
    return [*plan, Barrier()] if plan else []


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
