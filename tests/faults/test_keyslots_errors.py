"""The storage of a LUKS header fails while keyslots change, and the command that fails changes nothing.

Each request that a change makes of its storage fails in turn: once, or from then on, or a few later ones as
well, so that undoing fails too; a write may leave its first half.  Header and key area are afterwards byte
for byte as before, if the storage let itself be put back; if not, what should open the disk does.  The node
knows what the storage has, goes on serving its guest, and a later change works.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import luks2_areas
import luks_volumes
import pytest
from luks_volumes import CIPHER, carried_out

from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers import create as create_image
from qmpd.block.drivers.file import FileNode
from qmpd.block.graph import Graph
from qmpd.block.keyslot_holder import KeyslotHolder
from qmpd.block.keyslots import NOT_UNDONE, exclusive
from qmpd.block.node import errno_error
from qmpd.crypto import kdf
from qmpd.crypto.luks import Luks2, LuksHeader
from qmpd.crypto.luks1 import SECTOR, SLOTS
from qmpd.crypto.memory import KeyBuffer, KeyMemory
from qmpd.crypto.plan import Plan
from qmpd.crypto.steps import Steps
from qmpd.errors import Error

GUEST_BYTES = 64 << 10

SECRETS = {"base": b"base", "old": b"old", "new": b"new", "other": b"other"} | {
    f"eight{slot}": b"eight%d" % slot for slot in range(SLOTS)
}


class Trouble:
    """Says which of the requests to come fail: their numbers, counted from 0.

    With `persistent` all that come after the last of these fail as well, except reads; with `dead` reads too.
    """

    def __init__(self) -> None:
        self.cease()

    def begin(
        self,
        numbers: set[int],
        error: int = errno.EIO,
        *,
        torn: bool = False,
        persistent: bool = False,
        dead: bool = False,
    ) -> None:
        self.numbers, self.error, self.torn = numbers, error, torn
        self.persistent, self.dead = persistent, dead
        self.count = 0

    def cease(self) -> None:
        self.begin(set())

    def comes(self, *, read: bool = False) -> bool:
        number = self.count
        self.count += 1
        lasting = self.dead or (self.persistent and not read)
        return number in self.numbers or (lasting and number > max(self.numbers))

    def look(self, *, read: bool = False) -> None:
        if self.comes(read=read):
            raise errno_error(self.error)


def failing(trouble: Trouble) -> type[FileNode]:
    class FailingFile(FileNode):
        async def _pread(self, offset: int, length: int) -> memoryview:
            trouble.look(read=True)
            return await super()._pread(offset, length)

        async def _pwrite(self, offset: int, data: memoryview) -> None:
            if trouble.comes():
                if trouble.torn:
                    await super()._pwrite(offset, data[: len(data) // 2])
                raise errno_error(trouble.error)
            await super()._pwrite(offset, data)

        async def _flush(self) -> None:
            trouble.look()
            await asyncio.sleep(0)

    return FailingFile


def secret(name: str) -> KeyBuffer:
    return KeyMemory().copy_of(SECRETS[name])


class Disk:
    """A LUKS disk whose header's file can fail.

    :param layout: "inline", "detached" or "qcow2"; for LUKS2 "luks2-inline", or "luks2-damaged-detached",
        whose primary copy of the header is damaged from the beginning.
    """

    def __init__(self, directory: Path, layout: str) -> None:
        self.layout = layout
        self.detached = layout.endswith("detached")
        #: Of which version the headers are.
        self.volumes: Any = luks2_areas if layout.startswith("luks2") else luks_volumes
        self.header_path = directory / "header"
        self.payload_path = directory / "payload"
        self.trouble = Trouble()
        self.graph = Graph({**DRIVERS, "file": failing(self.trouble)}, secrets=secret)
        self.judge: luks_volumes.Judge = self.volumes.Judge(detached=self.detached)

    async def open(self, passwords: dict[int, bytes], known: str) -> None:
        """Make the disk with these passphrases, and open it with one of them."""
        if self.layout == "qcow2":
            self.header_path.touch()
            encrypt = {"format": "luks", "key-secret": "base", "iter-time": 1, **CIPHER}
            file = {"driver": "file", "filename": str(self.header_path)}
            options = {"driver": "qcow2", "file": file, "size": GUEST_BYTES, "encrypt": encrypt}
            await create_image(self.graph, options)
        else:
            area = self.volumes.new_area(detached=self.detached)
            self.header_path.write_bytes(area + (b"" if self.detached else bytes(GUEST_BYTES)))
            self.payload_path.write_bytes(bytes(GUEST_BYTES))
        header = {"driver": "file", "filename": str(self.header_path)}
        more: dict[str, Any] = {"file": header, "key-secret": known}
        if self.detached:
            payload = {"driver": "file", "filename": str(self.payload_path)}
            more |= {"header": header, "file": payload}
        if self.layout == "qcow2":
            encrypt = {"format": "luks", "key-secret": "base"}
            probe = await self._add({"driver": "qcow2", "file": header, "encrypt": encrypt})
            self.start = probe.header_area.offset
            assert probe.luks_header is not None
            self.length = probe.luks_header.length
            await self.graph.delete("d")
            more["encrypt"] = {"format": "luks", "key-secret": known}
            del more["key-secret"]
        else:
            self.start, self.length = 0, len(area)
        area = self.volumes.filled(self.area(), passwords, detached=self.detached)
        if "damaged" in self.layout:
            area = area[:5000] + b"?" + area[5001:]
        self.put(area)
        self.node = await self._add({"driver": "qcow2" if self.layout == "qcow2" else "luks", **more})

    async def _add(self, options: dict[str, Any]) -> KeyslotHolder:
        node = await self.graph.add({"node-name": "d", **options})
        assert isinstance(node, KeyslotHolder)
        return node

    def area(self) -> bytes:
        """Header and key area, as they are on the storage."""
        with self.header_path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.length).ljust(self.length, b"\0")

    def put(self, area: bytes) -> None:
        """Bring header and key area into a state."""
        with self.header_path.open("rb+") as file:
            file.seek(self.start)
            file.write(area)

    @property
    def known_header(self) -> LuksHeader:
        """What the node tells of its header."""
        header = self.node.luks_header
        assert header is not None
        return header

    def knows(self, area: bytes) -> None:
        """Let the node know the header in a state of the area."""
        self.node.luks_header = self.read(area)

    def read(self, area: bytes) -> LuksHeader:
        """The header in a state of the area."""
        header: LuksHeader = self.volumes.read(area, detached=self.detached)
        return header

    async def serve_guest(self, data: bytes) -> None:
        """Write and read as a guest does."""
        await self.node.pwrite(4096, data)
        assert bytes(await self.node.pread(4096, len(data))) == data


LAYOUTS = ("inline", "detached", "qcow2", "luks2-inline", "luks2-damaged-detached")

MakePlan = Callable[[Disk, bytes], Plan]


def activating(slots: list[int], known: bytes) -> MakePlan:
    def make(disk: Disk, area: bytes) -> Plan:
        plan: Plan = disk.volumes.activation(area, slots, known, b"new", detached=disk.detached)[1]
        return plan

    return make


def erasing(slots: list[int]) -> MakePlan:
    def make(disk: Disk, area: bytes) -> Plan:
        plan: Plan = disk.volumes.erasure(area, slots, detached=disk.detached)
        return plan

    return make


EIGHT = {slot: b"eight%d" % slot for slot in range(SLOTS)}

#: Name: passphrases before; the plan; of these at least one opens the disk at any moment, and each of those.
PLANS: dict[str, tuple[dict[int, bytes], MakePlan, set[bytes], set[bytes]]] = {
    "add": ({1: b"old"}, activating([6], b"old"), {b"old"}, {b"old"}),
    "replace": ({2: b"old", 6: b"old"}, activating([2, 6], b"old"), {b"old", b"new"}, set()),
    "replace one of eight": (
        EIGHT,
        activating([6], b"eight0"),
        {b"eight0"},
        {*EIGHT.values()} - {b"eight6"},
    ),
    "erase": (
        {1: b"old", 5: b"old", 6: b"old", 7: b"other"},
        erasing([1, 5, 6]),
        {b"other"},
        {b"other"},
    ),
    "erase all": ({0: b"old", 6: b"other"}, erasing([0, 6]), set(), set()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PLANS)
async def test_whichever_request_fails_the_slots_are_as_before(
    tmp_path: Path, layout: str, name: str
) -> None:
    passwords, make_plan, some, each = PLANS[name]
    disk = Disk(tmp_path, layout)
    await disk.open(passwords, next(k for k, v in SECRETS.items() if v in passwords.values()))
    before = disk.area()
    plan = make_plan(disk, before)
    after = carried_out(before, plan)
    trouble, chance = disk.trouble, random.Random(name)
    outcomes = []

    async def attempt() -> str:
        try:
            async with exclusive(disk.node) as access:
                trouble.count = 0
                await access.carry_out(plan, expected=disk.read(before))
                disk.knows(after)
        except Error as error:
            return error.desc
        finally:
            trouble.cease()
        return ""

    for number in itertools.count():
        answers = []
        for torn, lasting, later in (
            (False, "", 0),
            (True, "", 0),
            (True, "persistent", 0),
            (True, "dead", 0),
            (chance.random() < 0.5, "", chance.randrange(1, 9)),
            (True, "persistent", chance.randrange(1, 9)),
        ):
            error = chance.choice([errno.EIO, errno.ENOSPC])
            more = {lasting: True} if lasting else {}
            trouble.begin({number, number + later}, error, torn=torn, **more)
            answer = await attempt()
            now = disk.area()
            answers.append(answer)
            # What can't be read nobody knows.
            if lasting != "dead":
                assert disk.known_header == disk.read(now), (number, answer)
            await disk.serve_guest(chance.randbytes(SECTOR))
            if not answer:
                assert now == after
            elif NOT_UNDONE in answer:
                assert os.strerror(error) in answer
                opened = disk.judge.opened(now, [*passwords.values(), b"new"]).values()
                assert each <= {*opened}, (number, answer)
                assert not some or some & {*opened}, (number, answer)
            else:
                assert os.strerror(error) in answer
                assert now == before, (number, torn, lasting, later, answer)
                # Nothing is in the way of the next one.
                assert number % 5 or await attempt() == ""
            disk.put(before)
            disk.knows(before)
        outcomes.append(answers)
        if not any(answers):
            break
    # One request, failing once, is always undone.
    assert all(NOT_UNDONE not in answer for answers in outcomes for answer in answers[:2])
    assert any(NOT_UNDONE in answer for answers in outcomes for answer in answers[2:])
    await disk.graph.close()


# -- the whole command

CHANGES: dict[str, tuple[dict[int, bytes], dict[str, Any]]] = {
    "add": ({1: b"old"}, {"state": "active", "new-secret": "new", "keyslot": 6}),
    "add to the first": ({1: b"old"}, {"state": "active", "new-secret": "new"}),
    "replace": ({1: b"old"}, {"state": "active", "new-secret": "new", "old-secret": "old"}),
    "replace one of eight": (
        EIGHT | {0: b"old"},
        {"state": "active", "new-secret": "new", "keyslot": 0},
    ),
    "erase": ({1: b"old", 7: b"other"}, {"state": "inactive", "keyslot": 7}),
    "erase several": ({1: b"old", 6: b"old", 7: b"other"}, {"state": "inactive", "old-secret": "old"}),
}


def quick(*_: Any, **__: Any) -> Steps[int]:
    """Calibration that takes no time."""
    yield
    return kdf.MIN_ITERATIONS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CHANGES)
async def test_a_command_that_fails_changes_nothing_and_the_next_one_works(
    tmp_path: Path, layout: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kdf, "calibrating", quick)
    passwords, change = CHANGES[name]
    disk = Disk(tmp_path, layout)
    await disk.open(passwords, "old")
    before, header, chance = disk.area(), disk.known_header, random.Random(f"{layout} {name}")
    options = {"driver": "luks", **change}
    if layout.startswith("luks2") and change["state"] == "active":
        options["pbkdf"] = "pbkdf2"
    if layout == "qcow2":
        options = {"driver": "qcow2", "encrypt": {"format": "luks", **change}}
    force = "replace" in name

    async def amend() -> None:
        await disk.node.amend(options, force=force, progress=lambda *_: None, commit=lambda: None)

    disk.trouble.cease()
    await amend()
    requests, after = disk.trouble.count, disk.judge.opened(disk.area(), [*passwords.values(), b"new"])
    assert after != disk.judge.opened(before, passwords.values())
    for number in sorted(chance.sample(range(requests), 4)):
        disk.put(before)
        disk.knows(before)
        disk.trouble.begin({number}, torn=True)
        try:
            await amend()
        except Error as error:
            reason = error.desc
        else:
            # The key in memory did: with force that is enough, if the slots can't be read.
            assert force
            reason = ""
        disk.trouble.cease()
        await disk.serve_guest(chance.randbytes(SECTOR))
        if reason:
            assert os.strerror(errno.EIO) in reason
            assert disk.area() == before
            assert disk.known_header == header
            await amend()
        assert disk.judge.opened(disk.area(), [*passwords.values(), b"new"]) == after
        assert disk.known_header == disk.read(disk.area())
        if isinstance(header, Luks2):
            assert isinstance(disk.known_header, Luks2)
            assert disk.known_header.damaged == ()
            assert disk.known_header.header.binary.sequence > header.header.binary.sequence
    await disk.graph.close()
