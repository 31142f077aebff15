"""LUKS2 disks that want too much, in the graph: memory, time, or that nonsense is believed."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import luks2_areas
import orjson
import pytest
from luks_volumes import carried_out, extent

from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.file import FileNode
from qmpd.block.graph import Graph
from qmpd.crypto import luks2, luks2_kdf
from qmpd.crypto.luks2_binary import SIZES, BinaryHeader
from qmpd.crypto.luks2_kdf import Kdf
from qmpd.crypto.memory import KeyMemory
from qmpd.crypto.steps import run
from qmpd.errors import Error

LIMIT = 64


def graph_with(limit: int = LIMIT) -> Graph:
    return Graph(DRIVERS, secrets=lambda name: KeyMemory().copy_of(name.encode()), pbkdf_memory=limit)


def volume(*costs: Kdf) -> bytes:
    """A volume that the passphrase "base" opens, by a slot of each of these costs."""
    area = luks2_areas.new_area(detached=False)
    header = luks2_areas.read(area, detached=False)
    key = run(header.unlocking(0, b"base", area[slice(*extent(header, 0))]))
    assert key is not None
    with key:
        for slot, one in enumerate(costs):
            header, plan = run(header.activating([slot], key.data, b"base", one))
            area = carried_out(area, plan)
    return area + bytes(64 << 10)


def argon2id(memory: int) -> Kdf:
    return Kdf("argon2id", bytes(32), 1, memory=memory, cpus=1)


def with_costs(area: bytes, slot: int, **costs: object) -> bytes:
    """The same volume, with a slot that says other costs."""
    header = luks2_areas.read(area, detached=False).header
    metadata = copy.deepcopy(header.metadata)
    metadata["keyslots"][str(slot)]["kdf"] |= costs
    return luks2_areas.packed(header.binary, metadata) + area[2 * header.binary.size :]


def options(path: Path, name: str = "l") -> dict[str, Any]:
    return {
        "driver": "luks",
        "node-name": name,
        "key-secret": "base",
        "file": {"driver": "file", "filename": str(path)},
    }


PBKDF2 = Kdf("pbkdf2", bytes(32), 1000)

#: What a slot says that nobody can want, and what is said of it.
TOO_MUCH: list[tuple[dict[str, object], str]] = [
    ({"memory": 65}, "needs 65 KiB of memory, and --pbkdf-memory-max allows 64"),
    ({"memory": 1 << 40}, "needs 1099511627776 KiB of memory, and --pbkdf-memory-max allows 64"),
    ({"time": 1 << 40}, "takes too long"),
    ({"cpus": 1 << 20}, "argon2 with 1048576 lanes is not supported"),
]


@pytest.mark.parametrize(("costs", "refusal"), TOO_MUCH)
async def test_a_slot_that_costs_too_much_is_refused_before_anything_is_derived(
    tmp_path: Path, costs: dict[str, object], refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(with_costs(volume(argon2id(32)), 0, **costs))

    def never(*_: object) -> bytes:
        raise AssertionError("it was begun")

    monkeypatch.setattr(luks2_kdf, "hash_secret_raw", never)
    graph = graph_with()
    with pytest.raises(Error, match=refusal):
        await graph.add(options(path))
    assert graph.nodes() == []
    await graph.close()


@pytest.mark.parametrize(("costs", "refusal"), TOO_MUCH)
async def test_a_slot_that_costs_too_much_keeps_no_other_one_from_opening(
    tmp_path: Path, costs: dict[str, object], refusal: str
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(with_costs(volume(argon2id(32), PBKDF2), 0, **costs))
    graph = graph_with()
    node = await graph.add(options(path))
    assert node.size == 64 << 10
    await graph.close()


async def test_a_digest_that_would_take_hours_is_refused(tmp_path: Path) -> None:
    area = volume(PBKDF2)
    header = luks2_areas.read(area, detached=False).header
    metadata = copy.deepcopy(header.metadata)
    metadata["digests"]["0"]["iterations"] = 1 << 40
    path = tmp_path / "disk"
    path.write_bytes(luks2_areas.packed(header.binary, metadata) + area[2 * header.binary.size :])
    graph = graph_with()
    with pytest.raises(Error, match="LUKS2 digest iteration count 1099511627776 is more than"):
        await graph.add(options(path))
    await graph.close()


class Gate:
    """Derivations with argon2 that wait until they are let through; counts those under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.begun = self.now = self.most = 0
        lock, derive = threading.Lock(), luks2_kdf.hash_secret_raw

        def gated(*arguments: Any) -> bytes:
            with lock:
                self.begun, self.now = self.begun + 1, self.now + 1
                self.most = max(self.most, self.now)
            self.open.wait(30)
            try:
                result: bytes = derive(*arguments)
                return result
            finally:
                with lock:
                    self.now -= 1

        monkeypatch.setattr(luks2_kdf, "hash_secret_raw", gated)

    async def until_begun(self) -> None:
        while not self.begun:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)


