"""LUKS2 headers that cryptsetup has made and something has changed: qmpd never opens what cryptsetup refuses.

Each mutation comes from a seed.  It changes bytes of the binary header, bytes of the JSON text, or members of
the metadata, in one copy or in both; mostly the checksum is made right again, so that what was changed is
looked at.  What cryptsetup opens, qmpd opens with the same passphrase, or says why it does not.

Where a slot can't be tried, cryptsetup stops, and qmpd goes on to the next one: then cryptsetup is asked
about that one alone.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import os
import random
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from luks2_areas import packed, read
from luks_volumes import extent, opens_by_cryptsetup

from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.crypto import kdf, luks2_binary
from qmpd.crypto.luks1 import INVALID_PASSWORD
from qmpd.crypto.memory import KeyMemory
from qmpd.crypto.steps import run
from qmpd.errors import Error

SIZE = 16 << 10
PASSWORD = b"password"
MUTATIONS = 100
#: So many of them in one test.
BATCH = 20
GRAPH_MUTATIONS = 100


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A detached header with the passphrase in a slot of argon2id and one of PBKDF2."""
    path = tmp_path_factory.mktemp("luks2") / "header"
    disk = path.with_name("disk")
    disk.write_bytes(bytes(1 << 20))
    path.write_bytes(bytes(1 << 20))
    key = path.with_name("key")
    key.write_bytes(PASSWORD)
    room = "--luks2-keyslots-size 512k --luks2-metadata-size 16k --label some"
    for slot, costs, what in (
        (3, "argon2id --pbkdf-memory 64 --pbkdf-force-iterations 4", ["luksFormat", *room.split(), disk]),
        (5, "pbkdf2 --pbkdf-force-iterations 1000", ["luksAddKey", disk, key]),
    ):
        command = ["cryptsetup", "--batch-mode", "--type", "luks2", "--key-file", key, "--header", path]
        subprocess.run(
            [*command, "--key-slot", str(slot), "--pbkdf", *costs.split(), *what],
            check=True,
            capture_output=True,
        )
    area = path.read_bytes()[: 2 * SIZE + (512 << 10)]
    header = read(area, detached=True)
    # A digest that takes no time.
    found = run(header.unlocking(5, PASSWORD, area[slice(*extent(header, 5))]))
    assert found is not None
    metadata = copy.deepcopy(header.header.metadata)
    digest = metadata["digests"]["0"]
    digest["iterations"] = 1000
    with found as volume_key:
        salt = base64.b64decode(digest["salt"])
        value = kdf.pbkdf2(digest["hash"], volume_key.data, salt, 1000, 32)
    digest["digest"] = base64.b64encode(value).decode()
    return packed(header.header.binary, metadata) + area[2 * SIZE :]


def with_checksum(binary: bytearray) -> None:
    """Make the checksum of a copy right, if it names a hash."""
    name = bytes(binary[72:104]).partition(b"\0")[0].decode(errors="replace")
    binary[448:512] = bytes(64)
    try:
        checksum = luks2_binary._checksum(name, binary)
    except Error:
        return
    binary[448 : 448 + len(checksum)] = checksum


Mutation = Callable[[random.Random, bytearray], None]


def binary_bytes(chance: random.Random, data: bytearray) -> None:
    """Of the fields: those of the checksum and of what is reserved are rarely worth it."""
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.choice([chance.randrange(0, 16), chance.randrange(16, 264), chance.randrange(264, 512)])
        data[at] = chance.choice([0, 1, 0x7F, 0xFF, chance.randrange(256)])


def text_bytes(chance: random.Random, data: bytearray) -> None:
    end = data.index(0, 4096)
    for _ in range(chance.choice([1, 1, 2])):
        at = chance.randrange(4096, end)
        data[at] = chance.choice(b'{}[]":,0129-\\ x\xff\x00')


def behind_the_text(chance: random.Random, data: bytearray) -> None:
    data[chance.randrange(data.index(0, 4096), SIZE)] = chance.choice(b" x}")


VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    2**64,
    1.5,
    "",
    "0",
    "1",
    "512",
    "4096",
    "-1",
    "1e9",
    "18446744073709551615",
    "18446744073709551616",
    "%%%",
    "AAAA",
    "dynamic",
    "sha512",
    "aes-cbc-plain64",
    "aes-xts-plain",
    "argon2i",
    "x" * 500,
    "\0",
    [],
    ["0"],
    ["3", "5"],
    ["31"],
    {},
    {"0": {}},
    {"mandatory": ["what"]},
]


