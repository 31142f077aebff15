"""A new image: what lies where in it, and the writes that make it.

    cluster 0     the header
    cluster 1     the refcount table, unless it is elsewhere (see below)
    cluster 2     the first refcount block
    cluster 3     the L1 table, as many clusters as it takes
    then          the LUKS header, if the image is to be encrypted with one
    then          the other refcount blocks, and the refcount table if it does not fit into cluster 1
                  or if data is preallocated outside of it
    then          the clusters of the data and the L2 tables, if they are preallocated

QEMU's images look the same, so that two images made with the same options have the same headers.  When
it reserves storage for data (`falloc`, `full`) it moves the refcount table first, and the first
L2 table takes cluster 1; the others are behind the data.  With `metadata` they are in front of it.

The steps are in such an order that a file which was cut off anywhere, or whose writes since the last
barrier are there in part, is either no qcow2 image or all of one: the first sector, with the magic number, is
wiped first and written last.

Source: qcow2 specification; the order of writes is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from qmpd.block.drivers.qcow2 import mapping, refcounts
from qmpd.block.drivers.qcow2.header import MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, Crypto, Header
from qmpd.crypto.plan import Barrier, Write
from qmpd.errors import Error

SECTOR: Final = 512

#: Tables are written in pieces of about so many bytes.
_PIECE: Final = 1 << 20


@dataclass(frozen=True)
class Zeroes:
    """`length` bytes at `offset` have to read as zeroes."""

    offset: int
    length: int


Step = Write | Zeroes | Barrier


@dataclass(frozen=True)
class CryptoHeader:
    """A LUKS header that is to lie in the image.

    :param length: of it and all its keyslots, in bytes.
    :param pieces: what to write, with the offsets in it; of two in the same place the later one counts.
    """

    length: int
    pieces: list[tuple[int, bytes]]


class Layout:
    """The places in a new image.

    :param header: what the image is to be like; its tables' places are filled in.
    :param preallocation: PreallocMode; what it says of data holds for the image file only if the data is
        in it.
    :param crypto_header: the LUKS header, if there is one.
    :raise Error: if its tables would be too large.
    """

    def __init__(
        self, header: Header, preallocation: str = "off", crypto_header: CryptoHeader | None = None
    ) -> None:
        self.header = header
        cluster = self._cluster = header.cluster_bytes
        placed = preallocation != "off"
        reserved = placed and preallocation != "metadata" and not header.external_data
        l1_entries = header.l1_entries_for(header.size)
        if l1_entries * 8 > MAX_L1_BYTES:
            raise Error("Could not resize image: Failed to grow the L1 table: File too large")
        l1_clusters = -(-l1_entries * 8 // cluster)
        #: Guest's clusters, and how many of them lie in this file.
        self._entries = -(-header.size // cluster) if placed else 0
        self._data_clusters = 0 if header.external_data else self._entries
        self._tables = -(-self._entries // header.l2_entries)
        self._crypto_header = crypto_header
        self._crypto_start = self._blocks_start = 3 + l1_clusters
        if crypto_header is not None:
            self._blocks_start += -(-crypto_header.length // cluster)
            header.set_crypto(Crypto(self._crypto_start * cluster, crypto_header.length))

        self._reserved = reserved
        self._blocks, moved = 1, reserved
        while True:
            table_clusters = -(-self._blocks * 8 // cluster)
            moved = moved or table_clusters > 1
            tables_start = self._blocks_start + self._blocks - 1 + (table_clusters if moved else 0)
            #: Cluster 1 is the first L2 table's, if the refcount table is not there.
            early = 1 if moved and self._tables else 0
            self._clusters = tables_start + self._tables - early + self._data_clusters
            needed = -(-self._clusters // refcounts.block_entries(cluster, header.refcount_order))
            if needed <= self._blocks:
                break
            self._blocks = needed
        if table_clusters * cluster > MAX_REFCOUNT_TABLE_BYTES:
            raise Error("Could not resize image: File too large")
        behind = range(tables_start, tables_start + self._tables - early)
        if reserved:
            behind = range(tables_start + self._data_clusters, self._clusters)
            self._data_start = tables_start
        else:
            self._data_start = behind.stop
        self._l2_places = np.concatenate(
            [np.arange(1, 1 + early, dtype=np.uint64), np.arange(behind.start, behind.stop, dtype=np.uint64)]
        )
        self._hole = moved and not early
        table_cluster = tables_start - table_clusters if moved else 1

        header.l1_entries = l1_entries
        header.l1_offset = 3 * cluster if l1_entries else 0
        header.refcount_table_offset = table_cluster * cluster
        header.refcount_table_clusters = table_clusters
        self._l1_end = 3 * cluster + l1_entries * 8

    # -- sizes in bytes

    @property
    def data(self) -> range:
        """The bytes of the image file that are the guest's."""
        start = self._data_start * self._cluster
        return range(start, start + self._data_clusters * self._cluster)

    @property
    def data_bytes(self) -> int:
        """How long the guest's data is where it is placed, in whole clusters or subclusters."""
        grain = self._cluster // 32 if self.header.extended_l2 else self._cluster
        return min(-(-self.header.size // grain) * grain, self._entries * self._cluster)

    @property
    def length(self) -> int:
        """How long the image file has to be at least."""
        end = self._clusters * self._cluster
        if self._clusters == self._crypto_start:
            return self._l1_end
        if self._data_clusters and not self._reserved:
            return self.data.start + self.data_bytes
        return end

    # -- the writes

    def wipe(self) -> Iterator[Step]:
        """What makes a file that was an image none, before `steps`."""
        yield Write(0, bytes(SECTOR))
        yield Barrier()

    def steps(self, stale: int) -> Iterator[Step]:
        """What makes the image, in this order, once the file is `length` bytes long.

        :param stale: so many bytes from the file's start on hold what was there before.
        """
        cluster = self._cluster
        head = self.header.build()
        end = min(self.data.stop, stale)
        if end > self.data.start:
            yield Zeroes(self.data.start, end - self.data.start)
        l1_start = 3 * cluster
        if self._l1_end > l1_start:
            yield Zeroes(l1_start, self._l1_end - l1_start)
        yield from self._crypto_steps(stale)
        yield from self._refcount_steps()
        yield from self._mapping_steps()
        if cluster > SECTOR:
            inside = head[SECTOR:]
            if inside:
                yield Write(SECTOR, inside)
            yield Zeroes(SECTOR + len(inside), cluster - SECTOR - len(inside))
        yield Barrier()
        yield Write(0, head[:SECTOR].ljust(SECTOR, b"\0"))
        yield Barrier()

    def _crypto_steps(self, stale: int) -> Iterator[Step]:
        if self._crypto_header is None:
            return
        start = self._crypto_start * self._cluster
        end = min(self._blocks_start * self._cluster, stale)
        if end > start:
            yield Zeroes(start, end - start)
        for offset, data in self._crypto_header.pieces:
            yield Write(start + offset, data)

    def _refcount_steps(self) -> Iterator[Step]:
        cluster = self._cluster
        order = self.header.refcount_order
        per_block = refcounts.block_entries(cluster, order)
        places = np.arange(self._blocks_start - 1, self._blocks_start + self._blocks - 1, dtype=np.uint64)
        places[0] = 2
        counts = refcounts.parse_block(bytes(cluster), order)
        counts[:] = 1
        full = refcounts.build_block(counts, order)
        for number in range(self._blocks):
            used = self._clusters - number * per_block
            data = full
            if used < per_block or (not number and self._hole):
                counts[used:] = 0
                if not number and self._hole:
                    counts[1] = 0
                data = refcounts.build_block(counts, order)
                counts[:used] = 1
            yield from _pieces(int(places[number]) * cluster, data)
        table = np.zeros(self.header.refcount_table_clusters * cluster // 8, ">u8")
        table[: self._blocks] = places * np.uint64(cluster)
        yield from _pieces(self.header.refcount_table_offset, table.tobytes())

    def _mapping_steps(self) -> Iterator[Step]:
        if not self._tables:
            return
        cluster, per_table = self._cluster, self.header.l2_entries
        start = 0 if self.header.external_data else self.data.start
        for number in range(self._tables):
            first = number * per_table
            count = min(per_table, self._entries - first)
            table = np.zeros((per_table, self.header.l2_entry_bytes // 8), ">u8")
            offsets = np.arange(first, first + count, dtype=np.uint64) * np.uint64(cluster) + np.uint64(start)
            table[:count, 0] = offsets | np.uint64(mapping.COPIED)
            yield from _pieces(int(self._l2_places[number]) * cluster, table.tobytes())
        l1 = self._l2_places * np.uint64(cluster) | np.uint64(mapping.COPIED)
        yield from _pieces(self.header.l1_offset, l1.astype(">u8").tobytes())


def _pieces(offset: int, data: bytes) -> Iterator[Write]:
    for start in range(0, len(data), _PIECE):
        yield Write(offset + start, data[start : start + _PIECE])
