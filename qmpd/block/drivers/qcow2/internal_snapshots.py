"""Snapshots inside an image: made, deleted, and known to the overlap checks.

A snapshot is a copy of the L1 table, and an entry in the snapshot table.  What the copy leads to has
one user more, so the copied flags in the active tables go: whoever writes there from now on copies first.
Deleting one is the reverse.

The one write that makes or deletes a snapshot is that of the header's snapshot fields, which are in
one sector.  Before it, with barriers between, come the counts that it needs, the flags and the new tables;
what it makes superfluous is given up after it.  So a crash leaves leaks at worst (and entries
without a copied flag that could have one, which costs a copy).

Nobody else uses the image meanwhile.

Source: qcow2 specification, section "Snapshots"; the order of writes is ours.
"""

from __future__ import annotations

import errno
from array import array
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qmpd.block.drivers.qcow2 import mapping
from qmpd.block.drivers.qcow2.header import MAX_L1_BYTES, MAX_SNAPSHOTS, SNAPSHOTS_POSITION
from qmpd.block.drivers.qcow2.metadata import Metadata
from qmpd.block.drivers.qcow2.snapshots import (
    MAX_NAME_BYTES,
    MAX_TABLE_BYTES,
    Snapshot,
    build_table,
    parse_table,
)
from qmpd.block.node import errno_error
from qmpd.errors import Error

#: The table is read in pieces of so many bytes.
_TABLE_PIECE = 64 << 10

_COPIED = np.uint64(mapping.COPIED)
_COMPRESSED = np.uint64(mapping.COMPRESSED)
_OFFSET = np.uint64(mapping.OFFSET)
_ZERO = np.uint64(0)


class _UndecidedError(OSError):
    """Nobody knows which of two snapshot tables the header on the storage names."""


