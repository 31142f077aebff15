"""`blockdev-amend` for qcow2: an image in use becomes another version, another size, counts otherwise.

What is asked for is a *target*: the header as it is to be.  `target_for` refuses what can't be, in
QEMU's words and order, before anything is written.  Then the image is made ready for the new header, in
ways that change nothing for anybody (`refcount_width`, `zero_clusters`), and one write of the header's first
sector makes it the image's: version, refcount structure, lazy refcounts, names.  A size is another matter,
for tables change with it; it comes where it can be undone, or last, and then the header is what is undone.

So a crash leaves an image with the old values or the new ones, and leaks at worst.

Where the header is longer than a sector, what is behind the first is written before, in places that the
old header does not use (`header_writes`).

Source: qcow2 specification, section "Header"; the order of writes is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qmpd.block.backend import Backend
from qmpd.block.change import Change
from qmpd.block.drivers.qcow2 import refcount_width, zero_clusters
from qmpd.block.drivers.qcow2.bitmaps import clusters_of
from qmpd.block.drivers.qcow2.header import (
    FULL_BYTES,
    MAX_BACKING_NAME,
    MAX_L1_BYTES,
    MAX_REFCOUNT_ORDER,
    MAX_SIZE,
    MIN_CLUSTER_FOR_NAMES,
    V2_BYTES,
    Autoclear,
    Compatible,
    Compression,
    ExtensionType,
    Header,
    Incompatible,
    feature_name_table,
)
from qmpd.block.drivers.qcow2.metadata import Metadata
from qmpd.block.drivers.qcow2.settings import Settings
from qmpd.block.graph import check_unused_as_backing
from qmpd.block.node import SECTOR
from qmpd.block.permissions import Permission
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.driver import Qcow2Node
    from qmpd.block.drivers.qcow2.snapshots import Snapshot

_Options = Mapping[str, Any]

#: What an option of its own asks for; "encrypt" is about keyslots.
OPTIONS: Final = frozenset(
    {
        "backing-file",
        "backing-fmt",
        "data-file",
        "data-file-raw",
        "lazy-refcounts",
        "refcount-bits",
        "size",
        "version",
    }
)

_V2_REFCOUNT_ORDER: Final = 4
_NEWER: Final = "compatibility level 1.1 {}above (use compat=1.1 or greater)"
_NO_ROOM: Final = "Failed to update the image header: No space left on device"


# -- what is to be


class _Wanted:
    """The options, with what the image has where nothing is asked for."""

    def __init__(self, options: _Options, header: Header) -> None:
        self.options = options
        self.header = header
        self.version = {"v2": 2, "v3": 3}[options["version"]] if "version" in options else header.version
        self.refcount_bits: int = options.get("refcount-bits", 1 << header.refcount_order)
        lazy = bool(header.compatible & Compatible.LAZY_REFCOUNTS)
        self.lazy_before = lazy
        self.lazy: bool = options.get("lazy-refcounts", lazy)
        # QMP takes a negative number for an unsigned one; 0 is none, as for qemu-img.
        self.size: int = options.get("size", 0) % (1 << 64) or header.size

    @property
    def older(self) -> bool:
        """Whether a version without the present one's features is wanted."""
        return self.version < self.header.version


def check_size(size: int, header: Header, *, version: int, snapshots: bool) -> None:
    """See that a disk can get a size.

    :param size: bytes.
    :param version: of the format.
    :raise Error: in QEMU's words.
    """
    if size % SECTOR:
        raise Error("The new size must be a multiple of 512")
    if size > MAX_SIZE:
        raise Error(f"offset({size}) exceeds maximum({MAX_SIZE})")
    if snapshots and version < 3:
        raise Error("Can't resize a v2 image which has snapshots")
    if header.l1_entries_for(size) * 8 > MAX_L1_BYTES:
        raise Error("Failed to grow the L1 table: File too large")


