"""Encrypted disks whose keyslots change, and the programs that judge what opens them afterwards.

A disk is of one of three kinds: `luks` with its header in front of the data, `detached` with its
header in a file of its own, and `qcow2` with LUKS inside.  cryptsetup knows nothing of qcow2, so it
is shown a copy of the part of such an image that is the header.

A passphrase, the secret that holds it, and a file that holds it have one name.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from daemons import CommandError, RunningDaemon

KINDS: Final = ("luks", "detached", "qcow2")

PASSPHRASES: Final = ("first", "second", "third", "fourth", "fifth")
SECRETS: Final = tuple(word for name in PASSPHRASES for word in ("--object", f"secret,id={name},data={name}"))

#: Which slot has which passphrase.
Slots = Mapping[int, str]

#: What a key costs here: little.
ITER_TIME: Final = 1
CHEAP: Final = ("--batch-mode", "--pbkdf-force-iterations", "1000")

SIZE: Final = 1 << 20
PATTERN: Final = 0x5A

WRONG: Final = "Invalid password, cannot unlock any keyslot"

#: The extension of a qcow2 header that says where the LUKS header is.
_CRYPTO_HEADER: Final = 0x0537BE77


def tried(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=60)


def run(directory: Path, *command: str) -> str:
    done = tried(directory, *command)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


class Disk:
    """An encrypted disk in files, in a directory that has the passphrases as well."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory = directory
        self.kind = kind
        self.image = directory / ("disk.qcow2" if kind == "qcow2" else "disk.img")
        self.header = directory / "header.img" if kind == "detached" else self.image
        for name in PASSPHRASES:
            (directory / name).write_text(name)

    # -- as the programs want to hear of it

    def node_options(self, secret: str) -> dict[str, Any]:
        """BlockdevOptions."""
        file = {"driver": "file", "filename": str(self.image)}
        if self.kind == "qcow2":
            return {"driver": "qcow2", "encrypt": {"format": "luks", "key-secret": secret}, "file": file}
        options = {"driver": "luks", "key-secret": secret, "file": file}
        if self.kind == "detached":
            options["header"] = {"driver": "file", "filename": str(self.header)}
        return options

    def amend_options(self, **members: Any) -> dict[str, Any]:
        """BlockdevAmendOptions; a member is written with an underscore for each hyphen."""
        encryption = {name.replace("_", "-"): value for name, value in members.items()}
        if self.kind == "qcow2":
            return {"driver": "qcow2", "encrypt": {"format": "luks", **encryption}}
        return {"driver": "luks", **encryption}

    # -- made by various programs, with the first passphrase in slot 0

    def make(self, maker: str) -> None:
        """Make it with `qemu` (its image or storage daemon) or `cryptsetup`."""
        {"qemu": self._make_with_qemu, "cryptsetup": self.make_with_cryptsetup}[maker]()

    def _make_with_qemu(self) -> None:
        if self.kind == "detached":  # which qemu-img 10.0 can't make
            self._make_empty()
            daemon = RunningDaemon(("qemu-storage-daemon",), SECRETS, self.directory, "maker")
            try:
                self.make_in(daemon)
            finally:
                daemon.kill()
            return
        prefix, form = ("encrypt.", ["-o", "encrypt.format=luks"]) if self.kind == "qcow2" else ("", [])
        cost = f"{prefix}key-secret=first,{prefix}iter-time={ITER_TIME}"
        driver = "qcow2" if self.kind == "qcow2" else "luks"
        run(
            self.directory,
            *("qemu-img", "create", "-q", "-f", driver, *SECRETS[:2], *form, "-o", cost),
            *(str(self.image), str(SIZE)),
        )

    def make_in(self, daemon: RunningDaemon) -> None:
        """Make it with a daemon's `blockdev-create`."""
        self._make_empty()
        role = "header" if self.kind == "detached" else "file"
        daemon.execute("blockdev-add", {"driver": "file", "node-name": "new", "filename": str(self.header)})
        options: dict[str, Any] = {"key-secret": "first", "iter-time": ITER_TIME}
        if self.kind == "qcow2":
            options = {"driver": "qcow2", "encrypt": {"format": "luks", **options}}
        else:
            options = {"driver": "luks", **options}
        size = 0 if self.kind == "detached" else SIZE
        error = daemon.monitor.run_job("blockdev-create", "make", {**options, role: "new", "size": size})
        assert error is None, error
        daemon.execute("blockdev-del", {"node-name": "new"})

    def _make_empty(self) -> None:
        for path in {self.image, self.header}:
            path.touch()
        if self.kind == "detached":
            with self.image.open("r+b") as image:
                image.truncate(SIZE)

    def make_with_cryptsetup(self, *options: str, slot: int = 0) -> None:
        """Make it with cryptsetup.

        A qcow2 image has to be there already; it gets the new header in place of its own.

        :param options: of `luksFormat`, about ciphers and the like.
        """
        if self.kind == "qcow2" and not self.image.exists():
            self._make_with_qemu()
        made = self.directory / "made.img"
        for path in {made} if self.kind == "qcow2" else {self.image, self.header}:
            with path.open("wb") as empty:
                empty.truncate(SIZE if path == self.image != self.header else (4 << 20))
        where = {
            "luks": ["disk.img"],
            "detached": ["--header", "header.img", "disk.img"],
            "qcow2": ["made.img"],
        }
        run(
            self.directory,
            *("cryptsetup", "luksFormat", "--type", "luks1", *CHEAP, "--key-slot", str(slot), *options),
            *(*where[self.kind], "first"),
        )
        if self.kind == "qcow2":
            self.put_header(made.read_bytes())
        elif self.kind == "luks":
            with self.image.open("r+b") as image:
                offset = struct.unpack_from(">I", image.read(592), 104)[0]
                image.truncate(offset * 512 + SIZE)

    # -- the header

    def header_extent(self) -> tuple[int, int]:
        """Where the LUKS header is in `header`, and how long it may be, in bytes."""
        if self.kind != "qcow2":
            return 0, self.header.stat().st_size
        head = self.image.read_bytes()[: 64 << 10]
        (at,) = struct.unpack_from(">I", head, 100)
        while True:
            extension, length = struct.unpack_from(">II", head, at)
            assert extension != 0, "the image has no LUKS header"
            if extension == _CRYPTO_HEADER:
                offset, size = struct.unpack_from(">QQ", head, at + 8)
                return offset, size
            at += 8 + (length + 7) // 8 * 8

    def header_bytes(self) -> bytes:
        """The header with its key material (and for `luks` the data behind it)."""
        offset, length = self.header_extent()
        with self.header.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def put_header(self, header: bytes) -> None:
        """Write over the header, or the beginning of it."""
        offset, length = self.header_extent()
        with self.header.open("r+b") as file:
            file.seek(offset)
            file.write(header[:length])

    def shown_to_cryptsetup(self) -> str:
        """The name of a file with the header as it is now, that cryptsetup understands."""
        if self.kind != "qcow2":
            return self.header.name
        (self.directory / "shown.img").write_bytes(self.header_bytes())
        return "shown.img"

    def cryptsetup(self, action: str, *words: str) -> None:
        """Change keyslots with cryptsetup.

        :param words: the options, then what follows the image.
        """
        name = self.shown_to_cryptsetup()
        cost = CHEAP if action in ("luksAddKey", "luksChangeKey") else CHEAP[:1]
        run(self.directory, "cryptsetup", action, *cost, name, *words)
        if self.kind == "qcow2":
            self.put_header((self.directory / name).read_bytes())

    def qemu_img_amend(self, secret: str, *, force: bool = False, **members: Any) -> str | None:
        """Change keyslots with qemu-img; return what it refuses with, or None."""
        prefix = "encrypt." if self.kind == "qcow2" else ""
        options = ",".join(f"{prefix}{name.replace('_', '-')}={value}" for name, value in members.items())
        done = tried(
            self.directory,
            *("qemu-img", "amend", *SECRETS, "-o", options, *(["--force"] if force else [])),
            "json:" + json.dumps(self.node_options(secret)),
        )
        assert (done.returncode == 0) == (done.stderr == ""), done.stderr
        return None if done.returncode == 0 else done.stderr.removeprefix("qemu-img: ").removesuffix("\n")

    # -- the judges

    def active_slots(self) -> list[int]:
        """The slots in use, as cryptsetup reads the header."""
        dump = run(self.directory, "cryptsetup", "luksDump", self.shown_to_cryptsetup())
        return [int(slot) for slot in re.findall(r"^Key Slot (\d): ENABLED$", dump, re.MULTILINE)]

    def judge(self, slots: Slots, *, data: bool = True) -> None:
        """Cryptsetup and qemu-io find these passphrases in these slots, and no others open the disk.

        :param data: the disk begins with 4 KiB of `PATTERN`.
        """
        assert self.active_slots() == sorted(slots)
        test = ("cryptsetup", "open", "--test-passphrase", self.shown_to_cryptsetup(), "--key-file")
        for slot, passphrase in slots.items():
            run(self.directory, *test, passphrase, "--key-slot", str(slot))
        for passphrase in set(PASSPHRASES) - set(slots.values()):
            # It has another status where there is no keyslot to try.
            assert tried(self.directory, *test, passphrase).returncode == (2 if slots else 1), passphrase
        assert self.opened_by_qemu(data=data) == set(slots.values())

    def opened_by_qemu(self, *, data: bool = True) -> set[str]:
        """The passphrases with which qemu-io opens the disk and reads it."""
        commands = []
        # One process tries them all: which one opened it is seen by how much is read.
        lengths = {512 * number: passphrase for number, passphrase in enumerate(PASSPHRASES, 1)}
        for length, passphrase in lengths.items():
            # Others may have it open: this neither takes locks nor minds them.
            image = f"driver=luks,key-secret={passphrase},file.filename={self.image}"
            if self.kind == "qcow2":
                image = f"driver=qcow2,encrypt.key-secret={passphrase},file.filename={self.image}"
            if self.kind == "detached":
                image += f",header.driver=file,header.filename={self.header}"
            read = f"read -P {PATTERN} 0 {length}" if data else f"read 0 {length}"
            commands += ["-c", f"open -r -U -o {image}", "-c", read, "-c", "close"]
        said = tried(self.directory, "qemu-io", *SECRETS, *commands)
        assert "verification failed" not in said.stdout, said.stdout
        opened = {
            lengths[int(length)] for length in re.findall(r"^read (\d+)/\1 bytes", said.stdout, re.MULTILINE)
        }
        assert said.stderr.count(WRONG) == len(PASSPHRASES) - len(opened), said.stderr
        return opened


