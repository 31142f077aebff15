"""A LUKS header is saved, put back and looked at through QMP; cryptsetup and QEMU judge the outcome."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import CommandError, RunningDaemon
from header_disks import PREFIX, HeaderDisk

from qmpd.crypto.luks1 import Header

PASSWORD: Final = "abc123"
SECOND: Final = "second"
MEBIBYTE: Final = 1 << 20

KINDS: Final = ("inline", "detached", "qcow2")


def run(*command: str, password: str = "", fails: bool = False) -> str:
    done = subprocess.run(command, input=password, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode != 0) == fails, f"{command}: {done.stdout} {done.stderr}"
    return done.stdout


def opens(password: str, header: Path, slot: int | None = None) -> bool:
    """Whether cryptsetup opens this header with that passphrase."""
    which = [] if slot is None else ["--key-slot", str(slot)]
    command = ["cryptsetup", "open", "--test-passphrase", "--key-file=-", *which, str(header)]
    return (
        subprocess.run(command, input=password, text=True, capture_output=True, check=False).returncode == 0
    )


class Disk(HeaderDisk):
    """An encrypted disk, made by cryptsetup or qemu-img, and opened by a qmpd of its own."""

    def __init__(self, kind: str, directory: Path, daemon: RunningDaemon) -> None:
        super().__init__(directory, daemon.connect())
        self.kind = kind
        self.payload = directory / "payload"
        self.header = directory / ("header" if kind == "detached" else "payload")
        luks_format = ("cryptsetup", "luksFormat", "--type=luks1", "--batch-mode", "--key-file=-")
        if kind == "qcow2":
            options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
            secret = f"secret,id=s,data={PASSWORD}"
            run(
                "qemu-img",
                "create",
                "-f",
                "qcow2",
                "--object",
                secret,
                "-o",
                options,
                str(self.payload),
                "4M",
            )
        else:
            with self.header.open("wb") as file:
                file.truncate((2 if kind == "detached" else 6) * MEBIBYTE)
            detached = ()
            if kind == "detached":
                with self.payload.open("wb") as file:
                    file.truncate(4 * MEBIBYTE)
                detached = (f"--header={self.header}",)
            run(
                *luks_format, "--pbkdf-force-iterations=1000", *detached, str(self.payload), password=PASSWORD
            )
        for secret_id, data in (("pw", PASSWORD), ("second", SECOND)):
            self.daemon.execute("object-add", {"qom-type": "secret", "id": secret_id, "data": data})
        self.open()

    def open(self, node: str = "disk", secret: str = "pw") -> None:
        file = {"driver": "file", "filename": str(self.payload), "node-name": f"{node}-file"}
        options: dict[str, Any] = {"node-name": node, "driver": "luks", "file": file, "key-secret": secret}
        if self.kind == "detached":
            options["header"] = {"driver": "file", "filename": str(self.header)}
        if self.kind == "qcow2":
            options["encrypt"] = {"format": "luks", "key-secret": options.pop("key-secret")}
            options["driver"] = "qcow2"
        self.daemon.execute("blockdev-add", options)

    def amend(self, **options: Any) -> None:
        wrapped: Mapping[str, Any] = {"driver": "luks", **options}
        if self.kind == "qcow2":
            wrapped = {"driver": "qcow2", "encrypt": {"format": "luks", **options}}
        if "iter-time" not in options and options["state"] == "active":
            options["iter-time"] = 1
        assert self.job("x-blockdev-amend", options=wrapped) is None

    def add_second(self) -> None:
        self.amend(state="active", **{"new-secret": "second", "iter-time": 1})

    def keyslots(self) -> dict[str, Any]:
        info: dict[str, Any] = self.daemon.execute(f"{PREFIX}query-luks-keyslots", {"node-name": "disk"})
        return info

    def active(self) -> list[int]:
        return [slot["slot"] for slot in self.keyslots()["slots"] if slot["active"]]

    def place(self) -> int:
        """Where the header is in its file, in bytes."""
        if self.kind != "qcow2":
            return 0
        return self.payload.read_bytes().index(b"LUKS\xba\xbe")

    def overwrite(self, data: bytes, offset: int = 0) -> None:
        """Damage the header behind the daemon's back."""
        offset += self.place()
        with self.header.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def qemu_opens(self, password: str) -> bool:
        image = f"driver=luks,key-secret=s,file.filename={self.payload}"
        if self.kind == "detached":
            image += f",header.driver=file,header.filename={self.header}"
        if self.kind == "qcow2":
            image = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename={self.payload}"
        command = ["qemu-io", "--object", f"secret,id=s,data={password}", "--image-opts", image]
        return (
            subprocess.run([*command, "-c", "read 0 64k"], capture_output=True, check=False).returncode == 0
        )


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path: Path, daemon: RunningDaemon) -> Disk:
    return Disk(request.param, tmp_path, daemon)


