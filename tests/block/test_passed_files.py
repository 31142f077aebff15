"""Disks on descriptors that somebody else has opened.  Errors are those that were seen in QEMU 10.0.2."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from image_locks import locked

from qmpd.block.backend import Backend
from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.file import create
from qmpd.block.file_locks import PassedLocks
from qmpd.block.graph import Graph
from qmpd.block.permissions import Permission
from qmpd.block.reopening import reopen
from qmpd.errors import Error

READ = Permission.CONSISTENT_READ
WRITE = Permission.CONSISTENT_READ | Permission.WRITE
ALL = Permission.everything()
ALONE = ALL & ~Permission.WRITE


@pytest_asyncio.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph(DRIVERS, secrets=lambda name: pytest.fail(name))
    yield graph
    await graph.close()
    graph.fdsets.close_all()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(b"a" * (1 << 20))
    return path


def add(graph: Graph, path: Path, flags: int = os.O_RDWR, number: int = 0) -> None:
    graph.fdsets.add(os.open(path, flags), number)


def passed(name: str = "n", number: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "driver": "file",
        "node-name": name,
        "filename": f"/dev/fdset/{number}",
        **{member.replace("_", "-"): value for member, value in more.items()},
    }


def modes(path: Path) -> list[int]:
    """The access modes of the descriptors that the process has of a file."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{entry}") == str(path):
                found.append(fcntl.fcntl(int(entry), fcntl.F_GETFL) & os.O_ACCMODE)
        except OSError:
            pass
    return sorted(found)


async def test_a_file_that_has_no_name_any_more_is_read_and_written(graph: Graph, image: Path) -> None:
    add(graph, image)
    image.unlink()
    node = await graph.add(passed())
    backend = Backend(graph, perm=WRITE)
    backend.attach(node)
    await backend.pwrite(512, memoryview(b"b" * 512))
    assert bytes(await backend.pread(0, 1024)) == b"a" * 512 + b"b" * 512
    assert node.exact_filename == "/dev/fdset/0"
    assert node.size == 1 << 20


async def test_a_set_without_a_descriptor_for_writing_makes_a_read_only_disk(
    graph: Graph, image: Path
) -> None:
    add(graph, image, os.O_RDONLY)
    with pytest.raises(Error, match=r"^Failed to find file descriptor with matching flags=0x2$"):
        await graph.add(passed())
    assert (await graph.add(passed(read_only=True))).read_only


async def test_with_auto_read_only_the_set_is_asked_for_writing_when_somebody_writes(
    graph: Graph, image: Path
) -> None:
    add(graph, image, os.O_RDONLY)
    node = await graph.add(passed(auto_read_only=True))
    with pytest.raises(Error, match=r"^Failed to find file descriptor with matching flags=0x2$"):
        Backend(graph, perm=WRITE).attach(node)
    add(graph, image, os.O_RDWR)
    backend = Backend(graph, perm=WRITE)
    backend.attach(node)
    await backend.pwrite(0, memoryview(b"b"))
    assert image.read_bytes()[:2] == b"ba"


async def test_another_file_in_the_set_does_not_take_the_place_of_the_one_that_is_open(
    graph: Graph, image: Path, tmp_path: Path
) -> None:
    another = tmp_path / "another"
    another.write_bytes(bytes(4096))
    add(graph, image, os.O_RDONLY)
    node = await graph.add(passed(auto_read_only=True))
    add(graph, another, os.O_RDWR)
    with pytest.raises(Error, match=r"^Failed to find file descriptor with matching flags=0x2$"):
        Backend(graph, perm=WRITE).attach(node)


async def test_reopening_takes_the_descriptor_of_the_set_that_fits(graph: Graph, image: Path) -> None:
    add(graph, image, os.O_RDONLY)
    add(graph, image, os.O_RDWR)
    node = await graph.add(passed())
    kept = modes(image)
    await reopen(graph, [passed(read_only=True)])
    assert node.read_only
    assert modes(image) != kept
    await reopen(graph, [passed()])
    assert not node.read_only
    assert modes(image) == kept


