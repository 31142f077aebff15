"""A LUKS2 header is saved, put back and looked at through QMP; cryptsetup judges the outcome."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import RunningDaemon
from header_disks import PREFIX, HeaderDisk

FIRST: Final = "first"
SECOND: Final = "second"
MEBIBYTE: Final = 1 << 20

pytestmark = pytest.mark.peer("cryptsetup")

ARGON2: Final = (
    *("--pbkdf=argon2id", "--pbkdf-memory=64", "--pbkdf-force-iterations=4"),
    "--pbkdf-parallel=1",
)


def cryptsetup(*arguments: str, password: str = FIRST) -> str:
    command = ["cryptsetup", "--batch-mode", *arguments]
    done = subprocess.run(command, input=password, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
    return done.stdout


def opens(password: str, header: Path, *more: str) -> bool:
    """Whether cryptsetup opens this header with that passphrase."""
    command = ["cryptsetup", "open", "--test-passphrase", "--key-file=-", *more, str(header)]
    return (
        subprocess.run(command, input=password, text=True, capture_output=True, check=False).returncode == 0
    )


def blank(path: Path) -> None:
    """Room for a header."""
    with path.open("wb") as file:
        file.truncate(16 * MEBIBYTE)


class Disk(HeaderDisk):
    """A disk that cryptsetup has made, with its header in front or detached, opened by a qmpd of its own."""

    def __init__(self, directory: Path, daemon: RunningDaemon, *, detached: bool) -> None:
        super().__init__(directory, daemon.connect())
        self.detached = detached
        self.payload = directory / "payload"
        self.header = directory / "header" if detached else self.payload
        with self.payload.open("wb") as file:
            file.truncate(20 * MEBIBYTE)
        place = (f"--header={self.header}",) if detached else ()
        if detached:
            blank(self.header)
        options = ("--type=luks2", "--label=a disk", "--key-file=-", *ARGON2)
        cryptsetup("luksFormat", *options, *place, str(self.payload))
        for secret in (FIRST, SECOND):
            self.daemon.execute("object-add", {"qom-type": "secret", "id": secret, "data": secret})
        self.open()

    def open(self) -> None:
        options: dict[str, Any] = {
            "node-name": "disk",
            "driver": "luks",
            "file": {"driver": "file", "filename": str(self.payload)},
            "key-secret": FIRST,
        }
        if self.detached:
            options["header"] = {"driver": "file", "filename": str(self.header)}
        self.daemon.execute("blockdev-add", options)

    def amend(self, **options: Any) -> None:
        assert self.job("x-blockdev-amend", options={"driver": "luks", **options}) is None

    def add_second(self) -> None:
        self.amend(state="active", pbkdf="pbkdf2", **{"new-secret": SECOND, "iter-time": 1})

    def keyslots(self) -> dict[str, Any]:
        info: dict[str, Any] = self.daemon.execute(f"{PREFIX}query-luks-keyslots", {"node-name": "disk"})
        return info

    def active(self) -> list[int]:
        return [slot["slot"] for slot in self.keyslots()["slots"] if slot["active"]]

    def overwrite(self, data: bytes, offset: int = 0) -> None:
        """Damage the header behind the daemon's back."""
        with self.header.open("r+b") as file:
            file.seek(offset)
            file.write(data)


