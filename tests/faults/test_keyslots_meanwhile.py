"""What happens to a LUKS header, or to those who use it, while its keyslots are being changed.

Several clients at once, users that come and go, a client that cancels or leaves, somebody who writes to the
header without asking anybody, and headers that want to lead a change astray: the slots are afterwards what
one of the possible orders gives, or as before.
"""

from __future__ import annotations

import asyncio
import random
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import StartDaemon
from daemons import QMPD, CommandError, Connection, RunningDaemon
from luks_volumes import (
    CIPHER,
    Judge,
    accepted_by_cryptsetup,
    extent,
    filled,
    new_area,
    opens_by_cryptsetup,
    parse,
)

from qmpd.block.amending import amend
from qmpd.block.backend import Backend
from qmpd.block.drivers import DRIVERS, create
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.block.permissions import Permission
from qmpd.crypto import kdf
from qmpd.crypto.luks1 import SECTOR, slot_extent
from qmpd.crypto.memory import KeyMemory
from qmpd.crypto.steps import Steps
from qmpd.errors import Error
from qmpd.jobs import Job, Jobs, State

PASSWORDS = ("a", "b", "c", "d", "base")


def adding(password: str, slot: int | None = None) -> dict[str, Any]:
    options = {"driver": "luks", "state": "active", "new-secret": password, "iter-time": 1, "secret": "base"}
    return options if slot is None else {**options, "keyslot": slot}


def erasing(password: str) -> dict[str, Any]:
    return {"driver": "luks", "state": "inactive", "old-secret": password}


def replacing(old: str, new: str) -> dict[str, Any]:
    return {**adding(new), "old-secret": old}


class Header:
    """A detached header on disk, and two payloads."""

    def __init__(self, directory: Path, passwords: dict[int, bytes]) -> None:
        self.path = directory / "header.img"
        self.payloads = [directory / "first.img", directory / "second.img"]
        self.path.write_bytes(filled(new_area(detached=True), passwords, detached=True))
        for payload in self.payloads:
            payload.write_bytes(bytes(64 << 10))
        self.judge = Judge(detached=True)

    def options(self, name: str, number: int = 0, secret: str = "base", **more: Any) -> dict[str, Any]:
        payload = {"driver": "file", "filename": str(self.payloads[number])}
        header = {"driver": "file", "filename": str(self.path)}
        options = {"driver": "luks", "node-name": name, "file": payload, "header": header}
        return {**options, "key-secret": secret, **more}

    @property
    def area(self) -> bytes:
        return self.path.read_bytes()

    def opened(self) -> set[str]:
        names = [name.encode() for name in PASSWORDS]
        found = self.judge.opened(self.area, names)
        assert sorted(found) == self.judge.header(self.area).active_slots
        return {password.decode() for password in found.values()}

    def change(self, offset: int, data: bytes) -> None:
        """Write to it without asking anybody."""
        with self.path.open("rb+") as file:
            file.seek(offset)
            file.write(data)


# -- through the monitor


def start(start_daemon: StartDaemon, program: tuple[str, ...] = QMPD) -> RunningDaemon:
    secrets = [part for name in PASSWORDS for part in ("--object", f"secret,id={name},data={name}")]
    return start_daemon(*secrets, program=program)


def begin(client: Connection, job: str, node: str, options: dict[str, Any], *, force: bool = False) -> None:
    client.execute("blockdev-amend", {"job-id": job, "node-name": node, "options": options, "force": force})


def outcome(client: Connection, job: str) -> str | None:
    """Wait for a job's end; its error, or None."""
    client.wait_event("JOB_STATUS_CHANGE", id=job, status="concluded")
    (info,) = [entry for entry in client.execute("query-jobs") if entry["id"] == job]
    client.execute("job-dismiss", {"id": job})
    error: str | None = info.get("error")
    return error


def answer(client: Connection, command: str, arguments: dict[str, Any]) -> str | None:
    """What is wrong with a command, or None."""
    try:
        client.execute(command, arguments)
    except CommandError as error:
        return error.desc
    return None


