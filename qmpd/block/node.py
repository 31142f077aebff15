"""A node of the graph: what every driver has in common.

A driver overrides the methods whose names begin with an underscore; callers
use the others, which check bounds, align requests to what the driver can
serve, and detect zeroes.  All offsets and lengths are bytes.  A node's size
is always a multiple of 512: a file's odd tail reads as zeroes.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from qmpd.block.backing import full_name
from qmpd.block.change import Change
from qmpd.block.edge import Edge
from qmpd.block.options import NodeOptions, flattened
from qmpd.block.permissions import Permission
from qmpd.block.serialising import TrackedWrites
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.graph import Graph

SECTOR = 512

#: What requests carry: any of these, as bytes.
Data: TypeAlias = bytes | bytearray | memoryview

#: Offset and length of a request, in bytes.
Extent: TypeAlias = tuple[int, int]

#: The largest disk, in bytes (QEMU's bound: the sizes of its parts have to fit beside it).
MAX_SIZE = (1 << 63) - (1 << 30)

#: A write of zeroes that a driver can't do by itself is done in pieces of this many bytes.
ZERO_PIECE = 1 << 20


@dataclass(frozen=True)
class BlockStatus:
    """What is known about a run of bytes.

    :param length: of the run, in bytes; the next one may be just the same.
    :param data: there is something in it: it is no hole.
    :param zero: it reads as zeroes.
    :param depth: how far down the chain of images it comes from: 1 for this one, 0 for none of them.
    """

    length: int
    data: bool = True
    zero: bool = False
    depth: int = 1


@dataclass(frozen=True)
class InternalSnapshot:
    """A snapshot inside an image.

    :param id: unique in the image.
    :param vm_state_size: the bytes of a machine's state that belong to it.
    :param date: when it was made, in nanoseconds since 1970.
    :param vm_clock: what the machine's clock said, in nanoseconds.
    :param icount: how many instructions the machine had done, if it was known.
    """

    id: str
    name: str
    vm_state_size: int = 0
    date: int = 0
    vm_clock: int = 0
    icount: int | None = None


class NotSupported(Exception):
    """The driver has no way of its own for a request; the caller falls back."""


def errno_error(number: int) -> OSError:
    """An OSError for the errno `number`, with its text."""
    return OSError(number, os.strerror(number))


class Node(ABC):
    """A block driver at work under a node name.

    :param graph: the graph that it belongs to.
    :param name: the node name.
    :param options: what `blockdev-add` was given for it, in QAPI's names.
    :param node_options: the common options, inherited ones included.
    """

    #: The driver's name in QAPI.
    driver: ClassVar[str]
    #: A protocol driver is at the bottom of a chain; others have a child "file".
    is_protocol: ClassVar[bool] = False
    #: Whether images of this format can have a backing image (role "backing").  Such a driver says
    #: in `_block_status` with a depth of 0 what an image does not hold itself.
    supports_backing: ClassVar[bool] = False
    #: Options that `blockdev-reopen` may give another value, and those that it may leave out again.
    changeable_options: ClassVar[frozenset[str]] = frozenset()
    resettable_options: ClassVar[frozenset[str]] = frozenset()
    #: Whether images of this format can hold snapshots of themselves.
    supports_internal_snapshots: ClassVar[bool] = False
    #: Whether `amend` can change something.
    amendable: ClassVar[bool] = False
    #: Options that make a difference to the data, so that they appear in a `json:` file name; a member of an
    #: option is written with a dot.
    strong_options: ClassVar[tuple[str, ...]] = ()
    #: Requests must begin and end at multiples of this many bytes.
    request_alignment = 1

    def __init__(
        self, graph: Graph, name: str, options: Mapping[str, Any], node_options: NodeOptions
    ) -> None:
        self.graph = graph
        self.name = name
        self.options = options
        self.node_options = node_options
        self.read_only = node_options.read_only
        self.monitor_owned = False
        #: How many jobs are about it that nobody has dismissed: it can't be deleted so long.
        self.jobs = 0
        self.ready = False
        self.closing = False
        self.children: dict[str, Edge] = {}
        #: Newest first: conflicts are looked for, and reported, in this order.
        self.parents: list[Edge] = []
        #: The end of the highest write so far, in bytes.
        self.write_highest_offset = 0
        #: A write that ends beyond this, in bytes, is told of, and the threshold then gone; 0 is none.
        self.write_threshold = 0
        self._writes = TrackedWrites()
        self._resizing = asyncio.Lock()
        #: The name and the format of the backing image that the image's own header names; a driver
        #: that supports backing sets them in `open`.
        self.backing_filename: str | None = None
        self.backing_format: str | None = None
        #: The file name of the node that was opened because of that name.
        self.implied_backing: str | None = None
        #: The node along with which this one was made, if any; it inherits options from there.
        self.inherits_from: Node | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    # -- the life of a node

    async def open(self) -> None:  # noqa: B027
        """Make the node usable; its child "file" is attached already.

        :raise Error: if it can't be.
        """

    async def reopen(self, options: Mapping[str, Any], node_options: NodeOptions, change: Change) -> None:
        """Work with other options from now on; nothing is under way in the node meanwhile.

        A driver does more if it keeps anything that depends on its options.  What is not in
        `changeable_options` and `resettable_options` is the same as before.

        :raise Error: if they make no sense; whatever has been done is undone by `change`.
        """
        change.on_failure(self._set_options, self.options, self.node_options)
        self._set_options(options, node_options)

    def _set_options(self, options: Mapping[str, Any], node_options: NodeOptions) -> None:
        self.options = options
        self.node_options = node_options
        self.read_only = node_options.read_only

    def check_amend(self) -> None:  # noqa: B027 - for most drivers nobody stands in the way
        """See that nobody who uses the image stands in the way of `amend`, as things are now.

        :raise Error: it says who does, or what the lock is that can't be had.
        """

    async def amend(
        self,
        options: Mapping[str, Any],
        *,
        force: bool,
        progress: Callable[[int, int], None],
        commit: Callable[[], None],
    ) -> None:
        """Change what the image's header says; requests go on meanwhile.

        :param options: BlockdevAmendOptions, for this driver.
        :param force: even if data is lost.
        :param progress: is told how much is done, and of how much.
        :param commit: is called where there is no way back: from there on it can't be cancelled.
        :raise Error: what is wrong; then nothing has changed.
        :raise OSError: what the storage says.
        """
        raise Error("Driver does not support x-blockdev-amend")

    async def change_backing_name(self, filename: str | None, image_format: str | None) -> None:
        """Write another name of a backing image into the header; the graph stays as it is.

        A driver that supports it sets `backing_filename` and `backing_format` as well.

        :param filename: the new name, or None for no backing image.
        :raise OSError: what the storage says; EOPNOTSUPP if the format has no such name.
        """
        raise errno_error(errno.EOPNOTSUPP)

    @property
    def internal_snapshots(self) -> list[InternalSnapshot]:
        """The snapshots in the image, in the order of its table."""
        return []

    @property
    def ejected(self) -> bool:
        """Whether such damage was found that the node does nothing any more."""
        return False

    @property
    def lists_internal_snapshots(self) -> bool:
        """Whether this very image can have snapshots inside."""
        return True

    async def create_internal_snapshot(self, name: str, now: float) -> InternalSnapshot:
        """Keep the disk's present contents under `name`; nothing is under way in the node meanwhile.

        :param now: the time, in seconds since 1970.
        :returns: what was made; its name may be cut off.
        :raise OSError: what the storage says.
        """
        raise errno_error(errno.EOPNOTSUPP)

    async def delete_internal_snapshot(self, snapshot_id: str) -> None:
        """Forget a snapshot that is there; nothing is under way in the node meanwhile.

        :raise OSError: what the storage says.
        """
        raise errno_error(errno.EOPNOTSUPP)

    async def settle(self) -> None:  # noqa: B027
        """Write back what is in memory only; the children are still there.

        Called before `close`, also after a failed `open`, and before `reopen`.

        :raise OSError: what the storage says.
        """

    async def close(self) -> None:  # noqa: B027
        """Let go of everything that is no child.  Called once, also after a failed `open`."""

    def keep(self) -> Callable[[], None]:
        """See that the node is not deleted before what is returned has been called."""
        self.jobs += 1
        return self._let_go

    def _let_go(self) -> None:
        self.jobs -= 1

    def describe(self) -> str:
        """How a message names this node as a parent."""
        return f"node '{self.name}'"

    def begin_hurry(self) -> None:  # noqa: B027 - for most drivers nothing waits on purpose
        """Somebody waits for the requests that are under way to end."""

    def end_hurry(self) -> None:  # noqa: B027
        """They have ended, or nobody waits any more; called as often as `begin_hurry`."""

    # -- permissions

    def child_permissions(
        self, role: str, perm: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """What this node takes and shares on its child `role`.

        :param perm: what its own parents take, together.
        :param shared: what all of its parents share.
        """
        return perm, shared

    def prepare_permissions(self, perm: Permission, shared: Permission) -> None:  # noqa: B027
        """Get ready for new permissions of the parents; may refuse, changes nothing for good.

        :raise Error: if they can't be had.
        """

    def commit_permissions(self) -> None:  # noqa: B027 - most drivers have nothing to do here
        """The permissions last prepared are the ones in force."""

    def abort_permissions(self) -> None:  # noqa: B027
        """Forget the permissions last prepared."""

    # -- what it is

    @property
    @abstractmethod
    def size(self) -> int:
        """The disk's size in bytes, a multiple of 512."""

    @property
    def file(self) -> Node:
        """The child that holds the data."""
        return self.children["file"].child

    @property
    def backing(self) -> Node | None:
        """The backing image: what this image does not hold itself comes from there."""
        edge = self.children.get("backing")
        return None if edge is None else edge.child

    @property
    def backing_depth(self) -> int:
        """How many images are behind this one."""
        depth, node = 0, self.backing
        while node is not None:
            depth, node = depth + 1, node.backing
        return depth

    @property
    def full_backing_filename(self) -> str | None:
        """The header's name of the backing image as one that can be opened, if there is any.

        :raise Error: if it is relative, and this image has no file name.
        """
        if self.backing_filename is None:
            return None
        return full_name(self.protocol_filename, self.backing_filename)

    @property
    def backing_overridden(self) -> bool:
        """Whether the backing image is another one than the header says."""
        named = self.backing_filename if self.implied_backing is None else self.implied_backing
        return named != (None if self.backing is None else self.backing.filename)

    @property
    def protocol_filename(self) -> str | None:
        """The plain file name at the bottom of this node, to which names in its header are relative."""
        return None if self.is_protocol else self.file.protocol_filename

    @property
    def identity(self) -> Hashable:
        """Equal for two nodes that show the same storage in the same way."""
        if self.is_protocol:
            return self
        strong = tuple((name, repr(value)) for name, value in self._strong_options.items())
        return self.driver, strong, *(edge.child.identity for edge in self.storage_children)

    @property
    def exact_filename(self) -> str | None:
        """A plain file name that would open this very node, if there is one."""
        if self.backing_overridden or self._strong_options:
            return None
        child = self.file
        return child.exact_filename if child.is_protocol else None

    @property
    def filename(self) -> str:
        """A name that opens this node's contents: the plain one, else ``json:{...}``."""
        exact = self.exact_filename
        return exact if exact is not None else "json:" + json.dumps(self.full_options())

    def full_options(self) -> dict[str, Any]:
        """The options that would open this node again, for a `json:` file name."""
        result: dict[str, Any] = {"driver": self.driver}
        for edge in self.storage_children:
            result[edge.name] = edge.child.full_options()
        if self.backing_overridden:
            result["backing"] = None if self.backing is None else self.backing.full_options()
        return result | self._strong_options

    @property
    def _strong_options(self) -> dict[str, Any]:
        """Those of the options that make a difference, with their names as in `strong_options`."""
        given = flattened(self.options)
        return {name: given[name] for name in self.strong_options if name in given}

    @property
    def storage_children(self) -> list[Edge]:
        """The edges to the nodes that this image itself lies on: all but its backing image."""
        return [edge for edge in self.children.values() if edge.name != "backing"]

    @property
    def allocated_size(self) -> int:
        """The bytes that the image occupies on its storage."""
        return sum(edge.child.allocated_size for edge in self.storage_children)

    @property
    def can_grow(self) -> bool:
        """Whether a write behind the end makes the disk larger."""
        return False

    @property
    def grows_with_zeroes(self) -> bool:
        """Whether what nobody has written yet in a disk that has grown reads as zeroes."""
        return False

    @property
    def cluster_size(self) -> int | None:
        """The bytes of a cluster of the image's format, or None if it has none."""
        return None

    @property
    def dirty(self) -> bool:
        """Whether the image says that it was not closed properly, or is in use."""
        return False

    @property
    def has_info(self) -> bool:
        """Whether the driver can tell more about the image (its "dirty" flag)."""
        return self.file.has_info

    @property
    def encrypted(self) -> bool:
        """Whether the image's data is encrypted by this driver."""
        return False

    def format_specific(self) -> dict[str, Any] | None:
        """ImageInfoSpecific, in QAPI's names, or None."""
        return None

    def driver_statistics(self) -> dict[str, Any] | None:
        """BlockStatsSpecific, in QAPI's names, or None."""
        return None

    # -- requests

    def check_request(self, offset: int, length: int) -> None:
        """Refuse what lies outside the disk.

        :raise OSError: EIO, as a disk that is asked for a sector it has not.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise errno_error(errno.EIO)

    async def pread(self, offset: int, length: int) -> Data:
        """The `length` bytes at `offset`.

        :raise OSError: EIO outside the disk, or what the storage says.
        """
        self.check_request(offset, length)
        alignment = self.request_alignment
        head = offset % alignment
        tail = -(offset + length) % alignment
        if not head and not tail:
            return await self._pread(offset, length)
        data = memoryview(await self._pread(offset - head, head + length + tail))
        return data[head : head + length]

    def read_cached(self, requests: Sequence[Extent], into: memoryview) -> list[bool]:
        """Serve those of several reads that need no waiting.

        It is done in one turn of the event loop, so let it be little together.

        :param requests: any number of reads.
        :param into: receives their data one after the other; it is as long as they are together.
        :returns: of each read whether it was served.  One that was not, be it that it would have
            to wait or that something is wrong with it, is one for `pread`; its part of `into`
            holds anything.
        """
        size, alignment = self.size, self.request_alignment
        for offset, length in requests:
            if offset + length > size or offset % alignment or length % alignment:
                return [False] * len(requests)
        return self._read_cached(requests, into)

    async def pwrite(self, offset: int, data: Data, *, grow: bool = False) -> None:
        """Write `data` at `offset`.

        :param grow: what lies behind the disk's end makes it larger, if its driver can that; the
            caller has the permission to resize it.
        :raise OSError: EIO outside the disk, EPERM on a read-only node, or what the storage says.
        """
        view = memoryview(data).cast("B")
        length = len(view)
        if not (grow and self.can_grow and offset >= 0):
            self.check_request(offset, length)
        self._check_writable()
        if not length:
            return
        detect = self.node_options.detect_zeroes
        if detect != "off" and offset + length <= self.size and _is_zero(view):
            await self.pwrite_zeroes(offset, length, unmap=detect == "unmap")
            return
        alignment = self.request_alignment
        head = offset % alignment
        tail = -(offset + length) % alignment
        start, end = offset - head, offset + length + tail
        async with self._writes.track(start, end, serialising=bool(head or tail)):
            if head or tail:
                padded = bytearray(end - start)
                # What lies behind the end, in a disk that grows, is zeroes.
                if head and start < self.size:
                    padded[:alignment] = memoryview(await self._pread(start, alignment))
                if tail and not (head and end - start == alignment) and end - alignment < self.size:
                    padded[-alignment:] = memoryview(await self._pread(end - alignment, alignment))
                padded[head : head + length] = view
                view = memoryview(padded)
            self._watch_threshold(end)
            await self._pwrite(start, view)
        self.write_highest_offset = max(self.write_highest_offset, offset + length)

    async def pwrite_many(
        self, writes: Sequence[tuple[int, Data]], *, grow: bool = False
    ) -> list[OSError | None]:
        """Write several things, in no particular order: for small ones it costs less than one by one.

        :param writes: offset in bytes and data of each.
        :param grow: as for `pwrite`.
        :returns: what became of each: None, or the error that `pwrite` raises.
        """
        simple = (
            not self.read_only
            and self.node_options.detect_zeroes == "off"
            and not self._writes.any_serialising
        )
        size = MAX_SIZE if grow and self.can_grow else self.size
        alignment = self.request_alignment
        ranges = [(offset, offset + len(data)) for offset, data in writes]
        for start, end in ranges:
            if end > size or start % alignment or end % alignment or start == end:
                simple = False
        if not simple:
            return [await outcome_of(self.pwrite(offset, data, grow=grow)) for offset, data in writes]
        with self._writes.hold(ranges):
            for _, end in ranges:
                self._watch_threshold(end)
            outcomes = await self._pwrite_many(writes)
        for (_, end), failure in zip(ranges, outcomes, strict=True):
            if failure is None and end > self.write_highest_offset:
                self.write_highest_offset = end
        return outcomes

    async def pwrite_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fast: bool = False
    ) -> None:
        """Make `length` bytes at `offset` read as zeroes.

        :param unmap: their space may be given back.
        :param fast: only if it takes less time than writing them.
        :raise OSError: as for `pwrite`; EOPNOTSUPP if it is not `fast`.
        """
        self.check_request(offset, length)
        self._check_writable()
        if not length:
            return
        unmap = unmap and self.node_options.discard == "unmap"
        if offset % self.request_alignment == 0 and length % self.request_alignment == 0:
            try:
                async with self._writes.track(offset, offset + length, serialising=False):
                    self._watch_threshold(offset + length)
                    await self._pwrite_zeroes(offset, length, unmap)
                self.write_highest_offset = max(self.write_highest_offset, offset + length)
                return
            except NotSupported:
                pass
        if fast:
            raise errno_error(errno.EOPNOTSUPP)
        await self._write_out_zeroes(offset, length)

    async def _write_out_zeroes(self, offset: int, length: int) -> None:
        zeroes = memoryview(bytes(min(length, ZERO_PIECE)))
        alignment = self.request_alignment
        while length:
            piece = min(length, ZERO_PIECE)
            head, tail = offset % alignment, -(offset + piece) % alignment
            start, end = offset - head, offset + piece + tail
            async with self._writes.track(start, end, serialising=bool(head or tail)):
                self._watch_threshold(end)
                if head or tail:
                    padded = bytearray(memoryview(await self._pread(start, end - start)))
                    padded[head : head + piece] = zeroes[:piece]
                    await self._pwrite(start, memoryview(padded))
                else:
                    await self._pwrite(start, zeroes[:piece])
            self.write_highest_offset = max(self.write_highest_offset, offset + piece)
            offset += piece
            length -= piece

    async def pdiscard(self, offset: int, length: int) -> None:
        """The data in this range is of no more use; what it reads as afterwards is open.

        :raise OSError: as for `pwrite`.
        """
        self.check_request(offset, length)
        self._check_writable()
        if not length or self.node_options.discard != "unmap":
            return
        # Only whole units of the alignment: what lies at the ends is still in use.
        alignment = self.request_alignment
        start = offset + -offset % alignment
        end = (offset + length) // alignment * alignment
        if start < end:
            try:
                await self._pdiscard(start, end - start)
            except NotSupported:
                pass

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """What is known about the bytes from `offset` on.

        :param length: how far to look, in bytes; at least 1.
        :returns: a run of at least 1 and at most `length` bytes.
        :raise OSError: as for `pread`.
        """
        self.check_request(offset, length)
        status = await self._block_status(offset, length)
        if status.depth or not self.supports_backing:
            return status
        if self.backing is None:
            return replace(status, data=False, zero=True)
        available = self.backing.size - offset
        if available <= 0:
            # Behind the end of a short backing image are zeroes, as if they were its own.
            return replace(status, data=False, zero=True, depth=2)
        below = await self.backing.block_status(offset, min(status.length, available))
        return replace(below, depth=below.depth + 1 if below.depth else 0)

    async def pread_backing(self, offset: int, length: int) -> Data:
        """What the backing image has at `offset`: zeroes behind its end, and if there is none.

        :raise OSError: what its storage says.
        """
        available = 0 if self.backing is None else max(0, min(length, self.backing.size - offset))
        if self.backing is None or not available:
            return bytes(length)
        data = await self.backing.pread(offset, available)
        return data if available == length else bytes(data).ljust(length, b"\0")

    async def flush(self) -> None:
        """What was written before is on stable storage afterwards.

        :raise OSError: what the storage says.
        """
        if not self.node_options.no_flush:
            await self._flush()

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        """Change the disk's size to `size` bytes; what is new reads as zeroes.

        :raise Error: if the node is read-only or its driver can't.
        """
        if self.read_only:
            raise Error("Image is read-only")
        # Two at a time could leave the node with one size and its storage with the other.
        async with self._resizing:
            await self._truncate(size, preallocation)

    def _watch_threshold(self, end: int) -> None:
        if 0 < self.write_threshold < end:
            threshold, self.write_threshold = self.write_threshold, 0
            self.graph.report_threshold(self, threshold, end)

    def _check_writable(self) -> None:
        if self.read_only:
            raise errno_error(errno.EPERM)

    # -- for drivers to override

    @abstractmethod
    async def _pread(self, offset: int, length: int) -> Data:
        """Read; the request is inside the disk and aligned."""

    @abstractmethod
    async def _pwrite(self, offset: int, data: memoryview) -> None:
        """Write; the request is inside the disk and aligned."""

    def _read_cached(self, requests: Sequence[Extent], into: memoryview) -> list[bool]:
        """Serve what needs no waiting; the requests are inside the disk and aligned."""
        return [False] * len(requests)

    async def _pwrite_many(self, writes: Sequence[tuple[int, Data]]) -> list[OSError | None]:
        """Write; the requests are inside the disk, aligned and not empty."""
        return [await outcome_of(self._pwrite(offset, memoryview(data).cast("B"))) for offset, data in writes]

    async def _pwrite_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        raise NotSupported

    async def _pdiscard(self, offset: int, length: int) -> None:
        raise NotSupported

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        return BlockStatus(length)

    async def _flush(self) -> None:
        for edge in self.storage_children:
            await edge.child.flush()

    async def _truncate(self, size: int, preallocation: str) -> None:
        raise Error("Image format driver does not support resize")


async def outcome_of(request: Awaitable[None]) -> OSError | None:
    """What became of a request."""
    try:
        await request
    except OSError as error:
        return error
    return None


def _is_zero(view: memoryview) -> bool:
    """Whether all bytes are zero; looks at the ends first, for most data differ there."""
    if view[0] or view[-1]:
        return False
    return view.tobytes().count(0) == len(view)
