"""Drained sections: nothing is under way in them, and whatever waited is answered once."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from qmpd.block.backend import Backend
from qmpd.block.drivers.file import FileNode
from qmpd.block.drivers.raw import RawNode
from qmpd.block.graph import Graph
from qmpd.block.node import Data, Node
from qmpd.block.permissions import Permission
from qmpd.crypto.memory import KeyMemory
from qmpd.export import eager

SIZE = 1 << 16
WRITER = Permission.CONSISTENT_READ | Permission.WRITE


class PacedNode(Node):
    """A disk in memory.  A request takes as many turns of the loop as the test's dice say."""

    driver = "paced"
    is_protocol = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.contents = bytearray(SIZE)
        self.under_way = 0
        self.begun: list[int] = []
        self.dice = random.Random(0)
        self.gate: asyncio.Event | None = None

    @property
    def size(self) -> int:
        return len(self.contents)

    async def _pace(self) -> None:
        self.under_way += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
            for _ in range(self.dice.randrange(4)):
                await asyncio.sleep(0)
        finally:
            self.under_way -= 1

    async def _pread(self, offset: int, length: int) -> Data:
        self.begun.append(offset)
        await self._pace()
        return bytes(self.contents[offset : offset + length])

    async def _pwrite(self, offset: int, data: memoryview) -> None:
        await self._pace()
        # A resize in the middle of a write would make the disk longer here.
        assert offset + len(data) <= len(self.contents)
        self.contents[offset : offset + len(data)] = data

    async def _truncate(self, size: int, preallocation: str) -> None:
        await self._pace()
        self.contents = (self.contents + bytes(size))[:size]


@pytest_asyncio.fixture
async def graph() -> AsyncIterator[Graph]:
    drivers: dict[str, type[Node]] = {"paced": PacedNode, "raw": RawNode, "file": FileNode}
    graph = Graph(drivers, secrets=lambda name: KeyMemory().take(0))
    yield graph
    await graph.close()


async def paced(graph: Graph, name: str = "p") -> PacedNode:
    node = await graph.add({"driver": "paced", "node-name": name})
    assert isinstance(node, PacedNode)
    return node


def user(graph: Graph, node: Node) -> Backend:
    backend = Backend(graph, perm=WRITER)
    backend.attach(node)
    return backend


async def turns(number: int = 10) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_a_section_begins_when_what_was_begun_anywhere_above_has_ended(graph: Graph) -> None:
    bottom = await paced(graph)
    await graph.add({"driver": "raw", "node-name": "r", "file": "p"})
    top = await graph.add({"driver": "raw", "node-name": "rr", "file": "r"})
    backend, other = user(graph, top), user(graph, await paced(graph, "q"))
    bottom.gate = asyncio.Event()
    begun = asyncio.create_task(backend.pread(0, 512))
    await turns()
    inside = asyncio.Event()
    leave = asyncio.Event()

    async def section() -> None:
        async with graph.drained(bottom):
            inside.set()
            assert bottom.under_way == 0
            assert begun.done()
            await leave.wait()

    drainer = asyncio.create_task(section())
    await turns()
    late = asyncio.create_task(backend.pread(512, 512))
    await turns()
    assert not inside.is_set()
    assert (backend.in_flight, backend.waiting) == (1, 1)
    bottom.gate.set()
    await inside.wait()
    await turns()
    assert not late.done()
    # Who is not above goes on; and so does the drainer itself, by the node.
    assert await other.pread(0, 4) == bytes(4)
    assert await top.pread(0, 4) == bytes(4)
    leave.set()
    await drainer
    assert len(await late) == 512
    assert backend.accounting.counters["rd"].operations == 2


async def test_nothing_waits_without_a_section_not_even_for_a_turn_of_the_loop(graph: Graph) -> None:
    node = await paced(graph)
    node.dice = random.Random(7)
    node.dice.randrange = lambda *_: 0  # type: ignore[method-assign,assignment]
    backend = user(graph, node)

    async def read() -> None:
        await backend.pread(0, 512)

    assert eager.begin(read(), lambda task: None)
    async with graph.drained(node):
        pass
    assert eager.begin(read(), lambda task: None)


