"""The driver `throttle`: its child's bytes as they are, but no faster than a group's limits allow.

A request that waits for the limits is under way, as far as anybody above can tell.  Who
waits for requests to end (a drained section, an export that goes) says so to the nodes, and as
long as somebody does, no limit holds here.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any

from qmpd.block.change import Change
from qmpd.block.node import BlockStatus, Data, Extent, Node, NotSupported
from qmpd.block.options import NodeOptions
from qmpd.block.throttle_groups import Member
from qmpd.block.throttling import Direction, are_limiting


class ThrottleNode(Node):
    """A member of the group `throttle-group`."""

    driver = "throttle"
    strong_options = ("throttle-group",)
    changeable_options = frozenset(strong_options)

    _member: Member | None = None
    #: How many want no limit to hold for now.
    _hurries = 0

    async def open(self) -> None:
        """Join the group.

        :raise Error: if there is none of that name.
        """
        self._member = self._join()

    def _join(self) -> Member:
        return Member(self.graph.throttle_groups.existing(self.options["throttle-group"]))

    async def reopen(self, options: Mapping[str, Any], node_options: NodeOptions, change: Change) -> None:
        """Change to another group."""
        await super().reopen(options, node_options, change)
        before, self._member = self._member, self._join()
        assert before is not None, "an open node is in a group"
        change.on_success(before.leave)
        change.on_failure(self._go_back, before)

    def _go_back(self, before: Member) -> None:
        assert self._member is not None
        self._member.leave()
        self._member = before

    async def close(self) -> None:
        """Leave the group."""
        if self._member is not None:
            self._member.leave()
            self._member = None

    def begin_hurry(self) -> None:
        """Let through what waits, and what comes."""
        self._hurries += 1
        if self._member is not None:
            self._member.group.release(self._member)

    def end_hurry(self) -> None:
        """Let the limits hold again, unless somebody else does not want them to."""
        self._hurries -= 1

    async def _admit(self, direction: Direction, size: int) -> None:
        if self._member is not None and not self._hurries:
            await self._member.admit(direction, size)

    @property
    def size(self) -> int:
        """The child's."""
        return self.file.size

    async def _pread(self, offset: int, length: int) -> Data:
        await self._admit(Direction.READ, length)
        return await self.file.pread(offset, length)

    def _read_cached(self, requests: Sequence[Extent], into: memoryview) -> list[bool]:
        if self._member is not None and are_limiting(self._member.group.limits):
            return [False] * len(requests)
        return self.file.read_cached(requests, into)

    async def _pwrite(self, offset: int, data: memoryview) -> None:
        await self._admit(Direction.WRITE, len(data))
        await self.file.pwrite(offset, data)

    async def _pwrite_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        await self._admit(Direction.WRITE, length)
        try:
            await self.file.pwrite_zeroes(offset, length, unmap=unmap, fast=True)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                # Whether they are to be written instead is for whoever asked to say.
                raise NotSupported from None
            raise

    async def _pdiscard(self, offset: int, length: int) -> None:
        await self._admit(Direction.WRITE, length)
        await self.file.pdiscard(offset, length)

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        return await self.file.block_status(offset, length)
