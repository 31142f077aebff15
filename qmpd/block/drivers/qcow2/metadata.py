"""The image's tables at work: kept in memory, changed there, and written back in a safe order.

Nothing but a *commit* changes a table on the storage.  It takes everything that was changed since the last
one, in one turn of the event loop, and writes it in stages:

    1. refcount blocks, whose counts have grown        barrier, if there is a new block
    2. the refcount table                              barrier: what the next stage points at is there
    3. L2 tables and the L1 table                      barrier, if clusters were given up
    4. clusters given up may be used again

An L2 entry is changed in memory only when the data that it points at has been written, and a new L2 table
is written, empty or as a copy, before the L1 table in memory knows it.  So at any
moment the storage holds tables that point at valid data and are counted; what a crash can
leave are clusters with too high a count: leaks.  A flush is a commit and a barrier.

What a guest gave up is not given to another before stage 4, and not while a request that began before
is still under way (it may have looked its cluster up already): requests belong to an `Epoch`, and
a commit begins a new one.

With lazy refcounts stages 1 and 2 are left out until the image is closed; the dirty bit in the header says
that the counts have to be made anew if that never comes.

Source: qcow2 specification; the order of writes is ours.
"""

from __future__ import annotations

import asyncio
import errno
import os
from array import array
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Final, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from qmpd.block.drivers.qcow2 import mapping, refcounts
from qmpd.block.drivers.qcow2.header import REFCOUNT_TABLE_POSITION, Header
from qmpd.block.drivers.qcow2.overlap import SECTIONS, MetadataMap
from qmpd.block.drivers.qcow2.settings import Settings
from qmpd.block.node import Data, Node
from qmpd.errors import Error

#: Tables are written in whole sectors, so that a torn write leaves whole entries.
SECTOR: Final = 512
_WORD: Final = 8

#: A commit is made when so many pieces of the file wait to be given up.
_MANY_FREED: Final = 4096

#: No cluster lies behind this offset (an L2 entry has 56 bits for it).
_MAX_OFFSET: Final = 1 << 56

_Writes = list[tuple[int, bytes]]


def shown(number: int) -> str:
    """A number in hexadecimal as C's ``%#x`` shows it."""
    return f"{number:#x}" if number else "0"


class Corruption(Protocol):
    """Is told that the image is damaged; the request fails with EIO."""

    def __call__(self, message: str, *, offset: int = -1, size: int = -1, fatal: bool = True) -> NoReturn:
        """Report it, and raise OSError."""


