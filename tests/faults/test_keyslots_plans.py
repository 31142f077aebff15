"""A change of keyslots may be cut off anywhere, and a passphrase opens the disk that should.

What a failing power supply may leave is in `interrupted_plans.py`; what a killed daemon leaves, whose
writes stay in the page cache, is a part of it (`test_keyslots_killed.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from interrupted_plans import left_by_a_crash
from luks_volumes import (
    Judge,
    Passwords,
    accepted_by_cryptsetup,
    activation,
    carried_out,
    extent,
    filled,
    new_area,
    opens_by_cryptsetup,
    opens_by_qemu_io,
    parse,
    sectors_in_common,
)

from qmpd.crypto.luks1 import SECTOR, SLOTS, slot_extent
from qmpd.crypto.luks1_keyslots import HEADER_SECTORS_BYTES, erase_plan
from qmpd.crypto.plan import Plan, Write

OLD, NEW, OTHER = b"old", b"new", b"other"

EIGHT = {slot: b"other-%d" % slot for slot in range(SLOTS)}


@cache
def volume(name: str, *, detached: bool) -> bytes:
    """The volume before a change."""
    return filled(base(detached=detached), CHANGES[name].before, detached=detached)


@cache
def plan_of(name: str) -> Plan:
    """A plan for the volume with a detached header."""
    return CHANGES[name].plan(volume(name, detached=True), detached=True)


@cache
def base(*, detached: bool) -> bytes:
    return new_area(detached=detached)


@dataclass(frozen=True)
class Change:
    """A change of keyslots, and what it promises.

    :param before: the passphrases before.
    :param slots: the slots that are changed.
    :param password: what comes into them; None to erase them.
    :param always: these open the disk at any moment.
    :param either: of each of these pairs at least one does.
    """

    before: Passwords
    slots: list[int]
    password: bytes | None
    always: frozenset[bytes] = frozenset()
    either: tuple[tuple[bytes, bytes], ...] = ()

    def plan(self, area: bytes, *, detached: bool) -> Plan:
        if self.password is not None:
            known = next(iter(self.before.values()))
            return activation(area, self.slots, known, self.password, detached=detached)[1]
        return erase_plan(parse(area, detached=detached), area[:HEADER_SECTORS_BYTES], self.slots)[1]

    @property
    def after(self) -> dict[int, bytes]:
        left = {slot: password for slot, password in self.before.items() if slot not in self.slots}
        return left if self.password is None else left | dict.fromkeys(self.slots, self.password)


def others(but: int) -> dict[int, bytes]:
    return {slot: password for slot, password in EIGHT.items() if slot != but}


CHANGES: dict[str, Change] = {
    **{
        f"a key comes into slot {n}": Change({(n + 1) % SLOTS: OLD}, [n], NEW, always=frozenset({OLD}))
        for n in range(SLOTS)
    },
    **{
        f"slot {n} is erased": Change({n: OLD, (n + 1) % SLOTS: OTHER}, [n], None, always=frozenset({OTHER}))
        for n in (0, 3, 5, 6)
    },
    **{
        f"the only key, in slot {n}, is replaced": Change({n: OLD}, [n], NEW, either=((OLD, NEW),))
        for n in (0, 3, 6, 7)
    },
    **{
        f"one of eight keys, in slot {n}, is replaced": Change(
            {**others(n), n: OLD}, [n], NEW, always=frozenset(others(n).values())
        )
        for n in (0, 6, 7)
    },
    "the last key comes into the last free slot": Change(
        {slot: EIGHT[slot] for slot in range(7)}, [7], NEW, always=frozenset(others(7).values())
    ),
    "several slots of one passphrase are erased": Change(
        {0: OLD, 3: OLD, 6: OLD, 7: OTHER}, [0, 3, 6], None, always=frozenset({OTHER})
    ),
    "several slots of one passphrase are replaced": Change(
        {1: OLD, 5: OLD, 6: OLD, 7: OTHER}, [1, 5, 6], NEW, always=frozenset({OTHER}), either=((OLD, NEW),)
    ),
    "all slots have one passphrase, and are replaced": Change(
        dict.fromkeys(range(SLOTS), OLD), list(range(SLOTS)), NEW, either=((OLD, NEW),)
    ),
    "everything is erased": Change({0: OLD, 6: OTHER}, [0, 6], None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_wherever_a_change_is_cut_off_a_passphrase_opens_the_disk(name: str) -> None:
    change, judge = CHANGES[name], Judge(detached=True)
    area = volume(name, detached=True)
    plan = plan_of(name)
    everybody = {*change.before.values(), *change.after.values()}
    assert judge.opened(area, everybody) == change.before

    both = False
    for state in left_by_a_crash(area, plan, random.Random(name)):
        judge.header(state)
        for slot, password in change.before.items():
            assert password not in change.always or judge.opens(state, password, slot), password
        for first, second in change.either:
            opens = judge.opens(state, first), judge.opens(state, second)
            assert any(opens)
            both |= all(opens)
    # Nothing goes before what replaces it has arrived.
    assert both or not change.either
    assert judge.opened(carried_out(area, plan), everybody) == change.after


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_is_left_of_a_key_that_is_gone(name: str) -> None:
    change = CHANGES[name]
    area = volume(name, detached=True)
    header = parse(area, detached=True)
    plan = plan_of(name)
    after = carried_out(area, plan)
    for slot in change.slots:
        if slot not in change.before:
            continue
        start, end = extent(header, slot)
        material = area[start:end]
        assert sectors_in_common(material, area) == len(material) // SECTOR
        assert sectors_in_common(material, after) == 0
        salt = header.slots[slot].salt
        assert salt in area
        assert salt not in after
    # What helped for a while is gone as well: each key lies in its own slot, and nowhere else.
    for slot in change.after:
        start, end = extent(header, slot)
        assert sectors_in_common(after[start:end], after[:start] + after[end:]) == 0
    # All of it has been flushed.
    assert not isinstance(plan[-1], Write)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_writes_whole_sectors_of_the_header_and_of_the_slots_concerned(name: str) -> None:
    change = CHANGES[name]
    area = volume(name, detached=True)
    # What nobody knows of lies behind the header, and between the slots.
    header = parse(area, detached=True)
    used = {
        sector for slot in range(SLOTS) for sector in range(*(at // SECTOR for at in extent(header, slot)))
    }
    marked = bytearray(area)
    for sector in {1, 7} | {number for number in range(8, len(area) // SECTOR) if number not in used}:
        end = (sector + 1) * SECTOR
        marked[end - 64 : end] = b"~" * 64
    area = bytes(marked)
    plan = change.plan(area, detached=True)
    after = carried_out(area, plan)
    spare = {max(set(range(SLOTS)) - set(change.before), default=0)}
    changed = {*change.slots, *spare}
    allowed = set()
    for slot in changed:
        allowed |= set(range(*extent(header, slot)))
        start, length = slot_extent(slot)
        allowed |= set(range(start, start + length))
    assert {at for at in range(len(area)) if area[at] != after[at]} <= allowed
    assert all(
        step.offset % SECTOR == len(step.data) % SECTOR == 0 for step in plan if isinstance(step, Write)
    )


Opens = Callable[[Path, bytes], bool]


def by_qemu_io(path: Path, password: bytes) -> bool:
    return opens_by_qemu_io(f"driver=luks,key-secret=k,file.driver=file,file.filename={path}", password)


@pytest.mark.peer("cryptsetup", "qemu-io")
@pytest.mark.parametrize("seed", range(3))
def test_others_agree_on_what_a_cut_off_change_leaves(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = tmp_path / "volume"
    for name in chance.sample(sorted(CHANGES), 6):
        change, judge = CHANGES[name], Judge(detached=False)
        area = volume(name, detached=False)
        states = list(left_by_a_crash(area, change.plan(area, detached=False), chance))
        for state in chance.sample(states, 2):
            path.write_bytes(state + bytes(64 << 10))
            accepted_by_cryptsetup(path)
            for password in chance.sample([OLD, NEW, OTHER, b"other-3"], 2):
                opens: Opens = chance.choice([opens_by_cryptsetup, by_qemu_io])
                assert opens(path, password) == judge.opens(state, password), (name, password, opens)
