"""Getting rid of zero clusters, which version 2 of the format does not have.

Without a backing image a cluster that is not allocated reads as zeroes as well, so its entry is cleared.
With one it needs a place that is full of zeroes.  Each change of an entry leaves the disk, and what a
snapshot holds, as it is; so a crash in between does no harm, and neither does giving up.

Tables are changed in place, also those of snapshots, and those that several of them share: what is put
in has as many users as the table has.  Those of the disk that need places are done beforehand, while
guests' requests go on; the rest when nothing is under way.

Source: qcow2 specification, sections "Cluster mapping" and "Snapshots"; the order of writes is ours.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qmpd.block.drivers.qcow2 import mapping
from qmpd.block.drivers.qcow2.header import MAX_L1_BYTES
from qmpd.block.drivers.qcow2.metadata import Metadata
from qmpd.block.drivers.qcow2.snapshots import Snapshot
from qmpd.block.node import Data, errno_error

#: Zeroes are written in pieces of at most so many bytes (or a cluster).
PIECE: Final = 1 << 20

_COMPRESSED: Final = np.uint64(mapping.COMPRESSED)
_OFFSET: Final = np.uint64(mapping.OFFSET)
_NOTHING: Final = np.uint64(0)

#: Writes the disk's data at an offset to its place in the file: place, data, offset.
WriteData = Callable[[int, Data, int], Awaitable[None]]

#: Is called for each table that has been looked at.
Progress = Callable[[], None]


async def all_tables(meta: Metadata, snapshots: list[Snapshot]) -> dict[int, list[int]]:
    """The offsets of all L2 tables, those of snapshots included, with the L1 indexes that lead to each.

    :raise OSError: EIO if one can't be where it is said to be, or what the storage says.
    """
    found: dict[int, list[int]] = {}
    tables = [meta.l1.words]
    for snapshot in snapshots:
        if snapshot.l1_entries * 8 > MAX_L1_BYTES or snapshot.l1_offset % meta.cluster_bytes:
            raise errno_error(errno.EIO)
        tables.append(mapping.parse_table(await meta.read(snapshot.l1_offset, snapshot.l1_entries * 8)))
    for words in tables:
        for index, word in enumerate(words):
            offset = word & mapping.OFFSET
            if offset % meta.cluster_bytes:
                raise errno_error(errno.EIO)
            if offset:
                found.setdefault(offset, []).append(index)
    return found


async def any_compressed(meta: Metadata, snapshots: list[Snapshot]) -> bool:
    """Whether the disk or a snapshot has compressed clusters; what is in memory only can't have made any.

    :raise OSError: as `all_tables`.
    """
    for table in await all_tables(meta, snapshots):
        if (await _entries(meta, table) & _COMPRESSED).any():
            return True
    return False


async def _entries(meta: Metadata, table: int) -> NDArray[np.uint64]:
    """The first words of the entries of an L2 table, as the storage has them."""
    words = mapping.parse_table(await meta.read(table, meta.cluster_bytes))
    return np.frombuffer(words, np.uint64)[:: meta.entry_words].copy()


async def remove(
    meta: Metadata, snapshots: list[Snapshot], *, backed: bool, write: WriteData, progress: Progress
) -> None:
    """Change all entries of zero clusters; all is written back, and nothing is under way.

    :param backed: what is not allocated does not read as zeroes.
    :raise OSError: what the storage says; some of them may have been changed then.
    """
    for table, users in (await all_tables(meta, snapshots)).items():
        entries = await _entries(meta, table)
        zero = mapping.are_zero(entries)
        if zero.any():
            await _change(meta, table, users, entries, zero, write if backed else None)
        progress()
    await meta.settle()


async def _change(
    meta: Metadata,
    table: int,
    users: list[int],
    entries: NDArray[np.uint64],
    zero: NDArray[np.bool_],
    write: WriteData | None,
) -> None:
    given_up = entries[zero] & _OFFSET
    wanted = np.where(zero, _NOTHING, entries)
    taken: list[tuple[int, int]] = []
    try:
        if write is not None:
            base = users[0] * meta.header.l2_entries
            async for index, place, count in _places(meta, np.flatnonzero(zero), len(users), taken):
                flag = mapping.COPIED if len(users) == 1 else 0
                for number in range(count):
                    wanted[index + number] = place + number * meta.cluster_bytes | flag
                await write(place, bytes(count * meta.cluster_bytes), (base + index) * meta.cluster_bytes)
            await meta.commit(refcounts_too=True)
            await meta.file.flush()
        await meta.file.pwrite(table, wanted.astype(">u8").tobytes())
        await meta.file.flush()
    except BaseException:
        # It may be on the storage; what nobody needs then is as good as leaked, and what is needed stays.
        await _put_back(meta, table, entries, taken, len(users))
        raise
    finally:
        meta.forget_tables()
    for place in given_up[given_up != _NOTHING].tolist():
        for _ in users:
            meta.free(place, meta.cluster_bytes)


async def _put_back(
    meta: Metadata, table: int, entries: NDArray[np.uint64], taken: list[tuple[int, int]], users: int
) -> None:
    """Restore a table, and give up what it was to have; if that fails it is leaked."""
    try:
        await meta.file.pwrite(table, entries.astype(">u8").tobytes())
        await meta.file.flush()
    except OSError:
        return
    for place, count in taken:
        for _ in range(users):
            meta.free(place, count * meta.cluster_bytes)


async def _places(
    meta: Metadata, indexes: NDArray[np.int64], users: int, taken: list[tuple[int, int]]
) -> AsyncIterator[tuple[int, int, int]]:
    """New clusters for the entries at these indexes: index, place and number of clusters of each run.

    :param users: how often each is used.
    :param taken: place and number of clusters are added here before anything can go wrong.
    """
    most = max(1, PIECE // meta.cluster_bytes)
    for run in np.split(indexes, np.flatnonzero(np.diff(indexes) != 1) + 1):
        index, left = int(run[0]), len(run)
        while left:
            async with meta.allocating:
                place, count, _ = await meta.take(min(left, most))
                if users > 1:
                    first = place // meta.cluster_bytes
                    numbers = np.arange(first, first + count, dtype=np.uint64)
                    try:
                        await meta.change_counts(np.repeat(numbers, users - 1), 1)
                    except BaseException:
                        meta.free(place, count * meta.cluster_bytes)
                        raise
            taken.append((place, count))
            yield index, place, count
            index, left = index + count, left - count
