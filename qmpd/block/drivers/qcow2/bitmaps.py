"""The bitmap directory: which bitmaps an image holds, and whether they are to be believed.

A bitmap that is recorded automatically misses what qmpd writes, for it does not record.  So before the
first write its flag "in use" is set, as of one that nobody saved: QEMU shows it as inconsistent, and lets
it be removed.  Its clusters stay its own, which they would not if the autoclear bit went.  Bitmaps that
are not recorded stay valid until the disk gets another size.

Source: qcow2 specification, section "Bitmaps".
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from qmpd.block.drivers.qcow2 import mapping
from qmpd.block.drivers.qcow2.header import MAX_L1_BYTES

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.header import Bitmaps
    from qmpd.block.node import Data

_ENTRY: Final = struct.Struct(">QIIBBHI")
_FLAGS_POSITION: Final = 12


class Flags(enum.IntFlag):
    """Flags of a bitmap."""

    IN_USE = 1
    AUTO = 2


class Bitmap(NamedTuple):
    """An entry of the directory, at `position` in it; the table is at `table_offset` in the file (bytes)."""

    position: int
    table_offset: int
    table_entries: int
    flags: int


def parse_directory(directory: bytes) -> Iterator[Bitmap]:
    """The entries, as far as they are whole."""
    position = 0
    while position + _ENTRY.size <= len(directory):
        table, entries, flags, _, _, name_length, extra = _ENTRY.unpack_from(directory, position)
        yield Bitmap(position, table, entries, flags)
        position += -(-(_ENTRY.size + name_length + extra) // 8) * 8


def not_to_be_believed(directory: bytes, *, resized: bool = False) -> bytes:
    """The directory, with the flag "in use" where a bitmap is about to miss something.

    :param resized: the disk gets another size, so that no bitmap fits any more.
    """
    changed = bytearray(directory)
    for bitmap in parse_directory(directory):
        if resized or bitmap.flags & Flags.AUTO:
            flags = bitmap.flags | Flags.IN_USE
            struct.pack_into(">I", changed, bitmap.position + _FLAGS_POSITION, flags)
    return bytes(changed)


async def clusters_of(
    read: Callable[[int, int], Awaitable[Data]], bitmaps: Bitmaps, cluster_bytes: int
) -> list[tuple[int, int]]:
    """What the bitmaps of an image take: offset and length of each piece, in bytes.

    :param read: reads from the image file.
    :raise OSError: what the storage says.
    """
    found = [(bitmaps.directory_offset, bitmaps.directory_bytes)]
    for bitmap in parse_directory(bytes(await read(bitmaps.directory_offset, bitmaps.directory_bytes))):
        table, length = bitmap.table_offset, bitmap.table_entries * 8
        if length <= MAX_L1_BYTES and table % cluster_bytes == 0:
            found.append((table, length))
            words = mapping.parse_table(await read(table, length))
            places = [word & mapping.OFFSET for word in words]
            found += [(place, cluster_bytes) for place in places if place and place % cluster_bytes == 0]
    return found