def run_amend(
    daemon: RunningDaemon, node: str, options: Mapping[str, Any], *, force: bool | None = None
) -> str | None:
    """Amend a node; return the error of the command or of its job, or None if all went well."""
    arguments = {"job-id": "amend", "node-name": node, "options": options}
    if force is not None:
        arguments["force"] = force
    try:
        daemon.execute("x-blockdev-amend", arguments)
    except CommandError as error:
        return error.desc
    daemon.monitor.wait_event("JOB_STATUS_CHANGE", id="amend", status="concluded")
    (job,) = [job for job in daemon.execute("query-jobs") if job["id"] == "amend"]
    daemon.execute("job-dismiss", {"id": "amend"})
    error_text: str | None = job.get("error")
    return error_text


class Keyring:
    """A disk that qmpd has open, and what it is to be opened by.

    :param slots: which slot has which passphrase at the beginning.
    :param secret: what to open it with.
    """

    def __init__(
        self, daemon: RunningDaemon, disk: Disk, slots: Slots, *, secret: str = "first", node: str = "disk"
    ) -> None:
        self.daemon = daemon
        self.disk = disk
        self.slots = dict(slots)
        self.node = node
        self.open(secret)

    def open(self, secret: str, **more: Any) -> None:
        """Add the node."""
        options = self.disk.node_options(secret)
        self.daemon.execute("blockdev-add", {**options, "node-name": self.node, **more})

    def close(self) -> None:
        """Delete the node."""
        self.daemon.execute("blockdev-del", {"node-name": self.node})

    def write_pattern(self) -> None:
        """Write what the judges will look for."""
        said = self.daemon.qemu_io(self.node, f"write -P {PATTERN} 0 4096")
        assert said.startswith("wrote 4096/4096 bytes"), said
        # So that others see it who look at the image meanwhile.
        self.daemon.qemu_io(self.node, "flush")

    def reads_pattern(self) -> None:
        """The node reads what was written."""
        said = self.daemon.qemu_io(self.node, f"read -P {PATTERN} 0 4096")
        assert said.startswith("read 4096/4096 bytes"), said
        assert "failed" not in said, said

    def change(self, becomes: Slots, *, force: bool | None = None, **members: Any) -> None:
        """Amend, and have it judged: the header is accepted and opens with exactly these passphrases."""
        error = self._amend(force, members)
        assert error is None, error
        self.slots = dict(becomes)
        self.disk.judge(becomes)
        self.reads_pattern()
        assert self.known_slots() == sorted(becomes)

    def refuse(self, error: str, *, force: bool | None = None, **members: Any) -> None:
        """An amend fails with this text, and changes nothing."""
        before = self.disk.header_bytes()
        assert self._amend(force, members) == error
        assert self.disk.header_bytes() == before
        assert self.known_slots() == sorted(self.slots)
        self.reads_pattern()

    def _amend(self, force: bool | None, members: Mapping[str, Any]) -> str | None:
        if members["state"] == "active":
            members = {"iter_time": ITER_TIME, **members}
        return run_amend(self.daemon, self.node, self.disk.amend_options(**members), force=force)

    def known_slots(self) -> list[int]:
        """The slots in use, as the daemon tells them."""
        nodes = self.daemon.execute("query-named-block-nodes", {"flat": True})
        (node,) = [node for node in nodes if node["node-name"] == self.node]
        info = node["image"]["format-specific"]["data"]
        slots = info["encrypt"]["slots"] if self.disk.kind == "qcow2" else info["slots"]
        return [number for number, slot in enumerate(slots) if slot["active"]]
