"""A user of a node from outside the graph: a guest's disk, an export, qemu-io.

A backend is the upper end of an edge called "root".  It takes permissions on
its node, and requests go through it, so that it can count them.  A device's
statistics are about what its guest does: what somebody else does through its
backend (qemu-io on the monitor) is not `counted`.

While the graph below it is changed a backend is *drained*
(:meth:`qmpd.block.graph.Graph.drained`): what was begun has ended, and what
comes meanwhile waits its turn here, before it has looked at a node.  So does
what limits do not allow yet (`qmpd.block.throttle_groups`): neither is under way,
so a drained section does not wait for it.
"""

from __future__ import annotations

import asyncio
import errno
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qmpd.block.accounting import Accounting
from qmpd.block.edge import Edge
from qmpd.block.node import BlockStatus, Data, Extent, Node, errno_error
from qmpd.block.permissions import Permission
from qmpd.block.throttling import Direction

if TYPE_CHECKING:
    from qmpd.block.graph import Graph
    from qmpd.block.throttle_groups import Member, ThrottleGroup, ThrottleGroups

T = TypeVar("T")


class Backend:
    """Takes `perm` on a node, shares `shared`.

    :param name: the monitor's name for it ("" for all that a `blockdev-add` world has).
    :param qdev: the device that it belongs to, as messages and `query-block` name
        it: a QOM path, or an id.
    :param device_id: the id under which commands find the device.
    :param is_jobs: it belongs to a job.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        name: str = "",
        qdev: str | None = None,
        device_id: str | None = None,
        perm: Permission = Permission.CONSISTENT_READ,
        shared: Permission = Permission.everything(),  # noqa: B008 - an enum's member never changes
        is_jobs: bool = False,
    ) -> None:
        self.graph = graph
        self.is_jobs = is_jobs
        self.name = name
        self.qdev = qdev
        self.device_id = device_id
        self.perm = perm
        self.shared = shared
        self.accounting = Accounting()
        self._edge: Edge | None = None
        self._in_flight = 0
        self._idle: asyncio.Future[None] | None = None
        #: How many drained sections it is in.
        self._sections = 0
        #: The requests that wait for them to end, oldest first.
        self._waiting: OrderedDict[object, asyncio.Future[None]] = OrderedDict()
        #: Its place among those that share limits; None without limits.
        self._member: Member | None = None
        #: How many want its limits not to hold for now.
        self._hurries = 0
        #: Whether a new request may have to wait: there is a section, somebody who came before, or a limit.
        self._queues = False

    def describe(self) -> str:
        """How a message names this backend as a parent."""
        label = self.name or self.qdev
        return f"block device '{label}'" if label else "an unnamed block device"

    # -- the node below

    @property
    def node(self) -> Node:
        """The node that it uses.

        :raise RuntimeError: if there is none.
        """
        if self._edge is None:
            raise RuntimeError("the backend is not attached")
        return self._edge.child

    @property
    def edge(self) -> Edge | None:
        """The edge to its node, or None while it has none."""
        return self._edge

    def attach(self, node: Node) -> None:
        """Use `node` from now on.

        :raise Error: on a conflict of permissions; then nothing has changed.
        """
        self._edge = self.graph.attach(self, "root", node, self.perm, self.shared)
        self.graph.backends.append(self)

    def detach(self) -> None:
        """Let go of the node; harmless if there is none."""
        if self._edge is not None:
            edge, self._edge = self._edge, None
            self.graph.backends.remove(self)
            self.graph.detach(edge)

    @contextmanager
    def use(self, node: Node) -> Iterator[Backend]:
        """Be attached to `node` for the time of a ``with``."""
        self.attach(node)
        try:
            yield self
        finally:
            self.detach()

    def set_permissions(self, perm: Permission, shared: Permission) -> None:
        """Take and share something else on the node.

        :raise Error: on a conflict; then all is as before.
        """
        if self._edge is not None:
            self.graph.change_permissions(self._edge, perm, shared)
        self.perm, self.shared = perm, shared

    # -- requests

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self.node.size

    async def pread(self, offset: int, length: int, *, counted: bool = True) -> Data:
        """The `length` bytes at `offset`.

        :raise OSError: EIO outside the disk, ENOMEDIUM if the backend lost its node while the
            request waited, or what the storage says.
        """
        started = await self._turn(Direction.READ, length) if self._queues else perf_counter_ns()
        request = self.node.pread(offset, length)
        return await self._run("rd" if counted else None, length, request, started)

    async def pwrite(self, offset: int, data: Data, *, counted: bool = True) -> None:
        """Write `data` at `offset`; raises as `pread`, and EPERM on a read-only node."""
        started = await self._turn(Direction.WRITE, len(data)) if self._queues else perf_counter_ns()
        request = self.node.pwrite(offset, data)
        await self._run("wr" if counted else None, len(data), request, started)

    def read_cached(self, requests: Sequence[Extent], into: memoryview) -> list[bool]:
        """Serve those of several reads that need no waiting, see :meth:`qmpd.block.node.Node.read_cached`."""
        if self._queues:
            return [False] * len(requests)
        started = perf_counter_ns()
        served = self.node.read_cached(requests, into)
        took = perf_counter_ns() - started
        for (_, length), done in zip(requests, served, strict=True):
            if done:
                self.succeeded("rd", length, took)
        return served

    async def pwrite_many(self, writes: Sequence[tuple[int, Data]]) -> list[OSError | None]:
        """Write several things, see :meth:`qmpd.block.node.Node.pwrite_many`."""
        started = perf_counter_ns()
        if self._queues:
            started = await self._turn(Direction.WRITE, *(len(data) for _, data in writes))
        outcomes = await self._run(None, 0, self.node.pwrite_many(writes), started)
        took = perf_counter_ns() - started
        for number, ((_, data), failure) in enumerate(zip(writes, outcomes, strict=True)):
            if failure is None:
                self.succeeded("wr", len(data), took)
            elif self.failed("wr", len(data), took, failure):
                outcomes[number] = None
        return outcomes

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fast: bool = False, counted: bool = True
    ) -> None:
        """Make `length` bytes at `offset` read as zeroes; with `unmap` their space may be given back.

        With `fast` it fails with EOPNOTSUPP where it would take as long as writing them.
        """
        started = await self._turn(Direction.WRITE, length) if self._queues else perf_counter_ns()
        request = self.node.pwrite_zeroes(offset, length, unmap=unmap, fast=fast)
        await self._run("wr" if counted else None, length, request, started)

    async def discard(self, offset: int, length: int, *, counted: bool = True) -> None:
        """The data in this range is of no more use."""
        started = await self._turn() if self._queues else perf_counter_ns()
        request = self.node.pdiscard(offset, length)
        await self._run("unmap" if counted else None, length, request, started)

    async def flush(self, *, counted: bool = True) -> None:
        """What was written before is on stable storage afterwards."""
        started = await self._turn() if self._queues else perf_counter_ns()
        await self._run("flush" if counted else None, 0, self.node.flush(), started)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """What is known about the bytes from `offset` on; raises as `pread`."""
        if self._queues:
            await self._turn()
        return await self._run(None, 0, self.node.block_status(offset, length), 0)

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        """Change the disk's size to `size` bytes.

        It does not wait for a drained section to end: whoever resizes is in one.
        """
        await self._run(None, 0, self.node.truncate(size, preallocation), 0)

    async def run(self, request: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do something else with the node, as one request: drained sections wait for its end.

        :raise OSError: as `pread`, or what the request does.
        """
        if self._queues:
            await self._turn()
        return await self._run(None, 0, request(), 0)

    async def _run(self, kind: str | None, size: int, request: Coroutine[Any, Any, T], started: int) -> T:
        """Await a request, and count it as one of this kind.

        :param started: when it came, on `perf_counter_ns`: the time in which it waited counts.
        """
        self._in_flight += 1
        try:
            result = await request
            if kind is not None:
                self.succeeded(kind, size, perf_counter_ns() - started)
            return result
        except OSError as error:
            if kind is None or not self.failed(kind, size, perf_counter_ns() - started, error):
                raise
            # Nobody is to hear of it.
            ignored: Any = bytes(size) if kind == "rd" else None
            return cast(T, ignored)
        finally:
            self._in_flight -= 1
            if self._idle is not None and not self._in_flight:
                self._idle.set_result(None)
                self._idle = None

    def succeeded(self, kind: str, size: int, took: int) -> None:
        """Count a request, also one whose parts were made with ``counted=False``.

        :param took: in nanoseconds.
        """
        self.accounting.done(kind, size, took)

    def failed(self, kind: str, size: int, took: int, error: OSError) -> bool:
        """Count a request that failed; returns whether whoever made it is not to hear of that."""
        self.accounting.failed(kind, took)
        return False

    # -- drained sections

    @property
    def in_flight(self) -> int:
        """How many requests are under way; those that wait for a section to end are not."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """How many requests wait for the end of a drained section."""
        return len(self._waiting)

    def begin_drained(self) -> None:
        """Let new requests wait until `end_drained` was called as often as this."""
        self._sections += 1
        self._queues = True

    def end_drained(self) -> None:
        """Let the requests go on that have waited, oldest first, if this was the last section."""
        self._sections -= 1
        self._go_on()

    async def idle(self) -> None:
        """Return when no request is under way.  Unless the backend is drained others may begin."""
        while self._in_flight:
            if self._idle is None:
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)

    async def _turn(self, direction: Direction | None = None, *sizes: int) -> int:
        """Wait until the limits allow it, then for the end of all sections, behind those that came before.

        :param direction: None for what no limit is about.
        :param sizes: of the requests that go together, in bytes.
        :returns: when the request came, on `perf_counter_ns`.
        :raise OSError: ENOMEDIUM if there is no node any more.
        """
        came = perf_counter_ns()
        for size in sizes:
            if direction is not None and self._member is not None and not self._hurries:
                await self._member.admit(direction, size)
        if self._sections or self._waiting:
            await self._end_of_sections()
        if self._edge is None:
            raise errno_error(errno.ENOMEDIUM)
        return came

    async def _end_of_sections(self) -> None:
        create_future = asyncio.get_running_loop().create_future
        place = object()
        self._waiting[place] = create_future()
        try:
            await self._waiting[place]
            while self._sections:
                # The next section has begun before this request could; it keeps its place.
                self._waiting[place] = create_future()
                await self._waiting[place]
        finally:
            del self._waiting[place]
            self._go_on()

    def _go_on(self) -> None:
        """Wake up who may go on.  All are woken at once, so if the first one is, there is nobody else."""
        if not self._sections and self._waiting and not next(iter(self._waiting.values())).done():
            for turn in self._waiting.values():
                if not turn.done():
                    turn.set_result(None)
        self._may_queue()

    def _may_queue(self) -> None:
        self._queues = bool(self._sections or self._waiting or self._member is not None)

    # -- limits

    @property
    def throttle_group(self) -> ThrottleGroup | None:
        """The disks that it shares its limits with; None if it has none."""
        return None if self._member is None else self._member.group

    def set_limits(self, groups: ThrottleGroups, limits: Mapping[str, int], group: str) -> None:
        """Let its requests wait for limits.

        :param limits: ThrottleLimits, all of them; with nothing limited, limits are taken away.
        :param group: the name of the group whose limits these are, for a disk that is in none.
        :raise Error: if the limits make no sense; then nothing has changed.
        """
        self._member = groups.limit(self._member, limits, group)
        self._may_queue()

    def remove_limits(self) -> None:
        """Leave its group; what has waited goes on at once."""
        if self._member is not None:
            member, self._member = self._member, None
            member.leave()
            self._may_queue()

    @contextmanager
    def hurried(self) -> Iterator[None]:
        """For the time of a ``with`` no limit holds: somebody waits for what was begun to end."""
        self._hurries += 1
        nodes = [] if self._edge is None else self.graph.subtree(self._edge.child)
        for node in nodes:
            node.begin_hurry()
        if self._member is not None:
            self._member.group.release(self._member)
        try:
            yield
        finally:
            self._hurries -= 1
            for node in nodes:
                node.end_hurry()