@pytest.fixture
def detached(tmp_path: Path, daemon: RunningDaemon) -> Disk:
    return Disk("detached", tmp_path, daemon)


pytestmark = pytest.mark.peer("cryptsetup", "qemu-img", "qemu-io")


# -- saving


def test_cryptsetup_takes_a_backup_for_a_header(disk: Disk) -> None:
    disk.add_second()
    backup = disk.backup()
    assert f"UUID:          \t{disk.keyslots()['uuid']}" in run("cryptsetup", "luksDump", str(backup))
    assert [opens(password, backup) for password in (PASSWORD, SECOND, "wrong")] == [True, True, False]
    if disk.kind != "qcow2":
        command = ("cryptsetup", "open", "--test-passphrase", "--key-file=-")
        run(*command, "--header", str(backup), str(disk.payload), password=SECOND)


def test_a_backup_is_the_one_that_cryptsetup_makes_without_the_slots_that_are_not_in_use(
    detached: Disk,
) -> None:
    detached.add_second()
    path = detached.backup()
    detached.close()
    theirs = detached.directory / "theirs"
    run("cryptsetup", "luksHeaderBackup", "--header-backup-file", str(theirs), str(detached.header))
    expected = bytearray(theirs.read_bytes())
    header = Header.parse(expected, detached=True)
    for slot in range(2, 8):
        offset, length = header.material_extent(slot)
        expected[offset : offset + length] = bytes(length)
    assert path.read_bytes() == expected
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(theirs.stat().st_mode) == 0o400


def test_cryptsetup_puts_back_what_qmpd_saved(detached: Disk) -> None:
    detached.add_second()
    backup = detached.backup()
    detached.amend(state="inactive", **{"old-secret": "pw"})
    detached.close()
    assert not opens(PASSWORD, detached.header)
    run(
        "cryptsetup",
        "luksHeaderRestore",
        "--batch-mode",
        "--header-backup-file",
        str(backup),
        str(detached.header),
    )
    assert opens(PASSWORD, detached.header)
    detached.open()
    assert detached.active() == [0, 1]


def test_a_backup_never_overwrites_a_file(detached: Disk) -> None:
    path = detached.directory / "backup"
    path.write_text("precious")
    assert detached.job(f"{PREFIX}luks-header-backup", filename=str(path)) == "File exists"
    assert path.read_text() == "precious"
    path.unlink()
    path.symlink_to(detached.directory / "elsewhere")
    assert detached.job(f"{PREFIX}luks-header-backup", filename=str(path)) == "File exists"
    assert not (detached.directory / "elsewhere").exists()


def test_a_header_that_is_not_the_known_one_is_not_saved(detached: Disk) -> None:
    detached.overwrite(bytes(592))
    path = detached.directory / "backup"
    error = detached.job(f"{PREFIX}luks-header-backup", filename=str(path))
    assert error == "Volume is not in LUKS format"
    assert not path.exists()


# -- putting back


def test_passphrases_are_those_of_the_backup_again(disk: Disk, daemon: RunningDaemon) -> None:
    daemon.qemu_io("disk", "write -P 0x5a 0 64k")
    backup = disk.backup()
    disk.add_second()
    disk.amend(state="inactive", keyslot=0)
    assert disk.active() == [1]
    assert disk.restore(backup) is None
    assert disk.active() == [0]
    again = disk.backup("again")
    assert [opens(password, again) for password in (PASSWORD, SECOND)] == [True, False]
    assert "verification failed" not in daemon.qemu_io("disk", "read -P 0x5a 0 64k")
    disk.close()
    assert [disk.qemu_opens(password) for password in (PASSWORD, SECOND)] == [True, False]


