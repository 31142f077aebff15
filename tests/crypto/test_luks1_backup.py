"""Backups of a LUKS1 header: whose they are, and that putting one back leaves a way in wherever it stops."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import replace
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.crypto import luks, luks_backup
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks1 import (
    HEAD_BYTES,
    SECTOR,
    SLOTS,
    Header,
    Keyslot,
    checking_digest,
    formatting,
    new_header,
    unlocking,
)
from qmpd.crypto.luks1_backup import backup_image, difference, restore_plan, rewrite_plan
from qmpd.crypto.luks1_keyslots import HEADER_SECTORS_BYTES, activating, erase_plan
from qmpd.crypto.luks_backup import HeaderState
from qmpd.crypto.plan import Barrier, Plan, Write
from qmpd.crypto.steps import run
from qmpd.errors import Error

SPEC: Final = CipherSpec("aes-128", "xts", "plain64")


class Volume:
    """A header on a disk in memory, and the passphrase of each slot in use."""

    def __init__(self, slots: Mapping[int, bytes], origin: Volume | None = None) -> None:
        source = random.Random(repr(sorted(slots.items())))
        self.random: Callable[[int], bytes] = source.randbytes
        if origin is None:
            self.header, key, plan = run(formatting(SPEC, "sha256", b"first", 1000, 1000, random=self.random))
            self.key = bytes(key.data)
            self.data = bytearray(self.header.header_length())
            self.apply(plan)
            self.set_slots(slots)
        else:
            self.header, self.key, self.data = origin.header, origin.key, bytearray(origin.data)
            self.set_slots(slots)

    def set_slots(self, slots: Mapping[int, bytes]) -> None:
        """Every slot gets a new key, whatever it held; the others are erased."""
        for slot, password in slots.items():
            self.header, plan = run(
                activating(self.header, self.sectors, [slot], self.key, password, 1000, self.random)
            )
            self.apply(plan)
        rest = [slot for slot in self.header.active_slots if slot not in slots]
        self.header, plan = erase_plan(self.header, self.sectors, rest, self.random)
        self.apply(plan)

    def apply(self, plan: Plan) -> None:
        for step in plan:
            if isinstance(step, Write):
                self.data[step.offset : step.offset + len(step.data)] = step.data

    @property
    def sectors(self) -> bytes:
        return bytes(self.data[:HEADER_SECTORS_BYTES])

    @property
    def materials(self) -> dict[int, bytes]:
        return {slot: material(self.data, self.header, slot) for slot in self.header.active_slots}


def material(data: bytes | bytearray, header: Header, slot: int) -> bytes:
    offset, length = header.material_extent(slot)
    return bytes(data[offset : offset + length])


class Openers:
    """Tells which passphrases open a disk; what has been tried once is not tried again."""

    def __init__(self, passwords: set[bytes]) -> None:
        self._passwords = passwords
        self._tried: dict[tuple[Keyslot, bytes, bytes], bool] = {}

    def __call__(self, data: bytes | bytearray) -> set[bytes]:
        header = Header.parse(data)
        return {
            password
            for slot in header.active_slots
            for password in self._passwords
            if self._opens(header, slot, material(data, header, slot), password)
        }

    def _opens(self, header: Header, slot: int, key_material: bytes, password: bytes) -> bool:
        what = header.slots[slot], key_material, password
        if what not in self._tried:
            self._tried[what] = run(unlocking(header, slot, password, key_material)) is not None
        return self._tried[what]


def state_of(sectors: bytes, known: Header) -> tuple[HeaderState, Header | None]:
    """What lies where `known` was, and the header if it is of this volume."""
    found = None
    with suppress(Error):
        found = luks.parse(sectors)
    state = luks_backup.state_of(luks.Luks1(known, b""), found, sectors)
    return state, found.header if isinstance(found, luks.Luks1) and state.is_ours else None


def openers(data: bytes | bytearray, passwords: set[bytes]) -> set[bytes]:
    """Those of the passphrases that open what is on the disk."""
    return Openers(passwords)(data)


def stops(data: bytes, plan: Plan) -> Iterator[bytes]:
    """The disk after every step of a plan, and with each write torn in the middle and at its last sector."""
    disk = bytearray(data)
    yield bytes(disk)
    for step in plan:
        if isinstance(step, Barrier):
            continue
        sectors = len(step.data) // SECTOR
        for done in sorted({sectors // 2, sectors - 1, sectors}):
            part = step.data[: done * SECTOR]
            disk[step.offset : step.offset + len(part)] = part
            yield bytes(disk)


#: Slots and passphrases at the time of the backup, and now.
CASES: Final[Mapping[str, tuple[dict[int, bytes], dict[int, bytes]]]] = {
    "a slot was added": ({0: b"a"}, {0: b"a", 3: b"b"}),
    "a slot was erased": ({0: b"a", 6: b"b"}, {0: b"a"}),
    "the only slot was replaced": ({0: b"a"}, {0: b"b"}),
    "another slot is used": ({1: b"a"}, {6: b"b"}),
    "all of few was replaced": ({0: b"a", 1: b"b", 6: b"c"}, {0: b"d", 1: b"e", 6: b"f"}),
}


def backup_and_now(case: str) -> tuple[Volume, Volume]:
    """A volume at the time of a backup, and the same now: all keys are other ones."""
    then, now = CASES[case]
    backup = Volume(then)
    return backup, Volume(now, backup)


def plan_for(backup: Volume, now: Volume) -> tuple[Header, Plan]:
    return restore_plan(
        *(now.header, now.sectors, now.materials),
        *(backup.header, backup.sectors, backup.materials),
        now.random,
    )


@pytest.mark.parametrize("case", CASES)
def test_wherever_a_restoration_stops_all_old_or_all_new_passphrases_open(case: str) -> None:
    backup, now = backup_and_now(case)
    then, there = set(CASES[case][0].values()), set(CASES[case][1].values())
    header, plan = plan_for(backup, now)
    try_all = Openers(then | there)
    for disk in stops(bytes(now.data), plan):
        opened = try_all(disk)
        assert opened >= then or opened >= there
    now.apply(plan)
    assert openers(now.data, then | there) == then
    assert Header.parse(now.data) == header
    assert header.active_slots == backup.header.active_slots


def test_some_passphrase_opens_wherever_it_stops_when_all_slots_are_in_use() -> None:
    then = {slot: f"then {slot}".encode() for slot in range(SLOTS)}
    there = {slot: f"now {slot}".encode() for slot in range(SLOTS)}
    backup = Volume(then)
    now = Volume(there, backup)
    _, plan = plan_for(backup, now)
    headers: dict[bytes, bytes] = {}
    for disk in stops(bytes(now.data), plan):
        headers[disk[:HEADER_SECTORS_BYTES]] = disk
    for disk in headers.values():
        header = Header.parse(disk)
        known = {*backup.header.slots, *now.header.slots}
        assert len(header.active_slots) >= SLOTS - 1
        assert all(header.slots[slot] in known for slot in header.active_slots)
    now.apply(plan)
    first = next(iter(then.values()))
    assert openers(now.data, {first}) == {first}


def test_a_slot_that_is_the_same_in_both_is_not_written() -> None:
    backup = Volume({0: b"a"})
    _, plan = plan_for(backup, backup)
    assert plan == []


def test_key_material_that_was_damaged_is_put_back_though_the_header_is_the_same() -> None:
    backup = Volume({0: b"a", 1: b"b"})
    damaged = bytearray(backup.data)
    offset, length = backup.header.material_extent(1)
    damaged[offset : offset + length] = bytes(length)
    materials = {slot: material(damaged, backup.header, slot) for slot in (0, 1)}
    _, plan = restore_plan(
        *(backup.header, backup.sectors, materials),
        *(backup.header, backup.sectors, backup.materials),
    )
    for step in plan:
        if isinstance(step, Write):
            damaged[step.offset : step.offset + len(step.data)] = step.data
    assert openers(damaged, {b"a", b"b"}) == {b"a", b"b"}


def test_the_key_material_of_a_slot_that_the_backup_has_not_is_overwritten() -> None:
    backup = Volume({0: b"a"})
    now = Volume({0: b"b", 4: b"c"}, backup)
    before = now.materials
    _, plan = plan_for(backup, now)
    now.apply(plan)
    for slot, old in before.items():
        assert material(now.data, now.header, slot) != old
    # Nor is there a copy of the new key in the slot that was a spare one.
    fresh = backup.materials[0]
    assert bytes(now.data).count(fresh[:SECTOR]) == 1


def test_where_there_is_no_header_none_is_seen_before_it_is_whole() -> None:
    backup = Volume({0: b"a", 6: b"b"})
    known = Volume({0: b"c", 6: b"b", 7: b"d"}, backup)
    noise = random.Random(1).randbytes(len(backup.data))
    header, plan = rewrite_plan(known.header, backup.header, backup.sectors, backup.materials, known.random)
    assert header == backup.header
    whole = False
    for disk in stops(noise, plan):
        state, found = state_of(disk[:HEADER_SECTORS_BYTES], backup.header)
        if found is None:
            assert not whole
            assert state is HeaderState.DAMAGED
        else:
            whole = True
            assert state is HeaderState.UNCHANGED
            assert all(material(disk, found, slot) == backup.materials[slot] for slot in found.active_slots)
    assert whole
    # The last known slot that the backup has not is gone.
    offset, length = known.header.material_extent(7)
    assert disk[offset : offset + length] != noise[offset : offset + length]


def test_a_header_of_the_same_volume_is_known_by_everything_but_slots_and_uuid() -> None:
    volume = Volume({0: b"a"})
    header = volume.header
    assert difference(header, header) is None
    assert difference(header, Volume({5: b"z"}, volume).header) is None
    assert difference(header, replace(header, uuid="other")) is None
    for change, what in (
        (replace(header, digest=bytes(20)), "digest of the volume key"),
        (replace(header, payload_offset=header.payload_offset + 8), "payload offset"),
        (replace(header, hash_name="sha512"), "hash"),
        (replace(header, cipher_mode="cbc-plain64"), "cipher mode"),
        (header.with_slot(7, replace(header.slots[7], key_offset=80000)), "place of the keyslots"),
    ):
        assert difference(header, change) == what


def test_the_state_tells_this_volumes_header_from_others_and_from_none() -> None:
    volume = Volume({0: b"a"})
    other = Volume({0: b"other"})
    sectors = volume.sectors

    def state(data: bytes) -> HeaderState:
        return state_of(data, volume.header)[0]

    assert state(sectors) is HeaderState.UNCHANGED
    assert state(Volume({1: b"b"}, volume).sectors) is HeaderState.CHANGED
    assert state(other.sectors) is HeaderState.OTHER
    assert state(sectors[:6] + b"\0\2" + sectors[8:]) is HeaderState.OTHER
    assert state(bytes(len(sectors))) is HeaderState.DAMAGED
    assert state(sectors[:HEAD_BYTES] + bytes(len(sectors) - HEAD_BYTES)) is HeaderState.DAMAGED


def test_a_backup_begins_with_the_header_and_nothing_else() -> None:
    volume = Volume({0: b"a"})
    image = backup_image(volume.header.pack() + b"\xff" * 512)
    assert Header.parse(image) == volume.header
    assert not any(image[592:])
    assert len(image) == HEADER_SECTORS_BYTES


def test_only_the_volume_key_fits_the_digest() -> None:
    volume = Volume({0: b"a"})
    assert run(checking_digest(volume.header, volume.key))
    assert not run(checking_digest(volume.header, bytes(len(volume.key))))


def made_up(seed: int, slots: Set[int], origin: Header) -> Volume:
    """A volume of the same key with random salts and key material: which key is which needs no passphrase."""
    source = random.Random(seed)
    volume = object.__new__(Volume)
    volume.random = source.randbytes
    volume.header, volume.key = origin, b""
    volume.data = bytearray(origin.header_length())
    for slot in slots:
        described = replace(origin.slots[slot], active=True, iterations=1000, salt=source.randbytes(32))
        volume.header = volume.header.with_slot(slot, described)
        offset, length = origin.material_extent(slot)
        volume.data[offset : offset + length] = source.randbytes(length)
    packed = volume.header.pack()
    volume.data[: len(packed)] = packed
    return volume


def keys(data: bytes | bytearray) -> set[tuple[bytes, bytes]]:
    """The keys in the slots in use: whoever has the passphrase of one opens the disk."""
    header = Header.parse(data)
    return {(header.slots[slot].salt, material(data, header, slot)) for slot in header.active_slots}


_SLOT_SETS: Final = st.frozensets(st.integers(0, SLOTS - 1), min_size=1)


@settings(max_examples=40)
@given(_SLOT_SETS, _SLOT_SETS, st.frozensets(st.integers(0, SLOTS - 1)))
def test_whichever_slots_are_in_use_no_moment_is_without_a_way_in(
    then: frozenset[int], there: frozenset[int], kept: frozenset[int]
) -> None:
    origin = new_header(SPEC, "sha256")
    origin = replace(origin, digest_iterations=1000)
    backup, now = made_up(1, then, origin), made_up(2, there, origin)
    for slot in kept & then & there:
        now.header = now.header.with_slot(slot, backup.header.slots[slot])
        offset, length = origin.material_extent(slot)
        now.data[offset : offset + length] = backup.data[offset : offset + length]
    packed = now.header.pack()
    now.data[: len(packed)] = packed
    old, new = keys(now.data), keys(backup.data)
    clashing = [slot for slot in then & there if slot not in kept]
    room = SLOTS - len(then | there)
    _, plan = plan_for(backup, now)
    for disk in stops(bytes(now.data), plan):
        found = keys(disk)
        assert found & (old | new)
        if len(clashing) <= room:
            assert found >= old or found >= new
    now.apply(plan)
    assert keys(now.data) == new
