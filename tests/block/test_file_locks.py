"""Image locks without another program: what is left of them, and systems that have none."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image_locks import FLOCK, locked

from qmpd.block import file_locks
from qmpd.block.backend import Backend
from qmpd.block.drivers.file import FileNode
from qmpd.block.file_locks import ImageLocks
from qmpd.block.graph import Graph
from qmpd.block.permissions import Permission
from qmpd.errors import Error

READ = Permission.CONSISTENT_READ
WRITE = Permission.CONSISTENT_READ | Permission.WRITE
ALL = Permission.everything()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(1 << 20))
    return path


def let_fcntl_fail(monkeypatch: pytest.MonkeyPatch, commands: tuple[int, ...], number: int) -> None:
    real: Callable[..., Any] = fcntl.fcntl

    def fail(descriptor: int, command: int, argument: bytes) -> Any:
        if command in commands:
            raise OSError(number, os.strerror(number))
        return real(descriptor, command, argument)

    monkeypatch.setattr(file_locks.fcntl, "fcntl", fail)


def test_a_refused_lock_leaves_nothing_locked_that_was_not_before(image: Path) -> None:
    with image.open("r+b") as mine, image.open("r+b") as other:
        locks = ImageLocks(mine.fileno())
        locks.prepare(READ, ALL)
        locks.commit()
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 203, 1, 0))
        with pytest.raises(Error, match="^Failed to lock byte 203$"):
            locks.prepare(WRITE, ALL & ~Permission.RESIZE)
        locks.abort()
        assert locked(image) == [100, 203]
    assert locked(image) == []


def test_what_is_taken_is_looked_at_before_what_is_not_shared(image: Path) -> None:
    with image.open("r+b") as mine, image.open("r+b") as other:
        owner = ImageLocks(other.fileno())
        owner.prepare(Permission.WRITE, ALL & ~Permission.RESIZE)
        owner.commit()
        with pytest.raises(Error, match='^Failed to get "resize" lock$'):
            ImageLocks(mine.fileno()).prepare(Permission.RESIZE, ALL & ~Permission.WRITE)


async def test_without_locks_in_the_system_auto_does_without_and_on_refuses(
    graph: Graph, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_fcntl_fail(monkeypatch, (fcntl.F_OFD_GETLK, fcntl.F_OFD_SETLK), errno.EINVAL)
    options = {"driver": "file", "filename": str(image)}
    await graph.add({**options, "node-name": "auto"})
    await graph.add({**options, "node-name": "off", "locking": "off"})
    with pytest.raises(Error, match="locking=on was specified, but the system has no locks"):
        await graph.add({**options, "node-name": "on", "locking": "on"})
    Backend(graph, perm=WRITE).attach(graph.reference("auto"))


@pytest.mark.parametrize("locking", ["auto", "on"])
@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (fcntl.F_OFD_SETLK, "Failed to lock byte 100: No locks available"),
        (fcntl.F_OFD_GETLK, 'Failed to get "consistent read" lock: No locks available'),
    ],
)
async def test_a_file_system_without_locks_refuses_an_image_unless_locking_is_off(
    graph: Graph, image: Path, monkeypatch: pytest.MonkeyPatch, locking: str, command: int, complaint: str
) -> None:
    let_fcntl_fail(monkeypatch, (command,), errno.ENOLCK)
    node = {"driver": "file", "node-name": "n", "filename": str(image), "locking": locking}
    await graph.add(node)
    with pytest.raises(Error) as refusal:
        Backend(graph, perm=WRITE).attach(graph.reference("n"))
    assert refusal.value.desc == complaint
    await graph.delete("n")
    await graph.add({**node, "locking": "off"})
    Backend(graph, perm=WRITE).attach(graph.reference("n"))


async def test_a_file_that_is_opened_for_writing_later_is_the_one_that_was_locked(
    graph: Graph, image: Path
) -> None:
    node = await graph.add(
        {"driver": "file", "node-name": "n", "filename": str(image), "auto-read-only": True}
    )
    kept, other = image.with_name("kept.img"), image.with_name("other.img")
    other.write_bytes(bytes(1 << 20))
    image.rename(kept)
    other.rename(image)
    backend = Backend(graph, perm=WRITE)
    backend.attach(node)
    await backend.pwrite(0, b"x" * 512)
    assert kept.read_bytes()[:512] == b"x" * 512
    assert image.read_bytes() == bytes(1 << 20)
    assert locked(kept) == [100, 101]
    assert locked(image) == []


async def test_a_file_that_can_not_be_opened_for_writing_keeps_its_locks(
    graph: Graph, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await graph.add(
        {"driver": "file", "node-name": "n", "filename": str(image), "auto-read-only": True}
    )
    Backend(graph, perm=READ, shared=ALL & ~Permission.RESIZE).attach(node)

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(FileNode, "_open_kind", refuse)
        with pytest.raises(Error, match=f"^Could not open '{image}': Permission denied$"):
            Backend(graph, perm=WRITE).attach(node)
    assert locked(image) == [100, 203]


async def test_a_refusal_names_the_image_to_people_only(graph: Graph, image: Path) -> None:
    with image.open("r+b") as other:
        owner = ImageLocks(other.fileno())
        owner.prepare(READ, READ)
        owner.commit()
        node = await graph.add({"driver": "file", "node-name": "n", "filename": str(image)})
        with pytest.raises(Error) as refusal:
            Backend(graph, perm=WRITE).attach(node)
    assert refusal.value.desc == 'Failed to get "write" lock'
    assert refusal.value.hint == f"Is another process using the image [{image}]?"