@pytest.fixture(params=["inline", "detached"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, daemon: RunningDaemon) -> Disk:
    return Disk(tmp_path, daemon, detached=request.param == "detached")


@pytest.fixture
def detached(tmp_path: Path, daemon: RunningDaemon) -> Disk:
    return Disk(tmp_path, daemon, detached=True)


def test_a_backup_is_the_one_that_cryptsetup_makes_without_what_no_slot_uses(disk: Disk) -> None:
    disk.add_second()
    disk.amend(state="inactive", keyslot=0, **{"old-secret": FIRST})
    path = disk.backup()
    disk.close()
    theirs = disk.directory / "theirs"
    cryptsetup("luksHeaderBackup", "--header-backup-file", str(theirs), str(disk.header))
    expected = bytearray(theirs.read_bytes())
    area = json.loads(cryptsetup("luksDump", "--dump-json-metadata", str(disk.header)))["keyslots"]["1"][
        "area"
    ]
    start, end = int(area["offset"]), int(area["offset"]) + int(area["size"])
    assert any(expected[32768:start]), "the erased slot was there"
    expected[32768:start] = bytes(start - 32768)
    expected[end:] = bytes(len(expected) - end)
    assert path.read_bytes() == expected
    assert [opens(password, path) for password in (FIRST, SECOND)] == [False, True]
    assert opens(SECOND, disk.payload, "--header", str(path))


def test_either_puts_back_what_the_other_saved(detached: Disk) -> None:
    ours = detached.backup()
    detached.close()
    theirs = detached.directory / "theirs"
    cryptsetup("luksHeaderBackup", "--header-backup-file", str(theirs), str(detached.header))
    detached.open()
    for number, path in enumerate((theirs, ours)):
        detached.add_second()
        detached.amend(state="inactive", keyslot=0)
        assert detached.active() == [1]
        if number == 0:
            assert detached.restore(path) is None
            assert detached.keyslots()["state"] == "unchanged"
        detached.close()
        if number == 1:
            cryptsetup("luksHeaderRestore", "--header-backup-file", str(path), str(detached.header))
        assert [opens(password, detached.header) for password in (FIRST, SECOND)] == [True, False]
        detached.open()
        assert detached.active() == [0]


@pytest.mark.parametrize("what", ["noise", "all of it", "primary copy", "key material"])
def test_a_damaged_header_is_put_back_while_the_disk_is_open(detached: Disk, what: str) -> None:
    detached.add_second()
    backup = detached.backup()
    sequence = detached.keyslots()["sequence"]
    match what:
        case "noise":
            detached.overwrite(os.urandom(MEBIBYTE))
        case "all of it":
            os.truncate(detached.header, 0)
        case "primary copy":
            detached.overwrite(bytes(4096))
            assert detached.keyslots()["damaged"] == ["There is no primary LUKS2 header"]
        case "key material":
            detached.overwrite(bytes(1 << 19), 32768)
    damaged = what in ("noise", "all of it")
    assert detached.keyslots()["state"] == ("damaged" if damaged else "unchanged")
    assert detached.restore(backup) is None
    info = detached.keyslots()
    assert (info["state"], info["damaged"], info["sequence"]) == ("unchanged", [], sequence + 1)
    detached.close()
    assert f"Epoch:         \t{sequence + 1}" in cryptsetup("luksDump", str(detached.header))
    assert [opens(password, detached.header) for password in (FIRST, SECOND)] == [True, True]
    with detached.header.open("r+b") as file:
        file.write(bytes(16384))
    assert opens(FIRST, detached.header), "the secondary copy is good too"


def test_without_a_backup_a_header_becomes_what_is_known_of_it(detached: Disk) -> None:
    assert detached.restore(None, force=True) == (
        "The LUKS header can be read: to change it back, name a backup"
    )
    detached.overwrite(os.urandom(32768))
    assert detached.restore(None) is None
    detached.close()
    assert opens(FIRST, detached.header)


def test_what_is_of_another_volume_is_refused_and_nothing_changes(detached: Disk) -> None:
    other = detached.directory / "other"
    blank(other)
    cryptsetup(
        *("luksFormat", "--type=luks2", "--key-file=-", *ARGON2, f"--header={other}", str(detached.payload))
    )
    version_1 = detached.directory / "version-1"
    blank(version_1)
    cryptsetup(
        *("luksFormat", "--type=luks1", "--key-file=-", "--pbkdf-force-iterations=1000"),
        *(f"--header={version_1}", str(detached.payload)),
    )
    backup = detached.backup()
    before = detached.header.read_bytes()
    lead = "The backup is of another volume: its"
    for path, what in ((other, "salt of the volume key's digest"), (version_1, "version")):
        assert detached.restore(path, force=True) == f"{lead} {what} is not the one of this volume"
    cut = detached.directory / "cut"
    cut.write_bytes(before[:65536])
    assert (detached.restore(cut) or "").startswith("The backup is cut short: it has 65536 bytes")
    assert detached.header.read_bytes() == before
    detached.overwrite(other.read_bytes())
    assert detached.keyslots()["state"] == "other"
    assert detached.restore(backup) == (
        "There is a LUKS header of another volume now - refusing to overwrite it"
    )
    assert detached.restore(backup, force=True) is None
    assert opens(FIRST, detached.header)


def test_slots_are_told_with_costs_priorities_tokens_and_whose_key_they_hold(detached: Disk) -> None:
    detached.close()
    header = str(detached.header)
    second = detached.directory / "second"
    second.write_text(SECOND)
    for more in (
        ("--pbkdf=argon2i", "--pbkdf-memory=4096", "--pbkdf-force-iterations=5", "--pbkdf-parallel=2"),
        ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=10000", "--hash=sha512", "--key-slot=9"),
        ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--unbound", "--key-size=256"),
    ):
        cryptsetup("luksAddKey", "--key-file=-", *more, header, str(second))
    cryptsetup("config", "--key-slot=9", "--priority=prefer", header)
    cryptsetup("token", "add", "--key-description=mine", "--key-slot=1", header)
    detached.open()
    info = detached.keyslots()
    assert (info["type"], info["state"], info["label"], info["damaged"]) == (
        "luks2",
        "unchanged",
        "a disk",
        [],
    )
    assert info["uuid"] == cryptsetup("luksUUID", header).strip()
    assert info["opened-by"] == 0
    dump = json.loads(cryptsetup("luksDump", "--dump-json-metadata", header))
    assert [str(slot["slot"]) for slot in info["slots"]] == sorted(dump["keyslots"], key=int)
    slots = {slot.pop("slot"): slot for slot in info["slots"]}
    for number, slot in slots.items():
        costs = slot.pop("kdf")
        assert costs.pop("milliseconds") >= 1
        said = dump["keyslots"][str(number)]["kdf"]
        assert costs == {name: value for name, value in said.items() if name != "salt"}
    token = {"token": 0, "type": "luks2-keyring"}
    assert {number: slot.pop("weak", None) for number, slot in slots.items()}[2] is None
    usual = {"active": True, "opened-node": False, "unbound": False, "priority": 1, "tokens": []}
    assert slots == {
        0: usual | {"opened-node": True},
        1: usual | {"tokens": [token]},
        2: usual | {"active": False, "unbound": True},
        9: usual | {"priority": 2},
    }
    text = json.dumps(info)
    assert "salt" not in text
    assert "mine" not in text