async def test_those_that_waited_go_on_in_the_order_in_which_they_came(graph: Graph) -> None:
    node = await paced(graph)
    backend = user(graph, node)
    async with graph.drained(node):
        requests = [asyncio.create_task(backend.pread(number * 512, 1)) for number in range(20)]
        await turns()
        assert backend.waiting == 20
        requests[3].cancel()
    # The section has ended, but nobody was woken up yet: who comes now is the last.
    requests.append(asyncio.create_task(backend.pread(20 * 512, 1)))
    await asyncio.gather(*requests, return_exceptions=True)
    assert node.begun == [number * 512 for number in range(21) if number != 3]
    assert (backend.in_flight, backend.waiting) == (0, 0)


async def test_a_backend_goes_on_when_the_last_of_overlapping_sections_ends(graph: Graph) -> None:
    bottom = await paced(graph)
    top = await graph.add({"driver": "raw", "node-name": "r", "file": "p"})
    backend = user(graph, top)
    async with AsyncExitStack() as second:
        async with graph.drained(bottom, top):
            async with graph.drained(top):
                request = asyncio.create_task(backend.pread(0, 512))
                await turns()
            await turns()
            assert not request.done()
            await second.enter_async_context(graph.drained(bottom))
        await turns()
        assert not request.done()
    assert len(await request) == 512


async def test_a_section_that_begins_before_the_waiting_were_woken_holds_them(graph: Graph) -> None:
    node = await paced(graph)
    backend = user(graph, node)
    async with graph.drained(node):
        requests = [asyncio.create_task(backend.pread(number, 1)) for number in range(5)]
        await turns()
    async with graph.drained(node):
        await turns()
        assert backend.waiting == 5
    await asyncio.gather(*requests)
    assert node.begun == [0, 1, 2, 3, 4]


async def test_a_client_that_vanishes_while_it_waits_leaves_nothing_behind(graph: Graph) -> None:
    node = await paced(graph)
    backend = user(graph, node)
    async with graph.drained(node):
        request = asyncio.create_task(backend.pwrite(0, b"x"))
        await turns()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert backend.waiting == 0
    assert node.contents[0] == 0
    assert await backend.pread(0, 1) == b"\0"


async def test_without_a_node_the_waiting_get_an_error(graph: Graph) -> None:
    node = await paced(graph)
    backend = user(graph, node)
    async with graph.drained(node):
        request = asyncio.create_task(backend.pread(0, 1))
        await turns()
        backend.detach()
    with pytest.raises(OSError, match="No medium found") as caught:
        await request
    assert caught.value.errno == errno.ENOMEDIUM
    assert node.begun == []


async def test_who_waited_uses_the_node_that_is_there_afterwards(graph: Graph) -> None:
    before, after = await paced(graph), await paced(graph, "q")
    after.contents[:3] = b"new"
    backend = user(graph, before)
    async with graph.drained(before):
        request = asyncio.create_task(backend.pread(0, 3))
        await turns()
        backend.detach()
        backend.attach(after)
        await turns()
        assert not request.done()
    assert await request == b"new"


async def test_who_is_attached_during_a_section_waits_too(graph: Graph) -> None:
    node = await paced(graph)
    async with graph.drained(node):
        backend = user(graph, await graph.add({"driver": "raw", "node-name": "r", "file": "p"}))
        request = asyncio.create_task(backend.pread(0, 1))
        await turns()
        assert backend.waiting == 1
    await request


async def test_a_section_that_is_given_up_while_it_begins_holds_nobody(graph: Graph) -> None:
    node = await paced(graph)
    backend = user(graph, node)
    node.gate = asyncio.Event()
    begun = asyncio.create_task(backend.pread(0, 1))
    await turns()

    async def section() -> None:
        async with graph.drained(node):
            raise AssertionError("it has not begun")

    drainer = asyncio.create_task(section())
    await turns()
    drainer.cancel()
    await asyncio.wait([drainer])
    node.gate.set()
    assert await backend.pread(0, 1) == b"\0"
    await begun


