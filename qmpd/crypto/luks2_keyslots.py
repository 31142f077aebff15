"""Making a LUKS2 header, and changing its keyslots: what to write, in which order.

Functions here are given a header and return the header as it is afterwards and
a plan.  Wherever a plan is stopped, be it in the middle of a write, one of the
two copies of the metadata is whole, and what opened the volume before or what
opens it afterwards does open it:

- A key comes in by its key material, in a part of the keyslots area that no
  slot uses, and then by the metadata that names it.
- A slot in use gets another key in the same way: until the metadata names the
  new area the old one is as it was, and it is overwritten afterwards.  Where
  there is no room for a second area the slot goes first; other slots remain.
- A key goes by its key material, which is overwritten before the metadata
  forgets it: so nothing ever says that a key is gone which is still there.

The metadata is written to the secondary copy first, then to the primary one,
both with the next sequence number.  Where the primary copy is damaged or older
it comes first, for the other one is then the only one that is whole.  Either
way both are good afterwards.

Source: LUKS2 On-Disk Format Specification 1.1, sections 2.3, 3.2 and 3.4; the
order of writes is ours.
"""

from __future__ import annotations

import base64
import copy
import os
import uuid as uuids
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import replace
from typing import Any, Final

import orjson

from qmpd.crypto import digests, kdf
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks2 import AREA_ALIGNMENT, STRIPES, Area, Header, Keyslot, parse_metadata, sealing
from qmpd.crypto.luks2_binary import BINARY_BYTES, SIZES, BinaryHeader
from qmpd.crypto.luks2_kdf import Kdf
from qmpd.crypto.memory import Buffer, KeyBuffer, random_key, wiped_on_failure
from qmpd.crypto.plan import Barrier, Plan, Write
from qmpd.crypto.sectors import SECTOR
from qmpd.crypto.steps import Steps
from qmpd.errors import Error

SALT_BYTES: Final = 32

#: Length of each copy of a new header, JSON area included, and where its payload begins (cryptsetup's).
NEW_SIZE: Final = 16 << 10
NEW_PAYLOAD_OFFSET: Final = 16 << 20

#: The most iterations of a new header's digest take this many milliseconds (cryptsetup's).
DIGEST_TIME: Final = 125

Random = Callable[[int], bytes]
Metadata = dict[str, Any]


# -- changing keyslots


def activating(
    header: Header,
    slots: Sequence[int],
    key: Buffer,
    password: Buffer,
    costs: Kdf,
    random: Random = os.urandom,
) -> Steps[tuple[Header, Plan]]:
    """Put the volume key into slots, so that `password` opens each of them; in steps.

    :param slots: the slots' numbers; the key of one in use is lost.
    :param key: the volume key.
    :param costs: the key derivation; each slot gets a salt of its own.
    :param random: gives as many random bytes as it is asked for.
    :returns: the header as it will be, and what to write.
    :raise Error: there is no room for the key or for the metadata.
    """
    plan: Plan = []
    for number in slots:
        kdf_ = replace(costs, salt=random(SALT_BYTES))
        before = header.metadata
        old = before["keyslots"].get(str(number))
        described = _new_keyslot(header, number, len(key), kdf_)
        offset = _free_area(header, described.area.size)
        if offset is None and old is not None and int(old["area"]["size"]) >= described.area.size:
            header, steps = _forget(header, [number], random)
            plan += steps
            offset, old = _free_area(header, described.area.size), None
        if offset is None:
            raise Error("There is no room for another key in the keyslots area of the LUKS2 header")
        described = replace(described, area=replace(described.area, offset=offset))
        material = yield from sealing(described, key, password, random)
        plan += [Write(offset, material), Barrier()]
        metadata = without(header.metadata, [])
        # Another passphrase for a slot leaves its rank and its tokens, as cryptsetup's luksChangeKey does.
        metadata["tokens"] = copy.deepcopy(before["tokens"])
        metadata["keyslots"][str(number)] = _as_json(described) | _rank(before, number)
        volume_digest = str(header.volume_digest.number)
        if number not in header.volume_digest.keyslots:
            # What the slot had may have been another key than the volume's.
            _unassign(metadata, {str(number)})
            metadata["digests"][volume_digest]["keyslots"].append(str(number))
        header, steps = commit(header, metadata, random)
        plan += steps
        if old is not None:
            plan += [Write(int(old["area"]["offset"]), random(int(old["area"]["size"]))), Barrier()]
    return header, plan