@pytest.mark.peer("cryptsetup")
def test_of_two_clients_one_waits_for_the_other(tmp_path: Path, start_daemon: StartDaemon) -> None:
    header = Header(tmp_path, {0: b"base"})
    daemon = start(start_daemon)
    # A header node of both, and a third disk with a header node of its own.
    daemon.execute("blockdev-add", {"driver": "file", "node-name": "h", "filename": str(header.path)})
    for number in (0, 1):
        daemon.execute("blockdev-add", header.options(f"l{number}", number, header="h"))
    daemon.execute("blockdev-add", header.options("own", 1))
    clients = [daemon.connect(), daemon.connect(), daemon.connect()]
    for nodes in (("l0", "l0", "l1"), ("l0", "own", "l1")):
        for client, node, password in zip(clients, nodes, "abc", strict=True):
            begin(client, f"j{password}", node, adding(password))
        assert [outcome(client, f"j{name}") for client, name in zip(clients, "abc", strict=True)] == [
            None
        ] * 3
        assert header.opened() == {"base", "a", "b", "c"}
        for client, node, password in zip(clients, nodes, "abc", strict=True):
            begin(client, f"j{password}", node, erasing(password))
        assert [outcome(client, f"j{name}") for client, name in zip(clients, "abc", strict=True)] == [
            None
        ] * 3
        assert header.opened() == {"base"}

    # Each wants to take away the last key but its own: who comes second may not.
    begin(clients[0], "j", "l0", adding("a"))
    assert outcome(clients[0], "j") is None
    begin(clients[0], "j0", "l0", erasing("a"))
    begin(clients[1], "j1", "l1", erasing("base"))
    answers = outcome(clients[0], "j0"), outcome(clients[1], "j1")
    assert answers[0] is None
    assert answers[1] is not None
    assert answers[1].startswith("All the active keyslots match the (old) password")
    assert header.opened() == {"base"}

    # All of them know the slots, whoever changed them.
    slots = [
        [slot["active"] for slot in node["image"]["format-specific"]["data"]["slots"]]
        for node in daemon.execute("query-named-block-nodes")
        if node["drv"] == "luks"
    ]
    assert slots == [[True] + [False] * 7] * 3
    accepted_by_cryptsetup(header.path)
    assert opens_by_cryptsetup(header.path, b"base")
    daemon.assert_alive()


def test_a_client_that_leaves_lets_the_job_go_on(tmp_path: Path, start_daemon: StartDaemon) -> None:
    header = Header(tmp_path, {0: b"base"})
    daemon = start(start_daemon)
    daemon.execute("blockdev-add", header.options("l"))
    with daemon.connect() as client:
        begin(client, "j", "l", adding("a"))
    daemon.monitor.wait_event("JOB_STATUS_CHANGE", id="j", status="concluded")
    assert "error" not in daemon.execute("query-jobs")[0]
    assert header.opened() == {"base", "a"}


def test_quit_ends_a_change_before_it_or_after_it(tmp_path: Path, start_daemon: StartDaemon) -> None:
    header = Header(tmp_path, {0: b"base"})
    before = header.area
    daemon = start(start_daemon)
    daemon.execute("blockdev-add", header.options("l"))
    begin(daemon.monitor, "j", "l", adding("a"))
    assert daemon.quit() == 0
    assert header.area == before or header.opened() == {"base", "a"}


