"""A LUKS header becomes one of the other version through QMP; cryptsetup judges that, and takes turns."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import CommandError, RunningDaemon

from qmpd.block import luks_conversion
from qmpd.crypto import luks
from qmpd.crypto.plan import Write

MEBIBYTE: Final = 1 << 20
PASSWORDS: Final = ("first", "second", "third")

pytestmark = pytest.mark.peer("cryptsetup")

PBKDF2: Final = ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000")


def cryptsetup(*arguments: str, password: str = PASSWORDS[0], fails: bool = False) -> str:
    command = ["cryptsetup", "--batch-mode", *arguments]
    done = subprocess.run(command, input=password, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode != 0) == fails, f"{command}: {done.stdout} {done.stderr}"
    return done.stdout


class Volume:
    """A volume that cryptsetup has made, with three passphrases, and a qmpd that converts it."""

    def __init__(self, directory: Path, daemon: RunningDaemon, *options: str, detached: bool = False) -> None:
        self.directory, self.daemon = directory, daemon.connect()
        payload = directory / "payload"
        self.header = directory / "header" if detached else payload
        for path in (payload, self.header):
            with path.open("wb") as file:
                file.truncate(18 * MEBIBYTE if path == payload else 3 * MEBIBYTE)
        place = (f"--header={self.header}",) if detached else ()
        cryptsetup("luksFormat", "--key-file=-", *PBKDF2, *options, *place, str(payload))

    def add(self, password: str, slot: int, *options: str) -> None:
        new = self.directory / "new-key"
        new.write_text(password)
        cryptsetup(
            *("luksAddKey", "--key-file=-", f"--key-slot={slot}", *PBKDF2, *options),
            *(str(self.header), str(new)),
        )

    def convert(self, version: int, backup: str = "backup") -> str | None:
        """Convert by qmpd and return the job's error."""
        daemon = self.daemon
        arguments: dict[str, Any] = {
            "job-id": "job",
            "file": {"driver": "file", "filename": str(self.header)},
            "type": f"luks{version}",
            "backup": str(self.directory / backup),
        }
        daemon.execute("__org.qmpd_luks-convert", arguments)
        daemon.wait_event("JOB_STATUS_CHANGE", id="job", status="concluded")
        (info,) = daemon.execute("query-jobs")
        daemon.execute("job-dismiss", {"id": "job"})
        error: str | None = info.get("error")
        return error

    def opened(self) -> list[str]:
        """The passphrases that open it, as cryptsetup says."""
        command = ["cryptsetup", "open", "--test-passphrase", "--key-file=-", str(self.header)]
        return [
            password
            for password in PASSWORDS
            if subprocess.run(command, input=password, text=True, capture_output=True, check=False).returncode
            == 0
        ]

    def metadata(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(cryptsetup("luksDump", "--dump-json-metadata", str(self.header)))
        return found

    def materials(self) -> dict[str, bytes]:
        """The slots' key material; the rest of an area is whatever was there."""
        data = self.header.read_bytes()
        areas = {name: slot["area"] for name, slot in self.metadata()["keyslots"].items()}
        return {name: data[int(area["offset"]) :][:256000] for name, area in areas.items()}


@pytest.mark.parametrize("slots", [(0,), (0, 1, 5)])
def test_the_result_is_the_one_of_cryptsetup_but_for_places(
    tmp_path: Path, daemon: RunningDaemon, slots: tuple[int, ...]
) -> None:
    volume = Volume(tmp_path, daemon, "--type=luks1")
    for password, slot in zip(PASSWORDS[1:], slots[1:], strict=False):
        volume.add(password, slot)
    before = volume.header.read_bytes()
    opened = volume.opened()
    assert volume.convert(2) is None
    ours, materials, after = volume.metadata(), volume.materials(), volume.header.read_bytes()
    assert volume.opened() == opened
    volume.header.write_bytes(before)
    cryptsetup("convert", "--type=luks2", str(volume.header))
    theirs = volume.metadata()
    assert materials == volume.materials()
    if slots == (0,):
        assert ours == theirs
    for metadata in (ours, theirs):
        for slot in metadata["keyslots"].values():
            del slot["area"]["offset"]
    assert ours == theirs
    payload = int(theirs["segments"]["0"]["offset"])
    assert after[payload:] == before[payload:]


@pytest.mark.parametrize(
    "options",
    [
        ("--type=luks1",),
        ("--type=luks1", "--cipher=aes-cbc-essiv:sha256", "--key-size=128", "--hash=sha512"),
        ("--type=luks2", "--sector-size=512", "--label=gone"),
    ],
    ids=" ".join,
)
def test_the_two_convert_in_turn_and_every_passphrase_goes_along(
    tmp_path: Path, daemon: RunningDaemon, options: tuple[str, ...]
) -> None:
    volume = Volume(tmp_path, daemon, *options)
    volume.add("second", 1)
    volume.add("third", 6)
    uuid = cryptsetup("luksUUID", str(volume.header))
    version = 2 if "--type=luks2" in options else 1
    for turn in range(6):
        version = 3 - version
        # Ours after theirs and after ours, there and back.
        if turn in (0, 2, 3, 5):
            assert volume.convert(version, f"backup{turn}") is None
        else:
            cryptsetup("convert", f"--type=luks{version}", str(volume.header))
        cryptsetup("isLuks", f"--type=luks{version}", str(volume.header))
        assert volume.opened() == list(PASSWORDS)
        assert cryptsetup("luksUUID", str(volume.header)) == uuid
    # And the result can be worked with.
    cryptsetup("luksKillSlot", "--key-file=-", str(volume.header), "6")
    volume.add("third", 7)
    assert volume.opened() == list(PASSWORDS)


def test_with_all_slots_in_use_every_passphrase_goes_along(tmp_path: Path, daemon: RunningDaemon) -> None:
    volume = Volume(tmp_path, daemon, "--type=luks1", "--key-size=256")
    for slot in range(1, 8):
        volume.add(PASSWORDS[slot % 3], slot)
    for turn, version in enumerate((2, 1, 2)):
        assert volume.convert(version, f"backup{turn}") is None
        assert volume.opened() == list(PASSWORDS)


@pytest.mark.parametrize("length", [3 * MEBIBYTE, 2068480])
def test_a_detached_header_is_converted(tmp_path: Path, daemon: RunningDaemon, length: int) -> None:
    volume = Volume(tmp_path, daemon, "--type=luks1", detached=True)
    # QEMU makes them no longer than they have to be.
    os.truncate(volume.header, length)
    before = volume.header.read_bytes()
    assert volume.convert(2) is None
    ours = volume.metadata()
    assert volume.opened() == ["first"]
    volume.header.write_bytes(before)
    cryptsetup("convert", "--type=luks2", str(volume.header))
    assert volume.metadata() == ours
    assert volume.convert(1, "again") is None
    assert volume.opened() == ["first"]


def test_the_backup_that_is_made_first_brings_the_old_version_back(
    tmp_path: Path, daemon: RunningDaemon
) -> None:
    volume = Volume(tmp_path, daemon, "--type=luks1")
    assert volume.convert(2) is None
    backup = tmp_path / "backup"
    cryptsetup("isLuks", "--type=luks1", str(backup))
    volume.header.write_bytes(bytes(2 * MEBIBYTE) + volume.header.read_bytes()[2 * MEBIBYTE :])
    cryptsetup("luksHeaderRestore", "--header-backup-file", str(backup), str(volume.header))
    cryptsetup("isLuks", "--type=luks1", str(volume.header))
    assert volume.opened() == ["first"]


@pytest.mark.parametrize(
    ("make", "change", "why"),
    [
        ("--type=luks2 --sector-size=4096", "", "the sector size is 4096, not 512 bytes"),
        (
            "--type=luks2 --sector-size=512",
            "token add --key-description=x",
            "the LUKS2 header contains 1 token(s)",
        ),
        (
            "--type=luks2 --sector-size=512 --keyslot-cipher=aes-cbc-plain64 --keyslot-key-size=256",
            "",
            "keyslot 0 is not LUKS1 compatible",
        ),
        ("--type=luks1 --offset=4040", "", "its header takes 2097152 bytes, and there are 2068480"),
    ],
)
def test_what_cryptsetup_refuses_is_refused_and_nothing_changes(
    tmp_path: Path, daemon: RunningDaemon, make: str, change: str, why: str
) -> None:
    volume = Volume(tmp_path, daemon, *make.split())
    if change:
        cryptsetup(*change.split(), str(volume.header))
    version = 2 if "luks1" in make else 1
    before = volume.header.read_bytes()
    cryptsetup("convert", f"--type=luks{version}", str(volume.header), fails=True)
    assert volume.convert(version) == f"Cannot convert to LUKS{version}: {why}"
    assert volume.convert(3 - version) == f"The LUKS header is of version {3 - version} already"
    assert volume.header.read_bytes() == before
    assert not (tmp_path / "backup").exists()


def test_a_header_in_use_is_refused(tmp_path: Path, daemon: RunningDaemon) -> None:
    volume = Volume(tmp_path, daemon, "--type=luks1")
    qmp = volume.daemon
    qmp.execute("object-add", {"qom-type": "secret", "id": "pw", "data": "first"})
    file = {"driver": "file", "node-name": "file", "filename": str(volume.header)}
    qmp.execute("blockdev-add", {"driver": "luks", "node-name": "disk", "file": file, "key-secret": "pw"})
    before = volume.header.read_bytes()
    assert "lock" in (volume.convert(2) or "")
    arguments = {"job-id": "job", "file": "file", "type": "luks2", "backup": str(tmp_path / "backup")}
    qmp.execute("__org.qmpd_luks-convert", arguments)
    qmp.wait_event("JOB_STATUS_CHANGE", id="job", status="concluded")
    (info,) = qmp.execute("query-jobs")
    assert "Conflicts with use by disk as 'file'" in info["error"] or "permission" in info["error"].lower()
    assert volume.header.read_bytes() == before
    assert not (tmp_path / "backup").exists()
    with pytest.raises(CommandError):
        qmp.execute("__org.qmpd_luks-convert", {**arguments, "type": "luks3"})


def test_wherever_it_stops_cryptsetup_opens_what_is_there(tmp_path: Path, daemon: RunningDaemon) -> None:
    volume = Volume(tmp_path, daemon, "--type=luks1")
    volume.add("second", 1)
    versions = set()
    for version in (2, 1):
        data = bytearray(volume.header.read_bytes())
        header = luks.parse(data)
        extents = {slot: header.material_extent(slot) for slot in header.active_slots}
        materials = {slot: bytes(data[start : start + size]) for slot, (start, size) in extents.items()}
        for step in luks_conversion.plan_for(header, materials, len(data)):
            if isinstance(step, Write):
                data[step.offset : step.offset + len(step.data)] = step.data
                # cryptsetup repairs what it opens, so it has a copy each time.
                volume.header.write_bytes(data)
                assert volume.opened() == ["first", "second"]
                versions.add(luks.parse(volume.header.read_bytes()).version)
        volume.header.write_bytes(data)
        cryptsetup("isLuks", f"--type=luks{version}", str(volume.header))
    assert versions == {1, 2}