def test_what_cryptsetup_saved_is_put_back(detached: Disk) -> None:
    detached.close()
    theirs = detached.directory / "theirs"
    run("cryptsetup", "luksHeaderBackup", "--header-backup-file", str(theirs), str(detached.header))
    detached.open()
    detached.add_second()
    detached.amend(state="inactive", keyslot=0)
    assert detached.restore(theirs) is None
    detached.close()
    assert [opens(password, detached.header) for password in (PASSWORD, SECOND)] == [True, False]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("inline", "noise"),
        ("qcow2", "noise"),
        ("detached", "zeroes"),
        ("detached", "second sector"),
        ("detached", "all of it"),
        ("detached", "key material"),
    ],
)
def test_a_damaged_header_is_put_back_while_the_disk_is_open(
    kind: str, what: str, tmp_path: Path, daemon: RunningDaemon
) -> None:
    disk = Disk(kind, tmp_path, daemon)
    disk.add_second()
    backup = disk.backup()
    if what == "zeroes":
        disk.overwrite(bytes(512 * 1024))
    elif what == "noise":
        place = disk.place()
        with disk.header.open("r+b") as file:
            file.seek(place)
            file.write(os.urandom(512 * 1024))
    elif what == "all of it":
        os.truncate(disk.header, 0)
    elif what == "second sector":
        disk.overwrite(b"\xff" * 512, 512)
    else:
        disk.overwrite(bytes(4096), 8192)
    assert disk.keyslots()["state"] == ("unchanged" if what == "key material" else "damaged")
    assert disk.restore(backup) is None
    assert disk.keyslots()["state"] == "unchanged"
    assert disk.active() == [0, 1]
    disk.close()
    assert disk.qemu_opens(PASSWORD)
    assert disk.qemu_opens(SECOND)


@pytest.mark.parametrize("kind", ["detached", "qcow2"])
def test_without_a_backup_a_header_becomes_what_is_known_of_it(
    kind: str, tmp_path: Path, daemon: RunningDaemon
) -> None:
    disk = Disk(kind, tmp_path, daemon)
    disk.add_second()
    refused(disk, None, "The LUKS header can be read: to change it back, name a backup", force=True)
    before = disk.header.read_bytes()
    disk.overwrite(os.urandom(4096))
    assert disk.restore(None) is None
    assert disk.keyslots()["state"] == "unchanged"
    after = disk.header.read_bytes()
    assert after[disk.place() :][:592] == before[disk.place() :][:592]
    disk.close()
    assert disk.qemu_opens(PASSWORD)
    assert disk.qemu_opens(SECOND)


def test_without_a_backup_the_volume_key_in_memory_saves_a_header_that_is_all_gone(detached: Disk) -> None:
    os.truncate(detached.header, 0)
    refused(
        detached, None, "The passphrase of secret 'pw' opens no keyslot of the header that would be put back"
    )
    assert detached.restore(None, force=True) is None
    options = {"driver": "luks", "state": "active", "keyslot": 0, "new-secret": "second", "iter-time": 1}
    assert detached.job("blockdev-amend", options=options, force=True) is None
    detached.close()
    assert opens(SECOND, detached.header)
    assert detached.qemu_opens(SECOND)


def refused(disk: Disk, path: Path | None, text: str, **more: Any) -> None:
    """The restoration fails so, and nothing has changed."""
    before = disk.header.read_bytes()
    assert disk.restore(path, **more) == text
    assert disk.header.read_bytes() == before


def test_a_backup_of_another_volume_is_refused_whatever_is_said(detached: Disk) -> None:
    other = detached.directory / "other"
    other.touch()
    other.write_bytes(bytes(2 * MEBIBYTE))
    payload = detached.directory / "other-payload"
    payload.write_bytes(bytes(MEBIBYTE))
    run(
        *("cryptsetup", "luksFormat", "--type=luks1", "--batch-mode", "--pbkdf-force-iterations=1000"),
        *("--key-file=-", f"--header={other}", str(payload)),
        password=PASSWORD,
    )
    text = (
        "The backup is of another volume: its salt of the volume key's digest is not the one of this volume"
    )
    refused(detached, other, text)
    refused(detached, other, text, force=True)


def test_a_digest_that_the_volume_key_does_not_fit_is_refused(detached: Disk) -> None:
    backup = detached.backup()
    forged = bytearray(backup.read_bytes())
    forged[112] ^= 1
    path = detached.directory / "forged"
    path.write_bytes(forged)
    refused(
        detached,
        path,
        "The backup is of another volume: its digest of the volume key is not the one of this volume",
        force=True,
    )


