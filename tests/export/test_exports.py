from __future__ import annotations

import asyncio

import pytest
from nbd_served import SIZE, Served
from nbd_wire import READ, WRITE

from qmpd.errors import Error


async def refusal(awaitable: object) -> str:
    with pytest.raises(Error) as caught:
        await awaitable  # type: ignore[misc]
    return caught.value.desc


def refused(served: Served, export_id: str, node_name: str, **options: object) -> str:
    with pytest.raises(Error) as caught:
        served.add(export_id, node_name, **options)
    return caught.value.desc


async def test_exports_are_listed_newest_first(served: Served) -> None:
    assert served.exports.query() == [
        {"node-name": "n", "shutting-down": False, "type": "nbd", "id": "e-n"},
        {"node-name": "ro", "shutting-down": False, "type": "nbd", "id": "e-ro"},
        {"node-name": "f", "shutting-down": False, "type": "nbd", "id": "e-f"},
    ]


async def test_what_can_not_be_exported_is_refused_in_qemus_words(served: Served) -> None:
    assert refused(served, "1e", "f") == "Invalid block export id"
    assert refused(served, "e-f", "nope") == "Block export id 'e-f' is already in use"
    assert refused(served, "e", "nope") == "Cannot find device='' nor node-name='nope'"
    assert refused(served, "e", "ro", writable=True) == "Cannot export read-only node as writable"
    assert refused(served, "e", "f") == "NBD server already has export named 'f'"
    assert refused(served, "e", "f", name="y" * 4097) == f"export name '{'y' * 4097}' too long"
    assert (
        refused(served, "e", "f", name="y", description="z" * 4097) == f"description '{'z' * 4097}' too long"
    )
    assert refused(served, "e", "f", name="y", bitmaps=["b"]) == "Bitmap 'b' is not found"
    assert len(served.exports.query()) == 3


async def test_without_a_server_nothing_is_exported(idle: Served) -> None:
    await idle.graph.add({"node-name": "n", "driver": "null-co"})
    assert refused(idle, "e", "n") == "NBD server not running"
    assert await refusal(idle.exports.stop_nbd_server()) == "NBD server not running"
    await idle.graph.close()


async def test_there_is_one_server(served: Served) -> None:
    assert await refusal(served.exports.start_nbd_server(served.address)) == "NBD server already running"


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (
            {"type": "unix", "path": "/nowhere/s"},
            "Failed to bind socket to /nowhere/s: No such file or directory",
        ),
        ({"type": "unix", "path": "p" * 200}, f"UNIX socket path '{'p' * 200}' is too long"),
        (
            {"type": "inet", "host": "127.0.0.1", "port": "nosuch"},
            "address resolution failed for 127.0.0.1:nosuch: Servname not supported for ai_socktype",
        ),
        (
            {"type": "inet", "host": "192.0.2.1", "port": "10809"},
            "Failed to bind socket: Cannot assign requested address",
        ),
    ],
)
async def test_where_a_server_can_not_listen_there_is_none(
    idle: Served, address: dict[str, str], text: str
) -> None:
    assert await refusal(idle.exports.start_nbd_server(address)) == text
    assert idle.exports.nbd_server is None


async def test_an_exported_node_is_in_use_and_keeps_its_size(served: Served) -> None:
    assert await refusal(served.graph.delete("f")) == "Node f is in use"
    edge = served.exports.nbd_server.exports["f"].backend.edge  # type: ignore[union-attr]
    assert edge is not None
    assert edge.perm.value == 1 | 2
    assert edge.shared.value == 1 | 2 | 4


async def test_a_removed_export_is_announced_and_lets_go_of_its_node(served: Served) -> None:
    await served.exports.remove("e-f")
    assert served.events == [("BLOCK_EXPORT_DELETED", {"id": "e-f"})]
    await served.graph.delete("f")
    assert await refusal(served.exports.remove("e-f")) == "Export 'e-f' is not found"


async def test_an_export_with_a_client_is_removed_only_by_force(served: Served) -> None:
    wire = await served.run(lambda: served.taken("f"))
    assert await refusal(served.exports.remove("e-f")) == "export 'e-f' still in use"
    assert await served.run(lambda: wire.ask(READ, 0, 4).error) == 0
    await served.exports.remove("e-f", "hard")
    assert await served.run(wire.at_end)
    wire.close()


async def test_removal_waits_for_the_requests_under_way(served: Served) -> None:
    await served.graph.add({"node-name": "slow", "driver": "null-co", "latency-ns": 300_000_000})
    served.add("e-slow", "slow", writable=True)
    wire = await served.run(lambda: served.taken("slow"))
    backend = served.exports.nbd_server.exports["slow"].backend  # type: ignore[union-attr]
    wire.request(WRITE, 0, 1, b"x")
    async with asyncio.timeout(5):
        while not backend.in_flight:
            await asyncio.sleep(0.01)
    removal = asyncio.ensure_future(served.exports.remove("e-slow", "hard"))
    await asyncio.sleep(0.05)
    assert [one["shutting-down"] for one in served.exports.query() if one["id"] == "e-slow"] == [True]
    await removal
    assert await served.run(lambda: wire.reply().error) == 0
    assert await served.run(wire.at_end)
    wire.close()


async def test_stopping_the_server_removes_all_exports_newest_first(served: Served) -> None:
    wires = [await served.run(lambda: served.taken("f")), await served.run(served.wire)]
    await served.exports.stop_nbd_server()
    assert [data["id"] for _, data in served.events] == ["e-n", "e-ro", "e-f"]
    for wire in wires:
        assert await served.run(wire.at_end)
        wire.close()
    assert not served.socket.exists()
    await served.start()


async def test_requests_are_counted(served: Served) -> None:
    def client() -> None:
        with served.taken("f") as wire:
            wire.ask(READ, 0, 4096)
            wire.ask(WRITE, 0, 512, bytes(512))
            wire.ask(READ, SIZE, 512)

    backend = served.exports.nbd_server.exports["f"].backend  # type: ignore[union-attr]
    await served.run(client)
    counters = backend.accounting.counters
    assert (counters["rd"].operations, counters["rd"].bytes) == (1, 4096)
    assert (counters["wr"].operations, counters["wr"].bytes) == (1, 512)
    assert counters["wr"].time > 0