def _rank(metadata: Metadata, number: int) -> Metadata:
    """What a slot says of its priority, if it says anything."""
    slot = metadata["keyslots"].get(str(number), {})
    return {"priority": slot["priority"]} if "priority" in slot else {}


def erase_plan(header: Header, slots: Sequence[int], random: Random = os.urandom) -> tuple[Header, Plan]:
    """Take the keys out of slots; parameters and result as of :func:`activating`."""
    return _forget(header, slots, random)


def _forget(header: Header, slots: Sequence[int], random: Random) -> tuple[Header, Plan]:
    plan: Plan = []
    for number in slots:
        area = header.metadata["keyslots"][str(number)]["area"]
        plan.append(Write(int(area["offset"]), random(int(area["size"]))))
    header, steps = commit(header, without(header.metadata, slots), random)
    return header, [*plan, Barrier(), *steps]


def without(metadata: Metadata, slots: Iterable[int]) -> Metadata:
    """A copy of the metadata in which nothing names these slots any more."""
    changed = copy.deepcopy(metadata)
    names = {str(number) for number in slots}
    for name in names:
        del changed["keyslots"][name]
    for token in changed["tokens"].values():
        if isinstance(token, dict) and isinstance(token.get("keyslots"), list):
            token["keyslots"] = [name for name in token["keyslots"] if name not in names]
    _unassign(changed, names)
    return changed


def _unassign(metadata: Metadata, names: Set[str]) -> None:
    """Take slots out of the digests, and a digest away that is of no more use (as cryptsetup does it)."""
    for number, digest in list(metadata["digests"].items()):
        left = [name for name in digest["keyslots"] if name not in names]
        if left or digest["segments"] or left == digest["keyslots"]:
            digest["keyslots"] = left
        else:
            del metadata["digests"][number]


def commit(header: Header, metadata: Metadata, random: Random) -> tuple[Header, Plan]:
    """Write other metadata: to the copy that does not count, and when that is whole to the other one.

    :param header: what is there; its binary header says all but the sequence number.
    :returns: the header as it will be, and what to write.
    :raise Error: there is no room for it.
    """
    binary = header.binary.next()
    text = orjson.dumps(metadata)
    changed = parse_metadata(binary, text)
    writes = [
        Write(binary.size, binary.pack(text, secondary=True, random=random)),
        Write(0, binary.pack(text, secondary=False, random=random)),
    ]
    if header.offset != 0:
        writes.reverse()
    return changed, [writes[0], Barrier(), writes[1], Barrier()]


def _new_keyslot(header: Header, number: int, key_bytes: int, costs: Kdf) -> Keyslot:
    """A slot for the volume key, made like the others if there are any; its area has no place yet."""
    like = next(iter(header.volume_slots), None) or next(iter(header.keyslots.values()), None)
    segment = header.segments[0]
    encryption = segment.encryption if like is None else like.area.encryption
    area_key_bytes = key_bytes if like is None else like.area.key_bytes
    af_hash = header.volume_digest.hash_name if like is None else like.af_hash
    return _keyslot(number, key_bytes, encryption, area_key_bytes, af_hash, costs)


def _keyslot(
    number: int, key_bytes: int, encryption: str, area_key_bytes: int, af_hash: str, costs: Kdf
) -> Keyslot:
    size = _aligned(key_bytes * STRIPES)
    return Keyslot(number, key_bytes, STRIPES, af_hash, Area(0, size, encryption, area_key_bytes), costs)


def _as_json(keyslot: Keyslot) -> Metadata:
    area = keyslot.area
    return {
        "type": "luks2",
        "key_size": keyslot.key_bytes,
        "af": {"type": "luks1", "stripes": keyslot.stripes, "hash": keyslot.af_hash},
        "area": {
            "type": "raw",
            "offset": str(area.offset),
            "size": str(area.size),
            "encryption": area.encryption,
            "key_size": area.key_bytes,
        },
        "kdf": {**keyslot.kdf.parameters(), "salt": _base64(keyslot.kdf.salt)},
    }