class InternalSnapshots:
    """The snapshots of an open image, in the order of its table."""

    def __init__(self) -> None:
        self.entries: list[Snapshot] = []
        #: Bytes of the table in the file.
        self.table_bytes = 0

    async def load(self, meta: Metadata) -> None:
        """Read the table.

        :raise Error: if it makes no sense.
        :raise OSError: what the storage says.
        """
        header = meta.header
        data = bytearray()
        while header.snapshot_count:
            try:
                self.entries, self.table_bytes = parse_table(data, header.snapshot_count)
                break
            except Error:
                # The table does not say how long it is.
                position = header.snapshots_offset + len(data)
                if len(data) >= MAX_TABLE_BYTES or (data and position >= meta.file.size):
                    raise
                data += await meta.read(position, max(_TABLE_PIECE, len(data)))
        await self.note_places(meta)

    async def note_places(self, meta: Metadata) -> None:
        """Say where the table and what it leads to are, as far as the overlap checks want to know."""
        l1_clusters: set[int] = set()
        l2_clusters: set[int] = set()
        for snapshot in self.entries:
            if not _is_sound(meta, snapshot):
                continue  # It can't be gone back to; it harms nobody as long as it is not.
            length = snapshot.l1_entries * 8
            l1_clusters.update(_clusters_at(meta, snapshot.l1_offset, length))
            if meta.map.wants("inactive-l2"):
                for entry in mapping.parse_table(await meta.read(snapshot.l1_offset, length)):
                    l2_clusters.add((entry & mapping.OFFSET) // meta.cluster_bytes)
        table = _clusters_at(meta, meta.header.snapshots_offset, self.table_bytes)
        meta.map.set("snapshot-table", table)
        meta.map.set("inactive-l1", l1_clusters)
        meta.map.set("inactive-l2", l2_clusters - {0})

    async def create(self, meta: Metadata, name: str, now: float, disk_size: int) -> Snapshot:
        """Keep what the disk holds.

        :param now: seconds since 1970; a machine's clock is not known, and said to be the same.
        :param disk_size: bytes.
        :raise OSError: EINVAL if a cluster has as many users as can be counted, EFBIG if there are
            too many snapshots, or what the storage says; nothing has changed then.
        """
        if len(self.entries) >= MAX_SNAPSHOTS:
            raise errno_error(errno.EFBIG)
        await meta.settle()
        words = array("Q", [word & ~mapping.COPIED for word in meta.l1.words])
        place = await _take(meta, len(words) * 8)
        try:
            await _count_all(meta, words, 1)
        except BaseException:
            meta.free(place, len(words) * 8)
            raise
        clock = int(now * 1_000_000) * 1000
        snapshot = Snapshot(
            id=str(max((int(s.id) for s in self.entries if s.id.isdecimal()), default=0) + 1),
            name=name.encode(errors="surrogateescape")[:MAX_NAME_BYTES].decode(errors="surrogateescape"),
            l1_offset=place,
            l1_entries=len(words),
            seconds=clock // 1_000_000_000,
            nanoseconds=clock % 1_000_000_000,
            guest_clock=clock,
            disk_size=disk_size,
        )
        try:
            await _set_copied_flags(meta)
            await meta.commit(refcounts_too=True)
            await _write_table(meta, place, mapping.build_table(words))
            await self._replace(meta, [*self.entries, snapshot])
        except _UndecidedError:
            raise
        except BaseException:
            await _count_all(meta, words, -1)
            meta.free(place, len(words) * 8)
            await _set_copied_flags(meta)
            raise
        return snapshot

    async def delete(self, meta: Metadata, snapshot_id: str) -> None:
        """Forget a snapshot, and give up what only it has.

        :raise OSError: EINVAL if its tables make no sense, or what the storage says.
        """
        await meta.settle()
        snapshot = next(entry for entry in self.entries if entry.id == snapshot_id)
        if not _is_sound(meta, snapshot):
            raise errno_error(errno.EINVAL)
        length = snapshot.l1_entries * 8
        words = mapping.parse_table(await meta.read(snapshot.l1_offset, length))
        for table in _tables(meta, words):
            await _clusters_of(meta, table)  # What can't be read is found before anything is changed.
        await self._replace(meta, [entry for entry in self.entries if entry is not snapshot])
        await _count_all(meta, words, -1, discard=meta.settings.pass_snapshot)
        meta.free(snapshot.l1_offset, length, discard=meta.settings.pass_snapshot)
        await _set_copied_flags(meta)
        await meta.settle()

    async def complete(self, meta: Metadata) -> None:
        """Let each entry say how large its disk was, as version 3 wants it; nobody else uses the image.

        :raise OSError: what the storage says; nothing has changed then.
        """
        size = meta.header.size
        await self._replace(
            meta,
            [replace(entry, disk_size=entry.disk_size or size) for entry in self.entries],
        )

    async def _replace(self, meta: Metadata, entries: list[Snapshot]) -> None:
        """Write another table, and let the header name it."""
        header = meta.header
        data = build_table(entries, header.size)
        if len(data) > MAX_TABLE_BYTES:
            raise errno_error(errno.EFBIG)
        place = await _take(meta, len(data))
        try:
            await meta.commit(refcounts_too=True)
            await _write_table(meta, place, data)
            await meta.file.flush()
            await _write_fields(meta, len(entries), place, header.snapshot_count, header.snapshots_offset)
        except _UndecidedError:
            raise
        except BaseException:
            meta.free(place, len(data))
            raise
        old_offset, old_bytes = header.snapshots_offset, self.table_bytes
        header.snapshot_count, header.snapshots_offset = len(entries), place
        self.entries, self.table_bytes = entries, len(data)
        await self.note_places(meta)
        meta.free(old_offset, old_bytes)


async def _write_fields(meta: Metadata, count: int, offset: int, old_count: int, old_offset: int) -> None:
    """Write the header's snapshot fields, or see that the old ones are still there.

    :raise _UndecidedError: if it is not known which are there.
    """
    try:
        await meta.file.pwrite(SNAPSHOTS_POSITION, count.to_bytes(4, "big") + offset.to_bytes(8, "big"))
        await meta.file.flush()
    except BaseException as error:
        old = old_count.to_bytes(4, "big") + old_offset.to_bytes(8, "big")
        try:
            await meta.file.pwrite(SNAPSHOTS_POSITION, old)
            await meta.file.flush()
        except OSError as again:
            raise _UndecidedError(again.errno, again.strerror) from error
        raise


async def _take(meta: Metadata, length: int) -> int:
    """A place for a table of so many bytes; 0 if it is empty."""
    if not length:
        return 0
    async with meta.allocating:
        return await meta.take_in_one_piece(-(-length // meta.cluster_bytes))


async def _write_table(meta: Metadata, place: int, data: bytes) -> None:
    if data:
        padded = data.ljust(-(-len(data) // meta.cluster_bytes) * meta.cluster_bytes, b"\0")
        await meta.file.pwrite(place, padded, grow=True)


def _clusters_at(meta: Metadata, offset: int, length: int) -> range:
    """The numbers of the clusters that these bytes touch."""
    return range(offset // meta.cluster_bytes, -(-(offset + length) // meta.cluster_bytes))


def _is_sound(meta: Metadata, snapshot: Snapshot) -> bool:
    """Whether a snapshot's L1 table can be where it is said to be."""
    return snapshot.l1_entries * 8 <= MAX_L1_BYTES and snapshot.l1_offset % meta.cluster_bytes == 0


def _tables(meta: Metadata, words: array[int]) -> list[int]:
    """The offsets of the L2 tables that an L1 table leads to.

    :raise OSError: EIO if one can't be where it is said to be.
    """
    offsets = [word & mapping.OFFSET for word in words if word & mapping.OFFSET]
    if any(offset % meta.cluster_bytes for offset in offsets):
        raise errno_error(errno.EIO)
    return offsets


async def _clusters_of(meta: Metadata, table: int) -> NDArray[np.uint64]:
    """The numbers of an L2 table's own cluster and of all that it leads to, as often as it does.

    :raise OSError: EIO if an entry makes no sense, or what the storage says.
    """
    words = mapping.parse_table(await meta.read(table, meta.cluster_bytes))
    entries = np.frombuffer(words, np.uint64)[:: meta.entry_words]
    bits = meta.header.cluster_bits
    compressed = (entries & _COMPRESSED) != _ZERO
    places = entries[~compressed] & _OFFSET
    if (places % np.uint64(meta.cluster_bytes)).any():
        raise errno_error(errno.EIO)
    parts = [np.array([table >> bits], np.uint64), places[places != _ZERO] >> np.uint64(bits)]
    if compressed.any():
        first, last = mapping.compressed_clusters(entries[compressed], bits)
        while len(first):
            parts.append(first)
            more = first < last
            first, last = first[more] + np.uint64(1), last[more]
    return np.concatenate(parts)


async def _count_all(meta: Metadata, words: array[int], change: int, *, discard: bool = False) -> None:
    """All that an L1 table leads to has one user more or less.

    :raise OSError: as `Metadata.change_counts`, or what the storage says; nothing has changed then.
    """
    done: list[int] = []
    async with meta.allocating:
        try:
            for table in _tables(meta, words):
                await meta.change_counts(await _clusters_of(meta, table), change, discard=discard)
                done.append(table)
        except BaseException:
            for table in done:
                await meta.change_counts(await _clusters_of(meta, table), -change)
            raise


async def _set_copied_flags(meta: Metadata) -> None:
    """Let the active tables' copied flags say what the counts say."""
    for l1_index, word in enumerate(meta.l1.words):
        table = word & mapping.OFFSET
        if not table:
            continue
        alone = await meta.refcount(table // meta.cluster_bytes) == 1
        wanted = table | mapping.COPIED if alone else table
        if wanted != word:
            meta.l1.set(l1_index, wanted)
        first = l1_index * meta.header.l2_entries
        for cluster in range(first, first + meta.header.l2_entries, meta.slice_entries):
            await _set_flags_in_slice(meta, cluster, alone)


async def _set_flags_in_slice(meta: Metadata, cluster: int, alone: bool) -> None:
    piece = await meta.slice_for(cluster)
    assert piece is not None, "the L1 table has an entry for it"
    entries = np.frombuffer(piece.words, np.uint64)[:: meta.entry_words]
    places = entries & _OFFSET
    placed = ((entries & _COMPRESSED) == _ZERO) & (places != _ZERO)
    own = np.zeros(len(entries), np.bool_)
    if alone and placed.any():
        own[placed] = await meta.counts_of(places[placed] // np.uint64(meta.cluster_bytes)) == 1
    flags = np.where(own, _COPIED, _ZERO)
    wanted = np.where(placed, (entries & ~_COPIED) | flags, entries)
    changed = np.flatnonzero(wanted != entries)
    if len(changed):
        entries[changed] = wanted[changed]
        piece.mark(int(changed[0]) * meta.entry_words, (int(changed[-1]) + 1) * meta.entry_words)
