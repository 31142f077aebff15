from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from nbd_served import SIZE, Served
from nbd_wire import (
    ABORT,
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    GO,
    LIST,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Wire,
    name_data,
)

from qmpd.errors import Error
from qmpd.export.nbd.budget import LEAST, PIECE

OFFSET_HOLE = 2
EINVAL, EIO, ENOSPC, ENOTSUP = 22, 5, 28, 95
DIALECTS: list[dict[str, bool]] = [{}, {"structured": True}, {"extended": True}]
dialects = pytest.mark.parametrize("dialect", DIALECTS, ids=["simple", "structured", "extended"])


def read(wire: Wire, offset: int, length: int) -> bytes:
    """What a READ returns, put together from its chunks."""
    wire.request(READ, offset, length)
    if not (wire.structured or wire.extended):
        reply = wire.reply(length)
        assert reply.error == 0
        return reply.data
    data = bytearray(length)
    for chunk in wire.chunks():
        assert chunk.error == 0
        (at,) = struct.unpack_from(">Q", chunk.data)
        if chunk.kind == OFFSET_HOLE:
            continue
        data[at - offset : at - offset + len(chunk.data) - 8] = chunk.data[8:]
    return bytes(data)


@dialects
async def test_what_is_written_is_read_again(served: Served, dialect: dict[str, bool]) -> None:
    def client() -> None:
        with served.taken("f", **dialect) as wire:
            assert wire.ask(WRITE, 1000, 5, b"hello").error == 0
            assert read(wire, 998, 9) == b"\0\0hello\0\0"
            assert wire.ask(FLUSH).error == 0

    await served.run(client)
    assert served.image.read_bytes()[998:1007] == b"\0\0hello\0\0"


@dialects
async def test_every_command_is_answered_and_the_session_goes_on(
    served: Served, dialect: dict[str, bool]
) -> None:
    def client() -> None:
        with served.taken("f", **dialect) as wire:
            assert wire.ask(WRITE, 0, 8192, b"x" * 8192, flags=FUA).error == 0
            assert wire.ask(TRIM, 0, 4096, flags=FUA).error == 0
            assert wire.ask(WRITE_ZEROES, 4096, 4096, flags=NO_HOLE | FUA).error == 0
            assert wire.ask(WRITE_ZEROES, 4096, 4096, flags=FAST_ZERO).error == 0
            assert wire.ask(CACHE, 0, SIZE).error == 0
            assert wire.ask(99).error == EINVAL
            assert wire.ask(READ, SIZE, 1).error == EINVAL
            assert wire.ask(WRITE, SIZE, 1, b"x").error == EINVAL
            assert read(wire, 0, 8192) == bytes(8192)

    await served.run(client)


@dialects
async def test_a_long_read_arrives_whole(served: Served, dialect: dict[str, bool]) -> None:
    pattern = os.urandom(1 << 16) * (SIZE >> 16) * 4
    served.image.write_bytes(pattern)
    await served.graph.add({"node-name": "big", "driver": "file", "filename": str(served.image)})
    served.add("e-big", "big")

    def client() -> bytes:
        with served.taken("big", **dialect) as wire:
            return read(wire, 1, len(pattern) - 1)

    assert await served.run(client) == pattern[1:]


async def test_with_df_a_long_read_is_one_chunk(served: Served) -> None:
    def client() -> None:
        with served.taken("n", structured=True) as wire:
            wire.request(READ, 0, 8 << 20, flags=DF)
            assert len(wire.chunks()) == 1
            wire.request(READ, 0, 8 << 20)
            assert len(wire.chunks()) > 1

    await served.run(client)


