"""A header's backup or restoration that fails, at whichever write, leaves things as they were or a way in."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import CHECKOUT, QMPD, RunningDaemon

from qmpd.block import header_backup
from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.file import FileNode
from qmpd.block.drivers.luks import LuksNode
from qmpd.block.graph import Graph
from qmpd.crypto import luks, luks2_keyslots
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks1 import formatting
from qmpd.crypto.luks1_keyslots import HEADER_SECTORS_BYTES
from qmpd.crypto.luks2_kdf import Kdf
from qmpd.crypto.memory import KeyBuffer, KeyMemory
from qmpd.crypto.plan import Plan, Write
from qmpd.crypto.steps import run
from qmpd.errors import Error

PASSWORDS: Final = {"old": b"old", "new": b"new"}
COSTS: Final = Kdf("pbkdf2", bytes(32), 1000)


def secrets(secret_id: str) -> KeyBuffer:
    return KeyMemory().copy_of(PASSWORDS[secret_id])


class Faults:
    """Lets some writes and flushes of the header's file pass; then one fails, or all do."""

    def __init__(self) -> None:
        self.left = 1 << 30
        self.once = True

    def step(self) -> None:
        self.left -= 1
        if self.left == -1 or (self.left < 0 and not self.once):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def applied(data: bytes, plan: Plan) -> bytes:
    disk = bytearray(data)
    for step in plan:
        if isinstance(step, Write):
            disk[step.offset : step.offset + len(step.data)] = step.data
    return bytes(disk)


def volumes(version: int = 1) -> tuple[bytes, bytes]:
    """A detached header that "old" opens, and what it became later: only "new" opens it, in the same slot."""
    spec = CipherSpec("aes-128", "xts", "plain64")
    header: luks.LuksHeader
    if version == 1:
        said, key, plan = run(formatting(spec, "sha256", PASSWORDS["old"], 1000, 1000, detached=True))
        header = luks.Luks1(said, said.pack().ljust(HEADER_SECTORS_BYTES, b"\0"))
    else:
        said_2, key, plan = run(
            luks2_keyslots.formatting(spec, "sha256", PASSWORDS["old"], COSTS, 1000, detached=True)
        )
        header = luks.Luks2(said_2)
    before = applied(bytes(min(header.length, 1 << 20)), plan)
    header, plan = run(header.activating([0, 3], key.data, PASSWORDS["new"], COSTS))
    now = applied(before, plan)
    _, plan = header.erasing([3])
    return before, applied(now, plan)


def openers(data: bytes) -> set[str]:
    header = luks.parse(data, detached=True)
    found = set()
    for slot in header.active_slots:
        offset, length = header.material_extent(slot)
        for name, password in PASSWORDS.items():
            if run(header.unlocking(slot, password, data[offset : offset + length])) is not None:
                found.add(name)
    return found


class Trial:
    """An open disk whose header's file can fail, and a backup of that header."""

    def __init__(self, directory: Path, now: bytes, backup: bytes) -> None:
        self.header, self.payload, self.backup = (
            directory / name for name in ("header", "payload", "backup")
        )
        self.header.write_bytes(now)
        self.payload.write_bytes(bytes(4096))
        self.backup.write_bytes(backup)
        self.faults = faults = Faults()
        header = str(self.header)

        class FailingFile(FileNode):
            async def _pwrite(self, offset: int, data: memoryview) -> None:
                if self.options["filename"] == header:
                    faults.step()
                await super()._pwrite(offset, data)

            async def _flush(self) -> None:
                if self.options["filename"] == header:
                    faults.step()
                await super()._flush()

        self.graph = Graph({**DRIVERS, "file": FailingFile}, secrets=secrets)

    async def open(self) -> LuksNode:
        node = await self.graph.add(
            {
                "driver": "luks",
                "node-name": "disk",
                "file": {"driver": "file", "filename": str(self.payload)},
                "header": {"driver": "file", "filename": str(self.header)},
                "key-secret": "new",
            }
        )
        assert isinstance(node, LuksNode)
        return node

    async def restore(self, node: LuksNode) -> None:
        await header_backup.put_back(node, str(self.backup), secret="old", force=False, commit=lambda: None)


async def fails(trial: Trial, node: LuksNode) -> bool:
    try:
        await trial.restore(node)
    except (OSError, Error):
        return True
    return False


