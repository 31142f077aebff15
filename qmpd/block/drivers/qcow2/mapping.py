"""L1 and L2 tables: where the guest's clusters are in the image file.

A guest offset selects an entry of the L1 table, which holds the offset of an L2 table,
and an entry of that, which describes one cluster.  With extended entries a second
word says for each of 32 subclusters whether it is allocated or reads as zeroes.

In memory a piece of an L2 table (a *slice*) is an `array` of machine integers: looking up one
entry of it is three times as fast as in a numpy array, and most requests look up one.

Source: qcow2 specification, section "Cluster mapping".
"""

from __future__ import annotations

import enum
import sys
from array import array
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qmpd.block.drivers.qcow2.header import SUBCLUSTERS

#: The bits of an L1 or L2 entry that hold an offset in the file.
OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
#: The cluster or table is used once, so it may be written in place.
COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
#: In standard entries of version 3: the cluster reads as zeroes.
ZERO: Final = 1

#: Bits of an L1 entry, and of a standard entry of an uncompressed cluster, that have to be zero.
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
L2_RESERVED: Final = 0x3F00_0000_0000_01FE

#: All subclusters, in either half of the second word of an extended entry.
ALL_SUBCLUSTERS: Final = (1 << SUBCLUSTERS) - 1

#: Compressed data is counted in sectors of this many bytes.
SECTOR: Final = 512

#: All bits of an entry.
WORD: Final = (1 << 64) - 1

#: So many entries are compared one by one before numpy is asked: most runs that a request needs are shorter.
_FEW: Final = 16

_LITTLE: Final = sys.byteorder == "little"


class Kind(enum.Enum):
    """What a cluster or subcluster is; the two zero kinds differ in whether it has a place."""

    UNALLOCATED = enum.auto()
    #: It has a place in the file whose content does not count, and reads from the backing file.
    UNALLOCATED_PLACED = enum.auto()
    ZERO = enum.auto()
    ZERO_PLACED = enum.auto()
    DATA = enum.auto()
    COMPRESSED = enum.auto()
    INVALID = enum.auto()


#: The kinds that read as zeroes, and those that come from the backing file.
ZERO_KINDS: Final = frozenset((Kind.ZERO, Kind.ZERO_PLACED))
BACKING_KINDS: Final = frozenset((Kind.UNALLOCATED, Kind.UNALLOCATED_PLACED))


class CompressedPlace(NamedTuple):
    """Where compressed data is: its offset, and how many bytes may belong to it at most."""

    offset: int
    length: int


def parse_table(data: bytes | bytearray | memoryview) -> array[int]:
    """The words of an L1 table, an L2 table, or a refcount table."""
    words = array("Q", bytes(data))
    if _LITTLE:
        words.byteswap()
    return words


def build_table(words: array[int]) -> bytes:
    """The bytes of such a table, or of a part of it."""
    if _LITTLE:
        words = words[:]
        words.byteswap()
    return words.tobytes()


def is_placed(entry: int, external: bool = False) -> bool:
    """Whether an uncompressed cluster has a place in the file.

    :param external: the data is in another file, where offset 0 is a place like any other and the
        copied flag tells.
    """
    return bool(entry & OFFSET) or (external and bool(entry & COPIED))


def kind_of(entry: int, external: bool = False) -> Kind:
    """What a standard L2 entry says of its cluster (version 2 has no zero clusters)."""
    if entry & COMPRESSED:
        return Kind.COMPRESSED
    if entry & ZERO:
        return Kind.ZERO_PLACED if entry & OFFSET else Kind.ZERO
    return Kind.DATA if is_placed(entry, external) else Kind.UNALLOCATED


def subcluster_kind(entry: int, bitmap: int, index: int, external: bool = False) -> Kind:
    """What an extended L2 entry says of subcluster `index`.

    :param bitmap: the second word: the low half says what is allocated, the high half what is zero.
    """
    if entry & COMPRESSED:
        return Kind.COMPRESSED
    placed = is_placed(entry, external)
    allocated, zero = bitmap >> index & 1, bitmap >> SUBCLUSTERS + index & 1
    if allocated:
        return Kind.INVALID if zero or not placed else Kind.DATA
    if zero:
        return Kind.ZERO_PLACED if placed else Kind.ZERO
    return Kind.UNALLOCATED_PLACED if placed else Kind.UNALLOCATED