async def test_block_status_tells_data_from_holes(served: Served) -> None:
    def client() -> None:
        with served.wire() as wire:
            wire.negotiate(structured=True)
            wire.meta("sparse", "base:allocation", "qemu:allocation-depth")
            wire.go("sparse")
            wire.request(BLOCK_STATUS, 0, SIZE)
            base, depth = (struct.unpack(f">{len(one.data) // 4}I", one.data) for one in wire.chunks())
            assert base == (0, 4096, 0, SIZE - 4096, 3)
            assert depth == (1, SIZE, 1)
            wire.request(BLOCK_STATUS, 4096, 8192, flags=REQ_ONE)
            base, _ = (struct.unpack(f">{len(one.data) // 4}I", one.data) for one in wire.chunks())
            assert base == (0, 8192, 3)

    sparse = served.image.with_name("sparse")
    sparse.write_bytes(b"x" * 4096)
    os.truncate(sparse, SIZE)
    await served.graph.add({"node-name": "sparse", "driver": "file", "filename": str(sparse)})
    served.add("e-sparse", "sparse", allocation_depth=True)
    await served.run(client)


async def test_replies_come_out_of_order_where_that_is_faster(served: Served) -> None:
    await served.graph.add({"node-name": "slow", "driver": "null-co", "latency-ns": 200_000_000})
    served.add("e-slow", "slow", writable=True)

    def client() -> list[int]:
        with served.taken("slow") as wire:
            wire.request(READ, 0, 1, cookie=1)
            wire.request(99, cookie=2)
            return [wire.reply().cookie, wire.reply(1).cookie]

    assert await served.run(client) == [2, 1]


async def test_a_slow_client_is_served_only_so_many_requests_at_once(served: Served) -> None:
    await served.graph.add({"node-name": "slow", "driver": "null-co", "latency-ns": 100_000_000})
    served.add("e-slow", "slow", writable=True)
    backend = served.exports.nbd_server.exports["slow"].backend  # type: ignore[union-attr]

    def client() -> None:
        with served.taken("slow") as wire:
            for cookie in range(100):
                wire.request(READ, 0, 1, cookie=cookie)
            assert sorted(wire.reply(1).cookie for _ in range(100)) == list(range(100))

    running = asyncio.ensure_future(served.run(client))
    most = 0
    while not running.done():
        most = max(most, backend.in_flight)
        await asyncio.sleep(0.01)
    await running
    assert 1 < most <= 16


@dialects
async def test_who_never_reads_the_replies_holds_up_nobody(served: Served, dialect: dict[str, bool]) -> None:
    backend = served.exports.nbd_server.exports["n"].backend  # type: ignore[union-attr]

    def client() -> None:
        with served.taken("n", **dialect) as deaf, served.taken("f") as other:
            deaf.socket.settimeout(0.2)
            try:
                for _ in range(3000):
                    deaf.request(READ, 0, 1 << 20)
            except TimeoutError:
                pass
            assert other.ask(READ, 0, 512).error == 0

    await served.run(client)
    # The replies that nobody takes are not even made.
    assert backend.accounting.counters["rd"].bytes < 64 << 20


async def test_a_client_that_vanishes_leaves_nothing_behind(served: Served) -> None:
    def client() -> None:
        for _ in range(5):
            wire = served.taken("f", structured=True)
            wire.request(READ, 0, SIZE)
            wire.send(struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 7, 0, SIZE) + b"only a part")
            wire.close()

    await served.run(client)
    export = served.exports.nbd_server.exports["f"]  # type: ignore[union-attr]
    async with asyncio.timeout(5):
        while export.connections:
            await asyncio.sleep(0.01)
    await served.exports.remove("e-f")
    assert served.image.read_bytes() == bytes(SIZE)


async def test_disc_ends_the_session_after_the_replies(served: Served) -> None:
    def client() -> None:
        with served.taken("f") as wire:
            wire.request(READ, 0, 4)
            wire.request(DISC)
            assert wire.reply(4).data == bytes(4)
            assert wire.at_end()

    await served.run(client)


@pytest.mark.parametrize("flags", [None, 3])
async def test_a_handshake_that_takes_too_long_is_cut_off(idle: Served, flags: int | None) -> None:
    await idle.start(handshake_max_seconds=0.2)

    def client() -> None:
        with idle.wire(flags) as wire:
            assert wire.at_end()

    await idle.run(client)
    await idle.exports.close()
    await idle.graph.close()


