"""LUKS1 headers made LUKS2 ones and back: every passphrase goes along, wherever it stops.

Which results cryptsetup takes is tested in tests/interop.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.crypto import luks, luks1, luks2, luks2_keyslots
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks_conversion import to_version_1, to_version_2
from qmpd.crypto.plan import Barrier, Plan, Write
from qmpd.errors import Error

#: What cryptsetup makes, with the least room before the payload in which LUKS2 has a place.
AREA: Final = 65536
END: Final = 32768 + 8 * AREA
SPEC: Final = CipherSpec("aes-128", "cbc", "plain64")
_SLOTS: Final = st.frozensets(st.integers(0, 7), min_size=1)


def volume(slots: frozenset[int], room: int = END, *, detached: bool = False) -> bytearray:
    """A LUKS1 volume with random key material in some slots: which key is which needs no passphrase."""
    source = random.Random(1)
    header = replace(luks1.new_header(SPEC, "sha256"), digest_iterations=1000, digest=source.randbytes(20))
    header = replace(header, payload_offset=0 if detached else room // 512, digest_salt=source.randbytes(32))
    data = bytearray(source.randbytes(room))
    for slot in range(8):
        active = slot in slots
        offset = 4096 + slot * AREA
        described = luks1.Keyslot(active, 1000 + slot, source.randbytes(32), offset // 512)
        header = header.with_slot(slot, described)
    data[:4096] = header.pack().ljust(4096, b"\0")
    return data


def keys(data: bytes | bytearray) -> set[tuple[int, bytes, bytes]]:
    """The keys in the slots in use: whoever has the passphrase of one opens the disk."""
    header = luks.parse(data, detached=True)
    found = set()
    for slot in header.active_slots:
        offset, length = header.material_extent(slot)
        kdf = header.derivation(slot)
        found.add((kdf.iterations, kdf.salt, bytes(data[offset : offset + min(length, 64000)])))
    return found


def converted(data: bytes | bytearray) -> Plan:
    header = luks.parse(data, detached=True)
    extents = {slot: header.material_extent(slot) for slot in header.active_slots}
    materials = {slot: bytes(data[offset : offset + length]) for slot, (offset, length) in extents.items()}
    if isinstance(header, luks.Luks1):
        return to_version_2(header.header, header.sectors, materials, len(data))[1]
    assert isinstance(header, luks.Luks2)
    return to_version_1(header.header, materials, len(data))[1]


def apply(plan: Plan, data: bytearray) -> None:
    for step in plan:
        if isinstance(step, Write):
            data.extend(bytes(max(0, step.offset + len(step.data) - len(data))))
            data[step.offset : step.offset + len(step.data)] = step.data


def stops(data: bytes | bytearray, plan: Plan) -> Iterator[bytearray]:
    """The volume after every step of a plan, and with each write torn: its beginning there, or its end."""
    disk = bytearray(data)
    yield disk
    for step in plan:
        if isinstance(step, Barrier):
            continue
        middle = max(512, len(step.data) // 1024 * 512)
        before = bytes(disk)
        apply([Write(step.offset + middle, step.data[middle:])], disk)
        yield disk
        disk[:] = before
        apply([replace(step, data=step.data[:middle])], disk)
        yield disk
        apply([step], disk)
        yield disk


def leftovers(before: set[tuple[int, bytes, bytes]], data: bytes | bytearray) -> int:
    """How often key material is there, beyond once for each key."""
    return sum(bytes(data).count(material[40960:41472]) for _, _, material in before) - len(before)


@settings(max_examples=50, deadline=None)
@given(_SLOTS.filter(lambda slots: len(slots) < 8), st.sampled_from([END, END + 3 * AREA + 4096]))
def test_there_and_back_no_moment_is_without_any_of_the_keys(slots: frozenset[int], room: int) -> None:
    data = volume(slots, room)
    before = keys(data)
    for version in (2, 1, 2):
        plan = converted(data)
        for disk in stops(data, plan):
            # A key may be in two slots for a while.
            assert keys(disk) == before
        apply(plan, data)
        header = luks.parse(data)
        assert (header.version, header.active_slots) == (version, sorted(slots))
        assert isinstance(header, luks.Luks1) or not header.damaged  # type: ignore[attr-defined]
        assert keys(data) == before
        assert leftovers(before, data) == 0


def test_with_all_slots_in_use_the_keys_go_along_too() -> None:
    data = volume(frozenset(range(8)))
    before = keys(data)
    for _ in range(2):
        apply(converted(data), data)
        assert keys(data) == before


def test_the_only_key_in_slot_0_goes_where_cryptsetup_puts_it() -> None:
    data = volume(frozenset([0]))
    apply(converted(data), data)
    assert luks.parse(data).material_extent(0) == (32768, AREA)


def test_volume_key_digest_payload_and_uuid_stay() -> None:
    data = volume(frozenset([0, 2]))
    before = luks.parse(data)
    assert isinstance(before, luks.Luks1)
    for _ in range(2):
        apply(converted(data), data)
        after = luks.parse(data)
        assert (after.uuid, after.key_bytes, after.segments) == (
            before.uuid,
            before.key_bytes,
            before.segments,
        )
        assert after.digest_derivation == before.digest_derivation
    assert isinstance(after, luks.Luks1)
    unmoved = replace(after.header, slots=before.header.slots)
    assert unmoved == before.header


def test_without_room_for_the_longer_header_it_is_refused() -> None:
    with pytest.raises(Error, match=f"takes {END} bytes, and there are {END - 4096}"):
        converted(volume(frozenset([0]), END - 4096))
    with pytest.raises(Error, match="no keyslot is active"):
        converted(volume(frozenset()))


@pytest.mark.parametrize("room", [END, END - 28672])
def test_a_detached_header_has_its_volume_for_its_keys_which_grows_if_need_be(room: int) -> None:
    data = volume(frozenset([0, 3]), room, detached=True)
    before = keys(data)
    for _ in range(2):
        apply(converted(data), data)
        assert keys(data) == before
        assert luks.parse(data, detached=True).segments[0].offset == 0
        assert len(data) == END


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("segments", "0", "sector_size"), 4096, "the sector size is 4096, not 512 bytes"),
        (("segments", "0", "iv_tweak"), "8", "the segment has a size or an IV tweak of its own"),
        (("tokens", "0"), {"type": "x", "keyslots": []}, r"contains 1 token\(s\)"),
        (("keyslots", "0", "kdf", "hash"), "sha512", "keyslot 0 is not LUKS1 compatible"),
        (("keyslots", "0", "af", "stripes"), 2000, "keyslot 0 is not LUKS1 compatible"),
        (("keyslots", "0", "area", "encryption"), "aes-xts-plain64", "keyslot 0 is not LUKS1 compatible"),
        (
            ("keyslots", "0", "kdf"),
            {"type": "argon2id", "time": 4, "memory": 64, "cpus": 1},
            "keyslot 0 is not",
        ),
        (("digests", "0", "keyslots"), ["2"], "keyslot 0 holds another key than the volume key"),
    ],
)
def test_what_version_1_can_not_hold_is_refused(path: tuple[str, ...], value: Any, why: str) -> None:
    data = volume(frozenset([0, 2]))
    apply(converted(data), data)
    header = luks.parse(data)
    assert isinstance(header, luks.Luks2)
    metadata = luks2_keyslots.without(header.header.metadata, [])
    place = metadata
    for name in path[:-1]:
        place = place[name]
    if path[-1] == "kdf":
        value = {**value, "salt": place["kdf"]["salt"]}
    place[path[-1]] = value
    changed = luks2.parse_metadata(header.header.binary, orjson.dumps(metadata))
    with pytest.raises(Error, match=why):
        to_version_1(changed, {}, len(data))


def test_a_slot_beyond_the_eighth_is_refused() -> None:
    data = volume(frozenset([0, 2]))
    apply(converted(data), data)
    header = luks.parse(data)
    assert isinstance(header, luks.Luks2)
    text = orjson.dumps(header.header.metadata).replace(b'"2"', b'"8"')
    with pytest.raises(Error, match="keyslot 8 is over the maximum of 8"):
        to_version_1(luks2.parse_metadata(header.header.binary, text), {}, len(data))
