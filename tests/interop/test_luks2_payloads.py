"""The payload's bytes are those of other people's ciphers, sector by sector.

The volumes are made by cryptsetup, with a volume key that the test knows.  Where LUKS1 has the same
parameters QEMU writes the same plaintext with the same key; for everything there is :mod:`naive_sectors`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import RunningDaemon
from luks2_volumes import KEY, Volume, new_graph
from naive_sectors import decrypted, encrypted
from nbd_wire import FLUSH, READ, WRITE, WRITE_ZEROES, Wire
from served_disks import export, start

from qmpd.block.cipher_pool import CipherPool
from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.qcow2.creation import create as create_qcow2
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.crypto.memory import KeyMemory
from qmpd.errors import Error

pytestmark = pytest.mark.peer("cryptsetup")

StartDaemon = Callable[..., RunningDaemon]

KIBI: Final = 1 << 10
PAYLOAD: Final = 600 * KIBI
OFFSET: Final = 16 << 20


def run(directory: Path, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Run:
    """A segment as the test knows it.

    :param first: the number of its first sector, in units of 512 bytes.
    """

    cipher: str
    key: bytes
    sector_size: int
    length: int
    first: int = 0

    def encrypted(self, plain: bytes) -> bytes:
        return encrypted(self.cipher, self.key, plain, sector_size=self.sector_size, first=self.first)

    def decrypted(self, data: bytes) -> bytes:
        return decrypted(self.cipher, self.key, data, sector_size=self.sector_size, first=self.first)


class Expected:
    """What a disk has to read as, and what its file then has to hold."""

    def __init__(self, path: Path, offset: int, runs: list[Run]) -> None:
        self.path = path
        self.offset = offset
        self.runs = runs
        self.plain = bytearray(self._worked_on(self._stored(), Run.decrypted))

    def _worked_on(self, data: bytes, work: Callable[[Run, bytes], bytes]) -> bytes:
        result, start = b"", 0
        for part in self.runs:
            result += work(part, data[start : start + part.length])
            start += part.length
        return result

    def _stored(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(sum(part.length for part in self.runs))

    def is_stored(self) -> None:
        """The file holds it."""
        assert self._stored() == self._worked_on(bytes(self.plain), Run.encrypted)

    async def played(self, node: Node, extents: list[tuple[int, int]], seed: int = 0) -> None:
        """Write all of these extents to a node, and read each of them with what is around it."""
        source = random.Random(seed)
        assert node.size == len(self.plain)
        for offset, length in extents:
            data = source.randbytes(length)
            self.plain[offset : offset + length] = data
            await node.pwrite(offset, data)
            start, end = max(0, offset - 700), min(len(self.plain), offset + length + 700)
            assert bytes(await node.pread(start, end - start)) == self.plain[start:end]
        await node.flush()
        self.is_stored()


#: Aligned to 4096 bytes, to 512, and to nothing; within a sector, over several, longer than a tile.
EXTENTS: Final = [
    (0, 4096),
    (8192, 300 * KIBI),
    (512, 512),
    (3584, 1024),
    (5000, 1),
    (12287, 2),
    (20001, 70000),
    (PAYLOAD - 512, 512),
    (PAYLOAD - 5000, 5000),
]


@pytest.mark.parametrize(
    ("cipher", "key_bits", "sector_size"),
    [
        ("aes-xts-plain64", 512, 512),
        ("aes-xts-plain64", 512, 4096),
        ("aes-xts-plain64", 256, 4096),
        ("aes-xts-plain64", 256, 1024),
        ("aes-xts-plain", 512, 2048),
        ("aes-cbc-essiv:sha256", 256, 512),
        ("aes-cbc-essiv:sha256", 128, 4096),
        ("aes-cbc-plain64", 256, 4096),
    ],
)
async def test_what_is_written_is_what_the_naive_cipher_makes_of_it(
    tmp_path: Path, cipher: str, key_bits: int, sector_size: int
) -> None:
    volume = Volume(tmp_path, size=OFFSET + PAYLOAD)
    volume.format("--cipher", cipher, "--sector-size", str(sector_size), key_bits=key_bits)
    expected = Expected(volume.payload, OFFSET, [Run(cipher, KEY[: key_bits // 8], sector_size, PAYLOAD)])
    async with new_graph() as graph, volume.open(graph) as node:
        assert node.request_alignment == sector_size
        await expected.played(node, EXTENTS)
        # Small ones that come together.
        writes = [(place * 8192, bytes([place + 1]) * 4096) for place in range(20)]
        assert await node.pwrite_many(writes) == [None] * 20
        for offset, data in writes:
            expected.plain[offset : offset + 4096] = data
        into = bytearray(20 * 4096)
        node.read_cached([(offset, 4096) for offset, _ in writes], memoryview(into))
        assert bytes(into) in (b"".join(data for _, data in writes), bytes(20 * 4096))
        await node.pwrite_zeroes(1000, 9000)
        expected.plain[1000:10000] = bytes(9000)
        await expected.played(node, [])


@pytest.mark.peer("qemu-io")
@pytest.mark.parametrize(
    ("cipher", "key_bits"),
    [
        ("aes-xts-plain64", 512),
        ("aes-xts-plain64", 256),
        ("aes-xts-plain", 512),
        ("aes-cbc-essiv:sha256", 256),
        ("aes-cbc-plain64", 128),
    ],
)
async def test_qemu_writes_the_same_bytes_with_the_same_key_to_luks1(
    tmp_path: Path, cipher: str, key_bits: int
) -> None:
    pieces = ((0, 512, 0x11), (3584, 1024, 0x22), (64 * KIBI, 400 * KIBI, 0x33), (PAYLOAD - 512, 512, 0x44))
    peer = Volume(tmp_path, detached=True, size=PAYLOAD)
    peer.format("--cipher", cipher, version=1, key_bits=key_bits)
    image = "driver=luks,key-secret=s,file.filename=disk.img,header.driver=file,header.filename=header.img"
    commands = [w for at, length, byte in pieces for w in ("-c", f"write -P {byte} {at} {length}")]
    run(tmp_path, "qemu-io", "--object", "secret,id=s,data=first", "--image-opts", image, *commands)

    (tmp_path / "2").mkdir()
    volume = Volume(tmp_path / "2", detached=True, size=PAYLOAD)
    volume.format("--cipher", cipher, "--sector-size", "512", key_bits=key_bits)
    volume.payload.write_bytes(bytes(PAYLOAD))
    async with new_graph() as graph, volume.open(graph) as node:
        for at, length, byte in pieces:
            await node.pwrite(at, bytes([byte]) * length)
        await node.flush()
    assert volume.payload.read_bytes() == peer.payload.read_bytes()


async def test_processes_that_cipher_long_requests_do_the_same(tmp_path: Path) -> None:
    volume = Volume(tmp_path, size=OFFSET + PAYLOAD)
    volume.format("--sector-size", "4096", key_bits=512)
    first = (1 << 32) - 64
    volume.rewrite(tweaked(first))
    expected = Expected(volume.payload, OFFSET, [Run("aes-xts-plain64", KEY, 4096, PAYLOAD, first)])
    pool = CipherPool(1)
    graph = Graph(DRIVERS, secrets=lambda _: KeyMemory().copy_of(b"first"), cipher_pool=pool)
    try:
        async with volume.open(graph) as node:
            await expected.played(node, EXTENTS)
            await expected.played(node, EXTENTS, seed=1)
    finally:
        await graph.close()
        await pool.close()


def tweaked(first: int) -> Callable[[dict[str, Any]], None]:
    """Let the first sector have this number, in units of 512 bytes."""

    def change(metadata: dict[str, Any]) -> None:
        metadata["segments"]["0"]["iv_tweak"] = str(first)

    return change


@pytest.mark.parametrize("cipher", ["aes-xts-plain64", "aes-xts-plain", "aes-cbc-essiv:sha256"])
@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("first", [(1 << 32) - 64, (1 << 53) + 8])
async def test_sectors_are_counted_from_the_tweak_on(
    tmp_path: Path, cipher: str, sector_size: int, first: int
) -> None:
    volume = Volume(tmp_path, size=OFFSET + PAYLOAD)
    volume.format("--cipher", cipher, "--sector-size", str(sector_size), key_bits=256)
    volume.rewrite(tweaked(first))
    volume.cryptsetup("luksDump")
    expected = Expected(volume.payload, OFFSET, [Run(cipher, KEY[:32], sector_size, PAYLOAD, first)])
    async with new_graph() as graph, volume.open(graph) as node:
        await expected.played(node, [(31 * KIBI, 2 * KIBI), (32767, 2), (0, 300 * KIBI)])


@pytest.mark.parametrize(("cipher", "sector_size"), [("aes-xts-plain64", 4096), ("aes-xts-plain", 512)])
async def test_behind_two_tebibytes_the_number_has_more_than_32_bits(
    tmp_path: Path, cipher: str, sector_size: int
) -> None:
    far = 1 << 41
    volume = Volume(tmp_path, detached=True, size=far + 64 * KIBI)
    volume.format("--cipher", cipher, "--sector-size", str(sector_size), key_bits=512)
    async with new_graph() as graph, volume.open(graph) as node:
        data = os.urandom(100 * KIBI)
        await node.pwrite(far - 50 * KIBI, data)
        start = far - 64 * KIBI
        with volume.payload.open("rb") as file:
            file.seek(start)
            stored = file.read(128 * KIBI)
        plain = decrypted(cipher, KEY, stored, sector_size=sector_size, first=start // 512)
        assert plain[14 * KIBI :][: 100 * KIBI] == data


# -- several segments

#: Each with a cipher, a sector size and a first number of its own, under one key of 32 bytes.
ROW: Final = [
    Run("aes-xts-plain64", KEY[:32], 512, 64 * KIBI),
    Run("aes-cbc-essiv:sha256", KEY[:32], 4096, 4 * KIBI, (1 << 32) - 8),
    Run("aes-xts-plain", KEY[:32], 1024, 128 * KIBI, (1 << 32) - 64),
    Run("aes-xts-plain64", KEY[:32], 4096, 300 * KIBI, 8),
]


def in_a_row(row: list[Run], *, fixed: bool) -> Callable[[dict[str, Any]], None]:
    """Let the payload consist of these.

    :param fixed: the last one's size is given, too.
    """

    def change(metadata: dict[str, Any]) -> None:
        offset = int(metadata["segments"]["0"]["offset"])
        for number, part in enumerate(row):
            dynamic = number == len(row) - 1 and not fixed
            metadata["segments"][str(number)] = {
                "type": "crypt",
                "offset": str(offset),
                "size": "dynamic" if dynamic else str(part.length),
                "iv_tweak": str(part.first),
                "encryption": part.cipher,
                "sector_size": part.sector_size,
            }
            offset += part.length
        metadata["digests"]["0"]["segments"] = [str(number) for number in range(len(row))]

    return change


def borders(row: list[Run]) -> list[tuple[int, int]]:
    """Extents that cross into each segment, aligned to 4096 bytes, to 512, and to nothing; and all."""
    extents, start = [], 0
    for part in row[:-1]:
        start += part.length
        extents += [(start - 4096, 8192), (start - 512, 1024), (start - 1, 2), (start - 3000, 300)]
    return [*extents, (0, sum(part.length for part in row))]


@pytest.mark.parametrize("fixed", [False, True], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("detached", [False, True], ids=["inline", "detached"])
async def test_segments_in_a_row_are_one_disk(tmp_path: Path, detached: bool, fixed: bool) -> None:
    length = sum(part.length for part in ROW)
    offset = 0 if detached else OFFSET
    volume = Volume(tmp_path, detached=detached, size=offset + length + (12345 if fixed else 0))
    volume.format(key_bits=256)
    volume.rewrite(in_a_row(ROW, fixed=fixed))
    shown = volume.cryptsetup("luksDump")
    assert shown.count(": crypt\n") == len(ROW)
    expected = Expected(volume.payload, offset, ROW)
    async with new_graph() as graph, volume.open(graph) as node:
        await expected.played(node, borders(ROW) + EXTENTS[:-2])
        writes = [(end * 4096, bytes([end]) * 4096) for end in range(14, 20)]
        assert await node.pwrite_many(writes) == [None] * len(writes)
        for at, data in writes:
            expected.plain[at : at + 4096] = data
        await expected.played(node, [(65 * KIBI, 100 * KIBI)])
        if fixed:
            with pytest.raises(Error, match="gives the payload a fixed size"):
                await node.truncate(length + 4096)
            with pytest.raises(OSError, match="Input/output error"):
                await node.pwrite(length - 512, bytes(1024))
        else:
            await node.truncate(length + 4096)
            expected.runs = [*ROW[:-1], Run("aes-xts-plain64", KEY[:32], 4096, 304 * KIBI, 8)]
            expected.plain += expected._worked_on(expected._stored(), Run.decrypted)[length:]
            await expected.played(node, [(length - 1, 4000)])
        # The header's own changes go on meanwhile.
        await node.amend(
            {"driver": "luks", "state": "active", "new-secret": "second", "iter-time": 1, "pbkdf": "pbkdf2"},
            force=False,
            progress=lambda *_: None,
            commit=lambda: None,
        )
    assert volume.opened_by() == {"first": True, "second": True, "third": False}


@pytest.mark.parametrize(
    ("row", "refusal"),
    [
        (
            [Run("aes-xts-plain64", KEY, 512, 65536 - 512), Run("aes-xts-plain64", KEY, 4096, 65536)],
            "segment 0 does not consist of sectors of 4096 bytes",
        ),
        ([Run("aes-xts-plain64", KEY, 4096, 65536, 7)], "iv_tweak is within a sector of 4096 bytes"),
        ([Run("aes-xts-plain64", KEY, 512, 65536, 1 << 63)], "iv_tweak is no number that can be"),
    ],
)
async def test_sectors_that_no_disk_can_have_are_refused(
    tmp_path: Path, row: list[Run], refusal: str
) -> None:
    volume = Volume(tmp_path, size=OFFSET + PAYLOAD)
    volume.format(key_bits=512)
    volume.rewrite(in_a_row(row, fixed=False))
    async with new_graph() as graph:
        with pytest.raises(Error, match=refusal):
            await graph.add(volume.node_options(**{"node-name": "disk"}))
        assert graph.nodes() == []


# -- sizes


@pytest.mark.parametrize(
    ("behind", "size"),
    # A file's last bytes count as 512, as in QEMU.
    [(0, 0), (1, 0), (3584, 0), (3585, 4096), (4096, 4096), (4096 + 511, 4096), (2 * 4096, 8192)],
)
async def test_a_sector_that_is_not_whole_is_none(tmp_path: Path, behind: int, size: int) -> None:
    volume = Volume(tmp_path)
    volume.format("--sector-size", "4096", key_bits=512)
    os.truncate(volume.payload, OFFSET + behind)
    before = volume.payload.read_bytes()[OFFSET + size :]
    async with new_graph() as graph, volume.open(graph) as node:
        assert node.size == size
        if size:
            await node.pwrite(size - 1, b"x")
            assert bytes(await node.pread(size - 1, 1)) == b"x"
            assert volume.payload.read_bytes()[OFFSET + size :] == before
        with pytest.raises(OSError, match="Input/output error"):
            await node.pread(size, 1)
    os.truncate(volume.payload, OFFSET - 512)
    async with new_graph() as graph:
        with pytest.raises(Error, match="Could not refresh total sector count"):
            await graph.add(volume.node_options(**{"node-name": "disk"}))


async def test_a_disk_that_is_resized_has_at_least_the_size_asked_for(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    volume.format("--sector-size", "4096", key_bits=512)
    async with new_graph() as graph, volume.open(graph) as node:
        for size, shown in ((5 * 512, 4096), (4096, 4096), (PAYLOAD + 512, PAYLOAD + 4096), (0, 0)):
            await node.truncate(size)
            assert node.size == shown
            assert volume.payload.stat().st_size == OFFSET + shown


async def test_a_segment_of_fixed_size_needs_a_file_that_has_it(tmp_path: Path) -> None:
    row = [Run("aes-xts-plain64", KEY, 4096, PAYLOAD)]
    volume = Volume(tmp_path, size=OFFSET + PAYLOAD)
    volume.format(key_bits=512)
    volume.rewrite(in_a_row(row, fixed=True))
    async with new_graph() as graph:
        async with volume.open(graph) as node:
            assert node.size == PAYLOAD
        os.truncate(volume.payload, OFFSET + PAYLOAD - 1)
        # Its last sector is short, and reads as if zeroes were behind.
        async with volume.open(graph) as node:
            assert node.size == PAYLOAD
            await node.pread(PAYLOAD - 4096, 4096)
        os.truncate(volume.payload, OFFSET + PAYLOAD - 4096)
        with pytest.raises(Error, match="Could not refresh total sector count"):
            await graph.add(volume.node_options(**{"node-name": "disk"}))


# -- what lies on top


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize("cluster_size", [512, 65536])
async def test_a_qcow2_image_grows_in_sectors_that_are_longer_than_its_clusters(
    tmp_path: Path, cluster_size: int
) -> None:
    volume = Volume(tmp_path, size=OFFSET)
    volume.format("--sector-size", "4096", key_bits=512)
    async with new_graph() as graph, volume.open(graph) as node:
        options = {"driver": "qcow2", "file": "disk", "size": 8 << 20, "cluster-size": cluster_size}
        await create_qcow2(graph, options)
        image = await graph.add({"driver": "qcow2", "node-name": "image", "file": "disk"})
        for at in range(0, 1 << 20, 40000):
            await image.pwrite(at + 1, b"\x5a" * 3000)
        await image.flush()
        await graph.delete("image")
        size = node.size
    stored = volume.payload.read_bytes()[OFFSET:]
    assert len(stored) == size
    (tmp_path / "plain.qcow2").write_bytes(decrypted("aes-xts-plain64", KEY, stored, sector_size=4096))
    run(tmp_path, "qemu-img", "check", "-q", "plain.qcow2")
    commands = [w for at in range(0, 1 << 20, 40000) for w in ("-c", f"read -P 0x5a {at + 1} 3000")]
    assert "verification failed" not in run(tmp_path, "qemu-io", "-r", *commands, "plain.qcow2")


async def test_writes_to_parts_of_one_sector_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    volume = Volume(tmp_path, size=OFFSET + PAYLOAD)
    volume.format(key_bits=256)
    volume.rewrite(in_a_row([*ROW[:2], Run("aes-xts-plain64", KEY[:32], 4096, 65536)], fixed=False))
    async with new_graph() as graph, volume.open(graph) as node:
        data = random.Random(2).randbytes(128 * KIBI)
        pieces = [(at, data[at : at + 1000]) for at in range(0, len(data), 1000)]
        random.Random(3).shuffle(pieces)
        await asyncio.gather(*(node.pwrite(at, piece) for at, piece in pieces))
        assert bytes(await node.pread(0, len(data))) == data
        pieces = [(at, bytes([at >> 9 & 255]) * 512) for at in range(512, len(data), 1024)]
        half = len(pieces) // 2
        batches = (pieces[::2], pieces[1::2][:half])
        for outcomes in await asyncio.gather(*(node.pwrite_many(batch) for batch in batches)):
            assert set(outcomes) == {None}
        expected = bytearray(data)
        for at, piece in pieces:
            expected[at : at + 512] = piece
        assert bytes(await node.pread(0, len(data))) == expected


async def test_two_payloads_share_a_header(tmp_path: Path) -> None:
    volume = Volume(tmp_path, detached=True, size=PAYLOAD)
    volume.format("--sector-size", "4096", key_bits=512)
    (tmp_path / "2").mkdir()
    other = Volume(tmp_path / "2", detached=True, size=PAYLOAD - 8192)
    other.header = volume.header
    run_of = [Run("aes-xts-plain64", KEY, 4096, PAYLOAD)]
    expected = Expected(volume.payload, 0, run_of)
    expected_2 = Expected(other.payload, 0, [Run("aes-xts-plain64", KEY, 4096, PAYLOAD - 8192)])
    async with (
        new_graph() as graph,
        volume.open(graph) as node,
        other.open(graph, **{"node-name": "second"}) as second,
    ):
        await expected.played(node, EXTENTS[:4])
        await expected_2.played(second, EXTENTS[:4], seed=1)
        for disk, secret in ((node, "second"), (second, "third")):
            await disk.amend(
                {
                    "driver": "luks",
                    "state": "active",
                    "new-secret": secret,
                    "iter-time": 1,
                    "pbkdf": "pbkdf2",
                },
                force=False,
                progress=lambda *_: None,
                commit=lambda: None,
            )
        for disk in (node, second):
            info = disk.format_specific()
            assert info is not None
            assert [slot["slot"] for slot in info["data"]["slots"]] == [0, 1, 2]
        await expected.played(node, EXTENTS[4:], seed=2)
        await expected_2.played(second, EXTENTS[4:7], seed=3)
    assert volume.opened_by() == {"first": True, "second": True, "third": True}


@pytest.mark.peer("qemu-io", "nbdinfo")
def test_clients_that_ask_for_less_than_a_sector_are_served(
    tmp_path: Path, start_daemon: StartDaemon
) -> None:
    volume = Volume(tmp_path, size=OFFSET + PAYLOAD - 8192)
    volume.format("--sector-size", "4096", key_bits=512)
    daemon = start(start_daemon, "--object", "secret,id=first,data=first")
    daemon.execute("blockdev-add", volume.node_options(**{"node-name": "disk"}))
    daemon.execute("block_resize", {"node-name": "disk", "size": PAYLOAD - 512})
    uri = export(daemon, "disk")
    info = json.loads(run(tmp_path, "nbdinfo", "--json", uri))["exports"][0]
    assert (info["export-size"], info["block_size_minimum"]) == (PAYLOAD, 4096)
    expected = Expected(volume.payload, OFFSET, [Run("aes-xts-plain64", KEY, 4096, PAYLOAD)])
    pieces = ((0, 512, 0x11), (3584, 1024, 0x22), (30000, 70000, 0x33), (PAYLOAD - 512, 512, 0x44))
    for at, length, byte in pieces:
        expected.plain[at : at + length] = bytes([byte]) * length
    words = [f"write -P {byte} {at} {length}" for at, length, byte in pieces]
    words += [f"read -P {byte} {at} {length}" for at, length, byte in pieces]
    said = run(tmp_path, "qemu-io", "-f", "raw", *[w for word in words for w in ("-c", word)], uri)
    assert "failed" not in said
    expected.is_stored()
    # One that does not ask for the block size, and sends what belongs to one sector in pieces, all at once.
    with Wire(daemon.directory / "nbd.sock") as client:
        assert client.go("disk", requests=())[-1].kind == 1
        source = random.Random(1)
        places = [*range(8192, 28672, 512), *range(131072, 135072, 100)]
        source.shuffle(places)
        for place in places:
            data = source.randbytes(512 if place < 131072 else 100)
            expected.plain[place : place + len(data)] = data
            client.request(WRITE, place, len(data), data)
        client.request(WRITE_ZEROES, 40000, 5000)
        for _ in range(len(places) + 1):
            assert client.reply().error == 0
        expected.plain[40000:45000] = bytes(5000)
        for place in places:
            assert client.ask(READ, place, 100).data == expected.plain[place : place + 100]
        assert client.ask(FLUSH).error == 0
    expected.is_stored()
    assert "failed" not in daemon.qemu_io("disk", "read -P 0x22 3584 512")
    daemon.assert_alive()