def test_users_come_and_go_while_a_passphrase_is_changed(tmp_path: Path, start_daemon: StartDaemon) -> None:
    header = Header(tmp_path, {0: b"base"})
    daemon = start(start_daemon)
    monitor, other = daemon.monitor, daemon.connect()
    chance = random.Random(5)
    daemon.execute("blockdev-add", {"driver": "file", "node-name": "h", "filename": str(header.path)})
    options = header.options("l", header="h")
    daemon.execute("blockdev-add", options)
    daemon.execute("device_add", {"driver": "virtio-blk", "id": "disk", "drive": "l", "share-rw": True})
    reopened = {**options, "read-only": False, "discard": "unmap"}
    plug = {"driver": "virtio-blk", "id": "disk", "drive": "l", "share-rw": True}
    visits: list[tuple[str, dict[str, Any], str | None]] = [
        ("blockdev-del", {"node-name": "l"}, " l is in use"),
        ("blockdev-del", {"node-name": "h"}, "Block device h is in use"),
        ("block_resize", {"node-name": "l", "size": 128 << 10}, None),
        ("blockdev-reopen", {"options": [reopened]}, None),
        ("human-monitor-command", {"command-line": 'qemu-io l "write -P 7 0 64k"'}, None),
        ("device_del", {"id": "disk"}, None),
        ("device_add", plug, None),
        ("blockdev-add", header.options("late", 1, header="h"), "Permission conflict on node 'h'"),
        ("blockdev-add", header.options("late", 1), "Failed to get"),
    ]
    for number, password in enumerate("ab"):
        chance.shuffle(visits)
        visits.sort(key=lambda visit: visit[0] == "device_add")
        # The key takes so long that all visits come and go meanwhile.
        begin(monitor, "j", "l", {**adding(password), "iter-time": 800})
        answers = [answer(other, command, arguments) for command, arguments, _ in visits]
        assert [job["status"] for job in other.execute("query-jobs")] == ["running"]
        for (command, _, refusal), given in zip(visits, answers, strict=True):
            assert (given is None) == (refusal is None), (command, given)
            assert given is None or str(refusal) in given
        assert outcome(monitor, "j") is None
        assert header.opened() == {"base", *"ab"[: number + 1]}
    assert "Pattern" not in daemon.qemu_io("l", "read -P 7 0 64k")
    daemon.assert_alive()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("--error ENOSPC --of write --from 8192", "No space left on device"),
        ("--error EIO --of write", "Input/output error"),
        ("--error EIO --of flush", "Input/output error"),
        ("--error EROFS --of write", "Read-only file system"),
        ("--largest 100000", "File too large"),
    ],
)
def test_a_daemon_without_working_storage_says_so_and_changes_nothing(
    tmp_path: Path, start_daemon: StartDaemon, fault: str, reason: str
) -> None:
    header = Header(tmp_path, {0: b"base"})
    # Nobody has written what is behind the first slot.
    length = len(header.area)
    area = header.area[: extent(parse(header.area, detached=True), 0)[1]]
    header.path.write_bytes(area)
    program = (sys.executable, str(Path(__file__).parent.parent / "failing_storage.py"))
    daemon = start(start_daemon, program=(*program, *fault.split(), "--", *QMPD))
    daemon.execute("blockdev-add", header.options("l"))
    begin(daemon.monitor, "j", "l", adding("a", 6))
    error = outcome(daemon.monitor, "j")
    assert error is not None
    assert error.startswith(f"Could not write encryption header: {reason}")
    assert header.area.ljust(length, b"\0") == area.ljust(length, b"\0")
    (node,) = [node for node in daemon.execute("query-named-block-nodes") if node["drv"] == "luks"]
    assert [slot["active"] for slot in node["image"]["format-specific"]["data"]["slots"]] == [True] + [
        False
    ] * 7
    daemon.assert_alive()


# -- in this process


def quick(*_: Any, **__: Any) -> Steps[int]:
    """Calibration that takes no time."""
    yield
    return kdf.MIN_ITERATIONS


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Graph:
    monkeypatch.setattr(kdf, "calibrating", quick)
    return Graph(DRIVERS, secrets=lambda name: KeyMemory().copy_of(name.encode()))


async def change(node: Node, options: dict[str, Any], *, force: bool = False) -> None:
    await node.amend(options, force=force, progress=lambda *_: None, commit=lambda: None)


async def test_a_job_that_is_cancelled_has_changed_all_or_nothing(tmp_path: Path, graph: Graph) -> None:
    header = Header(tmp_path, {0: b"base"})
    node = await graph.add(header.options("l"))
    jobs, chance = Jobs(lambda *_: None), random.Random(5)
    outcomes = set()
    present: str | None = None
    for number in range(40):
        before = header.area
        options = adding("a") if present is None else replacing("a", "b") if present == "a" else erasing("b")
        following = {None: "a", "a": "b", "b": None}[present]

        def work(job: Job, options: dict[str, Any] = options) -> Any:
            return amend(node, options, force=True, progress=job.report_progress, commit=job.commit)

        job = jobs.start(f"j{number}", "amend", work)
        await asyncio.sleep(chance.uniform(0, 0.25))
        if job.state is State.RUNNING:
            job.cancel()
        await job.wait()
        assert job.error in (None, "Operation canceled")
        if job.error is None:
            assert header.opened() == {"base", following} - {None}
            present = following
        else:
            assert header.area == before
        outcomes.add(job.error)
        known = node.format_specific()
        assert known is not None
        active = {slot for slot, info in enumerate(known["data"]["slots"]) if info["active"]}
        assert active == {*parse(header.area, detached=True).active_slots}
    assert outcomes == {None, "Operation canceled"}
    await graph.close()