async def test_a_session_may_last_longer_than_a_handshake(idle: Served) -> None:
    await idle.start(handshake_max_seconds=0.2)

    def client() -> None:
        with idle.taken("f") as wire:
            time.sleep(0.4)
            assert wire.ask(READ, 0, 4).error == 0

    await idle.run(client)
    await idle.exports.close()
    await idle.graph.close()


async def test_one_client_too_many_waits_for_another_to_leave(idle: Served) -> None:
    await idle.start(max_connections=1)

    def client() -> None:
        with idle.taken("f"):
            second = socket.socket(socket.AF_UNIX)
            second.connect(str(idle.socket))
            second.settimeout(0.2)
            with pytest.raises(TimeoutError):
                second.recv(1)
        second.settimeout(10)
        assert second.recv(8) == b"NBDMAGIC"
        second.close()

    await idle.run(client)
    await idle.exports.close()
    await idle.graph.close()


async def test_many_idle_connections_are_bounded_and_leave_room_for_service(idle: Served) -> None:
    await idle.start(max_connections=50, handshake_max_seconds=0.5)

    def client() -> None:
        crowd = []
        for _ in range(500):
            one = socket.socket(socket.AF_UNIX)
            one.connect(str(idle.socket))
            crowd.append(one)
        for one in crowd[450:]:
            one.close()
        for one in crowd[:450]:
            one.close()
        with idle.taken("f") as wire:
            assert wire.ask(READ, 0, 4).error == 0

    await idle.run(client)
    await idle.exports.close()
    await idle.graph.close()


async def test_a_payload_that_is_too_long_is_refused_and_ends_the_session(served: Served) -> None:
    def client() -> None:
        with served.taken("n") as wire:
            wire.request(WRITE, 0, (32 << 20) + 1)
            assert wire.reply().error == EINVAL
            assert wire.at_end()

    await served.run(client)


async def test_the_storages_errors_are_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    node = served.graph.find("f")
    assert node is not None
    failures = iter([OSError(28, "full"), OSError(5, "broken"), OSError(71, "odd"), RuntimeError("a fault")])

    async def fail(*_: Any) -> None:
        raise next(failures)

    monkeypatch.setattr(node, "_pwrite_many", fail)

    def client() -> list[int]:
        with served.taken("f", structured=True) as wire:
            numbers = [wire.ask(WRITE, 0, 1, b"x").error for _ in range(4)]
            assert wire.ask(READ, 0, 1).error == 0
            return numbers

    assert await served.run(client) == [ENOSPC, EIO, EINVAL, EIO]


async def test_a_file_cut_short_under_an_export_reads_as_zeroes(served: Served) -> None:
    served.image.write_bytes(b"x" * SIZE)
    os.truncate(served.image, 4096)

    def client() -> None:
        with served.taken("ro") as wire:
            assert read(wire, 4000, 200) == b"x" * 96 + bytes(104)

    await served.run(client)