def ascending_run(words: array[int], index: int, limit: int, step: int, kept: int) -> int:
    """How many entries from `index` on are the same but for an offset that grows by `step`.

    :param limit: so many at most; there are so many.
    :param kept: the bits that are compared.
    """
    expected = words[index] & kept
    for count in range(1, min(limit, _FEW)):
        expected += step
        if words[index + count] & kept != expected:
            return count
    if limit <= _FEW:
        return limit
    found = np.frombuffer(words, np.uint64, limit, index * words.itemsize) & np.uint64(kept)
    wanted = np.arange(limit, dtype=np.uint64) * np.uint64(step) + found[0]
    return _length(found == wanted)


def kind_run(words: array[int], index: int, limit: int, external: bool = False) -> int:
    """How many standard entries from `index` on, at most `limit`, are of the same kind; `limit` are there."""
    kind = kind_of(words[index], external)
    for count in range(1, min(limit, _FEW)):
        if kind_of(words[index + count], external) is not kind:
            return count
    if limit <= _FEW:
        return limit
    found = np.frombuffer(words, np.uint64, limit, index * words.itemsize)
    placed = np.uint64(OFFSET | COPIED if external and not words[index] & ZERO else OFFSET)
    same_flags = (found ^ found[0]) & np.uint64(COMPRESSED | ZERO) == 0
    return _length(same_flags & (((found & placed) != 0) == bool(found[0] & placed)))


def are_zero(entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which standard entries are of zero clusters."""
    zero: NDArray[np.bool_] = entries & np.uint64(COMPRESSED | ZERO) == np.uint64(ZERO)
    return zero


def first_zero(words: array[int]) -> int | None:
    """The index of the first standard entry of a zero cluster; None if there is none."""
    found = are_zero(np.frombuffer(words, np.uint64))
    first = int(found.argmax())
    return first if found[first] else None


def zero_run(words: array[int], index: int, limit: int) -> int:
    """How many standard entries from `index` on, at most `limit`, are of zero clusters."""
    count = 0
    for entry in words[index : index + limit]:
        if entry & COMPRESSED or not entry & ZERO:
            break
        count += 1
    return count


def _length(alike: NDArray[np.bool_]) -> int:
    """How many values at the beginning are true."""
    first = int(alike.argmin())
    return len(alike) if alike[first] else first


def compressed_place(entry: int, cluster_bits: int) -> CompressedPlace:
    """Where the data of a compressed cluster is (section "Compressed Clusters Descriptor")."""
    bits = 62 - (cluster_bits - 8)
    offset = entry & (1 << bits) - 1
    more_sectors = (entry & COMPRESSED - 1) >> bits
    return CompressedPlace(offset, (more_sectors + 1) * SECTOR - offset % SECTOR)


def compressed_clusters(
    entries: NDArray[np.uint64], cluster_bits: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The numbers of the first and of the last cluster of the file that each descriptor touches."""
    bits = np.uint64(62 - (cluster_bits - 8))
    offsets = entries & (np.uint64(1) << bits) - np.uint64(1)
    more_sectors = (entries & np.uint64(COMPRESSED - 1)) >> bits
    per_cluster = np.uint64((1 << cluster_bits) // SECTOR)
    sectors = offsets // np.uint64(SECTOR)
    return sectors // per_cluster, (sectors + more_sectors) // per_cluster


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int:
    """The descriptor of `length` bytes of compressed data at `offset`."""
    bits = 62 - (cluster_bits - 8)
    more_sectors = (offset + length - 1) // SECTOR - offset // SECTOR
    return COMPRESSED | more_sectors << bits | offset


def subcluster_mask(first: int, end: int) -> int:
    """The bits of subclusters from `first` up to `end`, in the low half."""
    return (1 << end) - (1 << first)