@pytest.mark.parametrize("what", ["another volume's", "changed", "truncated", "gone"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_a_header_that_somebody_else_writes_is_left_alone(
    tmp_path: Path, graph: Graph, monkeypatch: pytest.MonkeyPatch, what: str, when: str
) -> None:
    header = Header(tmp_path, {0: b"base"})
    node = await graph.add(header.options("l"))
    area = header.area
    stranger = {
        "another volume's": filled(new_area(detached=True), {0: b"base"}, detached=True),
        "changed": filled(area, {0: b"base", 1: b"c"}, detached=True),
        "truncated": area[:400],
        "gone": b"",
    }[what]

    def interfering(*_: Any) -> Steps[int]:
        header.path.write_bytes(stranger)
        return (yield from quick())

    if when == "before":
        header.path.write_bytes(stranger)
    else:
        monkeypatch.setattr(kdf, "calibrating", interfering)
    if (what, when) == ("changed", "before"):
        # It is still this disk's; what is in use is known now, and stays.
        await change(node, adding("a"))
        assert header.opened() == {"base", "a", "c"}
    else:
        with pytest.raises(Error):
            await change(node, adding("a"))
        assert header.area == stranger
    await node.pwrite(0, b"guest" * 100)
    header.path.write_bytes(area)
    monkeypatch.setattr(kdf, "calibrating", quick)
    await change(node, adding("b", 3))
    assert header.opened() == {"base", "b"}
    await graph.close()


KEY_OFFSET = struct.Struct(">I")


def with_slot_at(area: bytes, slot: int, sector: int) -> bytes:
    start, length = slot_extent(slot)
    at = start + length - 8
    return area[:at] + KEY_OFFSET.pack(sector) + area[at + 4 :]


@pytest.mark.parametrize("sector", [0xFFFF_FF00, 1 << 20, 1100])
async def test_a_slot_far_behind_the_header_is_not_written(tmp_path: Path, graph: Graph, sector: int) -> None:
    header = Header(tmp_path, {0: b"base"})
    area = with_slot_at(header.area, 3, sector)
    header.path.write_bytes(area)
    node = await graph.add(header.options("l"))
    with pytest.raises(Error, match="Keyslot 3 ends behind the LUKS header's key area"):
        await change(node, adding("a", 3))
    with pytest.raises(Error, match="Keyslot 3 ends behind the LUKS header's key area"):
        await change(node, {"driver": "luks", "state": "inactive", "keyslot": 3}, force=True)
    assert header.area == area
    await change(node, adding("a"))
    assert header.opened() == {"base", "a"}
    await graph.close()


async def test_a_payload_behind_a_header_that_serves_another_disk_is_not_written(
    tmp_path: Path, graph: Graph
) -> None:
    header = Header(tmp_path, {0: b"base"})
    area = filled(new_area(detached=False), {0: b"base"}, detached=False)
    image = with_slot_at(area, 5, len(area) // SECTOR) + b"data" * (128 << 10)
    header.path.write_bytes(image)
    header.payloads[0].write_bytes(image)
    node = await graph.add(header.options("l"))
    with pytest.raises(Error, match="Keyslot 5 ends behind the LUKS header's key area"):
        await change(node, adding("a", 5))
    assert header.area == image
    await graph.close()


async def test_a_key_comes_into_a_slot_behind_the_end_of_the_file(tmp_path: Path, graph: Graph) -> None:
    header = Header(tmp_path, {0: b"base"})
    length = len(header.area)
    header.path.write_bytes(header.area[: extent(parse(header.area, detached=True), 0)[1]])
    node = await graph.add(header.options("l"))
    await change(node, adding("a", 7))
    assert header.opened() == {"base", "a"}
    assert len(header.area) <= length
    await graph.close()


async def test_a_slot_that_nobody_could_try_is_neither_used_nor_erased(tmp_path: Path, graph: Graph) -> None:
    header = Header(tmp_path, {0: b"c", 1: b"base", 2: b"b"})
    start, _ = slot_extent(0)
    header.change(start + 4, struct.pack(">I", 0xFFFF_FFFF))
    area = header.area
    node = await graph.add(header.options("l"))
    # Whether the passphrase opens that slot as well can't be found out.
    with pytest.raises(Error, match="Keyslot 0 iteration count 4294967295 is more than"):
        await change(node, erasing("b"))
    assert header.area == area
    await change(node, adding("a"))
    await change(node, {"driver": "luks", "state": "inactive", "keyslot": 2})
    assert header.area[start : start + 48] == area[start : start + 48]
    found = parse(header.area, detached=True)
    assert found.active_slots == [0, 1, 3]
    assert header.area[slice(*extent(found, 0))] == area[slice(*extent(found, 0))]
    await change(node, {"driver": "luks", "state": "inactive", "keyslot": 0})
    assert header.opened() == {"base", "a"}
    await graph.close()


@pytest.mark.parametrize("slot_sector", [8, 9, 130])
async def test_a_header_whose_slots_overlap_is_not_written(
    tmp_path: Path, graph: Graph, slot_sector: int
) -> None:
    header = Header(tmp_path, {0: b"base"})
    node = await graph.add(header.options("l"))
    area = with_slot_at(header.area, 4, slot_sector)
    header.path.write_bytes(area)
    with pytest.raises(Error, match="Keyslots 0 and 4 are overlapping in the header"):
        await change(node, adding("a", 4))
    assert header.area == area
    await graph.close()


async def test_a_header_that_may_not_be_written_is_not(tmp_path: Path, graph: Graph) -> None:
    header = Header(tmp_path, {0: b"base"})
    area = header.area
    await graph.add({"driver": "file", "node-name": "h", "filename": str(header.path), "read-only": True})
    node = await graph.add({**header.options("l", header="h"), "read-only": True})
    for options in (adding("a"), erasing("base")):
        with pytest.raises(Error, match="Block node is read-only"):
            await change(node, options, force=True)
    assert header.area == area
    await graph.close()


@pytest.mark.parametrize("driver", ["luks", "qcow2"])
async def test_a_guest_writes_on_while_its_passphrases_change(
    tmp_path: Path, graph: Graph, driver: str
) -> None:
    path, size = tmp_path / "disk", 256 << 10
    path.touch()
    file = {"driver": "file", "filename": str(path)}
    luks = {"key-secret": "base", "iter-time": 1, **CIPHER}
    encrypt = luks if driver == "luks" else {"encrypt": {"format": "luks", **luks}}
    await create(graph, {"driver": driver, "file": file, "size": size, **encrypt})
    key: dict[str, Any] = {"key-secret": "base"}
    if driver == "qcow2":
        key = {"encrypt": {"format": "luks", **key}}
    node = await graph.add({"driver": driver, "node-name": "d", "file": file, **key})
    guest = Backend(graph, perm=Permission.CONSISTENT_READ | Permission.WRITE)
    guest.attach(node)
    chance, model, over = random.Random(5), bytearray(await guest.pread(0, size)), False

    async def write() -> None:
        while not over:
            start, data = chance.randrange(0, size - 9999), chance.randbytes(chance.randrange(1, 9999))
            await guest.pwrite(start, data)
            model[start : start + len(data)] = data
            assert bytes(await guest.pread(start, len(data))) == data
            await asyncio.sleep(0)

    async def amend_all() -> None:
        nonlocal over
        for options in (adding("a", 6), replacing("a", "b"), adding("c"), erasing("b"), erasing("c")):
            if driver == "qcow2":
                inner = {name: value for name, value in options.items() if name != "driver"}
                options = {"driver": "qcow2", "encrypt": {"format": "luks", **inner}}
            await change(node, options, force=True)
        over = True

    await asyncio.gather(write(), amend_all())
    assert bytes(await guest.pread(0, size)) == model
    guest.detach()
    await graph.delete("d")
    again = await graph.add({"driver": driver, "node-name": "d", "file": file, **key})
    assert bytes(await again.pread(0, size)) == model
    await graph.close()
