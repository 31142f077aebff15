"""Backups of a LUKS2 header: whose they are, and that putting one back leaves a way in wherever it stops."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.crypto import luks, luks1, luks2, luks2_backup, luks2_keyslots, luks_backup
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks2_binary import BinaryHeader
from qmpd.crypto.luks2_kdf import Kdf
from qmpd.crypto.luks_backup import HeaderState
from qmpd.crypto.plan import Barrier, Plan, Write
from qmpd.crypto.steps import run
from qmpd.errors import Error

#: Keys of one byte make areas of 4 KiB, so that a keyslots area is soon full.
AREA: Final = 4096
SIZE: Final = luks2_keyslots.NEW_SIZE


def volume(slots: dict[int, int], room: int, seed: int) -> bytearray:
    """A volume with random key material in these slots, each in the area of that number; which key is which
    needs no passphrase, for its salt and material say so."""
    source = random.Random(seed)
    metadata: dict[str, Any] = luks2_keyslots._new_metadata(
        "aes-xts-plain64", 512, True, "sha256", 1000, bytes(32), bytearray(32)
    )
    metadata["config"]["keyslots_size"] = str(room * AREA)
    metadata["digests"]["0"]["keyslots"] = [str(slot) for slot in slots]
    binary = BinaryHeader(SIZE, seed, f"label {seed}", "sha256", "uuid", "")
    data = bytearray(2 * SIZE + room * AREA)
    for slot, area in slots.items():
        kdf = Kdf("pbkdf2", source.randbytes(32), 1000)
        described = luks2_keyslots._keyslot(slot, 1, "aes-xts-plain64", 32, "sha256", kdf)
        offset = 2 * SIZE + area * AREA
        place = replace(described.area, offset=offset, size=AREA)
        metadata["keyslots"][str(slot)] = luks2_keyslots._as_json(replace(described, area=place))
        data[offset : offset + AREA] = source.randbytes(AREA)
    header = luks2.parse_metadata(binary, orjson.dumps(metadata))
    data[: 2 * SIZE] = luks2_backup.two_copies(header)
    return data


def read(data: bytes | bytearray) -> luks.Luks2:
    header = luks.parse(data, detached=True)
    assert isinstance(header, luks.Luks2)
    return header


def materials(data: bytes | bytearray, header: luks.LuksHeader) -> dict[int, bytes]:
    extents = {slot: header.material_extent(slot) for slot in header.active_slots}
    return {slot: bytes(data[offset : offset + length]) for slot, (offset, length) in extents.items()}


def keys(data: bytes | bytearray) -> set[tuple[bytes, bytes]]:
    """The keys in the slots in use: whoever has the passphrase of one opens the disk."""
    header = read(data)
    return {(header.derivation(slot).salt, material) for slot, material in materials(data, header).items()}


def apply(plan: Plan, data: bytearray) -> None:
    for step in plan:
        if isinstance(step, Write):
            data[step.offset : step.offset + len(step.data)] = step.data


def stops(data: bytes | bytearray, plan: Plan) -> Iterator[bytearray]:
    """The volume after every step of a plan, and with each write torn in the middle."""
    disk = bytearray(data)
    yield disk
    for step in plan:
        if isinstance(step, Barrier):
            continue
        half = len(step.data) // 1024 * 512
        apply([replace(step, data=step.data[:half])], disk)
        yield disk
        apply([step], disk)
        yield disk


def plan_for(backup: bytearray, now: bytearray) -> tuple[luks.LuksHeader, Plan]:
    saved, present = read(backup), read(now)
    assert present.difference(saved) is None
    return present.restoring(materials(now, present), saved, materials(backup, saved))


_AREAS: Final = st.permutations(range(6)).map(lambda areas: dict(enumerate(areas[:3])))


@settings(max_examples=60, deadline=None)
@given(_AREAS, _AREAS, st.integers(0, 3), st.sampled_from([6, 8]))
def test_wherever_a_restoration_stops_all_keys_of_before_or_all_of_the_backup_are_there(
    then: dict[int, int], there: dict[int, int], kept: int, room: int
) -> None:
    backup, now = volume(then, room, seed=1), volume(there, room, seed=2)
    if kept:
        # Some slots are the same as in the backup, perhaps in other areas.
        saved, present = read(backup), read(now)
        metadata = luks2_keyslots.without(present.header.metadata, [])
        for slot in range(kept):
            offset = present.material_extent(slot)[0]
            metadata["keyslots"][str(slot)]["kdf"] = saved.header.metadata["keyslots"][str(slot)]["kdf"]
            now[offset : offset + AREA] = materials(backup, saved)[slot]
        apply(luks2_keyslots.commit(present.header, metadata, random.randbytes)[1], now)
    old, new = keys(now), keys(backup)
    sequence = read(now).header.binary.sequence
    header, plan = plan_for(backup, now)
    for disk in stops(now, plan):
        assert keys(disk) in (old, new)
        assert read(disk).header.binary.sequence >= sequence
    apply(plan, now)
    assert keys(now) == new
    assert read(now) == header
    assert read(now).header.binary.label == "label 1"
    # What no slot uses any more is not there any more.
    for _, material in old - new:
        assert material not in bytes(now)


@pytest.mark.parametrize("damaged", [0, SIZE])
def test_where_one_copy_is_damaged_a_restoration_does_not_tear_the_other_one(damaged: int) -> None:
    backup, now = volume({0: 0, 3: 1}, 6, seed=1), volume({1: 2}, 6, seed=2)
    now[damaged + 5000] ^= 1
    old, new = keys(now), keys(backup)
    _, plan = plan_for(backup, now)
    assert all(keys(disk) in (old, new) for disk in stops(now, plan))
    apply(plan, now)
    assert keys(now) == new
    assert read(now).damaged == ()


def test_where_there_is_no_room_for_all_keys_there_is_always_one() -> None:
    backup, now = volume({0: 0, 1: 1, 2: 2}, 4, seed=1), volume({0: 0, 1: 1, 2: 2}, 4, seed=2)
    old, new = keys(now), keys(backup)
    _, plan = plan_for(backup, now)
    for disk in stops(now, plan):
        assert keys(disk) == old or keys(disk) & new
    apply(plan, now)
    assert keys(now) == new


def test_where_there_is_no_room_for_any_key_nothing_is_begun() -> None:
    backup, now = volume({0: 0, 1: 1}, 2, seed=1), volume({0: 0, 1: 1}, 2, seed=2)
    with pytest.raises(Error, match="no room for the backup's keys"):
        plan_for(backup, now)


@pytest.mark.parametrize("noise", ["all", "zeroes", "newer"])
def test_a_damaged_header_becomes_readable_when_all_of_the_backup_is_there(noise: str) -> None:
    backup, known = volume({0: 0, 1: 3}, 6, seed=1), volume({0: 2, 2: 5}, 6, seed=2)
    now = bytearray(known)
    if noise == "newer":
        # Whole copies of what nobody can read, with a sequence number that is far higher.
        binary = replace(read(known).header.binary, sequence=1 << 60)
        for which in (False, True):
            now[which * SIZE : (which + 1) * SIZE] = binary.pack(b"{}", secondary=which)
    else:
        now[: 2 * SIZE] = random.Random(3).randbytes(2 * SIZE) if noise == "all" else bytes(2 * SIZE)
    saved = read(backup)
    header, plan = read(known).rewriting(saved, materials(backup, saved))
    whole = False
    for disk in stops(now, plan):
        try:
            found = read(disk)
        except Error:
            assert not whole
        else:
            whole = True
            assert keys(disk) == keys(backup)
            assert found.header.binary.sequence == header.header.binary.sequence
    assert whole
    # The slot that the backup has not is gone.
    offset, length = read(known).material_extent(2)
    assert disk[offset : offset + length] != known[offset : offset + length]


def test_a_header_of_the_same_volume_is_known_by_digest_segments_and_areas() -> None:
    known = read(volume({0: 0}, 6, seed=1))
    assert known.difference(read(volume({3: 4}, 6, seed=2))) is None
    assert known.difference(read(volume({0: 0}, 8, seed=1))) == "size of the keyslots area"
    metadata = known.header.metadata
    for change, what in (
        (("digests", "digest", "A" * 24), "digest of the volume key"),
        (("digests", "salt", "AAAA"), "salt of the volume key's digest"),
        (("digests", "iterations", 1001), "iteration count of the volume key's digest"),
        (("segments", "offset", "4096"), "segments"),
        (("segments", "encryption", "aes-cbc-plain64"), "segments"),
    ):
        changed = luks2_keyslots.without(metadata, [])
        changed[change[0]]["0"][change[1]] = change[2]
        other = luks.Luks2(luks2.parse_metadata(known.header.binary, orjson.dumps(changed)))
        assert known.difference(other) == what
    version_1 = luks.Luks1(luks1.new_header(CipherSpec.from_options(), "sha256"), b"")
    assert known.difference(version_1) == version_1.difference(known) == "version"


def test_the_state_tells_this_volumes_header_from_others_and_from_none() -> None:
    data = volume({0: 0}, 6, seed=1)
    known = read(data)
    uuid = bytes(data[168:172])
    assert uuid == b"uuid"

    def state(beginning: bytes | bytearray) -> HeaderState:
        try:
            found = read(beginning)
        except Error:
            found = None
        return luks_backup.state_of(known, found, beginning)

    assert state(data) is HeaderState.UNCHANGED
    # One copy is enough.
    assert state(bytes(SIZE) + data[SIZE:]) is HeaderState.UNCHANGED
    assert state(volume({0: 0}, 6, seed=2)) is HeaderState.CHANGED
    assert state(volume({0: 0}, 8, seed=1)) is HeaderState.OTHER
    assert state(bytes(len(data))) is HeaderState.DAMAGED
    assert state(data[:4096] + bytes(len(data) - 4096)) is HeaderState.DAMAGED
    assert state(data[:168] + b"else" + bytes(4096)) is HeaderState.OTHER


def test_a_backup_of_a_header_with_a_damaged_copy_has_two_good_ones() -> None:
    data = volume({0: 0}, 6, seed=1)
    assert read(data).backup_image(data) == data[: 2 * SIZE]
    data[5000] ^= 1
    header = read(data)
    assert header.damaged
    again = read(header.backup_image(data))
    assert (again.damaged, again.header) == ((), header.header)


def test_a_passphrase_opens_what_was_put_back() -> None:
    spec = CipherSpec.from_options()
    costs = Kdf("pbkdf2", bytes(32), 1000)
    header, key, plan = run(luks2_keyslots.formatting(spec, "sha256", b"old", costs, 1000, detached=True))
    backup = bytearray(header.keyslots_offset + 4 * 260096)
    apply(plan, backup)
    now = bytearray(backup)
    header, plan = run(luks2_keyslots.activating(header, [0], key.data, b"new", costs))
    apply(plan, now)
    apply(plan_for(backup, now)[1], now)
    found = read(now)
    for password, opened in ((b"old", True), (b"new", False)):
        unlocked = run(found.unlocking(0, password, materials(now, found)[0]))
        assert (unlocked is not None) == opened