def _check_before_width(wanted: _Wanted) -> None:
    """The refusals that come before the counts are looked at."""
    options, header = wanted.options, wanted.header
    if "data-file" in options and not header.external_data:
        raise Error("data-file can only be set for images that use an external data file")
    if options.get("data-file-raw", False) and not header.raw_external_data:
        raise Error("data-file-raw cannot be set on existing images")
    bits = wanted.refcount_bits
    if bits <= 0 or bits & bits - 1 or bits > 1 << MAX_REFCOUNT_ORDER:
        raise Error("Refcount width must be a power of two and may not exceed 64 bits")
    changes = bits != 1 << header.refcount_order
    if changes and wanted.version < 3 and bits != 1 << _V2_REFCOUNT_ORDER:
        raise Error(f"Refcount widths other than 16 bits require {_NEWER.format('or ')}")


def _check_after_width(wanted: _Wanted, snapshots: list[Snapshot], *, force: bool) -> None:
    """The refusals that come after that."""
    options, header = wanted.options, wanted.header
    if not force and ("backing-file" in options or "backing-fmt" in options):
        named = header.backing_name
        before = (None if named is None else named.decode(errors="surrogateescape"), header.backing_format)
        if (options.get("backing-file"), options.get("backing-fmt")) != before:
            raise Error("Cannot amend the backing file")
    if wanted.lazy and not wanted.lazy_before and wanted.version < 3:
        raise Error(f"Lazy refcounts only supported with {_NEWER.format('and ')}")
    if wanted.size != header.size:
        version = max(wanted.version, header.version)
        check_size(wanted.size, header, version=version, snapshots=bool(snapshots))
    if wanted.older:
        _check_older(wanted, snapshots)


def _check_older(wanted: _Wanted, snapshots: list[Snapshot]) -> None:
    header = wanted.header
    if wanted.refcount_bits != 1 << _V2_REFCOUNT_ORDER:
        raise Error("compat=0.10 requires refcount_bits=16")
    if header.external_data:
        raise Error("Cannot downgrade an image with a data file")
    if any(snapshot.disk_size not in (None, wanted.size) for snapshot in snapshots) or any(
        snapshot.vm_state_bytes >> 32 for snapshot in snapshots
    ):
        raise Error("Internal snapshots prevent downgrade of image")
    features = header.incompatible & ~(Incompatible.DIRTY | Incompatible.COMPRESSION)
    if features:
        raise Error(f"Cannot downgrade an image with incompatible features {int(features):#x} set")


def _target(wanted: _Wanted, *, force: bool) -> Header:
    """The header to be, but for its size and the place of its tables.

    :raise Error: if there is no room for what it is to hold.
    """
    options, header = wanted.options, wanted.header
    target = header.copy()
    target.refcount_order = wanted.refcount_bits.bit_length() - 1
    target.compatible &= ~int(Compatible.LAZY_REFCOUNTS)
    if wanted.lazy:
        target.compatible |= int(Compatible.LAZY_REFCOUNTS)
    if not options.get("data-file-raw", True):
        target.autoclear &= ~int(Autoclear.DATA_FILE_RAW)
    if "data-file" in options:
        name = options["data-file"].encode(errors="surrogateescape")
        target.set_extension(ExtensionType.DATA_FILE, name or None)
    if force:
        _set_backing(target, options)
    if wanted.version != header.version:
        _set_version(target, wanted.version)
    try:
        target.build()
    except Error:
        raise Error(_NO_ROOM) from None
    return target


def _set_backing(target: Header, options: _Options) -> None:
    if "backing-file" in options:
        target.backing_name = options["backing-file"].encode(errors="surrogateescape") or None
        if target.backing_name is None:
            target.set_extension(ExtensionType.BACKING_FORMAT, None)
    if "backing-fmt" in options:
        target.set_extension(ExtensionType.BACKING_FORMAT, options["backing-fmt"].encode())
    name = target.backing_name
    if name is None and target.backing_format is not None:
        raise Error("Backing format cannot be used without backing file")
    if name is not None and target.raw_external_data:
        raise Error("Backing file and data-file-raw cannot be used at the same time")
    if name is not None and len(name) > MAX_BACKING_NAME:
        raise Error("Backing file name too long")