@pytest.mark.parametrize("version", [1, 2])
async def test_a_write_that_fails_leaves_the_header_as_it_was(tmp_path: Path, version: int) -> None:
    before, now = volumes(version)
    trial = Trial(tmp_path, now, before)
    node = await trial.open()
    steps = 0
    while True:
        known = node.luks_header
        trial.faults.left, trial.faults.once = steps, True
        if not await fails(trial, node):
            break
        assert trial.header.read_bytes() == now
        assert node.luks_header == known
        steps += 1
    assert steps >= 8
    assert openers(trial.header.read_bytes()) == {"old"}
    await trial.graph.close()


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("version", [1, 2])
async def test_a_storage_that_dies_leaves_a_way_in(tmp_path: Path, damaged: bool, version: int) -> None:
    before, now = volumes(version)
    trial = Trial(tmp_path, now, before)
    node = await trial.open()
    assert node.luks_header is not None
    lost = node.luks_header.beginning_bytes
    start = bytes(lost) + now[lost:] if damaged else now
    steps = 0
    while True:
        trial.header.write_bytes(start)
        trial.faults.left, trial.faults.once = steps, False
        if not await fails(trial, node):
            break
        left = trial.header.read_bytes()
        if not damaged or left.startswith(b"LUKS"):
            assert openers(left)
        # Whatever is there, it can be tried again as long as the node is open.
        trial.faults.left = 1 << 30
        await trial.restore(node)
        assert openers(trial.header.read_bytes()) == {"old"}
        steps += 1
    assert steps > 4
    await trial.graph.close()


async def test_a_header_that_changes_while_a_passphrase_is_tried_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, now = volumes()
    trial = Trial(tmp_path, now, before)
    node = await trial.open()
    check = header_backup._check_unforced

    async def slow_check(*arguments: Any) -> None:
        await check(*arguments)
        trial.header.write_bytes(before)

    monkeypatch.setattr(header_backup, "_check_unforced", slow_check)
    with pytest.raises(Error, match="has been changed by somebody else meanwhile"):
        await trial.restore(node)
    assert trial.header.read_bytes() == before
    await trial.graph.close()


@pytest.fixture
def failing_daemon(start_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """A qmpd whose files can't become longer than 64 KiB."""
    wrapper = (sys.executable, str(CHECKOUT / "tests" / "failing_storage.py"), "--largest", "65536", "--")
    return start_daemon(program=(*wrapper, *QMPD))


def test_a_backup_for_which_there_is_no_room_is_taken_away(
    tmp_path: Path, failing_daemon: RunningDaemon
) -> None:
    (tmp_path / "header").write_bytes(volumes()[0])
    (tmp_path / "payload").write_bytes(bytes(4096))
    monitor = failing_daemon.monitor
    monitor.execute("object-add", {"qom-type": "secret", "id": "old", "data": "old"})
    options: dict[str, Any] = {
        "driver": "luks",
        "node-name": "disk",
        "file": {"driver": "file", "filename": str(tmp_path / "payload")},
        "header": {"driver": "file", "filename": str(tmp_path / "header")},
        "key-secret": "old",
    }
    monitor.execute("blockdev-add", options)
    arguments = {"job-id": "job", "node-name": "disk", "filename": str(tmp_path / "backup")}
    monitor.execute("__org.qmpd_luks-header-backup", arguments)
    monitor.wait_event("JOB_STATUS_CHANGE", id="job", status="concluded")
    (info,) = monitor.execute("query-jobs")
    assert info["error"] == "File too large"
    assert info["type"] == "__org.qmpd_luks-header-backup"
    assert not (tmp_path / "backup").exists()


async def test_a_backup_that_is_cancelled_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, now = volumes()
    trial = Trial(tmp_path, now, before)
    node = await trial.open()
    path = tmp_path / "cancelled"
    reached, go_on = threading.Event(), threading.Event()

    def wait_there(directory: str) -> None:
        reached.set()
        go_on.wait()

    monkeypatch.setattr(header_backup, "_sync_directory", wait_there)
    saving = asyncio.create_task(header_backup.save(node, str(path)))
    await asyncio.to_thread(reached.wait)
    assert path.exists()
    saving.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert not path.exists()
    await trial.graph.close()


async def test_a_header_that_changes_while_it_is_saved_is_saved_as_it_is_at_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, now = volumes()
    trial = Trial(tmp_path, now, before)
    node = await trial.open()
    read = header_backup.key_materials
    changes = [before, now, before]

    async def changing(*arguments: Any) -> dict[int, bytes]:
        found = await read(*arguments)
        if changes:
            trial.header.write_bytes(changes.pop(0))
        return found

    monkeypatch.setattr(header_backup, "key_materials", changing)
    with pytest.raises(Error, match="is being changed by somebody else"):
        await header_backup.save(node, str(tmp_path / "first"))
    assert not (tmp_path / "first").exists()
    await header_backup.save(node, str(tmp_path / "second"))
    assert openers((tmp_path / "second").read_bytes()) == {"old"}
    await trial.graph.close()
