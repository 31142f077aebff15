"""Ciphering in other processes: the same bytes, whatever becomes of the processes."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from qmpd.block import cipher_messages, cipher_process
from qmpd.block.cipher_pool import CipherPool
from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.memory import KeyMemory
from qmpd.crypto.sectors import SectorCipher
from tests.block.conftest import resolve
from tests.block.test_luks import make, open_luks

MEGABYTE = 1 << 20
SPEC = CipherSpec("aes-256", "xts", "plain64")


async def ready(pool: CipherPool) -> None:
    """Wait until the processes have started."""
    pool.lease(512)
    for _ in range(3000):
        gc.collect()
        if len(pool._ready) == pool._wanted:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the processes did not start")


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[CipherPool]:
    pool = CipherPool(1)
    await ready(pool)
    yield pool
    await pool.close()


@pytest_asyncio.fixture
async def disk(tmp_path: Path) -> AsyncIterator[Node]:
    """A LUKS disk of 4 MiB that is ciphered by two processes."""
    pool = CipherPool(2)
    graph = Graph(DRIVERS, secrets=resolve, cipher_pool=pool)
    await make(graph, tmp_path / "d.luks", 4 * MEGABYTE)
    node = await open_luks(graph, tmp_path / "d.luks")
    await ready(pool)
    yield node
    await graph.close()


@pytest.mark.parametrize("spec", [SPEC, CipherSpec("aes-128", "cbc", "essiv", "sha256")])
async def test_a_process_ciphers_as_we_do(pool: CipherPool, spec: CipherSpec) -> None:
    cipher = SectorCipher(spec, os.urandom(spec.key_bytes))
    data = os.urandom(100 * 512)
    lease = pool.lease(len(data))
    assert lease is not None
    lease.data[:] = data
    assert await lease.encrypt(cipher, 77)
    assert lease.data == cipher.encrypt(data, 77)
    assert await lease.decrypt(cipher, 77)
    assert lease.data == data


async def test_long_requests_through_processes_are_what_this_process_reads(disk: Node) -> None:
    generator = random.Random(7)
    expected = bytearray(4 * MEGABYTE)

    async def write(number: int) -> None:
        data = generator.randbytes(200_000 + 512 * number)
        offset = number * (1 << 19) + 512 * number
        expected[offset : offset + len(data)] = data
        await disk.pwrite(offset, data)

    await disk.pwrite(0, bytes(4 * MEGABYTE))
    await asyncio.gather(*(write(number) for number in range(7)))
    # In small pieces it is read without their help.
    small = b"".join([bytes(await disk.pread(offset, 4096)) for offset in range(0, 4 * MEGABYTE, 4096)])
    assert small == expected
    reads = await asyncio.gather(
        *(disk.pread(offset, 1 << 18) for offset in range(0, 4 * MEGABYTE, 1 << 18)),
        disk.pread(0, 4 * MEGABYTE),
    )
    assert b"".join(map(bytes, reads[:-1])) == expected
    assert bytes(reads[-1]) == expected


async def test_a_process_that_is_killed_costs_no_request(
    disk: Node, caplog: pytest.LogCaptureFixture
) -> None:
    pool = disk.graph.cipher_pool
    assert pool is not None
    data = os.urandom(MEGABYTE)
    await disk.pwrite(0, data)

    async def kill() -> None:
        for process in list(pool._processes):
            process.process.send_signal(signal.SIGKILL)
            await asyncio.sleep(0.02)

    async def read() -> None:
        for turn in range(200):
            offset = turn % 4 << 18
            assert await disk.pread(offset, 1 << 18) == data[offset : offset + (1 << 18)]
            await asyncio.sleep(0)

    async def write() -> None:
        for turn in range(50):
            await disk.pwrite((2 << 20) + (turn % 4 << 18), data[: 1 << 18])

    await asyncio.gather(read(), write(), kill())
    for _ in range(500):
        if not pool._processes:
            break
        await asyncio.sleep(0.01)
    assert not pool._processes
    assert pool.lease(512) is None
    assert "a process for ciphering has ended" in caplog.text
    await read()
    assert await disk.pread(2 << 20, 1 << 18) == data[: 1 << 18]


async def test_when_all_slots_are_taken_nobody_waits(disk: Node) -> None:
    pool = disk.graph.cipher_pool
    assert pool is not None
    data = os.urandom(1 << 18)
    await disk.pwrite(0, data)
    held = [await disk.pread(0, 1 << 18) for _ in range(40)]
    assert not pool.has_room
    assert pool.lease(512) is None
    assert all(piece == data for piece in held)
    del held
    gc.collect()
    assert pool.has_room


async def test_a_slot_is_held_until_the_process_is_done_with_it(pool: CipherPool) -> None:
    cipher = SectorCipher(SPEC, os.urandom(64))
    free = len(pool._free)
    lease = pool.lease(1 << 18)
    assert lease is not None
    asking = asyncio.create_task(lease.encrypt(cipher, 0))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    del lease, asking
    gc.collect()
    assert len(pool._free) == free - 1
    for _ in range(500):
        if len(pool._free) == free:
            break
        await asyncio.sleep(0.01)
        gc.collect()
    assert len(pool._free) == free


async def test_the_processes_end_with_the_pool() -> None:
    pool = CipherPool(2)
    await ready(pool)
    processes = [process.process for process in pool._processes]
    await pool.close()
    assert [process.poll() for process in processes] == [0, 0]


async def test_a_pool_that_was_never_used_starts_nothing() -> None:
    pool = CipherPool(2)
    await pool.close()
    assert not pool._processes


async def test_a_process_that_cannot_be_started_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    pool = CipherPool(1)
    assert pool.lease(512) is None
    for _ in range(500):
        if caplog.text:
            break
        await asyncio.sleep(0.01)
    assert "no processes for ciphering: No such file or directory" in caplog.text
    assert pool.lease(512) is None
    assert not pool.has_room
    await pool.close()


def test_a_forgotten_key_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SectorCipher] = []
    new = cipher_process.new_cipher

    def remember(description: memoryview, key: memoryview, keys: KeyMemory) -> SectorCipher:
        made.append(new(description, key, keys))
        return made[-1]

    monkeypatch.setattr(cipher_process, "new_cipher", remember)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = memoryview(bytearray(cipher_messages.SLOT))
    running = threading.Thread(target=cipher_process.serve, args=(theirs, memory))
    running.start()
    cipher = SectorCipher(SPEC, bytes(range(64)))
    request = cipher_messages.REQUEST
    added = request.pack(cipher_messages.ADD, 5, 0, 0, 0)
    ours.sendmsg([added, cipher_messages.describe_cipher(cipher), bytes(range(64))])
    ours.send(request.pack(cipher_messages.ENCRYPT, 5, 0, 9, 512))
    assert ours.recv(4) == cipher_messages.REPLY.pack(cipher_messages.NO_SLOT)
    assert ours.recv(4) == cipher_messages.REPLY.pack(0)
    assert memory[:512] == cipher.encrypt(bytes(512), 9)
    ours.send(request.pack(cipher_messages.FORGET, 5, 0, 0, 0))
    ours.close()
    running.join(10)
    assert not running.is_alive()
    assert made[0]._key.data == bytes(64)
    with pytest.raises(ValueError, match="the cipher is closed"):
        made[0].encrypt(bytes(512), 0)
