"""Requests wait for limits: in their order, nobody for another disk, and never for ever."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from fake_clock import FakeClock

from qmpd.block.backend import Backend
from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.block.permissions import Permission
from qmpd.block.throttle_groups import ThrottleGroups
from qmpd.block.throttling import UNLIMITED
from qmpd.crypto.memory import KeyMemory
from qmpd.errors import Error

SIZE = 1 << 20


class Disks:
    """Disks with limits, requests to them, and the time."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.groups = ThrottleGroups(self.clock)
        self.graph = Graph(DRIVERS, secrets=lambda name: KeyMemory().take(0), throttle_groups=self.groups)
        #: The requests that are done, by their names, in the order in which they ended.
        self.done: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def disk(self, name: str) -> Backend:
        node = await self.graph.add(
            {"driver": "null-co", "node-name": name, "size": SIZE, "read-zeroes": True}
        )
        backend = Backend(self.graph, perm=Permission.CONSISTENT_READ | Permission.WRITE)
        backend.attach(node)
        return backend

    def limit(self, backend: Backend, group: str = "g", **changes: int) -> None:
        limits = {**UNLIMITED, **{name.replace("_", "-"): value for name, value in changes.items()}}
        backend.set_limits(self.groups, limits, group)

    async def read(self, backend: Backend, *names: str, size: int = 512) -> None:
        await self._start(names, lambda: backend.pread(0, size))

    async def write(self, backend: Backend, *names: str, size: int = 512) -> None:
        await self._start(names, lambda: backend.pwrite(0, bytes(size)))

    async def _start(self, names: tuple[str, ...], request: object) -> None:
        async def run(name: str) -> None:
            await request()  # type: ignore[operator]
            self.done.append(name)

        self.tasks += [asyncio.create_task(run(name)) for name in names]
        await self.turns()

    async def pass_seconds(self, seconds: float) -> list[str]:
        """Let time pass; returns which requests were done meanwhile."""
        self.done.clear()
        self.clock.advance(seconds)
        await self.turns()
        return list(self.done)

    async def turns(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


@pytest_asyncio.fixture
async def disks() -> AsyncIterator[Disks]:
    disks = Disks()
    yield disks
    for backend in list(disks.graph.backends):
        backend.detach()
        backend.remove_limits()
    for task in disks.tasks:
        task.cancel()
    await asyncio.gather(*disks.tasks, return_exceptions=True)
    await disks.graph.close()
    assert disks.clock.next is None, "a timer outlives the last member"


async def test_requests_begin_in_their_order_at_the_limit_s_rate(disks: Disks) -> None:
    disk = await disks.disk("n")
    disks.limit(disk, iops_total=10)
    await disks.read(disk, *"abcde")
    assert disks.done == ["a", "b"]
    assert await disks.pass_seconds(0.1) == ["c"]
    assert await disks.pass_seconds(0.05) == []
    assert await disks.pass_seconds(0.15) == ["d", "e"]


async def test_bytes_take_the_time_that_their_rate_says(disks: Disks) -> None:
    disk = await disks.disk("n")
    disks.limit(disk, bps_read=64 << 10)
    await disks.read(disk, *map(str, range(17)), size=64 << 10)
    began = disks.clock.now
    while (delay := disks.clock.next) is not None:
        await disks.pass_seconds(delay)
    # The first one goes at once, the last one when those before it have, but for a tenth of a second's.
    assert disks.clock.now - began == pytest.approx(16 - 0.1)
    assert disk.accounting.counters["rd"].operations == 17


async def test_reads_do_not_wait_behind_writes_that_have_a_limit(disks: Disks) -> None:
    disk = await disks.disk("n")
    disks.limit(disk, iops_write=1)
    await disks.write(disk, "w1", "w2", "w3")
    await disks.read(disk, "r1", "r2")
    assert disks.done == ["w1", "r1", "r2"]


async def test_reads_and_writes_that_share_a_limit_take_turns(disks: Disks) -> None:
    disk = await disks.disk("n")
    disks.limit(disk, iops_total=10)
    await disks.read(disk, *(f"r{number}" for number in range(5)))
    await disks.write(disk, *(f"w{number}" for number in range(4)))
    assert disks.done == ["r0", "r1"]
    assert await disks.pass_seconds(0.6) == ["w0", "r2", "w1", "r3", "w2", "r4"]


async def test_the_disks_of_a_group_share_its_limits_and_take_turns(disks: Disks) -> None:
    first, second = await disks.disk("n"), await disks.disk("m")
    disks.limit(first, iops_total=1)
    disks.limit(second, iops_total=10)
    group = first.throttle_group
    assert group is second.throttle_group is not None
    assert group.limits["iops-total"] == 10
    await disks.read(first, "a1", "a2", "a3", "a4")
    await disks.read(second, "b1", "b2")
    assert disks.done == ["a1", "a2"]
    assert await disks.pass_seconds(0.4) == ["a3", "b1", "a4", "b2"]


async def test_nobody_waits_for_a_disk_of_another_group_or_of_none(disks: Disks) -> None:
    slow, other, free = await disks.disk("n"), await disks.disk("m"), await disks.disk("o")
    disks.limit(slow, "slow", bps_total=1)
    disks.limit(other, "other", bps_total=10**9)
    await disks.read(slow, "s1", "s2")
    await disks.read(other, "o1", "o2")
    await disks.write(free, "f1", "f2")
    assert disks.done == ["s1", "o1", "o2", "f1", "f2"]


async def test_small_requests_do_not_go_past_a_limit_together(disks: Disks) -> None:
    disk = await disks.disk("n")
    disks.limit(disk, iops_total=10)
    assert disk.read_cached([(0, 512), (512, 512)], memoryview(bytearray(1024))) == [False, False]
    writing = asyncio.create_task(disk.pwrite_many([(0, bytes(512))] * 4))
    await disks.turns()
    disks.clock.advance(0.1)
    await disks.turns()
    assert not writing.done()
    disks.clock.advance(0.1)
    assert await writing == [None] * 4


async def test_flushes_discards_and_questions_are_not_limited(disks: Disks) -> None:
    disk = await disks.disk("n")
    disks.limit(disk, iops_total=1)
    await disks.read(disk, "a", "b")
    assert disks.done == ["a"]
    await disk.flush()
    await disk.discard(0, 512)
    await disk.block_status(0, 512)


async def test_zeroes_are_limited_like_data(disks: Disks) -> None:
    disk = await disks.disk("n")
    disks.limit(disk, bps_write=1000)
    zeroing = asyncio.create_task(disk.write_zeroes(0, 10000))
    await zeroing
    await disks.write(disk, "w")
    assert disks.done == []
    assert await disks.pass_seconds(9.9) == ["w"]


async def test_other_limits_hold_at_once_and_none_let_everything_go(disks: Disks) -> None:
    disk = await disks.disk("n")
    disks.limit(disk, bps_total=1)
    await disks.read(disk, *"abcd")
    assert disks.done == ["a"]
    disks.limit(disk, iops_total=1)
    await disks.turns()
    assert disks.done == ["a", "b"]
    disks.limit(disk)
    await disks.turns()
    assert disks.done == ["a", "b", "c", "d"]
    assert disk.throttle_group is None
    # And it is as quick as ever.
    assert disk.read_cached([(0, 512)], memoryview(bytearray(512))) == [True]


async def test_wrong_limits_change_nothing(disks: Disks) -> None:
    disk = await disks.disk("n")
    disks.limit(disk, iops_total=5)
    with pytest.raises(Error, match="cannot be lower"):
        disks.limit(disk, "h", iops_total=5, iops_total_max=4)
    assert disk.throttle_group is not None
    assert (disk.throttle_group.name, disk.throttle_group.limits["iops-total"]) == ("g", 5)


async def test_a_group_lives_as_long_as_somebody_needs_it(disks: Disks) -> None:
    disk = await disks.disk("n")
    disks.limit(disk, iops_total=5)
    with pytest.raises(Error, match="^A group with this name already exists$"):
        disks.groups.create("g")
    disks.limit(disk, "h", iops_total=6)
    group = disks.groups.create("g")
    assert dict(group.limits) == UNLIMITED
    disks.limit(disk, "g", iops_total=7)
    disks.limit(disk)
    assert group.limits["iops-total"] == 7
    with pytest.raises(Error, match="^A group with this name already exists$"):
        disks.groups.create("g")


async def test_a_drained_section_does_not_wait_for_limits_and_they_hold_after_it(disks: Disks) -> None:
    disk = await disks.disk("n")
    disks.limit(disk, iops_total=1)
    await disks.read(disk, "a", "b", "c")
    assert disks.done == ["a"]
    async with disks.graph.drained(disk.node):
        # The limit would let one more begin, which the section does not.
        assert await disks.pass_seconds(1) == []
        assert disk.in_flight == 0
    await disks.turns()
    assert disks.done == ["b"]
    assert await disks.pass_seconds(1) == ["c"]


async def test_what_waits_goes_to_the_node_that_is_there_then(disks: Disks) -> None:
    disk = await disks.disk("n")
    before = disk.node
    after = await disks.graph.add({"driver": "null-co", "node-name": "m", "size": SIZE, "read-zeroes": False})
    disks.limit(disk, iops_total=1)
    await disks.read(disk, "a", "b")
    async with disks.graph.drained(before):
        disk.detach()
        await disks.graph.delete("n")
        disk.attach(after)
    assert await disks.pass_seconds(1) == ["b"]


async def test_a_disk_that_goes_leaves_nobody_waiting(disks: Disks) -> None:
    disk, other = await disks.disk("n"), await disks.disk("m")
    disks.limit(disk, iops_total=1)
    disks.limit(other, iops_total=1)
    await disks.read(disk, "a", "b", "c")
    await disks.read(other, "d")
    disk.detach()
    disk.remove_limits()
    await disks.turns()
    for task in disks.tasks[1:3]:
        assert isinstance(error := task.exception(), OSError)
        assert error.errno == errno.ENOMEDIUM
    assert await disks.pass_seconds(1) == ["d"]


async def test_in_a_hurry_no_limit_holds(disks: Disks) -> None:
    disk, other = await disks.disk("n"), await disks.disk("m")
    disks.limit(disk, iops_total=1)
    disks.limit(other, iops_total=1)
    await disks.read(disk, "a", "b", "c")
    await disks.read(other, "d")
    with disk.hurried():
        await disks.turns()
        await disks.read(disk, "e", "f")
        assert disks.done == ["a", "b", "c", "e", "f"]
    await disks.read(disk, "g")
    assert await disks.pass_seconds(1) == ["d"]
    assert await disks.pass_seconds(1) == ["g"]


async def test_a_request_that_is_given_up_costs_nothing(disks: Disks) -> None:
    disk = await disks.disk("n")
    disks.limit(disk, bps_total=512)
    await disks.read(disk, *"abc")
    disks.tasks[1].cancel()
    await disks.turns()
    assert await disks.pass_seconds(0.9) == ["c"]


async def test_the_last_request_that_is_given_up_leaves_nothing(disks: Disks) -> None:
    disk = await disks.disk("n")
    disks.limit(disk, bps_total=512)
    await disks.read(disk, *"ab")
    disks.tasks[1].cancel()
    await disks.turns()
    assert await disks.pass_seconds(0.9) == []
    assert disk.throttle_group is not None
    assert disk.throttle_group.waiting == 0


# -- the driver


async def limited_node(disks: Disks, **changes: int) -> Backend:
    """A disk on a node of the driver `throttle` whose group "tg" has such limits."""
    group = disks.groups.create("tg")
    group.set_limits({**UNLIMITED, **{name.replace("_", "-"): value for name, value in changes.items()}})
    await disks.graph.add({"driver": "null-co", "node-name": "below", "size": SIZE, "read-zeroes": True})
    options = {"driver": "throttle", "node-name": "t", "file": "below", "throttle-group": "tg"}
    node = await disks.graph.add({**options, "discard": "unmap"})
    backend = Backend(disks.graph, perm=Permission.CONSISTENT_READ | Permission.WRITE)
    backend.attach(node)
    return backend


async def test_a_node_is_as_slow_as_its_group_says(disks: Disks) -> None:
    disk = await limited_node(disks, iops_total=10)
    await disks.read(disk, "a", "b", "c")
    await disks.write(disk, "d")
    assert disks.done == ["a", "b"]
    assert await disks.pass_seconds(0.2) == ["d", "c"]
    assert disk.read_cached([(0, 512)], memoryview(bytearray(512))) == [False]
    disks.groups.find("tg").set_limits(UNLIMITED)
    assert disk.read_cached([(0, 512)], memoryview(bytearray(512))) == [True]


async def test_a_node_limits_discards_and_zeroes_as_writes(disks: Disks) -> None:
    disk = await limited_node(disks, bps_write=1000)
    await disk.discard(0, 10000)
    await disks.read(disk, "r")
    await disks.write(disk, "w")
    assert disks.done == ["r"]
    assert await disks.pass_seconds(9.9) == ["w"]


async def test_a_disk_and_a_node_of_one_group_share_its_limits(disks: Disks) -> None:
    node = await limited_node(disks, iops_total=10)
    disk = await disks.disk("n")
    disks.limit(disk, "tg", iops_total=10)
    await disks.read(node, "a", "b", "c")
    await disks.read(disk, "d", "e")
    assert disks.done == ["a", "b"]
    assert await disks.pass_seconds(0.3) == ["c", "d", "e"]


async def test_a_drained_section_lets_through_what_a_node_holds_back(disks: Disks) -> None:
    disk = await limited_node(disks, iops_total=1)
    await disks.read(disk, "a", "b", "c")
    assert disks.done == ["a"]
    below = disks.graph.find("below")
    assert below is not None
    async with disks.graph.drained(below):
        assert disks.done == ["a", "b", "c"]
    await disks.read(disk, "d", "e")
    assert await disks.pass_seconds(1) == ["d"]
    assert await disks.pass_seconds(1) == ["e"]


async def test_in_a_hurry_a_node_holds_nothing_back(disks: Disks) -> None:
    disk = await limited_node(disks, iops_total=1)
    await disks.read(disk, "a", "b", "c")
    with disk.hurried():
        await disks.turns()
        assert disks.done == ["a", "b", "c"]
    await disks.read(disk, "d")
    assert "d" not in disks.done


async def test_a_node_that_goes_leaves_its_group(disks: Disks) -> None:
    disk = await limited_node(disks, iops_total=1)
    group = disks.groups.find("tg")
    assert len(group.members) == 1
    disk.detach()
    await disks.graph.delete("t")
    assert group.members == []


async def test_a_node_without_a_group_is_none(disks: Disks) -> None:
    options = {"driver": "null-co", "size": SIZE}
    with pytest.raises(Error, match="^Throttle group 'nope' does not exist$"):
        await disks.graph.add(
            {"driver": "throttle", "node-name": "t", "file": options, "throttle-group": "nope"}
        )
    assert disks.graph.nodes() == []
