"""A user of a node from outside the graph: a guest's disk, an export, qemu-io.

A backend is the upper end of an edge called "root".  It takes permissions on
its node, and requests go through it, so that it can count them.  A device's
statistics are about what its guest does: what somebody else does through its
backend (qemu-io on the monitor) is not `counted`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeVar

from qmpd.block.accounting import Accounting
from qmpd.block.edge import Edge
from qmpd.block.node import BlockStatus, Data, Node
from qmpd.block.permissions import Permission

if TYPE_CHECKING:
    from qmpd.block.graph import Graph

T = TypeVar("T")


class Backend:
    """Takes `perm` on a node, shares `shared`.

    :param name: the monitor's name for it ("" for all that a `blockdev-add` world has).
    :param qdev: the device that it belongs to, as messages and `query-block` name
        it: a QOM path, or an id.
    :param device_id: the id under which commands find the device.
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
    ) -> None:
        self.graph = graph
        self.name = name
        self.qdev = qdev
        self.device_id = device_id
        self.perm = perm
        self.shared = shared
        self.accounting = Accounting()
        self._edge: Edge | None = None
        self._in_flight = 0
        self._drained: asyncio.Future[None] | None = None

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

        :raise OSError: EIO outside the disk, or what the storage says.
        """
        return await self._run("rd" if counted else None, length, self.node.pread(offset, length))

    async def pwrite(self, offset: int, data: Data, *, counted: bool = True) -> None:
        """Write `data` at `offset`; raises as `pread`, and EPERM on a read-only node."""
        await self._run("wr" if counted else None, len(data), self.node.pwrite(offset, data))

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fast: bool = False, counted: bool = True
    ) -> None:
        """Make `length` bytes at `offset` read as zeroes; with `unmap` their space may be given back.

        With `fast` it fails with EOPNOTSUPP where it would take as long as writing them.
        """
        request = self.node.pwrite_zeroes(offset, length, unmap=unmap, fast=fast)
        await self._run("wr" if counted else None, length, request)

    async def discard(self, offset: int, length: int, *, counted: bool = True) -> None:
        """The data in this range is of no more use."""
        await self._run("unmap" if counted else None, length, self.node.pdiscard(offset, length))

    async def flush(self, *, counted: bool = True) -> None:
        """What was written before is on stable storage afterwards."""
        await self._run("flush" if counted else None, 0, self.node.flush())

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """What is known about the bytes from `offset` on; raises as `pread`."""
        return await self._run(None, 0, self.node.block_status(offset, length))

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        """Change the disk's size to `size` bytes."""
        await self.node.truncate(size, preallocation)

    async def _run(self, kind: str | None, size: int, request: Coroutine[Any, Any, T]) -> T:
        """Await a request, and count it as one of this kind."""
        self._in_flight += 1
        started = perf_counter_ns()
        try:
            result = await request
            if kind is not None:
                self.accounting.done(kind, size, perf_counter_ns() - started)
            return result
        except OSError:
            if kind is not None:
                self.accounting.failed(kind, perf_counter_ns() - started)
            raise
        finally:
            self._end_one()

    # -- requests under way

    @property
    def in_flight(self) -> int:
        """How many requests are under way."""
        return self._in_flight

    async def drain(self) -> None:
        """Return when no request is under way any more."""
        while self._in_flight:
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)

    def _end_one(self) -> None:
        self._in_flight -= 1
        if not self._in_flight and self._drained is not None:
            self._drained.set_result(None)
            self._drained = None