def _set_version(target: Header, version: int) -> None:
    target.version = version
    target.set_extension(ExtensionType.FEATURE_NAMES, None)
    if version < 3:
        # Their bitmaps would be taken for out of date by everybody.
        target.set_extension(ExtensionType.BITMAPS, None)
        target.incompatible = target.compatible = target.autoclear = 0
        target.compression = Compression.ZLIB
        target.unknown_fields = b""
        target.length = V2_BYTES
        return
    target.length = FULL_BYTES
    if target.cluster_bytes >= MIN_CLUSTER_FOR_NAMES:
        without_names = list(target.extensions)
        target.extensions.append(feature_name_table())
        try:
            target.build()
        except Error:
            target.extensions = without_names  # A long backing file name is worth more.


# -- the header's write


def header_writes(area: bytes, target: Header) -> tuple[list[tuple[int, bytes]], bytes]:
    """How a header is replaced.

    :param area: the image's first cluster.
    :returns: what is to be written, and be on stable storage, before (offset and data of each), and
        the bytes from offset 0 on that are to be written then: one sector, unless there is no other way.
    :raise Error: if the new header does not fit into its cluster.
    """
    used = Header.bytes_in_use(area)
    behind = -(-max(part.stop for part in used) // SECTOR) * SECTOR
    for name_offset in (0, SECTOR, behind):
        try:
            data = target.build(name_offset=name_offset)
        except Error:
            if not name_offset:
                raise
            continue
        # What is not needed stays as it is, for the old header may need it.
        head, name = Header.bytes_in_use(data.ljust(len(area), b"\0"))
        if name:
            data = data[: head.stop] + area[head.stop : name.start] + data[name.start :]
        data += area[len(data) :]
        differing = np.flatnonzero(np.frombuffer(data, np.uint8) != np.frombuffer(area, np.uint8))
        differing = differing[differing >= SECTOR]
        if not any(((differing >= part.start) & (differing < part.stop)).any() for part in used):
            sectors = np.unique(differing // SECTOR) * SECTOR
            before = [(start, data[start : start + SECTOR]) for start in sectors.tolist()]
            return before, data[:SECTOR]
    # Two headers whose extensions take more than a sector, and not the same.
    data = target.build()
    return [], data + area[len(data) : -(-len(data) // SECTOR) * SECTOR]


async def _write_header(meta: Metadata, target: Header) -> None:
    """Let the storage have another header.

    :raise OSError: what the storage says; it has the old one then.
    """
    area = bytes(await meta.read(0, meta.cluster_bytes))
    before, first = header_writes(area, target)
    for offset, data in before:
        await meta.file.pwrite(offset, data)
    # All that the new header relies on.
    await meta.file.flush()
    await meta.change_header(0, first, area[: len(first)])
    meta.header.become(target)


# -- the work


class _Count:
    """How much is done, in tables and blocks that have been looked at or written."""

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self._tell = tell
        self._done = 0
        self._total = 1

    def expect(self, more: int) -> None:
        """There is so much more to do."""
        self._total += more
        self._tell(self._done, self._total)

    def step(self, done: int = 1, more: int = 0) -> None:
        """So much is done, and `more` has come to it that was not expected."""
        self._done += done
        self.expect(more)


async def amend(
    node: Qcow2Node,
    options: _Options,
    *,
    force: bool,
    progress: Callable[[int, int], None],
    commit: Callable[[], None],
) -> None:
    """Change an image in use.

    :param options: BlockdevAmendOptionsQcow2; "encrypt" is left alone.
    :param force: whatever the backing image's name is to be, for that may change the disk's contents.
    :param progress: is told how much is done, and of how much.
    :param commit: is called where there is no way back; the caller does not cancel from then on.
    :raise Error: what is wrong, in QEMU's words; then nothing has changed.
    :raise OSError: what the storage says; so here.
    """
    await _Amendment(node, options, force, _Count(progress), commit).run()


async def check(node: Qcow2Node, options: _Options, *, force: bool) -> Header:
    """The header to be.

    :raise Error: if it can't be.
    """
    if node.read_only:
        raise Error("Block node is read-only")
    meta = node.tables
    snapshots = node.snapshot_entries
    wanted = _Wanted(options, meta.header)
    _check_before_width(wanted)
    if wanted.refcount_bits < 1 << meta.header.refcount_order:
        await refcount_width.check_width(meta, wanted.refcount_bits.bit_length() - 1)
    _check_after_width(wanted, snapshots, force=force)
    target = _target(wanted, force=force)
    target.size = wanted.size
    if wanted.older:
        # The node's own options may ask for what the version has not.
        Settings.parse(node.options, target, unmap=node.node_options.discard == "unmap")
        if meta.header.compression is not Compression.ZLIB and await zero_clusters.any_compressed(
            meta, snapshots
        ):
            raise Error(
                f"Cannot downgrade an image with {meta.header.compression.name.lower()} compression type and "
                "existing compressed clusters"
            )
    return target


class _Amendment:
    """One amendment, from the options to the end."""

    def __init__(
        self,
        node: Qcow2Node,
        options: _Options,
        force: bool,
        count: _Count,
        commit: Callable[[], None],
    ) -> None:
        self._node = node
        self._options = options
        self._force = force
        self._count = count
        self._commit = commit
        #: Offset and length of what nobody needs after the change.
        self._superfluous: list[tuple[int, int]] = []

    async def run(self) -> None:
        """Check, make ready, and change."""
        node = self._node
        try:
            with Backend(node.graph, perm=Permission.nothing()).use(node) as own:
                target = await own.run(self._check)
                older = target.version < node.tables.header.version
                node.zero_flags_wanted = not older
                if older and self._backed:
                    await self._place_zero_clusters(own)
            async with AsyncExitStack() as stack:
                graph_change = await stack.enter_async_context(node.graph.change())
                resized = target.size != node.tables.header.size
                if resized:
                    check_unused_as_backing(node)
                    stack.enter_context(Backend(node.graph, perm=Permission.RESIZE).use(node))
                if older or resized:
                    await graph_change.hold(node.graph.drained(*node.graph.subtree(node)))
                # Only now, for a request that is waited for may be one for another size.
                await stack.enter_async_context(node.resizing)
                # It has had time to become something else.
                target = await self._check()
                if not resized and target.size != node.tables.header.size:
                    raise Error("The disk has been given another size meanwhile")
                change = await stack.enter_async_context(Change())
                await self._carry_out(target, change)
        finally:
            node.zero_flags_wanted = True
        self._count.step()

    async def _check(self) -> Header:
        return await check(self._node, self._options, force=self._force)

    @property
    def _backed(self) -> bool:
        """Whether what is not allocated may not read as zeroes."""
        return self._node.backing is not None or self._node.tables.header.backing_name is not None

    async def _place_zero_clusters(self, own: Backend) -> None:
        """Give the disk's zero clusters places while requests go on; there come no new ones.

        :param own: for requests that others can wait for.
        """
        meta = self._node.tables
        entries = meta.header.l2_entries
        numbers = [index for index, word in enumerate(meta.l1.words) if word]
        self._count.expect(len(numbers))
        for index in numbers:
            for first in range(index * entries, (index + 1) * entries, meta.slice_entries):
                while await own.run(partial(self._node.place_zero_clusters, first, zero_clusters.PIECE)):
                    pass
            self._count.step()

    async def _carry_out(self, target: Header, change: Change) -> None:
        node = self._node
        old = node.tables.header.copy()
        snapshots = node.snapshot_entries
        if target == old:
            return
        older = target.version < old.version
        # Cutting something off can't be undone, so it comes last; but a version 2 image with snapshots has
        # one size for ever.
        grows = target.size > old.size
        resized_first = older if snapshots and min(target.version, old.version) < 3 else grows
        if older:
            await self._remove_zero_clusters()
        if target.size != old.size and resized_first:
            self._commit()
            if grows:
                change.on_failure(node.resize, old.size)
            await node.resize(target.size)
        if target.version > old.version and any(entry.disk_size is None for entry in snapshots):
            self._commit()
            await node.complete_snapshot_table()
        await self._switch(target)
        if target.size != old.size and not resized_first:
            change.on_failure(self._switch, old)
            await node.resize(target.size)
        for offset, length in self._superfluous:
            node.tables.free(offset, length)
        try:
            await node.tables.commit()
        except OSError:
            pass  # It will be tried again; until then there is something that nobody uses.

    async def _remove_zero_clusters(self) -> None:
        """Nothing is under way."""
        node, meta = self._node, self._node.tables
        await meta.settle()
        tables = await zero_clusters.all_tables(meta, node.snapshot_entries)
        self._count.expect(len(tables))
        await zero_clusters.remove(
            meta,
            node.snapshot_entries,
            backed=self._backed,
            write=node.write_to_place,
            progress=self._count.step,
        )

    async def _switch(self, target: Header) -> None:
        """Let the image have another header, except for its size."""
        node, meta = self._node, self._node.tables
        lazy = node.options.get("lazy-refcounts", bool(target.compatible & Compatible.LAZY_REFCOUNTS))
        if meta.lazy and not lazy:
            self._commit()
            # If all fails after this the node does without until it is opened again.
            await node.stop_being_lazy()
        if target.version < 3 and meta.header.bitmaps is not None:
            self._superfluous = await clusters_of(meta.read, meta.header.bitmaps, meta.cluster_bytes)
        renamed = target.backing_name, target.backing_format
        renamed_from = meta.header.backing_name, meta.header.backing_format
        if target.refcount_order == meta.header.refcount_order:
            self._commit()
            async with meta.allocating:
                await _write_header(meta, _with_places_of(target, meta.header, lazy=lazy))
        else:
            await self._change_width(target, lazy=lazy)
        if renamed != renamed_from:
            node.name_backing()
        if lazy:
            node.be_lazy()

    async def _change_width(self, target: Header, *, lazy: bool) -> None:
        meta = self._node.tables
        self._count.expect(sum(1 for word in meta.table.words if word))
        async with meta.unchanging_counts():
            made = await refcount_width.build(meta, target.refcount_order, self._count.step)
            self._commit()
            new = _with_places_of(target, meta.header, lazy=lazy)
            new.refcount_table_offset = made.table_offset
            new.refcount_table_clusters = made.table_clusters
            await _write_header(meta, new)
            meta.use_refcounts(made.order, made.table_offset, made.table(), made.end * meta.cluster_bytes)


def _with_places_of(target: Header, now: Header, *, lazy: bool) -> Header:
    """A header that says what `target` says, of tables that are where they are now.

    :param lazy: refcounts will be postponed from then on, those that wait to be written included.
    """
    new = target.copy()
    new.size = now.size
    for name in (
        "l1_entries",
        "l1_offset",
        "refcount_table_offset",
        "refcount_table_clusters",
        "snapshot_count",
        "snapshots_offset",
    ):
        setattr(new, name, getattr(now, name))
    passing = int(Incompatible.DIRTY | Incompatible.CORRUPT)
    if new.version >= 3:
        new.incompatible = new.incompatible & ~passing | now.incompatible & passing
        if lazy:
            new.incompatible |= int(Incompatible.DIRTY)
    return new
