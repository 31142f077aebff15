"""A change of a LUKS2 header's keyslots may be cut off anywhere, whatever state its two copies were in.

As `test_keyslots_plans.py` for LUKS1; what the storage keeps is in `interrupted_plans.py`.  Here there are
besides two copies of the metadata: either may be damaged, or of an earlier change, when another one begins,
and a copy may be torn at any byte.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from interrupted_plans import left_by_a_crash
from luks2_areas import (
    KEY_AREA,
    Judge,
    activation,
    erasure,
    filled,
    header_of,
    new_area,
    packed,
    read,
)
from luks_volumes import (
    Passwords,
    accepted_by_cryptsetup,
    carried_out,
    extent,
    opens_by_cryptsetup,
    sectors_in_common,
)

from qmpd.crypto.luks2_keyslots import NEW_SIZE
from qmpd.crypto.plan import Plan, Write
from qmpd.crypto.sectors import SECTOR

OLD, NEW, OTHER = b"old", b"new", b"other"

EIGHT = {slot: b"other-%d" % slot for slot in range(8)}


@dataclass(frozen=True)
class Change:
    """A change of keyslots, and what it promises.

    :param before: the passphrases before.
    :param slots: the slots that are changed.
    :param password: what comes into them; None to erase them.
    :param always: these open the disk at any moment.
    :param either: of these at least one does, if there are any.
    :param room: for so many keys.
    """

    before: Passwords
    slots: list[int]
    password: bytes | None
    always: frozenset[bytes] = frozenset()
    either: tuple[bytes, ...] = ()
    room: int = 9

    def plan(self, area: bytes) -> Plan:
        if self.password is None:
            return erasure(area, self.slots, detached=True)
        known = next(iter(self.before.values()))
        return activation(area, self.slots, known, self.password, detached=True)[1]

    @property
    def after(self) -> dict[int, bytes]:
        left = {slot: password for slot, password in self.before.items() if slot not in self.slots}
        return left if self.password is None else left | dict.fromkeys(self.slots, self.password)


def others(but: int) -> frozenset[bytes]:
    return frozenset(password for slot, password in EIGHT.items() if slot != but)


CHANGES: dict[str, Change] = {
    "a key is added": Change({1: OLD}, [6], NEW, always=frozenset({OLD})),
    "a key comes into the last slot that there can be": Change({0: OLD}, [31], NEW, always=frozenset({OLD})),
    "a key is erased": Change({3: OLD, 4: OTHER}, [3], None, always=frozenset({OTHER})),
    "the only key is replaced": Change({3: OLD}, [3], NEW, either=(OLD, NEW)),
    "one of eight keys is replaced, with room": Change({**EIGHT}, [6], NEW, always=others(6)),
    "one of eight keys is replaced, without room": Change({**EIGHT}, [6], NEW, always=others(6), room=8),
    "several slots of one passphrase are erased": Change(
        {0: OLD, 3: OLD, 6: OLD, 7: OTHER}, [0, 3, 6], None, always=frozenset({OTHER})
    ),
    "all slots have one passphrase, and are replaced": Change(
        dict.fromkeys(range(4), OLD), list(range(4)), NEW, either=(OLD, NEW)
    ),
    "all slots are replaced, without room": Change(
        dict.fromkeys(range(3), OLD), list(range(3)), NEW, either=(OLD, NEW), room=3
    ),
    "everything is erased": Change({0: OLD, 6: OTHER}, [0, 6], None),
}


def intact(area: bytes, earlier: bytes) -> bytes:
    return area


def without_primary(area: bytes, earlier: bytes) -> bytes:
    return area[:5000] + b"?" + area[5001:]


def without_primary_magic(area: bytes, earlier: bytes) -> bytes:
    return bytes(4096) + area[4096:]


def without_secondary(area: bytes, earlier: bytes) -> bytes:
    return area[: NEW_SIZE + 5000] + b"?" + area[NEW_SIZE + 5001 :]


def with_older_primary(area: bytes, earlier: bytes) -> bytes:
    return earlier[:NEW_SIZE] + area[NEW_SIZE:]


def with_older_secondary(area: bytes, earlier: bytes) -> bytes:
    return area[:NEW_SIZE] + earlier[NEW_SIZE : 2 * NEW_SIZE] + area[2 * NEW_SIZE :]


#: What has become of the two copies before the change.
CONDITIONS: dict[str, Callable[[bytes, bytes], bytes]] = {
    "both copies are good": intact,
    "the primary copy is damaged": without_primary,
    "the primary copy does not begin like one": without_primary_magic,
    "the secondary copy is damaged": without_secondary,
    "the primary copy is older": with_older_primary,
    "the secondary copy is older": with_older_secondary,
}


@cache
def volume(name: str, condition: str) -> bytes:
    """The volume before a change, with a detached header."""
    change = CHANGES[name]
    blank = new_area(detached=True, room=max(change.room, len(change.before) + 1))
    area = filled(blank, change.before, detached=True)
    if change.room < len(change.before) + 1:
        area = without_room(area, change.room)
    # The copies of an earlier change name a key whose area holds another one since.
    return CONDITIONS[condition](area, blank)


def without_room(area: bytes, room: int) -> bytes:
    """The same keys, one after the other, with no room for one more."""
    header = header_of(area)
    metadata = header.metadata
    keys = b""
    for number, slot in sorted(metadata["keyslots"].items()):
        where = int(slot["area"]["offset"])
        slot["area"]["offset"] = str(2 * NEW_SIZE + len(keys))
        keys += area[where : where + KEY_AREA]
        assert header.keyslots[int(number)].area.size == KEY_AREA
    assert len(keys) == room * KEY_AREA
    metadata["config"]["keyslots_size"] = str(len(keys))
    return packed(header.binary, metadata) + keys


@cache
def plan_of(name: str, condition: str) -> Plan:
    return CHANGES[name].plan(volume(name, condition))


#: Each change in the usual condition and in that which asks most, and some in each.
CASES = [(name, condition) for name in CHANGES for condition in list(CONDITIONS)[:2]] + [
    (name, condition)
    for name in ("a key is added", "a key is erased", "the only key is replaced")
    for condition in list(CONDITIONS)[2:]
]


@pytest.mark.parametrize(("name", "condition"), CASES)
def test_wherever_a_change_is_cut_off_a_passphrase_opens_the_disk(name: str, condition: str) -> None:
    change, judge = CHANGES[name], Judge(detached=True)
    area, plan = volume(name, condition), plan_of(name, condition)
    everybody = {*change.before.values(), *change.after.values()}
    assert judge.opened(area, everybody) == change.before
    before = judge.header(area).header.binary.sequence
    for state in left_by_a_crash(area, plan, random.Random(name)):
        # Neither is it unreadable at any moment, nor does an earlier change win.
        assert judge.header(state).header.binary.sequence >= before
        assert all(judge.opens(state, password) for password in change.always)
        assert not change.either or any(judge.opens(state, password) for password in change.either)
    after = carried_out(area, plan)
    assert judge.opened(after, everybody) == change.after
    header = judge.header(after)
    assert header.damaged == ()
    assert header.header.binary.sequence > before


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_copy_that_is_torn_at_any_byte_leaves_the_other_one(condition: str) -> None:
    name = "a key is added"
    area = volume(name, condition)
    for step in plan_of(name, condition):
        if not isinstance(step, Write):
            continue
        if len(step.data) == NEW_SIZE:
            overwritten = area[step.offset : step.offset + NEW_SIZE]
            last = max(at for at in range(NEW_SIZE) if overwritten[at] != step.data[at])
            for end in (*range(520), *range(520, last + 1, 13), last):
                torn = area[: step.offset] + step.data[:end] + area[step.offset + end :]
                assert read(torn, detached=True).active_slots in ([1], [1, 6])
        area = carried_out(area, [step])
    assert read(area, detached=True).active_slots == [1, 6]


@pytest.mark.parametrize(("name", "condition"), CASES)
def test_nothing_is_left_of_a_key_that_is_gone(name: str, condition: str) -> None:
    change, area, plan = CHANGES[name], volume(name, condition), plan_of(name, condition)
    header, after = read(area, detached=True), carried_out(area, plan)
    for slot in set(change.slots) & set(change.before):
        start = extent(header, slot)[0]
        material = area[start : start + header.header.keyslots[slot].material_bytes]
        assert sectors_in_common(material, area) == len(material) // SECTOR
        assert sectors_in_common(material, after) == 0
        salt = base64.b64encode(header.derivation(slot).salt)
        assert salt in area
        assert salt not in after
    # Of a copy that did not count, neither.
    header_after = read(after, detached=True)
    salts = [base64.b64encode(header_after.derivation(slot).salt) for slot in header_after.active_slots]
    for copy in (after[:NEW_SIZE], after[NEW_SIZE : 2 * NEW_SIZE]):
        assert copy.count(b'"salt"') == len(salts) + 1
        assert all(copy.count(salt) == 1 for salt in salts)
    # Each key lies in its own area, and nowhere else.
    for slot in change.after:
        start, end = extent(header_after, slot)
        assert sectors_in_common(after[start:end], after[:start] + after[end:]) == 0
    assert not isinstance(plan[-1], Write)


def test_a_change_writes_nothing_but_the_copies_and_areas_of_the_slots_concerned() -> None:
    for name, change in CHANGES.items():
        area, plan = volume(name, "both copies are good"), plan_of(name, "both copies are good")
        before, after = read(area, detached=True), read(carried_out(area, plan), detached=True)
        untouched = [slot for slot in change.before if slot not in change.slots]
        assert [before.header.keyslots[slot] for slot in untouched] == [
            after.header.keyslots[slot] for slot in untouched
        ]
        kept = {at for slot in untouched for at in range(*extent(before, slot))}
        for step in plan:
            if isinstance(step, Write):
                assert step.offset % SECTOR == len(step.data) % SECTOR == 0
                assert not kept & {step.offset, step.offset + len(step.data) - 1}
                assert step.offset + len(step.data) <= len(area)


@pytest.mark.peer("cryptsetup")
@pytest.mark.parametrize("seed", range(2))
def test_cryptsetup_agrees_on_what_a_cut_off_change_leaves(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = tmp_path / "volume"
    for name in chance.sample(sorted(CHANGES), 7):
        condition = chance.choice(sorted(CONDITIONS))
        change, judge = CHANGES[name], Judge(detached=True)
        states = list(left_by_a_crash(volume(name, condition), plan_of(name, condition), chance))
        for state in chance.sample(states, 2):
            for password in chance.sample([*change.before.values(), NEW], 2):
                # It repairs a copy when it can; what it opens is the same.
                path.write_bytes(state)
                accepted_by_cryptsetup(path)
                path.write_bytes(state)
                assert opens_by_cryptsetup(path, password) == judge.opens(state, password), (name, condition)
