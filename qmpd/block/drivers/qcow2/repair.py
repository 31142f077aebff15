"""Making the reference counts anew, from what the tables use.

An image with lazy refcounts that was not closed has counts that can't be relied on; whoever wants to
write it counts first.  Everything that points at clusters is visited once: the header, the L1 and L2
tables of the disk and of its snapshots, the refcount table and its blocks, the snapshot table, the
bitmaps.  Memory is a number for each cluster of the file.

Source: qcow2 specification, sections "Host cluster management" and "Consistency".
"""

from __future__ import annotations

import errno
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qmpd.block.drivers.qcow2 import mapping, refcounts
from qmpd.block.drivers.qcow2.bitmaps import clusters_of
from qmpd.block.drivers.qcow2.header import MAX_L1_BYTES, Bitmaps
from qmpd.block.drivers.qcow2.metadata import Metadata
from qmpd.block.drivers.qcow2.snapshots import Snapshot
from qmpd.block.node import errno_error

#: An image file with more clusters than this is not counted: it is a sparse file made to be large.
MAX_CLUSTERS: Final = 1 << 28


class _Uses:
    """How often each cluster of the file is used."""

    def __init__(self, meta: Metadata) -> None:
        self.meta = meta
        self.cluster = meta.cluster_bytes
        clusters = -(-meta.file.size // self.cluster)
        if clusters > MAX_CLUSTERS:
            raise errno_error(errno.EFBIG)
        self.counts: NDArray[np.uint32] = np.zeros(clusters, np.uint32)

    def add(self, offset: int, length: int) -> None:
        """These bytes are used."""
        if length > 0:
            self.counts[offset // self.cluster : -(-(offset + length) // self.cluster)] += 1

    def add_all(self, offsets: NDArray[np.uint64]) -> None:
        """Clusters at these offsets are used; what makes no sense is left out."""
        cluster = np.uint64(self.cluster)
        numbers = (offsets[(offsets != 0) & (offsets % cluster == 0)] // cluster).astype(np.int64)
        numbers = numbers[numbers < len(self.counts)]
        np.add.at(self.counts, numbers, 1)

    async def add_l1(self, offset: int, entries: int) -> None:
        """An L1 table with all that it leads to."""
        length = entries * 8
        if length > MAX_L1_BYTES or offset % self.cluster:
            return
        self.add(offset, length)
        words = mapping.parse_table(await self.meta.read(offset, length))
        l2_offsets = np.frombuffer(words, np.uint64) & np.uint64(mapping.OFFSET)
        self.add_all(l2_offsets)
        for l2_offset in l2_offsets[l2_offsets != 0].tolist():
            if l2_offset % self.cluster == 0 and l2_offset < self.meta.file.size:
                await self.add_l2(l2_offset)

    async def add_l2(self, offset: int) -> None:
        """What an L2 table leads to."""
        words = mapping.parse_table(await self.meta.read(offset, self.cluster))
        entries = np.frombuffer(words, np.uint64)[:: self.meta.entry_words]
        compressed = (entries & np.uint64(mapping.COMPRESSED)) != 0
        if not self.meta.external:
            self.add_all(entries[~compressed] & np.uint64(mapping.OFFSET))
        for entry in entries[compressed].tolist():
            self.add(*mapping.compressed_place(entry, self.meta.header.cluster_bits))


async def _used(meta: Metadata, snapshots: list[Snapshot], table_bytes: int) -> NDArray[np.uint32]:
    header = meta.header
    uses = _Uses(meta)
    uses.add(0, 1)
    await uses.add_l1(header.l1_offset, header.l1_entries)
    for snapshot in snapshots:
        await uses.add_l1(snapshot.l1_offset, snapshot.l1_entries)
    uses.add(header.snapshots_offset, table_bytes)
    uses.add(header.refcount_table_offset, header.refcount_table_clusters * uses.cluster)
    table = np.frombuffer(meta.table.words, np.uint64) & np.uint64(refcounts.TABLE_OFFSET)
    uses.add_all(table)
    if header.crypto is not None:
        uses.add(header.crypto.offset, header.crypto.length)
    if header.bitmaps is not None:
        await _add_bitmaps(uses, header.bitmaps)
    return uses.counts


async def _add_bitmaps(uses: _Uses, bitmaps: Bitmaps) -> None:
    for place, taken in await clusters_of(uses.meta.read, bitmaps, uses.cluster):
        uses.add(place, taken)


async def rebuild_refcounts(meta: Metadata, snapshots: list[Snapshot], table_bytes: int) -> None:
    """Count everything, set the counts to that, and write them.

    :param table_bytes: the length of the snapshot table.
    :raise OSError: what the storage says; EFBIG for a file too large to count.
    """
    used = await _used(meta, snapshots, table_bytes)
    await meta.set_refcounts(used)
    await meta.commit(refcounts_too=True)
    await meta.file.flush()