def test_a_backup_that_the_nodes_passphrase_does_not_open_needs_a_secret_that_does_or_force(
    detached: Disk,
) -> None:
    detached.add_second()
    detached.amend(state="inactive", keyslot=0)
    backup = detached.backup()
    detached.amend(state="active", keyslot=0, **{"new-secret": "pw", "iter-time": 1, "secret": "second"})
    refused(
        detached,
        backup,
        "The passphrase of secret 'pw' opens no keyslot of the header that would be put back",
    )
    assert detached.restore(backup, secret="second") is None
    assert detached.active() == [1]
    detached.amend(state="active", keyslot=0, **{"new-secret": "pw", "iter-time": 1, "secret": "second"})
    assert detached.restore(backup, force=True) is None
    assert detached.active() == [1]


def test_another_uuid_needs_force(detached: Disk) -> None:
    backup = bytearray(detached.backup().read_bytes())
    old = detached.keyslots()["uuid"]
    new = "01234567-89ab-cdef-0123-456789abcdef"
    backup[168 : 168 + 36] = new.encode()
    path = detached.directory / "renamed"
    path.write_bytes(backup)
    refused(detached, path, f"The backup has the UUID '{new}', and the volume '{old}'")
    assert detached.restore(path, force=True) is None
    assert detached.keyslots()["uuid"] == new
    detached.close()
    assert run("cryptsetup", "luksUUID", str(detached.header)).strip() == new


def test_another_volumes_header_is_overwritten_with_force_only(detached: Disk) -> None:
    backup = detached.backup()
    other = detached.directory / "other-header"
    other.write_bytes(bytes(2 * MEBIBYTE))
    payload = detached.directory / "other-payload"
    payload.write_bytes(bytes(MEBIBYTE))
    run(
        *("cryptsetup", "luksFormat", "--type=luks1", "--batch-mode", "--pbkdf-force-iterations=1000"),
        *("--key-file=-", f"--header={other}", str(payload)),
        password=SECOND,
    )
    detached.overwrite(other.read_bytes())
    assert detached.keyslots()["state"] == "other"
    refused(detached, backup, "There is a LUKS header of another volume now - refusing to overwrite it")
    assert detached.restore(backup, force=True) is None
    detached.close()
    assert [opens(password, detached.header) for password in (PASSWORD, SECOND)] == [True, False]


def test_a_luks2_header_counts_as_another_volumes(detached: Disk) -> None:
    detached.overwrite(b"LUKS\xba\xbe\0\2")
    assert detached.keyslots()["state"] == "other"


def test_what_is_no_backup_is_refused(detached: Disk) -> None:
    good = detached.backup().read_bytes()
    noise = detached.directory / "noise"
    noise.write_bytes(os.urandom(8192))
    lead = "The backup holds no LUKS header that can be used: "
    refused(detached, noise, f"{lead}Volume is not in LUKS format", force=True)
    empty = detached.directory / "empty"
    empty.touch()
    refused(detached, empty, f"{lead}Volume is not in LUKS format", force=True)
    short = detached.directory / "short"
    short.write_bytes(good[:65536])
    assert "The backup is cut short: it has 65536 bytes" in (detached.restore(short, force=True) or "")
    inactive = bytearray(good)
    for slot in range(8):
        inactive[208 + 48 * slot : 212 + 48 * slot] = b"\0\0\xde\xad"
    dead = detached.directory / "dead"
    dead.write_bytes(inactive)
    refused(detached, dead, "No keyslot is active in the backup", force=True)
    os.mkfifo(detached.directory / "fifo")
    fifo = detached.directory / "fifo"
    refused(detached, fifo, f"'file' driver requires '{fifo}' to be a regular file", force=True)
    missing = detached.directory / "missing"
    refused(detached, missing, f"Could not open '{missing}': No such file or directory", force=True)


@pytest.mark.peer("qemu-storage-daemon")
def test_nothing_is_put_back_while_another_process_reads_the_header(
    detached: Disk, start_storage_daemon: Callable[..., RunningDaemon]
) -> None:
    backup = detached.backup()
    start_storage_daemon(
        *("--blockdev", f"driver=file,node-name=n,read-only=on,filename={detached.header}"),
        *("--nbd-server", f"addr.type=unix,addr.path={detached.directory / 'nbd.sock'}"),
        *("--export", "nbd,id=e,node-name=n"),
    )
    before = detached.header.read_bytes()
    assert (detached.restore(backup) or "").startswith("Failed to get")
    assert detached.header.read_bytes() == before
    assert detached.backup("another").read_bytes() == backup.read_bytes()


