"""Keys are added, replaced and erased on disks in use, and other people's programs judge each step.

After every change cryptsetup accepts the header, and it and qemu-io open the disk with exactly the
passphrases that are to open it; a refusal leaves every byte of the header as it was.  What is
done here is what QEMU's own tests of its amend interface do (numbers 293 to 296), and more.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import CommandError, RunningDaemon
from keyslot_disks import ITER_TIME, KINDS, PASSPHRASES, SECRETS, WRONG, Disk, Keyring, run, run_amend, tried

StartDaemon = Callable[..., RunningDaemon]

pytestmark = pytest.mark.peer("cryptsetup", "qemu-io", "qemu-img", "qemu-storage-daemon")

LAST_SLOT: Final = (
    "Attempt to erase the only active keyslot {} which will erase all the data in the image irreversibly "
    "- refusing operation"
)
LAST_PASSPHRASE: Final = (
    "All the active keyslots match the (old) password that was given and erasing them will erase all the "
    "data in the image irreversibly - refusing operation"
)
NO_SUCH: Final = "No keyslots match given (old) password for erase operation"
FULL: Final = "Can't add a keyslot - all keyslots are in use"
LOCKED: Final = 'Failed to get shared "consistent read" lock'

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def qmpd(start_daemon: StartDaemon) -> RunningDaemon:
    """A daemon that has all passphrases as secrets."""
    return start_daemon(*SECRETS)


def opened(daemon: RunningDaemon, kind: str, maker: str = "qmpd") -> Keyring:
    """A new disk with the first passphrase in slot 0, open and written to."""
    disk = Disk(daemon.directory, kind)
    if maker == "qmpd" or (kind == "qcow2" and maker == "cryptsetup"):
        disk.make_in(daemon)
    if maker != "qmpd":
        disk.make(maker)
    keys = Keyring(daemon, disk, {0: "first"})
    keys.write_pattern()
    return keys


@each_kind
@pytest.mark.parametrize("maker", ["qmpd", "qemu", "cryptsetup"])
def test_keys_fill_all_slots_and_go_down_to_one(kind: str, maker: str, qmpd: RunningDaemon) -> None:
    keys = opened(qmpd, kind, maker)
    keys.disk.judge({0: "first"})
    keys.change({0: "first", 4: "fifth"}, state="active", new_secret="fifth", keyslot=4)
    keys.change({0: "first", 1: "second", 4: "fifth"}, state="active", new_secret="second")
    keys.change(
        {0: "first", 1: "second", 3: "fourth", 4: "fifth"}, state="active", new_secret="fourth", keyslot=3
    )
    keys.change({0: "first", 1: "second", 3: "fourth"}, state="inactive", keyslot=4)
    keys.change({1: "second", 3: "fourth"}, state="inactive", old_secret="first")
    # The node was opened with a passphrase that opens nothing now.
    keys.refuse(WRONG, state="active", new_secret="third")
    keys.close()
    keys.open("fourth")

    full = {1: "second", 3: "fourth"}
    for slot in (0, 2, 4, 5):
        full |= {slot: "third"}
        assert (
            run_amend(
                qmpd,
                "disk",
                keys.disk.amend_options(state="active", new_secret="third", iter_time=ITER_TIME),
            )
            is None
        )
    keys.slots = full
    keys.disk.judge(full)
    keys.change(full := {**full, 6: "first"}, state="active", new_secret="first")
    keys.change(full := {**full, 7: "fourth"}, state="active", new_secret="fourth")
    keys.refuse(FULL, state="active", new_secret="fourth")
    keys.refuse(FULL, state="active", new_secret="fourth", force=True)
    keys.refuse(
        "Refusing to overwrite active keyslot 7 - please erase it first",
        state="active",
        new_secret="second",
        keyslot=7,
    )

    keys.change({1: "second", 3: "fourth", 6: "first", 7: "fourth"}, state="inactive", old_secret="third")
    keys.change({3: "fourth", 6: "first", 7: "fourth"}, state="inactive", old_secret="second")
    keys.change({3: "fourth", 7: "fourth"}, state="inactive", old_secret="first")
    keys.refuse(LAST_PASSPHRASE, state="inactive", old_secret="fourth")
    keys.change({7: "fourth"}, state="inactive", keyslot=3, old_secret="fourth")
    keys.refuse(LAST_SLOT.format(7), state="inactive", keyslot=7)
    keys.refuse(LAST_SLOT.format(7), state="inactive", keyslot=7, old_secret="fourth")
    keys.refuse(LAST_PASSPHRASE, state="inactive", old_secret="fourth")
    qmpd.assert_alive()


@each_kind
def test_nothing_that_is_not_there_is_erased(kind: str, qmpd: RunningDaemon) -> None:
    keys = opened(qmpd, kind)
    for force in (None, False, True):
        keys.refuse(NO_SUCH, state="inactive", old_secret="second", force=force)
        keys.refuse("No secret with id 'nobody'", state="inactive", old_secret="nobody", force=force)
        keys.refuse(
            "Given keyslot 0 doesn't contain the given old password for erase operation",
            state="inactive",
            keyslot=0,
            old_secret="second",
            force=force,
        )
        keys.refuse(
            "Given keyslot 5 doesn't contain the given old password for erase operation",
            state="inactive",
            keyslot=5,
            old_secret="first",
            force=force,
        )
    keys.refuse("Given keyslot 5 is already erased (inactive) ", state="inactive", keyslot=5)
    # Forced, an empty slot is overwritten all the same.
    keys.change({0: "first"}, state="inactive", keyslot=5, force=True)


@each_kind
def test_an_erased_key_does_not_come_back_with_an_old_header(kind: str, qmpd: RunningDaemon) -> None:
    keys = opened(qmpd, kind)
    keys.change({0: "first", 1: "second"}, state="active", new_secret="second", keyslot=1)
    before = keys.disk.header_bytes()
    keys.change({1: "second"}, state="inactive", keyslot=0)
    erased = keys.disk.header_bytes()
    keys.close()

    keys.disk.put_header(before[:4096])
    assert keys.disk.active_slots() == [0, 1]
    test = ("cryptsetup", "open", "--test-passphrase", keys.disk.shown_to_cryptsetup(), "--key-file")
    assert tried(keys.disk.directory, *test, "first").returncode == 2
    assert tried(keys.disk.directory, *test, "second").returncode == 0
    with pytest.raises(CommandError, match=WRONG):
        keys.open("first")
    keys.open("second")
    keys.reads_pattern()

    # Not one sector of the key material is what it was.
    start, stripes = struct.unpack_from(">II", before, 208 + 40)
    length = stripes * struct.unpack_from(">I", before, 108)[0]
    for offset in range(start * 512, start * 512 + length, 512):
        old = before[offset : offset + 512]
        assert old not in (bytes(512), erased[offset : offset + 512]), f"sector at {offset} of the header"


@each_kind
def test_a_passphrase_is_changed_while_the_disk_is_in_use(kind: str, qmpd: RunningDaemon) -> None:
    keys = opened(qmpd, kind)
    keys.change({0: "first", 1: "second"}, state="active", new_secret="second")
    keys.change({0: "first", 1: "second", 5: "third"}, state="active", new_secret="third", keyslot=5)
    keys.change({1: "second", 5: "third"}, state="inactive", old_secret="first")
    keys.close()
    with pytest.raises(CommandError, match=WRONG):
        keys.open("first")
    keys.open("second")
    keys.reads_pattern()


@each_kind
def test_whoever_adds_a_key_shows_another_one(kind: str, qmpd: RunningDaemon) -> None:
    keys = opened(qmpd, kind)
    keys.change({0: "first", 1: "second"}, state="active", new_secret="second")
    keys.refuse(WRONG, state="active", new_secret="third", secret="fourth")
    keys.refuse("No secret with id 'nobody'", state="active", new_secret="third", secret="nobody")
    keys.refuse("No secret with id 'nobody'", state="active", new_secret="nobody")
    keys.change({1: "second"}, state="inactive", old_secret="first")
    keys.refuse(WRONG, state="active", new_secret="third")
    keys.change({0: "third", 1: "second"}, state="active", new_secret="third", secret="second")
    qmpd.execute("object-del", {"id": "first"})
    keys.refuse("No secret with id 'first'", state="active", new_secret="fourth")
    keys.change({0: "third", 1: "second", 2: "fourth"}, state="active", new_secret="fourth", secret="third")


@each_kind
def test_force_overwrites_a_slot_and_erases_the_last_one(kind: str, qmpd: RunningDaemon) -> None:
    keys = opened(qmpd, kind)
    keys.change({0: "first", 4: "second"}, state="active", new_secret="second", keyslot=4)
    keys.change({0: "first", 2: "fourth", 4: "second"}, state="active", new_secret="fourth", keyslot=2)
    refusal = "Refusing to overwrite active keyslot 2 - please erase it first"
    keys.refuse(refusal, state="active", new_secret="fifth", keyslot=2)
    keys.refuse(refusal, state="active", new_secret="fifth", keyslot=2, force=False)
    keys.change(
        {0: "first", 2: "fifth", 4: "second"}, state="active", new_secret="fifth", keyslot=2, force=True
    )
    keys.change({0: "first", 1: "first", 2: "fifth", 4: "second"}, state="active", new_secret="first")
    keys.change({0: "first", 1: "first", 4: "second"}, state="inactive", old_secret="fifth")
    keys.change({0: "first", 1: "first"}, state="inactive", keyslot=4)
    keys.refuse(LAST_PASSPHRASE, state="inactive", old_secret="first")
    keys.change({}, state="inactive", old_secret="first", force=True)
    # Nothing opens it any more; who has it open goes on using it.
    keys.write_pattern()
    keys.refuse(NO_SUCH, state="inactive", old_secret="first", force=True)
    keys.refuse(WRONG, state="active", new_secret="second")


@each_kind
def test_force_saves_an_open_disk_that_has_no_key_any_more(kind: str, qmpd: RunningDaemon) -> None:
    """QEMU refuses: "Invalid password, cannot unlock any keyslot", and the disk is lost when it is closed."""
    keys = opened(qmpd, kind)
    keys.change({}, state="inactive", keyslot=0, force=True)
    keys.refuse(WRONG, state="active", new_secret="second")
    keys.change({0: "second"}, state="active", new_secret="second", force=True)
    keys.close()
    keys.open("second")
    keys.reads_pattern()


@each_kind
def test_force_replaces_the_slots_that_an_old_passphrase_opens(kind: str, qmpd: RunningDaemon) -> None:
    """QEMU refuses 'old-secret' here, with force or without."""
    keys = opened(qmpd, kind)
    keys.change({0: "first", 3: "second"}, state="active", new_secret="second", keyslot=3)
    keys.change({0: "first", 3: "second", 6: "second"}, state="active", new_secret="second", keyslot=6)
    refusal = "'old-secret' must not be given when activating keyslots"
    keys.refuse(refusal, state="active", new_secret="third", old_secret="second")
    keys.refuse(refusal, state="active", new_secret="third", old_secret="nobody")
    keys.change(
        {0: "first", 3: "third", 6: "third"},
        state="active",
        new_secret="third",
        old_secret="second",
        force=True,
    )
    keys.refuse(NO_SUCH, state="active", new_secret="fourth", old_secret="second", force=True)


# -- who else has the disk


# A qcow2 image can be open in one process only, so these are not about such images.


@pytest.mark.parametrize("kind", ["luks", "detached"])
def test_a_disk_that_another_process_has_open_keeps_its_keys(
    kind: str, qmpd: RunningDaemon, start_daemon: StartDaemon
) -> None:
    keys = opened(qmpd, kind)
    keys.change({0: "first", 1: "second"}, state="active", new_secret="second")
    other = Keyring(start_daemon(*SECRETS, name="other"), keys.disk, keys.slots)
    for one in (keys, other):
        one.refuse(LOCKED, state="active", new_secret="third")
        one.refuse(LOCKED, state="inactive", keyslot=1, force=True)
    keys.close()
    other.change({0: "first", 1: "second", 2: "third"}, state="active", new_secret="third")

    refused = keys.disk.qemu_img_amend("first", state="active", new_secret="fourth")
    assert refused is not None
    assert refused.startswith(LOCKED)
    keys.disk.judge(other.slots)


@pytest.mark.parametrize("kind", ["luks", "detached"])
def test_one_reader_elsewhere_is_enough(kind: str, qmpd: RunningDaemon, start_daemon: StartDaemon) -> None:
    keys = opened(qmpd, kind)
    keys.close()
    keys.open("first", **{"read-only": True})
    other = Keyring(start_daemon(*SECRETS, name="other"), keys.disk, keys.slots)
    keys.refuse("Block node is read-only", state="active", new_secret="second")
    other.refuse(LOCKED, state="active", new_secret="second")
    qmpd.execute(
        "blockdev-reopen",
        {"options": [{**keys.disk.node_options("first"), "node-name": "disk", "read-only": False}]},
    )
    keys.refuse(LOCKED, state="active", new_secret="second")
    other.close()
    keys.change({0: "first", 1: "second"}, state="active", new_secret="second")


@pytest.mark.parametrize("shared", [False, True])
def test_a_disk_of_two_guests_is_shared_only_if_both_say_so(
    shared: bool, qmpd: RunningDaemon, start_daemon: StartDaemon
) -> None:
    keys = opened(qmpd, "luks")
    other = Keyring(start_daemon(*SECRETS, name="other"), keys.disk, keys.slots)
    device = {"driver": "virtio-blk-pci", "id": "vda", "drive": "disk", "share-rw": shared}
    qmpd.execute("device_add", device)
    if shared:
        other.daemon.execute("device_add", device)
        keys.refuse(LOCKED, state="active", new_secret="second")
        return
    with pytest.raises(CommandError, match='Failed to get "write" lock'):
        other.daemon.execute("device_add", device)


def test_any_node_of_a_daemon_amends_the_header_that_several_share(
    qmpd: RunningDaemon, tmp_path: Path
) -> None:
    keys = opened(qmpd, "detached")
    (tmp_path / "other.img").write_bytes(bytes(1 << 20))
    twin = Disk(tmp_path, "detached")
    twin.image = tmp_path / "other.img"
    others = Keyring(qmpd, twin, keys.slots, node="twin")
    others.write_pattern()
    keys.change({0: "first", 1: "second"}, state="active", new_secret="second")
    assert others.known_slots() == [0, 1]
    others.slots = keys.slots
    others.change({1: "second"}, state="inactive", old_secret="first")
    assert keys.known_slots() == [1]
    keys.write_pattern()
    keys.slots = others.slots
    keys.change({1: "second", 2: "third"}, state="active", new_secret="third", secret="second", keyslot=2)


def test_a_qcow2_image_under_an_export_and_an_overlay_changes_its_keys(qmpd: RunningDaemon) -> None:
    keys = opened(qmpd, "qcow2")
    directory = qmpd.directory
    run(
        directory,
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-F",
        "qcow2",
        "-b",
        "disk.qcow2",
        "top",
        "1M",
    )
    top = {"driver": "qcow2", "file": {"driver": "file", "filename": "top"}, "backing": "disk"}
    qmpd.execute("blockdev-add", {**top, "node-name": "top"})
    qmpd.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}})
    qmpd.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "top", "writable": True})
    keys.change({0: "first", 1: "second"}, state="active", new_secret="second")
    keys.change({1: "second"}, state="inactive", old_secret="first")
    said = qmpd.qemu_io("top", "read -P 0x5a 0 4096")
    assert said.startswith("read 4096/4096")
    assert "failed" not in said


# -- headers of other people


#: What cryptsetup can make and QEMU reads: cipher and mode, bits of the key, hash.
FORMATS: Final = (
    ("aes-xts-plain64", 256, "sha1"),
    ("aes-xts-plain64", 512, "sha512"),
    ("aes-xts-plain", 512, "sha256"),
    ("aes-cbc-essiv:sha256", 128, "sha256"),
    ("aes-cbc-essiv:sha256", 256, "sha512"),
    ("aes-cbc-plain64", 256, "sha1"),
    ("aes-cbc-plain", 128, "sha256"),
)


@each_kind
@pytest.mark.parametrize(("cipher", "bits", "hash_name"), FORMATS, ids=str)
def test_headers_of_any_cipher_and_hash_get_new_keys(
    kind: str, cipher: str, bits: int, hash_name: str, qmpd: RunningDaemon
) -> None:
    disk = Disk(qmpd.directory, kind)
    if kind == "qcow2":
        disk.make_in(qmpd)
    disk.make_with_cryptsetup("--cipher", cipher, "--key-size", str(bits), "--hash", hash_name, slot=3)
    keys = Keyring(qmpd, disk, {3: "first"})
    keys.write_pattern()
    keys.change({0: "second", 3: "first"}, state="active", new_secret="second")
    keys.change({0: "second", 3: "first", 7: "third"}, state="active", new_secret="third", keyslot=7)
    keys.change({0: "second", 7: "third"}, state="inactive", old_secret="first")
    keys.change(
        {0: "fourth", 7: "third"}, state="active", new_secret="fourth", secret="third", keyslot=0, force=True
    )


@each_kind
def test_key_material_is_where_the_header_says(kind: str, qmpd: RunningDaemon) -> None:
    """The slots' material is in reversed order, as nobody's `luksFormat` lays it out."""
    disk = Disk(qmpd.directory, kind)
    if kind == "qcow2":
        disk.make_in(qmpd)
    disk.make_with_cryptsetup("--key-size", "512")
    disk.put_header(reversed_material(disk.header_bytes()))
    keys = Keyring(qmpd, disk, {0: "first"})
    keys.write_pattern()
    disk.judge({0: "first"})
    keys.change({0: "first", 1: "second"}, state="active", new_secret="second")
    keys.change({0: "first", 1: "second", 7: "third"}, state="active", new_secret="third", keyslot=7)
    keys.change({1: "second", 7: "third"}, state="inactive", keyslot=0)
    keys.change(
        {1: "fourth", 7: "third"}, state="active", new_secret="fourth", secret="third", keyslot=1, force=True
    )


def reversed_material(header: bytes) -> bytes:
    """The same header with the key material of slot 0 last and that of slot 7 first."""
    fields = [208 + 48 * slot + 40 for slot in range(8)]
    starts = [struct.unpack_from(">I", header, field)[0] for field in fields]
    length = 4000 * struct.unpack_from(">I", header, 108)[0]
    changed = bytearray(header)
    for field, old, new in zip(fields, starts, reversed(starts), strict=True):
        struct.pack_into(">I", changed, field, new)
        changed[new * 512 : new * 512 + length] = header[old * 512 : old * 512 + length]
    return bytes(changed)


@each_kind
@pytest.mark.parametrize("seed", range(2))
def test_keys_changed_in_turn_by_qmpd_qemu_img_and_cryptsetup(
    kind: str, seed: int, qmpd: RunningDaemon
) -> None:
    """Each goes on where the one before left off; whoever does it, the judges agree on the result."""
    dice = random.Random(seed)
    keys = opened(qmpd, kind, ("qmpd", "cryptsetup")[seed])
    disk, slots = keys.disk, dict(keys.slots)
    keys.close()
    for step in range(7):
        program = ("qmpd", "cryptsetup", "qmpd", "qemu-img")[step % 4]
        shown = dice.choice(sorted(set(slots.values())))
        free = [slot for slot in range(8) if slot not in slots]
        adds = len(slots) < 2 or (bool(free) and dice.random() < 0.6)
        new = dice.choice(PASSPHRASES)
        if adds:
            slot = dice.choice(free)
            slots[slot] = new
        else:
            slot = dice.choice(sorted(slots))
            del slots[slot]
            shown = dice.choice(sorted(set(slots.values())))
        members: dict[str, Any] = {"state": "inactive", "keyslot": slot}
        if adds:
            members = {"state": "active", "keyslot": slot, "new_secret": new}
        if program == "qmpd":
            keys.open(shown)
            keys.change(slots, **members)
            keys.close()
        elif program == "qemu-img":
            if adds:
                members["iter_time"] = ITER_TIME
            assert disk.qemu_img_amend(shown, **members) is None
        elif adds:
            disk.cryptsetup("luksAddKey", "--key-file", shown, "--key-slot", str(slot), new)
        else:
            disk.cryptsetup("luksKillSlot", str(slot), "--key-file", shown)
        disk.judge(slots)
        keys.slots = dict(slots)


@each_kind
def test_an_open_disk_follows_what_cryptsetup_did_to_its_header(kind: str, qmpd: RunningDaemon) -> None:
    """cryptsetup minds no locks: what it changed meanwhile is neither overlooked nor undone."""
    keys = opened(qmpd, kind)
    keys.disk.cryptsetup("luksAddKey", "--key-file", "first", "--key-slot", "1", "second")
    keys.change({0: "first", 1: "second", 2: "third"}, state="active", new_secret="third")
    keys.disk.cryptsetup("luksChangeKey", "--key-file", "first", "--key-slot", "0", "fourth")
    keys.slots[0] = "fourth"
    keys.disk.judge(keys.slots)
    assert run_amend(qmpd, "disk", keys.disk.amend_options(state="active", new_secret="fifth")) == WRONG
    keys.change({0: "fourth", 1: "second"}, state="inactive", old_secret="third")
    keys.disk.cryptsetup("luksRemoveKey", "--key-file", "second")
    keys.change({0: "fourth", 1: "fifth"}, state="active", new_secret="fifth", secret="fourth")