async def test_a_reopening_for_which_there_is_no_descriptor_changes_nothing(
    graph: Graph, image: Path
) -> None:
    add(graph, image, os.O_RDWR)
    node = await graph.add(passed())
    kept = modes(image)
    with pytest.raises(Error, match=r"^Failed to find file descriptor with matching flags=0x0$"):
        await reopen(graph, [passed(read_only=True)])
    assert not node.read_only
    assert modes(image) == kept


async def test_a_disk_goes_on_when_its_set_is_removed_and_leaves_nothing_open(
    graph: Graph, image: Path
) -> None:
    add(graph, image)
    node = await graph.add(passed())
    backend = Backend(graph, perm=WRITE)
    backend.attach(node)
    graph.fdsets.remove(0)
    assert bytes(await backend.pread(0, 1)) == b"a"
    assert graph.fdsets.query() == [{"fds": [], "fdset-id": 0}]
    backend.detach()
    await graph.delete("n")
    assert graph.fdsets.query() == []
    assert modes(image) == []


@pytest.mark.parametrize("opened", ["directory", "pipe", "device"])
async def test_only_regular_files_are_taken(graph: Graph, tmp_path: Path, opened: str) -> None:
    if opened == "pipe":
        descriptor, other = os.pipe()
        os.close(other)
    else:
        descriptor = os.open(tmp_path if opened == "directory" else "/dev/null", os.O_RDONLY)
    graph.fdsets.add(descriptor)
    with pytest.raises(Error, match=r"^'file' driver requires '/dev/fdset/0' to be a regular file$"):
        await graph.add(passed(read_only=True))
    graph.fdsets.remove(0)
    assert graph.fdsets.query() == []


async def test_what_can_only_be_appended_to_is_no_disk_to_write_to(graph: Graph, image: Path) -> None:
    add(graph, image, os.O_RDWR | os.O_APPEND)
    with pytest.raises(Error, match=r"^'/dev/fdset/0' can only be appended to: it was opened with O_APPEND$"):
        await graph.add(passed())
    add(graph, image, os.O_RDONLY | os.O_APPEND)
    await graph.add(passed(read_only=True))


async def test_past_the_page_cache_goes_a_descriptor_that_was_opened_so(graph: Graph, image: Path) -> None:
    add(graph, image)
    with pytest.raises(Error, match=r"^Failed to find file descriptor with matching flags=0x4002$"):
        await graph.add(passed(cache={"direct": True}))
    try:
        add(graph, image, os.O_RDWR | os.O_DIRECT, 1)
    except OSError:
        pytest.skip("the file system has no O_DIRECT")
    node = await graph.add(passed(number=1, cache={"direct": True}))
    backend = Backend(graph, perm=READ)
    backend.attach(node)
    assert bytes(await backend.pread(1, 8191)) == b"a" * 8191
    with pytest.raises(Error, match=r"^Failed to find file descriptor with matching flags=0x2$"):
        await graph.add(passed("m", number=1))