async def test_several_unlocks_wait_for_one_anothers_memory_and_one_of_them_may_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    area = volume(argon2id(40))
    gate, graph = Gate(monkeypatch), graph_with(64)
    tasks = []
    for number in range(4):
        path = tmp_path / f"disk{number}"
        path.write_bytes(area)
        tasks.append(asyncio.create_task(graph.add(options(path, f"l{number}"))))
    await gate.until_begun()
    assert gate.begun == 1
    waiting = tasks[-1]
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.open.set()
    assert [(await task).name for task in tasks[:-1]] == ["l0", "l1", "l2"]
    assert (gate.begun, gate.most) == (3, 1)
    # What the cancelled one would have had is there for the next one, with its name.
    assert (await graph.add(options(path, "l3"))).name == "l3"
    await graph.close()


async def test_the_memory_of_a_derivation_is_given_back_to_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(volume(argon2id(64 << 10)))
    graph = graph_with(64 << 10)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    await graph.add(options(path))
    assert resident() - before < 16 << 20
    await graph.close()


class CountingFile(FileNode):
    """Counts what is read."""

    requests = 0
    data = 0

    async def _pread(self, offset: int, length: int) -> memoryview:
        self.requests += 1
        self.data += length
        return await super()._pread(offset, length)


async def test_a_volume_without_luks_is_known_by_a_few_small_reads(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(4 << 20))
    graph = Graph({**DRIVERS, "file": CountingFile}, secrets=lambda name: KeyMemory().copy_of(b"base"))
    file = await graph.add({"driver": "file", "node-name": "f", "filename": str(path)})
    with pytest.raises(Error, match="^Volume is not in LUKS format$"):
        await graph.add({**options(path), "file": "f"})
    assert isinstance(file, CountingFile)
    assert file.requests <= 10
    assert file.data < 64 << 10
    await graph.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["garbage", "another place"])
async def test_what_looks_like_a_second_header_alone_is_none(tmp_path: Path, size: int, how: str) -> None:
    path = tmp_path / "disk"
    secondary = BinaryHeader(size, 1, "", "sha256", "u", "").pack(b"{}", secondary=True)
    if how == "garbage":
        secondary = secondary[:-1] + b"?"
    at = size if how == "garbage" else (SIZES[0] if size != SIZES[0] else SIZES[1])
    path.write_bytes((bytes(at) + secondary).ljust(9 << 20, b"\0"))
    graph = graph_with()
    with pytest.raises(Error, match="^Volume is not in LUKS format$"):
        await graph.add(options(path))
    await graph.close()


def deep(text: bytes) -> bytes:
    """Metadata with something nested in a token."""
    return text.replace(b'"tokens":{}', b'"tokens":{"0":%s}')


NONSENSE: dict[str, Callable[[bytes], bytes]] = {
    "nesting without end": lambda text: b"[" * len(text),
    "4 MiB of nesting": lambda text: b"{" + b'"a":[' * 800_000 + b"}",
    "nesting that is too deep by one": lambda text: deep(text) % (b"[" * 31 + b"]" * 31),
    "a million lists": lambda text: deep(text) % (b"[" + b"[]," * 1_000_000 + b"0]"),
    "no UTF-8": lambda text: deep(text) % b'"\xff"',
    "a NUL inside": lambda text: deep(text) % b'"\0"',
    "something behind": lambda text: text + b"\0x",
    "space behind": lambda text: text + b" ",
    "space before": lambda text: b" " + text,
    "a number without end": lambda text: deep(text) % b"1e400",
    "half a surrogate": lambda text: deep(text) % rb'"\ud800"',
    "a slot too many": lambda text: text.replace(b'"keyslots":{"0"', b'"keyslots":{"32"', 1),
    "a list": lambda text: b"[" + text + b"]",
    "nothing": lambda text: b"",
}


@pytest.mark.parametrize("what", NONSENSE)
async def test_nonsense_with_a_right_checksum_is_refused(tmp_path: Path, what: str) -> None:
    area = volume(PBKDF2)
    header = luks2_areas.read(area, detached=False).header
    metadata = copy.deepcopy(header.metadata)
    size = SIZES[-1]
    metadata["config"]["json_size"] = str(size - 4096)
    text = NONSENSE[what](orjson.dumps(metadata))
    binary = BinaryHeader(size, 1, "", "sha256", "u", "")
    path = tmp_path / "disk"
    path.write_bytes(binary.pack(text, secondary=False) + binary.pack(text, secondary=True))
    graph = graph_with()
    with pytest.raises(Error, match="LUKS2 metadata"):
        await graph.add(options(path))
    await graph.close()


def test_what_is_strange_but_right_is_kept_by_a_change() -> None:
    area = volume(PBKDF2)
    header = luks2_areas.read(area, detached=False).header
    text = orjson.dumps(header.metadata)
    strange = b'{"type":"x","keyslots":[],"a":1,"a":2,"big":18446744073709551615,"text":"%s","deep":%s}' % (
        b"x" * 5000,
        b"[" * 29 + b"]" * 29,
    )
    parsed = luks2.parse_metadata(header.binary, deep(text) % strange)
    assert parsed.metadata["tokens"]["0"]["a"] == 2
    read_again = luks2.parse_metadata(header.binary, orjson.dumps(copy.deepcopy(parsed.metadata)))
    assert read_again == parsed