def _free_area(header: Header, size: int) -> int | None:
    """The first place in the keyslots area for `size` bytes that no slot uses, whatever its kind."""
    extents = sorted(
        (int(slot["area"]["offset"]), int(slot["area"]["size"]))
        for slot in header.metadata["keyslots"].values()
    )
    place = header.keyslots_offset
    for offset, length in extents:
        if offset - place >= size:
            return place
        place = max(place, _aligned(offset + length))
    return place if header.keyslots_offset + header.keyslots_bytes - place >= size else None


# -- making a header


def formatting(
    spec: CipherSpec,
    hash_name: str,
    password: Buffer,
    costs: Kdf,
    digest_iterations: int,
    *,
    sector_size: int = SECTOR,
    detached: bool = False,
    label: str = "",
    subsystem: str = "",
    uuid: str | None = None,
    random: Random = os.urandom,
) -> Steps[tuple[Header, KeyBuffer, Plan]]:
    """Make a volume key and a header with `password` in slot 0, in steps.

    The first writes take away whatever headers were there, and the primary copy of the new one comes
    last: an interrupted creation leaves nothing that claims to be a LUKS volume, or the whole of it.

    :param costs: the key derivation of the slot; it gets a salt.
    :param sector_size: bytes of the payload that have an IV of their own.
    :param detached: the payload is elsewhere and begins at 0.
    :param label: at most 47 bytes; so is `subsystem`.
    :param uuid: as text; a random one if it is left out.
    :param random: gives as many random bytes as it is asked for.
    :returns: the header, the volume key for the caller to wipe, and what to write.
    :raise Error: no such hash, or a label is too long.
    """
    for what, text in (("label", label), ("subsystem", subsystem)):
        if len(text.encode()) > 47 or "\0" in text:
            raise Error(f"Parameter '{what}' expects at most 47 bytes")
    key = random_key(spec.key_bytes, random)
    with wiped_on_failure(key):
        digest_salt = random(SALT_BYTES)
        yield
        digest_bytes = digests.algorithm(hash_name).digest_size
        digest = kdf.pbkdf2(hash_name, key.data, digest_salt, digest_iterations, digest_bytes)
        metadata = _new_metadata(
            "-".join(spec.header_names()),
            sector_size,
            detached,
            hash_name,
            digest_iterations,
            digest_salt,
            digest,
        )
        binary = BinaryHeader(NEW_SIZE, 0, label, "sha256", uuid or str(uuids.uuid4()), subsystem)
        blank = parse_metadata(binary, orjson.dumps(metadata))
        header, plan = yield from activating(blank, [0], key.data, password, costs, random)
    wipe: Plan = [Write(0, bytes(2 * NEW_SIZE))]
    wipe += [Write(offset, bytes(BINARY_BYTES)) for offset in SIZES if offset >= 2 * NEW_SIZE]
    return header, key, [*wipe, Barrier(), *plan]


def _new_metadata(
    encryption: str,
    sector_size: int,
    detached: bool,
    hash_name: str,
    iterations: int,
    salt: bytes,
    digest: bytearray,
) -> Metadata:
    """The metadata of a volume without keyslots."""
    return {
        "keyslots": {},
        "tokens": {},
        "segments": {
            "0": {
                "type": "crypt",
                "offset": str(0 if detached else NEW_PAYLOAD_OFFSET),
                "size": "dynamic",
                "iv_tweak": "0",
                "encryption": encryption,
                "sector_size": sector_size,
            }
        },
        "digests": {
            "0": {
                "type": "pbkdf2",
                "keyslots": [],
                "segments": ["0"],
                "hash": hash_name,
                "iterations": iterations,
                "salt": _base64(salt),
                "digest": _base64(digest),
            }
        },
        "config": {
            "json_size": str(NEW_SIZE - BINARY_BYTES),
            "keyslots_size": str(NEW_PAYLOAD_OFFSET - 2 * NEW_SIZE),
        },
    }


def _aligned(length: int) -> int:
    return -(-length // AREA_ALIGNMENT) * AREA_ALIGNMENT


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()
