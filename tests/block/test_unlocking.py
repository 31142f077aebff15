"""Stopping an unlock: at which moment, and what is left of it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.luks import create
from qmpd.block.graph import Graph
from qmpd.crypto import kdf
from qmpd.crypto.memory import Buffer, KeyBuffer, KeyMemory


class Gate:
    """Key derivations that wait until they are let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.passwords: list[bytes] = []
        derive = kdf.pbkdf2_into

        def gated(name: str, password: Buffer, salt: bytes, iterations: int, into: memoryview) -> None:
            self.begun.set()
            self.open.wait(30)
            self.passwords.append(bytes(password))
            derive(name, password, salt, iterations, into)

        monkeypatch.setattr(kdf, "pbkdf2_into", gated)

    async def until_begun(self) -> None:
        while not self.begun.is_set():
            await asyncio.sleep(0.001)


@pytest.fixture
def given() -> list[KeyBuffer]:
    """The passphrases that were handed out."""
    return []


@pytest.fixture
def graph(given: list[KeyBuffer]) -> Graph:
    def secret(name: str) -> KeyBuffer:
        given.append(KeyMemory().copy_of(name.encode()))
        return given[-1]

    return Graph(DRIVERS, secrets=secret)


@pytest.fixture
async def image(graph: Graph, tmp_path: Path) -> Path:
    path = tmp_path / "disk.luks"
    path.touch()
    file = {"driver": "file", "filename": str(path)}
    await create(graph, {"driver": "luks", "file": file, "size": 4096, "key-secret": "pw", "iter-time": 1})
    return path


def unlocking(graph: Graph, image: Path) -> asyncio.Task[object]:
    file = {"driver": "file", "node-name": "f", "filename": str(image)}
    options = {"driver": "luks", "node-name": "l", "key-secret": "pw", "file": file}
    return asyncio.get_running_loop().create_task(graph.add(options))


async def test_a_cancelled_unlock_ends_with_the_step_under_way_and_leaves_nothing(
    graph: Graph, image: Path, given: list[KeyBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    task = unlocking(graph, image)
    await gate.until_begun()
    task.cancel()
    await asyncio.sleep(0.05)
    # The thread still needs the passphrase.
    assert not task.done()
    assert bytes(given[-1].data) == b"pw"
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.passwords == [b"pw"]
    assert bytes(given[-1].data) == bytes(2)
    assert graph.nodes() == []
    # Names and image are free again.
    await graph.add({"driver": "null-co", "node-name": "l"})
    await graph.add({"driver": "null-co", "node-name": "f"})
    assert await unlocking_again(graph, image)
    await graph.close()


async def unlocking_again(graph: Graph, image: Path) -> bool:
    file = {"driver": "file", "filename": str(image)}
    node = await graph.add({"driver": "luks", "node-name": "again", "key-secret": "pw", "file": file})
    return node.size == 4096


async def test_an_unlock_that_is_cancelled_while_others_keep_the_threads_busy_ends_at_once(
    graph: Graph, image: Path, given: list[KeyBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    release, begun = threading.Event(), threading.Barrier(3)

    def busy() -> None:
        begun.wait(30)
        release.wait(30)

    def steps():  # type: ignore[no-untyped-def]
        yield
        busy()

    others = [asyncio.get_running_loop().create_task(graph.in_key_thread(steps())) for _ in range(2)]
    await asyncio.get_running_loop().run_in_executor(None, begun.wait, 30)
    gate = Gate(monkeypatch)
    task = unlocking(graph, image)
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not gate.begun.is_set()
    assert bytes(given[-1].data) == bytes(2)
    release.set()
    await asyncio.gather(*others)
    await graph.close()


async def test_an_unlock_that_is_given_up_at_the_end_of_the_process_is_not_waited_for(
    graph: Graph, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    task = unlocking(graph, image)
    await gate.until_begun()
    graph.give_up_keys()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    assert graph.nodes() == []
    gate.open.set()
    await graph.close()