class _Table:
    """A piece of a table in memory, and which of its entries the storage has not.

    :param offset: where it is in the file, in bytes.
    :param entries: how many entries it has.
    """

    __slots__ = ("dirty_end", "dirty_first", "entries", "offset", "sound", "writing")

    def __init__(self, offset: int, entries: int) -> None:
        self.offset = offset
        self.entries = entries
        self.dirty_first = entries
        self.dirty_end = 0
        #: A commit is under way with it.
        self.writing = False
        #: There is no other table in its place.
        self.sound = False

    @property
    def dirty(self) -> bool:
        """Whether the storage has something else."""
        return self.dirty_first < self.dirty_end

    def mark(self, first: int, end: int) -> None:
        """The entries from `first` up to `end` were changed."""
        self.dirty_first = min(self.dirty_first, first)
        self.dirty_end = max(self.dirty_end, end)

    def _take_entries(self, per_sector: int) -> tuple[int, int]:
        """The entries of the sectors that were changed; they count as written from now on."""
        first = self.dirty_first // per_sector * per_sector
        end = -(-self.dirty_end // per_sector) * per_sector
        self.dirty_first, self.dirty_end = self.entries, 0
        return first, end


class L2Slice(_Table):
    """A piece of an L2 table in memory."""

    __slots__ = ("words",)

    def __init__(self, offset: int, words: array[int]) -> None:
        super().__init__(offset, len(words))
        self.words = words

    def take(self) -> tuple[int, bytes]:
        """What is to be written where; it counts as written from now on."""
        first, end = self._take_entries(SECTOR // _WORD)
        return self.offset + first * _WORD, mapping.build_table(self.words[first:end])


class RefcountBlock(_Table):
    """A refcount block in memory."""

    __slots__ = ("counts", "order")

    def __init__(self, offset: int, counts: refcounts.Counts, order: int) -> None:
        super().__init__(offset, len(counts))
        self.counts = counts
        self.order = order

    def take(self) -> tuple[int, bytes]:
        """What is to be written where; it counts as written from now on."""
        first, end = self._take_entries(SECTOR * 8 >> self.order)
        data = refcounts.build_block(self.counts[first:end], self.order)
        return self.offset + (first << self.order) // 8, data


class WordTable:
    """A table that is in memory as a whole: the L1 table or the refcount table."""

    def __init__(self, offset: int, words: array[int]) -> None:
        self.offset = offset
        self.words = words
        self._dirty: set[int] = set()

    def set(self, index: int, value: int) -> None:
        """Change an entry."""
        self.words[index] = value
        self._dirty.add(index * _WORD // SECTOR)

    def take(self) -> _Writes:
        """What is to be written where; it counts as written from now on."""
        per_sector = SECTOR // _WORD
        sectors, self._dirty = sorted(self._dirty), set()
        return [
            (
                self.offset + sector * SECTOR,
                mapping.build_table(self.words[sector * per_sector : (sector + 1) * per_sector]),
            )
            for sector in sectors
        ]

    def put_back(self, writes: _Writes) -> None:
        """These could not be written."""
        self._dirty.update((offset - self.offset) // SECTOR for offset, _ in writes)


class Epoch:
    """The requests that began between two commits."""

    __slots__ = ("requests",)

    def __init__(self) -> None:
        self.requests = 0


class Freed:
    """A run of clusters that has one user less.

    :param discard: whether the file may give its space back.
    :param table: whether it was an L2 table.
    """

    __slots__ = ("discard", "length", "offset", "table")

    def __init__(self, offset: int, length: int, discard: bool, table: bool) -> None:
        self.offset = offset
        self.length = length
        self.discard = discard
        self.table = table


def joined(writes: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The same writes in the order of their offsets, with neighbours as one."""
    start, parts, end = 0, list[bytes](), -1
    for offset, data in sorted(writes):
        if offset != end:
            if parts:
                yield start, b"".join(parts)
            start, parts = offset, []
        parts.append(data)
        end = offset + len(data)
    if parts:
        yield start, b"".join(parts)


class Metadata:
    """L1, L2 and refcount tables of an open image.

    :param file: the node with the image file.
    :param header: its header; what changes here is changed there too.
    :param settings: the sizes of the caches, among others.
    :param corrupt: is told about damage.
    """

    def __init__(self, file: Node, header: Header, settings: Settings, corrupt: Corruption) -> None:
        self.file = file
        self.header = header
        self.settings = settings
        self._corrupt = corrupt
        self.cluster_bytes = header.cluster_bytes
        self.external = header.external_data
        #: Words of an L2 entry, entries of a slice, and words of it.
        self.entry_words = header.l2_entry_bytes // _WORD
        self.slice_entries = settings.slice_bytes // header.l2_entry_bytes
        self._slice_limit = max(settings.l2_cache // settings.slice_bytes, 2)
        self._block_limit = max(settings.refcount_cache // self.cluster_bytes, 4)
        self._block_entries = refcounts.block_entries(self.cluster_bytes, header.refcount_order)
        self.l1 = WordTable(header.l1_offset, array("Q"))
        self.table = WordTable(header.refcount_table_offset, array("Q"))
        self._slices: dict[int, L2Slice] = {}
        self._blocks: dict[int, RefcountBlock] = {}
        self._loading: dict[int, asyncio.Future[None]] = {}
        self.map = MetadataMap(settings.overlap)
        #: Clusters besides the first that nobody may take for the header's sake; set before `load`.
        self.header_clusters: set[int] = set()
        #: Held by whoever takes clusters, makes tables, or moves them.
        self.allocating = asyncio.Lock()
        self._committing = asyncio.Lock()
        #: No cluster with a lower number is free.
        self._hint = 0
        #: The end of the highest cluster ever taken, in bytes.
        self._used_end = 0
        self._freed: list[Freed] = []
        self._quarantine: deque[tuple[Epoch, list[Freed]]] = deque()
        self.epoch = Epoch()
        #: Counts are not lowered, for somebody copies them; held by whoever lowers them.
        self._recounting = False
        self._releasing = asyncio.Lock()
        #: Stages 1 and 2 can wait, for the dirty bit is set.
        self.lazy = False
        #: Is called before counts change for the first time.
        self.before_change: Callable[[], Awaitable[None]] | None = None
        #: Is called within a commit before entries point at new data.
        self.data_barrier: Callable[[], Awaitable[None]] = self._flush_file

    # -- reading the file

    async def read(self, offset: int, length: int) -> Data:
        """Bytes of the image file; what lies behind its end reads as zeroes."""
        available = min(length, self.file.size - offset)
        if available >= length:
            return await self.file.pread(offset, length)
        if available <= 0:
            return bytes(length)
        return bytes(await self.file.pread(offset, available)).ljust(length, b"\0")

    async def load(self) -> None:
        """Read the L1 table and the refcount table.

        :raise OSError: what the storage says.
        """
        header = self.header
        self.l1.words = mapping.parse_table(await self.read(header.l1_offset, header.l1_entries * _WORD))
        length = header.refcount_table_clusters * self.cluster_bytes
        self.table.words = mapping.parse_table(await self.read(header.refcount_table_offset, length))
        self.map_all()

    def map_all(self) -> None:
        """Note where the tables are."""
        header, cluster = self.header, self.cluster_bytes
        self.map.set("main-header", {0, *self.header_clusters})
        self.map.set("active-l1", self._clusters(header.l1_offset, len(self.l1.words) * _WORD))
        self.map.set(
            "refcount-table", self._clusters(header.refcount_table_offset, len(self.table.words) * _WORD)
        )
        for section, words, mask in (
            ("active-l2", self.l1.words, mapping.OFFSET),
            ("refcount-block", self.table.words, refcounts.TABLE_OFFSET),
        ):
            offsets = np.frombuffer(words, np.uint64) & np.uint64(mask)
            self.map.set(section, offsets[offsets != 0] // np.uint64(cluster))

    def _clusters(self, offset: int, length: int) -> range:
        return range(offset // self.cluster_bytes, -(-(offset + length) // self.cluster_bytes))

    # -- L2 tables

    async def slice_for(self, cluster: int) -> L2Slice | None:
        """The slice with the entry of the guest's cluster number `cluster`; None if there is no L2 table.

        Until the caller awaits something, it stays the one that counts.

        :raise OSError: EIO if the L1 entry makes no sense, or what the storage says.
        """
        l1_index, index = divmod(cluster, self.header.l2_entries)
        while True:
            table = self.l1.words[l1_index] & mapping.OFFSET if l1_index < len(self.l1.words) else 0
            if not table:
                return None
            if table % self.cluster_bytes:
                self._corrupt(f"L2 table offset {shown(table)} unaligned (L1 index: {shown(l1_index)})")
            key = table + index // self.slice_entries * self.settings.slice_bytes
            found = self._slices.pop(key, None)
            if found is not None:
                self._slices[key] = found  # It is the last one used.
                return found
            await self._load_once(key, self._load_slice)

    def peek(self, cluster: int) -> L2Slice | None:
        """The same if it is in memory, without a turn of anything; None says nothing."""
        l1_index, index = divmod(cluster, self.header.l2_entries)
        if l1_index >= len(self.l1.words):
            return None
        table = self.l1.words[l1_index] & mapping.OFFSET
        key = table + index // self.slice_entries * self.settings.slice_bytes
        found = self._slices.pop(key, None)
        if found is not None:
            self._slices[key] = found
        return found

    def has_no_table(self, cluster: int) -> bool:
        """Whether there is no L2 table for a guest's cluster."""
        index = cluster // self.header.l2_entries
        return index >= len(self.l1.words) or not self.l1.words[index] & mapping.OFFSET

    async def _load_once(self, key: int, load: Callable[[int], Awaitable[None]]) -> None:
        """Load a piece of metadata, or wait until somebody else has."""
        under_way = self._loading.get(key)
        if under_way is not None:
            await asyncio.shield(under_way)
            return
        under_way = asyncio.get_running_loop().create_future()
        self._loading[key] = under_way
        try:
            await load(key)
        finally:
            # Whoever waits looks whether it is there now, and tries by itself if not.
            del self._loading[key]
            under_way.set_result(None)

    async def _load_slice(self, key: int) -> None:
        await self._make_room(self._slices, self._slice_limit)
        data = await self.read(key, self.settings.slice_bytes)
        self._slices[key] = L2Slice(key, mapping.parse_table(data))

    async def _make_room(self, cache: dict[int, L2Slice] | dict[int, RefcountBlock], limit: int) -> None:
        """Forget what was used least recently, and write it first if need be."""
        while len(cache) >= limit:
            for key, entry in cache.items():
                # What is being written must not be read from the storage again before it is there.
                if not entry.dirty and not entry.writing:
                    del cache[key]
                    break
            else:
                await self._write_back(refcounts_too=True)

    async def writable_slice(self, cluster: int) -> L2Slice:
        """The slice with the entry of a guest's cluster, in an L2 table that may be changed.

        :raise OSError: as `slice_for`; ENOSPC and the like if there has to be a new table.
        """
        l1_index = cluster // self.header.l2_entries
        while True:
            if l1_index >= len(self.l1.words):
                # The disk has become smaller meanwhile.
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if not self.l1.words[l1_index] & mapping.COPIED:
                async with self.allocating:
                    await self._own_l2_table(l1_index)
            found = await self.slice_for(cluster)
            if found is not None and self.l1.words[l1_index] & mapping.COPIED:
                self._check_alone(found, "active-l2")
                return found

    async def _own_l2_table(self, l1_index: int) -> None:
        """Give an L1 entry a table of its own: an empty one, or a copy of the one it shares."""
        entry = self.l1.words[l1_index]
        old = entry & mapping.OFFSET
        if old and entry & mapping.COPIED:
            return
        if old % self.cluster_bytes:
            self._corrupt(f"L2 table offset {shown(old)} unaligned (L1 index: {shown(l1_index)})")
        self.check_inside(self.l1.offset)
        self.check_overlap(self.l1.offset + l1_index * _WORD, _WORD, ignore="active-l1")
        offset, _, fresh = await self.take(1)
        if not offset:
            self._corrupt("Preventing invalid allocation of L2 table at offset 0")
        try:
            if old:
                await self.file.pwrite(offset, await self.read(old, self.cluster_bytes), grow=True)
            elif fresh:
                # A table behind the end of the file would be taken for damage.
                await self.file.pwrite(offset + self.cluster_bytes - SECTOR, bytes(SECTOR), grow=True)
            else:
                await self.file.pwrite(offset, bytes(self.cluster_bytes), grow=True)
        except BaseException:
            self.free(offset, self.cluster_bytes)
            raise
        self.l1.set(l1_index, offset | mapping.COPIED)
        self.map.add("active-l2", offset // self.cluster_bytes)
        if old:
            # A snapshot may have it still; when that goes, the cluster is anybody's.
            self.map.remove("active-l2", old // self.cluster_bytes)
            self.free(old, self.cluster_bytes, table=True)

    # -- refcounts

    async def _block(self, index: int) -> RefcountBlock | None:
        """A refcount block by its place in the table; None if there is none."""
        while True:
            offset = self.table.words[index] & refcounts.TABLE_OFFSET if index < len(self.table.words) else 0
            if not offset:
                return None
            if offset % self.cluster_bytes:
                self._corrupt(f"Refblock offset {shown(offset)} unaligned (reftable index: {shown(index)})")
            found = self._blocks.pop(offset, None)
            if found is not None:
                self._blocks[offset] = found
                return found
            await self._load_once(offset, self._load_block)

    async def _load_block(self, offset: int) -> None:
        await self._make_room(self._blocks, self._block_limit)
        data = await self.read(offset, self.cluster_bytes)
        order = self.header.refcount_order
        self._blocks[offset] = RefcountBlock(offset, refcounts.parse_block(data, order), order)

    async def refcount(self, cluster: int) -> int:
        """The count of a cluster of the file, by its number."""
        index, within = divmod(cluster, self._block_entries)
        block = await self._block(index)
        return 0 if block is None else int(block.counts[within])

    async def counts_of(self, clusters: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The counts of many clusters of the file, by their numbers."""
        found = np.zeros(len(clusters), np.uint64)
        indexes = clusters // np.uint64(self._block_entries)
        for index in np.unique(indexes).tolist():
            block = await self._block(index)
            if block is not None:
                chosen = indexes == index
                within = (clusters[chosen] % np.uint64(self._block_entries)).astype(np.int64)
                found[chosen] = block.counts[within]
        return found

    async def change_counts(
        self, clusters: NDArray[np.uint64], change: int, *, discard: bool = False
    ) -> None:
        """Clusters have one user more or one less; `allocating` is held, and no request is under way.

        :param clusters: their numbers, each as often as its count changes.
        :param change: 1 or -1.
        :param discard: the file may give back the space of those that have none any more.
        :raise OSError: EINVAL if a count would not fit, EIO if a cluster is not counted at all, or what
            the storage says; nothing has changed then.
        """
        if self.before_change is not None:
            await self.before_change()
        numbers, times = np.unique(clusters, return_counts=True)
        limit = refcounts.highest(self.header.refcount_order)
        indexes = numbers // np.uint64(self._block_entries)
        done: list[int] = []
        try:
            for index in np.unique(indexes).tolist():
                block = await self._block(index)
                if block is None:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                chosen = indexes == index
                within = (numbers[chosen] % np.uint64(self._block_entries)).astype(np.int64)
                counts, by = block.counts[within].astype(np.uint64), times[chosen].astype(np.uint64)
                if change > 0:
                    if (by > limit).any() or (counts > np.uint64(limit) - by).any():
                        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                    counts += by
                else:
                    counts -= np.minimum(counts, by)
                    free = numbers[chosen][counts == 0]
                    if len(free):
                        if discard:
                            await self._discard_clusters(free)
                            block = await self._block(index)
                            assert block is not None, "no refcount block ever goes"
                        self._hint = min(self._hint, int(free[0]))
                block.counts[within] = counts.astype(block.counts.dtype)
                block.mark(int(within[0]), int(within[-1]) + 1)
                done.append(index)
        except BaseException:
            if done:
                changed = np.isin(clusters // np.uint64(self._block_entries), done)
                await self.change_counts(clusters[changed], -change)
            raise

    async def take(self, wanted: int) -> tuple[int, int, bool]:
        """Take the first free clusters; `allocating` is held.

        :param wanted: how many, if there are so many in a row.
        :returns: the offset of the first, how many, and whether they read as zeroes.
        :raise OSError: EIO if a table is there, EFBIG if there is no room, or what the storage says.
        """
        if self.before_change is not None:
            await self.before_change()
        await self._release()
        cluster = self._hint
        while True:
            index, within = divmod(cluster, self._block_entries)
            block = await self._block(index) or await self._new_block(index)
            start, count = refcounts.free_run(block.counts, within, wanted)
            if count:
                break
            cluster = (index + 1) * self._block_entries
        first = index * self._block_entries + start
        offset, end = first * self.cluster_bytes, (first + count) * self.cluster_bytes
        if end > _MAX_OFFSET:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self._check_alone(block, "refcount-block")
        self.check_overlap(offset, end - offset)
        block.counts[start : start + count] = 1
        block.mark(start, start + count)
        self._hint = first + count
        fresh = offset >= max(self.file.size, self._used_end) and self.file.grows_with_zeroes
        self._used_end = max(self._used_end, end)
        return offset, count, fresh

    async def take_in_one_piece(self, wanted: int) -> int:
        """Take so many clusters in a row, for a table; `allocating` is held.

        More than half of what a refcount block counts is never free between two blocks: such a run goes
        where nothing is counted yet, behind the blocks that count it.

        :returns: the offset of the first.
        :raise OSError: as `take`.
        """
        if wanted <= self._block_entries // 2:
            while True:
                offset, count, _ = await self.take(wanted)
                if count == wanted:
                    return offset
                self.free(offset, count * self.cluster_bytes)
        if self.before_change is not None:
            await self.before_change()
        while True:
            index = next((i + 1 for i in range(len(self.table.words) - 1, -1, -1) if self.table.words[i]), 0)
            blocks = 1
            while blocks * self._block_entries < blocks + wanted:
                blocks += 1
            if index + blocks <= len(self.table.words):
                break
            await self._grow_table(index + blocks - 1)
        first = index * self._block_entries
        self.check_overlap(first * self.cluster_bytes, (blocks + wanted) * self.cluster_bytes)
        for number in range(blocks):
            await self._make_room(self._blocks, self._block_limit)
            block = self._empty_block((first + number) * self.cluster_bytes)
            used = max(0, min(blocks + wanted - number * self._block_entries, self._block_entries))
            block.counts[:used] = 1
            self._blocks[block.offset] = block
            self.table.set(index + number, block.offset)
            self.map.add("refcount-block", first + number)
        self._used_end = max(self._used_end, (first + blocks + wanted) * self.cluster_bytes)
        return (first + blocks) * self.cluster_bytes

    def _check_alone(self, piece: L2Slice | RefcountBlock, section: str) -> None:
        """Refuse to write a table of `section` where there is another table as well."""
        if not piece.sound:
            self.check_inside(piece.offset)
            self.check_overlap(piece.offset, SECTOR, ignore=section)
            piece.sound = True

    def is_guests_place(self, offset: int, length: int) -> bool:
        """Whether `check_inside` and `check_overlap` find nothing wrong with a write."""
        cluster = self.cluster_bytes
        inside = offset < max(self.file.size, self._used_end) + cluster
        return inside and self.map.find(offset // cluster, -(-(offset + length) // cluster)) is None

    def check_inside(self, offset: int) -> None:
        """Refuse to write in place where the file has never been: a table that says so is damaged.

        :raise OSError: EIO, and the image is marked as corrupt.
        """
        if offset >= max(self.file.size, self._used_end) + self.cluster_bytes:
            self._corrupt(
                f"Cluster offset {shown(offset)} is behind the end of the image file", offset=offset
            )

    def check_overlap(self, offset: int, length: int, *, ignore: str | None = None) -> None:
        """Refuse to write where a table is.

        :param ignore: the section of what is to be written, if it is a table itself.
        :raise OSError: EIO, and the image is marked as corrupt.
        """
        first = offset // self.cluster_bytes
        section = self.map.find(first, -(-(offset + length) // self.cluster_bytes), ignore=ignore)
        if section is not None:
            self._corrupt(
                f"Preventing invalid write on metadata (overlaps with {SECTIONS[section]})",
                offset=offset,
                size=length,
            )

    async def _new_block(self, index: int, place: int = 0) -> RefcountBlock:
        """A refcount block where there is none: it lies in one of the clusters that it counts.

        Those are all free, for nobody counts them.
        """
        if index >= len(self.table.words):
            await self._grow_table(index)
            block = await self._block(index)
            assert block is not None
            return block
        offset = (index * self._block_entries + place) * self.cluster_bytes
        if not offset:
            self._corrupt("Preventing invalid allocation of refcount block at offset 0")
        self.check_inside(self.table.offset)
        self.check_overlap(offset, self.cluster_bytes)
        await self._make_room(self._blocks, self._block_limit)
        block = self._empty_block(offset)
        block.counts[place] = 1
        self._blocks[offset] = block
        self.table.set(index, offset)
        self.map.add("refcount-block", offset // self.cluster_bytes)
        self._used_end = max(self._used_end, offset + self.cluster_bytes)
        return block

    def _empty_block(self, offset: int) -> RefcountBlock:
        order = self.header.refcount_order
        block = RefcountBlock(offset, refcounts.parse_block(bytes(self.cluster_bytes), order), order)
        block.mark(0, len(block.counts))
        return block

    async def _grow_table(self, index: int) -> None:
        """Move the refcount table to where there is room for block `index` and half as much again.

        Behind the old table's reach nothing is counted, so everything is free there: first the blocks
        that count the new area, then the new table itself.
        """
        # The new table may only name blocks that are on the storage.
        await self._write_back(refcounts_too=True)
        per_cluster = self.cluster_bytes // _WORD
        blocks = 1
        while True:
            entries = (index + blocks) * 3 // 2
            table_clusters = -(-entries // per_cluster)
            needed = -(-(blocks + table_clusters) // self._block_entries)
            if needed <= blocks:
                break
            blocks = needed
        if table_clusters * self.cluster_bytes > 8 << 20:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        first = index * self._block_entries
        words = (
            self.table.words + array("Q", bytes(table_clusters * self.cluster_bytes))[len(self.table.words) :]
        )
        writes: _Writes = []
        used = blocks + table_clusters
        for number in range(blocks):
            block = self._empty_block((first + number) * self.cluster_bytes)
            block.counts[: max(0, min(used - number * self._block_entries, self._block_entries))] = 1
            words[index + number] = block.offset
            writes.append(block.take())
        table_offset = (first + blocks) * self.cluster_bytes
        self.check_overlap(first * self.cluster_bytes, used * self.cluster_bytes)
        writes.append((table_offset, mapping.build_table(words)))
        await self._write_all(writes)
        await self._flush_file()
        old_offset = self.header.refcount_table_offset
        old_length = self.header.refcount_table_clusters * self.cluster_bytes
        place = table_offset.to_bytes(8, "big") + table_clusters.to_bytes(4, "big")
        old_place = old_offset.to_bytes(8, "big") + self.header.refcount_table_clusters.to_bytes(4, "big")
        await self.change_header(REFCOUNT_TABLE_POSITION, place, old_place)
        self.header.refcount_table_offset, self.header.refcount_table_clusters = table_offset, table_clusters
        self.table = WordTable(table_offset, words)
        self._used_end = max(self._used_end, (first + used) * self.cluster_bytes)
        self.map_all()
        self.free(old_offset, old_length)

    async def set_refcounts(self, counts: NDArray[np.uint32]) -> None:
        """Set the counts of all clusters of the file; the others are free.

        :raise OSError: EIO if one does not fit, or what the storage says.
        """
        if len(counts) and int(counts.max()) > refcounts.highest(self.header.refcount_order):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        async with self.allocating:
            for index in range(max(len(self.table.words), -(-len(counts) // self._block_entries))):
                start = index * self._block_entries
                wanted = counts[start : start + self._block_entries]
                block = await self._block(index)
                if block is None:
                    if not wanted.any():
                        continue
                    wanted = np.append(wanted, np.zeros(self._block_entries - len(wanted), np.uint32))
                    place = int((wanted == 0).argmax())
                    if wanted[place]:
                        raise OSError(errno.EIO, os.strerror(errno.EIO))
                    block = await self._new_block(index, place)
                    wanted[place] = 1
                padded = np.zeros(self._block_entries, block.counts.dtype)
                padded[: len(wanted)] = wanted
                changed = np.flatnonzero(padded != block.counts)
                if len(changed):
                    block.counts[:] = padded
                    block.mark(int(changed[0]), int(changed[-1]) + 1)

    # -- another refcount structure

    @asynccontextmanager
    async def unchanging_counts(self) -> AsyncIterator[None]:
        """No count changes for the time of an ``async with``; whoever needs a cluster waits."""
        async with self.allocating:
            self._recounting = True
            try:
                async with self._releasing:
                    pass  # Whoever is lowering counts just now has come to an end.
                yield
            finally:
                self._recounting = False

    async def refcount_block(self, index: int) -> RefcountBlock | None:
        """A refcount block by its place in the table; None if there is none."""
        return await self._block(index)

    def use_refcounts(self, order: int, offset: int, words: array[int], end: int) -> None:
        """Count in another structure, which says the same; the counts are not changing.

        The old one's clusters are given up.

        :param order: the binary logarithm of a count's bits.
        :param offset: where the table is, in bytes; the header has to say so already.
        :param words: its entries.
        :param end: where it ends in the file, with its blocks.
        """
        given_up = [word & refcounts.TABLE_OFFSET for word in self.table.words]
        old_offset, old_bytes = self.table.offset, len(self.table.words) * _WORD
        self._block_entries = refcounts.block_entries(self.cluster_bytes, order)
        self.table = WordTable(offset, words)
        # What a commit that is under way writes of the old ones harms nobody.
        self._blocks = {}
        self._used_end = max(self._used_end, end)
        self.map_all()
        for block in given_up:
            if block and block % self.cluster_bytes == 0:
                self.free(block, self.cluster_bytes)
        self.free(old_offset, old_bytes)

    def forget_tables(self) -> None:
        """Read L2 tables anew when they are needed: the storage has others; nothing is under way."""
        self._slices = {}

    # -- giving up

    async def cut_file(self) -> None:
        """Let the file end where the last cluster does that anybody uses; `allocating` is held.

        What was given up has to be on the storage.
        """
        end = 0
        for index in range(len(self.table.words) - 1, -1, -1):
            block = await self._block(index)
            if block is None:
                continue
            used = np.flatnonzero(block.counts)
            if len(used):
                end = (index * self._block_entries + int(used[-1]) + 1) * self.cluster_bytes
                break
        if 0 < end < self.file.size:
            self._used_end = end
            try:
                await self.file.truncate(end)
            except (Error, OSError):
                pass  # It is only longer than it has to be.

    def free(self, offset: int, length: int, *, discard: bool = False, table: bool = False) -> None:
        """The clusters that these bytes touch have one user less, as soon as the storage knows.

        :param discard: the file may give their space back.
        :param table: they were an L2 table.
        """
        start = offset // self.cluster_bytes * self.cluster_bytes
        end = -(-(offset + length) // self.cluster_bytes) * self.cluster_bytes
        last = self._freed[-1] if self._freed else None
        alike = last is not None and (last.discard, last.table) == (discard, table)
        if last is not None and alike and last.offset + last.length == start:
            last.length += end - start
        else:
            self._freed.append(Freed(start, end - start, discard, table))

    @property
    def much_freed(self) -> bool:
        """Whether so much waits to be given up that it is time for a commit."""
        return len(self._freed) > _MANY_FREED

    async def _release(self) -> None:
        """Lower the counts of what nobody can be using any more."""
        if self._recounting:
            return
        async with self._releasing:
            while not self._recounting and self._quarantine and not self._quarantine[0][0].requests:
                _, freed = self._quarantine.popleft()
                for run in freed:
                    if run.table:
                        self._forget(run)
                    await self._lower(run.offset, run.length, discard=run.discard)

    async def _discard(self, offset: int, length: int) -> None:
        try:
            length = min(length, self.file.size - offset)
            if length > 0:
                await self.file.pdiscard(offset, length)
        except OSError:
            pass  # It was only an offer.

    async def _discard_clusters(self, numbers: NDArray[np.uint64] | NDArray[np.int64]) -> None:
        """Discard clusters; their numbers are sorted."""
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
            if len(run):
                await self._discard(int(run[0]) * self.cluster_bytes, len(run) * self.cluster_bytes)

    async def _lower(self, offset: int, length: int, *, discard: bool) -> None:
        cluster, end = offset // self.cluster_bytes, (offset + length) // self.cluster_bytes
        while cluster < end:
            index, within = divmod(cluster, self._block_entries)
            count = min(end - cluster, self._block_entries - within)
            block = await self._block(index)
            if block is not None and discard:
                # A snapshot may have them as well.  As long as one is counted nobody else gets it.
                last_users = np.flatnonzero(block.counts[within : within + count] == 1)
                await self._discard_clusters(last_users + cluster)
                block = await self._block(index)
            if block is not None:
                counts = block.counts[within : within + count]
                counts -= (counts > 0).astype(counts.dtype)
                block.mark(within, within + count)
                free = counts == 0
                first = int(free.argmax())
                if free[first]:
                    self._hint = min(self._hint, cluster + first)
            cluster += count

    def _forget(self, table: Freed) -> None:
        """What was an L2 table is none any more for the active disk."""
        for offset in range(table.offset, table.offset + table.length, self.settings.slice_bytes):
            self._slices.pop(offset, None)

    # -- writing back

    async def commit(self, *, refcounts_too: bool = False) -> None:
        """Write what was changed, in the order that the head of this module explains.

        :param refcounts_too: the counts as well, although they are lazy.
        :raise OSError: what the storage says; what was not written will be tried again.
        """
        await self._write_back(refcounts_too=refcounts_too)
        await self._release()

    async def _write_back(self, *, refcounts_too: bool) -> None:
        """All of a commit but its last stage, which may have to load refcount blocks."""
        async with self._committing:
            with_counts = refcounts_too or not self.lazy
            blocks = [block for block in self._blocks.values() if block.dirty] if with_counts else []
            slices = [piece for piece in self._slices.values() if piece.dirty]
            block_spans = [(block, block.dirty_first, block.dirty_end) for block in blocks]
            slice_spans = [(piece, piece.dirty_first, piece.dirty_end) for piece in slices]
            block_writes = [block.take() for block in blocks]
            slice_writes = [piece.take() for piece in slices]
            table_writes = self.table.take() if with_counts else []
            l1_writes = self.l1.take()
            freed, self._freed = self._freed, []
            epoch = self.epoch
            if freed:
                self.epoch = Epoch()
            l1, table = self.l1, self.table
            written: list[RefcountBlock | L2Slice] = [*blocks, *slices]
            for entry in written:
                entry.writing = True
            try:
                await self._write_all(block_writes)
                if table_writes:
                    await self._flush_file()
                    await self._write_all(table_writes)
                if slice_writes or l1_writes:
                    await self.data_barrier()
                await self._write_all(slice_writes + l1_writes)
                if freed:
                    await self._flush_file()
            except BaseException:
                for block, first, end in block_spans:
                    block.mark(first, end)
                for piece, first, end in slice_spans:
                    piece.mark(first, end)
                table.put_back(table_writes)
                l1.put_back(l1_writes)
                self._freed[:0] = freed
                raise
            finally:
                for entry in written:
                    entry.writing = False
            if freed:
                self._quarantine.append((epoch, freed))

    async def settle(self) -> None:
        """Write everything: two commits, for giving clusters up changes counts again."""
        for _ in range(2):
            await self.commit(refcounts_too=True)

    async def _write_all(self, writes: _Writes) -> None:
        if len(writes) == 1:
            await self.file.pwrite(*writes[0], grow=True)
        elif writes:
            await asyncio.gather(
                *(self.file.pwrite(offset, data, grow=True) for offset, data in joined(writes))
            )

    async def change_header(self, position: int, new: bytes, old: bytes) -> None:
        """Write a field of the header that says where a table is, with a barrier.

        If that fails the old one is put back, for the old table stays the one in use; if it is not known
        which of them the storage has, nothing more is written.

        :raise OSError: what the storage says.
        """
        try:
            await self.file.pwrite(position, new)
            await self._flush_file()
        except BaseException:
            try:
                await self.file.pwrite(position, old)
                await self._flush_file()
            except OSError:
                self._corrupt("The place of a table could not be written to the header", offset=position)
            raise

    async def _flush_file(self) -> None:
        await self.file.flush()