def members(chance: random.Random, data: bytearray) -> None:
    metadata = json.loads(bytes(data[4096:]).rstrip(b"\0"))
    places: list[tuple[dict[str, Any], str]] = []

    def visit(value: object) -> None:
        if isinstance(value, dict):
            for name, member in value.items():
                places.append((value, name))
                visit(member)

    visit(metadata)
    for _ in range(chance.choice([1, 1, 1, 2])):
        where, name = chance.choice(places)
        what = chance.randrange(8)
        if what == 0:
            where.pop(name, None)
        elif what == 1:
            where[chance.choice(["0", "7", "31", "32", "x"])] = copy.deepcopy(where.get(name))
        else:
            where[name] = chance.choice(VALUES)
    text = json.dumps(metadata).encode()
    data[4096:SIZE] = text.ljust(SIZE - 4096, b"\0")[: SIZE - 4096]


MUTATE: list[Mutation] = [binary_bytes, text_bytes, behind_the_text, members, members, members, members]


def mutated(area: bytes, seed: int) -> bytes:
    chance = random.Random(seed)
    copies = [bytearray(area[:SIZE]), bytearray(area[SIZE : 2 * SIZE])]
    mutate = chance.choice(MUTATE)
    state = chance.random()
    for data in copies if chance.random() < 0.7 else [chance.choice(copies)]:
        again = random.Random(state)  # both copies in the same way
        mutate(again, data)
        if chance.random() < 0.9:
            with_checksum(data)
    return b"".join(copies) + area[2 * SIZE :]


def verdict(area: bytes) -> tuple[str, int]:
    """Why the passphrase does not open the volume, or an empty string and the slot that it opens."""
    try:
        header = read(area, detached=True)
    except Error as error:
        return error.desc, -1
    refusal = INVALID_PASSWORD
    for slot in header.tried_slots:
        try:
            found = run(header.unlocking(slot, PASSWORD, area[slice(*extent(header, slot))]))
        except Error as error:
            refusal = error.desc
            continue
        if found is not None:
            found.wipe()
            return "", slot
    return refusal, -1


def opened_by_cryptsetup(path: Path, area: bytes, *more: str) -> bool:
    path.write_bytes(area)  # it may repair what is there
    try:
        return opens_by_cryptsetup(path, PASSWORD, *more)
    except AssertionError:
        return False


@pytest.mark.peer("cryptsetup")
@pytest.mark.parametrize("first", range(0, MUTATIONS, BATCH))
def test_what_cryptsetup_refuses_is_not_opened_and_what_it_opens_is_opened_or_refused_with_a_reason(
    tmp_path: Path, made: bytes, first: int
) -> None:
    path = tmp_path / "header"
    assert verdict(made) == ("", 3)
    for seed in range(first, first + BATCH):
        area = mutated(made, seed)
        answer, slot = verdict(area)
        theirs = opened_by_cryptsetup(path, area)
        if not theirs and not answer:
            theirs = opened_by_cryptsetup(path, area, "--key-slot", str(slot))
        print(seed, theirs, answer)
        assert theirs or answer, f"seed {seed}: cryptsetup refuses it"
        assert not theirs or answer != INVALID_PASSWORD, f"seed {seed}: {answer}"


# -- the whole daemon's way to a disk

#: More memory than the process has already, in bytes.
MORE_MEMORY = 256 << 20
SECONDS = 60


def add_all(made: bytes, path: Path, report: int) -> None:
    """In a fork: open mutated volumes as `blockdev-add` does; write how many of them did open."""
    resident = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (resident + MORE_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))

    async def add() -> int:
        graph = Graph(DRIVERS, secrets=lambda _: KeyMemory().copy_of(PASSWORD), pbkdf_memory=1024)
        payload = {"driver": "null-co", "size": 1 << 20}
        opened = 0
        for seed in range(1000, 1000 + GRAPH_MUTATIONS):
            path.write_bytes(mutated(made, seed))
            header = {"driver": "file", "filename": str(path)}
            options = {"driver": "luks", "node-name": "l", "file": payload, "header": header}
            try:
                node = await graph.add({**options, "key-secret": "k"})
                await node.pread(0, 4096)
            except Error:
                assert graph.nodes() == []
            else:
                opened += 1
                await graph.delete("l")
        await graph.close()
        return opened

    os.write(report, b"%d" % asyncio.run(add()))


@pytest.mark.peer("cryptsetup")
def test_the_graph_opens_or_refuses_them_with_little_memory_and_time(tmp_path: Path, made: bytes) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            add_all(made, tmp_path / "header", writer)
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}"[:4000].encode())
        finally:
            os._exit(0)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as file:
        report = file.read().decode()
    assert status == 0, "it took too long"
    assert report.isdecimal(), report
    assert 0 < int(report) < GRAPH_MUTATIONS
