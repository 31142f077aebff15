"""Counts of another width: a second refcount structure beside the one in use.

The new blocks and the new table go behind the last cluster that anybody uses, in one run.  As long as
the header does not name them nobody counts those clusters, so that whatever happens up to the one write
of the header that makes the new structure the image's, the old one is untouched and leaks nothing.  The
counts do not change meanwhile (`Metadata.unchanging_counts`): reads go on, and writes that need no new
cluster.

Source: qcow2 specification, section "Host cluster management"; the order of writes is ours.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qmpd.block.drivers.qcow2 import mapping, refcounts
from qmpd.block.drivers.qcow2.header import MAX_REFCOUNT_TABLE_BYTES
from qmpd.block.drivers.qcow2.metadata import Metadata, RefcountBlock
from qmpd.block.node import errno_error
from qmpd.errors import Error

#: Blocks are written in pieces of about so many bytes.
_PIECE: Final = 1 << 20

#: An L2 entry has so many bits for an offset.
_MAX_OFFSET: Final = 1 << 56

#: Is told that so many more blocks are done, and how many have to be done that were not expected.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Structure:
    """Where the blocks and the table of a new refcount structure are.

    :param order: the binary logarithm of a count's bits.
    :param start: the number of the first cluster, which holds the first block; the table is behind them.
    :param blocks: the places in the table that have a block, in ascending order.
    :param table_clusters: the table's length.
    """

    order: int
    start: int
    blocks: list[int]
    table_clusters: int
    cluster_bytes: int

    @property
    def end(self) -> int:
        """The number of the first cluster behind it."""
        return self.start + len(self.blocks) + self.table_clusters

    @property
    def table_offset(self) -> int:
        """Where the table is, in bytes."""
        return (self.start + len(self.blocks)) * self.cluster_bytes

    def table(self) -> array[int]:
        """The table's entries."""
        words = array("Q", bytes(self.table_clusters * self.cluster_bytes))
        for number, index in enumerate(self.blocks):
            words[index] = (self.start + number) * self.cluster_bytes
        return words


def lay_out(cluster_bytes: int, order: int, used_blocks: set[int], start: int) -> Structure:
    """Find out how long a new structure is that counts itself as well.

    :param used_blocks: the places in its table where something is counted already.
    :param start: the number of the cluster where it begins; nothing is used from there on.
    :raise OSError: EFBIG if it would be too large.
    """
    per_block = refcounts.block_entries(cluster_bytes, order)
    blocks, table_clusters = sorted(used_blocks), 1
    while True:
        end = start + len(blocks) + table_clusters
        own = range(start // per_block, (end - 1) // per_block + 1)
        wanted = sorted(used_blocks.union(own))
        needed = max(table_clusters, -(-(wanted[-1] + 1) * 8 // cluster_bytes))
        if (len(wanted), needed) == (len(blocks), table_clusters):
            break
        blocks, table_clusters = wanted, needed
    if table_clusters * cluster_bytes > MAX_REFCOUNT_TABLE_BYTES or end * cluster_bytes > _MAX_OFFSET:
        raise errno_error(errno.EFBIG)
    return Structure(order, start, wanted, table_clusters, cluster_bytes)


async def check_width(meta: Metadata, order: int) -> None:
    """See that all counts fit.

    :raise Error: in QEMU's words, naming the first one that does not.
    """
    async for index, block in _blocks(meta):
        _check_block(meta, index, block, order)


async def _blocks(meta: Metadata) -> AsyncIterator[tuple[int, RefcountBlock]]:
    """All refcount blocks, with their places in the table."""
    for index in range(len(meta.table.words)):
        block = await meta.refcount_block(index)
        if block is not None:
            yield index, block


def _check_block(meta: Metadata, index: int, block: RefcountBlock, order: int) -> None:
    too_high = block.counts > refcounts.highest(order)
    if too_high.any():
        within = int(too_high.argmax())
        offset = (index * len(block.counts) + within) * meta.cluster_bytes
        raise Error(
            f"Cannot decrease refcount entry width to {1 << order} bits: Cluster at offset {offset:#x} has a "
            f"refcount of {int(block.counts[within])}"
        )


async def build(meta: Metadata, order: int, progress: Progress) -> Structure:
    """Write a structure that counts what the present one counts, and itself; the counts do not change.

    It is on stable storage afterwards, and nothing names it.

    :param order: the binary logarithm of its counts' bits.
    :raise Error: if a count does not fit.
    :raise OSError: what the storage says.
    """
    per_block = refcounts.block_entries(meta.cluster_bytes, order)
    used_blocks: set[int] = set()
    start = 0
    async for index, block in _blocks(meta):
        _check_block(meta, index, block, order)
        used = np.flatnonzero(block.counts)
        if len(used):
            numbers = used + index * len(block.counts)
            used_blocks.update(np.unique(numbers // per_block).tolist())
            start = max(start, int(numbers[-1]) + 1)
        progress(1, 0)
    structure = lay_out(meta.cluster_bytes, order, used_blocks, start)
    offset = start * meta.cluster_bytes
    meta.check_overlap(offset, structure.end * meta.cluster_bytes - offset)
    length_before = max(meta.file.size, offset)
    try:
        await _write(meta, structure, progress)
    except BaseException:
        # There may be no room on the storage for what nobody will ever look at.
        if meta.file.size > length_before:
            try:
                await meta.file.truncate(length_before)
            except (Error, OSError):
                pass
        raise
    return structure


async def _write(meta: Metadata, structure: Structure, progress: Progress) -> None:
    pieces: list[bytes] = []
    place = structure.start * meta.cluster_bytes
    progress(0, len(structure.blocks))
    for number, index in enumerate(structure.blocks):
        counts = await _counts_for(meta, structure, index)
        pieces.append(refcounts.build_block(counts, structure.order))
        if len(pieces) * meta.cluster_bytes >= _PIECE or number == len(structure.blocks) - 1:
            data = b"".join(pieces)
            await meta.file.pwrite(place, data, grow=True)
            place += len(data)
            progress(len(pieces), 0)
            pieces.clear()
    await meta.file.pwrite(place, mapping.build_table(structure.table()), grow=True)
    await meta.file.flush()


async def _counts_for(meta: Metadata, structure: Structure, index: int) -> NDArray[np.uint64]:
    """What a block of the new structure counts."""
    entries = refcounts.block_entries(meta.cluster_bytes, structure.order)
    entries_before = refcounts.block_entries(meta.cluster_bytes, meta.header.refcount_order)
    first = index * entries
    counts = np.zeros(entries, np.uint64)
    for number in range(first // entries_before, (first + entries - 1) // entries_before + 1):
        block = await meta.refcount_block(number)
        if block is not None:
            start = number * entries_before
            begin, end = max(first, start), min(first + entries, start + entries_before)
            counts[begin - first : end - first] = block.counts[begin - start : end - start]
    counts[max(structure.start - first, 0) : max(structure.end - first, 0)] = 1
    return counts