async def test_a_cancelled_request_has_ended_when_its_thread_has(graph: Graph, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    node = await graph.add({"driver": "file", "node-name": "f", "filename": str(image)})
    backend = user(graph, node)
    entered, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    assert isinstance(node, FileNode)

    def slow(data: Data, offset: int) -> None:
        entered.set()
        go_on.wait(20)
        os.pwrite(node._descriptor, data, offset)
        ended.set()

    node._write = slow  # type: ignore[method-assign]
    request = asyncio.create_task(backend.pwrite(0, bytes(SIZE)))
    await asyncio.to_thread(entered.wait)
    request.cancel()
    await turns()
    request.cancel()
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    async with graph.drained(node):
        assert ended.is_set()
        backend.detach()
        await graph.delete("f")
    with pytest.raises(asyncio.CancelledError):
        await request


@pytest.mark.parametrize("seed", range(40))
async def test_every_request_is_answered_once_whatever_happens_meanwhile(graph: Graph, seed: int) -> None:
    """Writers, readers, drainers, resizers, and a disk that moves between nodes and loses its own."""
    dice = random.Random(seed)
    bottoms = [await paced(graph, name) for name in ("p", "q")]
    for bottom in bottoms:
        bottom.dice = dice
    tops = [
        await graph.add({"driver": "raw", "node-name": f"r{bottom.name}", "file": bottom.name})
        for bottom in bottoms
    ]
    nodes: list[Node] = [*bottoms, *tops]
    backends = [user(graph, dice.choice(nodes)) for _ in range(4)]
    answers: dict[int, str] = {}

    async def request(number: int) -> None:
        backend = dice.choice(backends)
        offset = dice.randrange(SIZE // 512) * 512
        for _ in range(dice.randrange(6)):
            await asyncio.sleep(0)
        assert number not in answers
        try:
            if backend.edge is None:
                answers[number] = "nobody asked"
            elif dice.random() < 0.5:
                await backend.pwrite(offset, bytes([number % 256]) * 512)
                answers[number] = "written"
            else:
                assert len(await backend.pread(offset, 512)) == 512
                answers[number] = "read"
        except OSError as error:
            answers[number] = errno.errorcode[error.errno or 0]
        except asyncio.CancelledError:
            answers[number] = "cancelled"

    def below(backend: Backend, wanted: Node) -> bool:
        return backend.edge is not None and wanted in (
            backend.node,
            backend.node.file if backend.node in tops else None,
        )

    async def change() -> None:
        for _ in range(dice.randrange(10)):
            await asyncio.sleep(0)
        number = dice.randrange(2)
        node = dice.choice((bottoms[number], tops[number]))
        async with graph.drained(*graph.subtree(node)):
            above = [backend for backend in backends if below(backend, node)]
            assert not any(backend.in_flight for backend in above)
            match dice.randrange(4):
                case 0:
                    await node.truncate(dice.randrange(1, SIZE // 512) * 512)
                case 1 if above:
                    moved = dice.choice(above)
                    moved.detach()
                    if dice.random() < 0.7:
                        moved.attach(dice.choice(nodes))
                case 2:
                    async with graph.drained(*nodes):
                        await asyncio.sleep(0)
            for _ in range(dice.randrange(3)):
                await asyncio.sleep(0)
                assert not any(backend.in_flight for backend in above)

    tasks = [asyncio.create_task(request(number)) for number in range(100)]
    changes = [asyncio.create_task(change()) for _ in range(12)]
    for _ in range(10):
        await asyncio.sleep(0)
        # Like a client that vanishes.
        dice.choice(tasks).cancel()
    async with asyncio.timeout(20):
        await asyncio.gather(*changes)
        await asyncio.wait(tasks)
    # A task that is cancelled before it has begun never asks.
    asked = [number for number, task in enumerate(tasks) if not task.cancelled()]
    assert sorted(answers) == asked
    assert set(answers.values()) <= {"nobody asked", "written", "read", "cancelled", "EIO", "ENOMEDIUM"}
    for backend in backends:
        assert (backend.in_flight, backend.waiting) == (0, 0)
        if backend.edge is not None:
            assert await backend.pread(0, 1)
    assert all(bottom.under_way == 0 for bottom in bottoms)