# -- looking


def test_the_slots_that_cryptsetup_sees_are_told_with_their_cost(disk: Disk) -> None:
    disk.amend(state="active", keyslot=5, **{"new-secret": "second", "iter-time": 1000})
    info = disk.keyslots()
    assert info["type"] == "luks1"
    assert info["state"] == "unchanged"
    assert info["opened-by"] == 0
    assert [slot["slot"] for slot in info["slots"]] == list(range(8))
    assert [slot["slot"] for slot in info["slots"] if slot["active"]] == [0, 5]
    assert [slot["slot"] for slot in info["slots"] if slot["opened-node"]] == [0]
    assert info["slots"][0]["weak"] is True
    strong = info["slots"][5]
    assert strong["weak"] is False
    assert strong["kdf"]["type"] == "pbkdf2"
    # The slot was made to take a second of this machine; how exact that is, is the machine's affair.
    assert 300 < strong["kdf"]["milliseconds"] < 3000
    dump = run("cryptsetup", "luksDump", str(disk.backup()))
    assert info["uuid"] in dump
    assert f"Iterations:         \t{strong['kdf']['iterations']}" in dump
    assert f"MK iterations: \t{info['digest']['iterations']}" in dump
    text = json.dumps(info)
    assert PASSWORD not in text
    assert "salt" not in text


def test_the_slot_that_opened_the_node_is_told_as_long_as_its_key_is_there(disk: Disk) -> None:
    disk.add_second()
    backup = disk.backup()
    assert disk.keyslots()["opened-by"] == 0
    disk.amend(state="inactive", keyslot=0)
    assert "opened-by" not in disk.keyslots()
    assert not any(slot["opened-node"] for slot in disk.keyslots()["slots"])
    # The same passphrase in a new key is another key.
    disk.amend(state="active", keyslot=0, **{"new-secret": "pw", "iter-time": 1, "secret": "second"})
    assert "opened-by" not in disk.keyslots()
    assert disk.restore(backup) is None
    assert disk.keyslots()["opened-by"] == 0
    disk.close()
    disk.open(secret="second")
    assert disk.keyslots()["opened-by"] == 1


def test_slots_that_somebody_else_changes_are_told(detached: Disk) -> None:
    detached.close()
    copy = detached.directory / "copy"
    copy.write_bytes(detached.header.read_bytes())
    key_file = detached.directory / "new-key"
    key_file.write_text(SECOND)
    run(
        *("cryptsetup", "luksAddKey", "--batch-mode", "--pbkdf-force-iterations=1000", "--key-file=-"),
        *(str(copy), str(key_file)),
        password=PASSWORD,
    )
    detached.open()
    detached.overwrite(copy.read_bytes())
    info = detached.keyslots()
    assert info["state"] == "changed"
    assert [slot["slot"] for slot in info["slots"] if slot["active"]] == [0, 1]
    assert info["opened-by"] == 0


def test_the_nodes_that_share_a_header_are_told_and_know_its_slots_after_a_restoration(
    detached: Disk,
) -> None:
    backup = detached.backup()
    detached.add_second()
    other = detached.directory / "other-payload"
    other.write_bytes(bytes(MEBIBYTE))
    options = {
        "node-name": "other",
        "driver": "luks",
        "file": {"driver": "file", "filename": str(other)},
        "header": {"driver": "file", "filename": str(detached.header)},
        "key-secret": "second",
    }
    detached.daemon.execute("blockdev-add", options)
    assert detached.keyslots()["shared-with"] == ["other"]
    assert detached.restore(backup) is None
    info = detached.daemon.execute(f"{PREFIX}query-luks-keyslots", {"node-name": "other"})
    assert info["state"] == "unchanged"
    assert info["shared-with"] == ["disk"]
    assert "opened-by" not in info


def test_what_has_no_luks_header_is_refused(daemon: RunningDaemon) -> None:
    daemon.execute("blockdev-add", {"driver": "null-co", "node-name": "n"})
    for command, more in (
        ("query-luks-keyslots", {}),
        ("luks-header-backup", {"job-id": "j", "filename": "f"}),
    ):
        with pytest.raises(CommandError) as refusal:
            daemon.execute(PREFIX + command, {"node-name": "n", **more})
        assert refusal.value.desc == "Node 'n' has no LUKS header"