async def test_past_the_page_cache_a_second_descriptor_is_only_opened_if_the_set_has_none(
    graph: Graph, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        add(graph, image, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("the file system has no O_DIRECT")

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr("qmpd.block.drivers.file.os.open", refuse)
        with pytest.raises(Error, match=r"^Could not open '/dev/fdset/0': Permission denied$"):
            await graph.add(passed(cache={"direct": True}))
    add(graph, image)
    with monkeypatch.context() as patch:
        patch.setattr("qmpd.block.drivers.file.os.open", refuse)
        await graph.add(passed(cache={"direct": True}))
    await graph.delete("n")
    graph.fdsets.remove(0)
    assert modes(image) == []


# -- making images


async def test_an_image_is_made_in_a_file_that_was_passed(graph: Graph, image: Path) -> None:
    add(graph, image)
    await create(
        graph, {"driver": "file", "filename": "/dev/fdset/0", "size": 65536, "preallocation": "full"}
    )
    assert image.read_bytes() == bytes(65536)
    assert locked(image) == []


async def test_an_image_is_not_made_where_it_could_not_be_written(graph: Graph, image: Path) -> None:
    add(graph, image, os.O_RDONLY)
    with pytest.raises(Error, match=r"^Failed to find file descriptor with matching flags=0x42$"):
        await create(graph, {"driver": "file", "filename": "/dev/fdset/0", "size": 65536})
    with pytest.raises(Error, match=r"^Failed to find fdset /dev/fdset/9$"):
        await create(graph, {"driver": "file", "filename": "/dev/fdset/9", "size": 65536})
    assert image.stat().st_size == 1 << 20


async def test_an_image_is_not_made_over_one_that_is_in_use(graph: Graph, image: Path) -> None:
    add(graph, image)
    Backend(graph, perm=WRITE, shared=ALONE).attach(await graph.add(passed()))
    with pytest.raises(Error, match=r'^Failed to get "write" lock$'):
        await create(graph, {"driver": "file", "filename": "/dev/fdset/0", "size": 65536})
    assert image.stat().st_size == 1 << 20
    assert locked(image) == [100, 101, 201]


# -- locks


async def test_two_users_of_one_descriptor_keep_out_of_each_other_s_way(graph: Graph, image: Path) -> None:
    add(graph, image)
    one, other = await graph.add(passed("one")), await graph.add(passed("other"))
    first, second = (Backend(graph, perm=WRITE, shared=ALONE) for _ in range(2))
    first.attach(one)
    with pytest.raises(Error, match=r'^Failed to get "write" lock$'):
        second.attach(other)
    assert locked(image) == [100, 101, 201]
    first.detach()
    assert locked(image) == []
    second.attach(other)
    assert locked(image) == [100, 101, 201]


async def test_a_user_of_a_descriptor_that_closes_leaves_the_others_their_locks(
    graph: Graph, image: Path
) -> None:
    add(graph, image)
    one, other = await graph.add(passed("one")), await graph.add(passed("other"))
    first, second = (Backend(graph, perm=READ, shared=ALONE) for _ in range(2))
    first.attach(one)
    second.attach(other)
    first.detach()
    await graph.delete("one")
    assert locked(image) == [100, 201]
    second.detach()
    await graph.delete("other")
    assert locked(image) == []


async def test_locks_are_given_back_though_the_descriptor_stays_open(graph: Graph, image: Path) -> None:
    add(graph, image)
    backend = Backend(graph, perm=WRITE, shared=ALONE)
    backend.attach(await graph.add(passed()))
    await graph.close()
    assert locked(image) == []
    assert modes(image) == [os.O_RDWR]


async def test_a_disk_on_a_descriptor_and_one_by_name_keep_each_other_out(graph: Graph, image: Path) -> None:
    add(graph, image)
    Backend(graph, perm=WRITE, shared=ALONE).attach(await graph.add(passed()))
    named = await graph.add({"driver": "file", "node-name": "named", "filename": str(image)})
    with pytest.raises(Error, match=r'^Failed to get "write" lock$'):
        Backend(graph, perm=WRITE, shared=ALONE).attach(named)


def test_a_lock_that_was_left_for_a_fellow_goes_with_it(image: Path) -> None:
    table = PassedLocks()
    with image.open("r+b") as one, image.open("r+b") as other:
        first, second = table.join(one.fileno(), "a"), table.join(other.fileno(), "b")
        for locks in (first, second):
            locks.prepare(READ, ALL)
            locks.commit()
        first.prepare(Permission(0), ALL)
        first.commit()
        assert locked(image) == [100]
        table.leave(second)
        assert locked(image) == []
        table.leave(first)