async def test_a_deep_queue_of_writes_ends_up_in_the_file(served: Served) -> None:
    data = os.urandom(SIZE)

    def client() -> None:
        with served.taken("f") as wire:
            for offset in range(0, SIZE, 4096):
                wire.request(WRITE, offset, 4096, data[offset : offset + 4096], cookie=offset)
            cookies = {wire.reply().cookie for _ in range(SIZE // 4096)}
            assert cookies == set(range(0, SIZE, 4096))

    await served.run(client)
    assert served.image.read_bytes() == data


async def test_tcp_is_served_too(idle: Served) -> None:
    address = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
    await idle.exports.start_nbd_server(address)
    server = idle.exports.nbd_server
    assert server is not None
    host, port = server.addresses[0][:2]

    def client() -> None:
        with Wire((host, port)) as wire:
            assert wire.option(LIST)[-1].kind == 1

    await idle.run(client)
    await idle.exports.close()


async def test_options_after_another_are_answered_in_order(served: Served) -> None:
    def client() -> None:
        with served.wire() as wire:
            wire.send_option(LIST)
            wire.send_option(GO, name_data("nope") + b"\0\0")
            wire.send_option(ABORT)
            kinds = [wire.option_reply().option for _ in range(6)]
            assert kinds == [LIST, LIST, LIST, LIST, GO, ABORT]
            assert wire.at_end()

    await served.run(client)


async def test_a_socket_file_is_its_owners_and_goes_with_the_server(idle: Served, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        await idle.start()
    finally:
        os.umask(before)
    assert idle.socket.stat().st_mode & 0o777 == 0o600
    await idle.exports.stop_nbd_server()
    assert not idle.socket.exists()
    await idle.graph.close()


async def test_the_socket_file_stays_at_the_end_of_the_daemon(idle: Served) -> None:
    await idle.start()
    await idle.exports.close()
    # As QEMU leaves it; the next server replaces it.
    assert idle.socket.is_socket()
    await idle.graph.close()


async def test_a_file_with_contents_is_not_replaced_by_a_socket(idle: Served) -> None:
    idle.socket.write_bytes(b"a disk image")
    with pytest.raises(Error, match="not empty"):
        await idle.start()
    assert idle.socket.read_bytes() == b"a disk image"
    assert idle.exports.nbd_server is None


@dialects
async def test_a_long_write_is_one_request_to_everybody_else(
    served: Served, dialect: dict[str, bool]
) -> None:
    os.truncate(served.image, 8 << 20)
    await served.graph.add({"node-name": "big", "driver": "file", "filename": str(served.image)})
    served.add("e-big", "big", writable=True)
    data = os.urandom(6 << 20)

    def client() -> None:
        with served.taken("big", **dialect) as wire:
            assert wire.ask(WRITE, 1000, len(data), data, flags=FUA).error == 0
            assert read(wire, 1000, len(data)) == data

    await served.run(client)
    server = served.exports.nbd_server
    assert server is not None
    counter = server.exports["big"].backend.accounting.counters["wr"]
    assert (counter.operations, counter.bytes) == (1, len(data))
    assert server.budget.used == 0


@dialects
async def test_a_long_write_that_fails_gets_one_error_and_the_session_goes_on(
    served: Served, dialect: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = served.graph.lookup(None, "n")
    whole = node.pwrite
    written: list[int] = []

    async def pwrite(offset: int, data: Any) -> None:
        written.append(offset)
        if offset >= 2 << 20:
            raise OSError(ENOSPC, "full")
        await whole(offset, data)

    monkeypatch.setattr(node, "pwrite", pwrite)

    def client() -> None:
        with served.taken("n", **dialect) as wire, served.taken("ro", **dialect) as other:
            assert wire.ask(WRITE, 0, 8 << 20, bytes(8 << 20)).error == ENOSPC
            assert wire.ask(WRITE, 63 << 20, 4 << 20, bytes(4 << 20)).error == EINVAL
            assert wire.ask(FLUSH).error == 0
            assert other.ask(WRITE, 0, 4 << 20, bytes(4 << 20)).error == 1
            assert other.ask(FLUSH).error == 0

    await served.run(client)
    # What comes after the failure is not written, and what can't be right is not begun.
    assert written == [0, 1 << 20, 2 << 20]
    server = served.exports.nbd_server
    assert server is not None
    assert server.budget.used == 0


@pytest.mark.parametrize("place", [2 << 20, 7 << 20])
@pytest.mark.parametrize("ignored", [False, True])
async def test_a_long_write_that_fails_is_one_failure_to_the_disk_which_may_ignore_it(
    served: Served, ignored: bool, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = served.exports.nbd_server
    assert server is not None
    backend = server.exports["n"].backend
    told: list[tuple[Any, ...]] = []
    full = OSError(ENOSPC, "full")

    async def pwrite(offset: int, data: Any) -> None:
        if offset == place:
            raise full

    def failed(kind: str, size: int, took: int, error: OSError) -> bool:
        told.append((kind, size, error))
        return ignored

    monkeypatch.setattr(backend.node, "pwrite", pwrite)
    monkeypatch.setattr(backend, "failed", failed)

    def client() -> None:
        with served.taken("n") as wire:
            assert wire.ask(WRITE, 0, 8 << 20, bytes(8 << 20)).error == (0 if ignored else ENOSPC)
            assert wire.ask(WRITE, 63 << 20, 4 << 20, bytes(4 << 20)).error == EINVAL
            assert wire.ask(FLUSH).error == 0

    await served.run(client)
    # What the client should not have asked for never reaches the disk.
    assert told == [("wr", 8 << 20, full)]
    assert backend.accounting.counters["wr"].operations == 0


async def test_a_client_that_vanishes_in_a_long_write_gives_its_memory_back(served: Served) -> None:
    server = served.exports.nbd_server
    assert server is not None

    def client() -> None:
        with served.taken("n") as wire:
            wire.request(WRITE, 0, 8 << 20, bytes(5 << 19))

    await served.run(client)
    async with asyncio.timeout(5):
        while server.exports["n"].connections:
            await asyncio.sleep(0.01)
    assert server.budget.used == 0


async def test_many_clients_with_long_writes_hold_no_more_than_the_server_s_budget(served: Served) -> None:
    await served.graph.add({"node-name": "slow", "driver": "null-co", "latency-ns": 5_000_000})
    served.add("e-slow", "slow", writable=True)
    server = served.exports.nbd_server
    assert server is not None

    def client() -> None:
        with served.taken("slow") as wire:
            for cookie in range(12):
                wire.request(WRITE, cookie << 20, 1 << 20, bytes(1 << 20), cookie=cookie)
            assert sorted(wire.reply().cookie for _ in range(12)) == list(range(12))

    running = asyncio.gather(*(served.run(client) for _ in range(6)))
    most = 0
    while not running.done():
        most = max(most, server.budget.used)
        await asyncio.sleep(0.002)
    await running
    assert PIECE < most <= server.budget.total + 6 * LEAST
    assert server.budget.used == 0


async def test_holes_are_only_told_in_long_reads(served: Served) -> None:
    sparse = served.image.with_name("sparse")
    with sparse.open("wb") as file:
        file.truncate(4 << 20)
        file.seek(1 << 20)
        file.write(b"x" * (1 << 19))
    await served.graph.add(
        {"node-name": "sparse", "driver": "file", "filename": str(sparse), "discard": "unmap"}
    )
    served.add("e-sparse", "sparse", writable=True)

    def client() -> None:
        for dialect in DIALECTS[1:]:
            with served.taken("sparse", **dialect) as wire:
                assert kinds(wire, 0, 4 << 20) == [(2, 0), (1, 1 << 20), (2, 3 << 19)]
                assert kinds(wire, 0, 4 << 20, DF) == [(1, 0)]
                assert kinds(wire, 0, 4096) == [(1, 0)]
                assert kinds(wire, 1 << 20, 1 << 19) == [(1, 1 << 20)]
                assert kinds(wire, 3 << 20, 1 << 16) == [(2, 3 << 20)]
        with served.taken("sparse", structured=True) as wire:
            assert wire.ask(TRIM, 1 << 20, 1 << 19).error == 0
            assert kinds(wire, 1 << 20, 1 << 19) == [(2, 1 << 20)]
            assert wire.ask(WRITE, 1 << 20, 4, b"data").error == 0
            assert wire.ask(FLUSH).error == 0
            assert kinds(wire, 1 << 20, 1 << 19)[0] == (1, 1 << 20)

    await served.run(client)


def kinds(wire: Wire, offset: int, length: int, flags: int = 0) -> list[tuple[int | None, int]]:
    """The chunks that answer a read: the kind and the place of each."""
    wire.request(READ, offset, length, flags=flags)
    return [(chunk.kind, struct.unpack_from(">Q", chunk.data)[0]) for chunk in wire.chunks()]
