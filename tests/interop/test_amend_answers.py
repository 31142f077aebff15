"""qmpd's amend job and `qemu-img amend` answer alike, whatever is asked of whatever header.

For every combination both get a copy of the same image.  They must refuse with the same words, or both
do it, and the same slots must be in use afterwards.  (`qemu-img` does not take 'secret'; what QEMU's
daemon says about that is in tests/conformance.)
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import RunningDaemon
from keyslot_disks import ITER_TIME, KINDS, SECRETS, Disk, Slots, run_amend

StartDaemon = Callable[..., RunningDaemon]

pytestmark = pytest.mark.peer("cryptsetup", "qemu-img")

#: In a keyslot's first field (LUKS On-Disk Format Specification 1.2.3, section 2.1).
IN_USE: Final = 0x00AC71F3

STATES: Final[dict[str, Slots]] = {
    "one slot in use": {0: "first"},
    "some slots in use": {0: "first", 1: "second", 4: "third"},
    "all slots in use": dict(enumerate(["first", "second", "third", "fourth"] * 2)),
    "the last slot in use": {7: "first"},
    "one passphrase in some slots": {0: "first", 2: "first", 5: "second"},
    "one passphrase in all slots in use": {0: "first", 3: "first"},
}


def active(**members: Any) -> dict[str, Any]:
    return {"state": "active", **members}


def inactive(**members: Any) -> dict[str, Any]:
    return {"state": "inactive", **members}


#: What is asked, with and without force.
ERASURES_AND_REFUSALS: Final = (
    active(),
    active(old_secret="first"),
    active(keyslot=0),
    active(new_secret="nobody", keyslot=8),
    active(new_secret="fifth", keyslot=8),
    active(new_secret="fifth", keyslot=-1),
    inactive(),
    inactive(new_secret="fifth"),
    inactive(iter_time=10),
    inactive(keyslot=0, new_secret="fifth"),
    inactive(keyslot=0, iter_time=10),
    inactive(new_secret="fifth", iter_time=10),
    *(inactive(keyslot=slot) for slot in (0, 1, 3, 5, 7, 8, -1)),
    *(inactive(old_secret=secret) for secret in ("first", "second", "fifth", "nobody")),
    *(inactive(keyslot=slot, old_secret="first") for slot in (0, 1, 2, 7, 8)),
    inactive(keyslot=0, old_secret="second"),
    inactive(keyslot=8, old_secret="fifth"),
    inactive(keyslot=0, old_secret="nobody"),
    inactive(keyslot=8, old_secret="nobody"),
)

#: Refused without force; with it they are ours.
ONLY_WITHOUT_FORCE: Final = (
    active(new_secret="fifth", old_secret="first"),
    active(new_secret="fifth", old_secret="fifth"),
    active(new_secret="nobody", old_secret="nobody"),
)

#: Each costs QEMU some seconds where it is done, for it measures the machine anew.
#: With each, whether by force.
ACTIVATIONS: Final[dict[str, tuple[tuple[dict[str, Any], bool], ...]]] = {
    "one slot in use": (
        (active(new_secret="fifth"), False),
        (active(new_secret="first", keyslot=7, iter_time=ITER_TIME), False),
        (active(new_secret="fifth", keyslot=0), False),
        (active(new_secret="fifth", keyslot=0, iter_time=ITER_TIME), True),
        (active(new_secret="nobody"), False),
        (active(new_secret="nobody"), True),
    ),
    "all slots in use": (
        (active(new_secret="fifth"), False),
        (active(new_secret="fifth"), True),
        (active(new_secret="nobody"), False),
        (active(new_secret="fifth", keyslot=6), False),
        (active(new_secret="fifth", keyslot=6, iter_time=ITER_TIME), True),
    ),
    "the last slot in use": (
        (active(new_secret="fifth"), False),
        (active(new_secret="fifth", keyslot=7), False),
    ),
    "one passphrase in some slots": ((active(new_secret="first"), False),),
}


def make(directory: Path, kind: str, slots: Slots, daemon: RunningDaemon) -> Disk:
    """An empty disk with these passphrases in these slots, and nobody who has it open."""
    disk = Disk(directory, kind)
    if kind == "qcow2":
        disk.make_in(daemon)
    (first, passphrase), *others = slots.items()
    assert passphrase == "first"
    disk.make_with_cryptsetup(slot=first)
    for slot, name in others:
        disk.cryptsetup("luksAddKey", "--key-file", "first", "--key-slot", str(slot), name)
    assert disk.active_slots() == sorted(slots)
    return disk


def copy(disk: Disk, name: str) -> Disk:
    """The same disk in a directory of its own."""
    directory = disk.directory / name
    directory.mkdir(exist_ok=True)
    other = Disk(directory, disk.kind)
    for path in {disk.image, disk.header}:
        shutil.copy(path, directory)
    return other


def slots_in_use(disk: Disk) -> list[int]:
    """As :meth:`Disk.active_slots`, but without a process for each look."""
    header = disk.header_bytes()
    return [slot for slot in range(8) if struct.unpack_from(">I", header, 208 + 48 * slot)[0] == IN_USE]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", STATES)
def test_both_refuse_with_the_same_words_or_change_the_same_slots(
    kind: str, state: str, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(*SECRETS)
    disk = make(daemon.directory, kind, STATES[state], daemon)
    asked = [(members, force) for members in ERASURES_AND_REFUSALS for force in (False, True)]
    asked += [(members, False) for members in ONLY_WITHOUT_FORCE]
    asked += ACTIVATIONS.get(state, ())
    answers: dict[str, dict[str, tuple[str | None, list[int]]]] = {"qmpd": {}, "qemu-img": {}}
    fresh = False
    for members, force in asked:
        if members["state"] == "active" and "keyslot" not in members:
            members = {**members, "iter_time": ITER_TIME}
        if not fresh:
            ours, theirs = copy(disk, "ours"), copy(disk, "theirs")
            daemon.execute("blockdev-add", {**ours.node_options("first"), "node-name": "disk"})
        question = f"{members} {'with' if force else 'without'} force"
        our_answer = run_amend(daemon, "disk", ours.amend_options(**members), force=force)
        their_answer = theirs.qemu_img_amend("first", force=force, **members)
        answers["qmpd"][question] = our_answer, slots_in_use(ours)
        answers["qemu-img"][question] = their_answer, slots_in_use(theirs)
        # Who refuses leaves the image as it was, so the next question can be asked of it.
        fresh = None not in (our_answer, their_answer)
        if not fresh:
            daemon.execute("blockdev-del", {"node-name": "disk"})
    assert answers["qmpd"] == answers["qemu-img"]
    daemon.assert_alive()
