"""The payload of an encrypted disk: requests go to the segment that they lie in, through its cipher.

Nearly every volume has one segment.  LUKS2 allows several in a row, each with a cipher, a sector size and
a first sector number of its own; requests that cross a border are divided.

Source: LUKS2 On-Disk Format Specification 1.1, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from qmpd.block.buffers import unset
from qmpd.block.node import Data, Extent, Node
from qmpd.block.tiled_cipher import LONG, TILE, TiledCipher
from qmpd.crypto.sectors import SectorCipher

if TYPE_CHECKING:
    from qmpd.block.graph import Graph
    from qmpd.crypto.luks import PayloadSegment
    from qmpd.crypto.memory import Buffer, KeyBuffer

_SECTOR: Final = 512

#: Where a segment ends that goes to the end of the file.
_ENDLESS: Final = 1 << 63


def in_sectors(size: int, sector_size: int) -> int:
    """How long a payload is made that shall have `size` bytes: whole sectors, if they are large.

    With sectors of 512 bytes a file may end amid the last one, as QEMU leaves it: what is missing counts
    as zeroes.
    """
    return size if sector_size == _SECTOR else size + -size % sector_size


class _Part(NamedTuple):
    """A segment at work.

    :param start: where it begins in the payload, in bytes; it ends at `end`.
    :param shift: what is added to get from there to the file.
    :param first_sector: the number of the payload's first sector, if all of it were like this segment.
    """

    start: int
    end: int
    shift: int
    first_sector: int
    cipher: TiledCipher

    def sector(self, offset: int) -> int:
        """The number of the sector at this offset of the payload."""
        return self.first_sector + offset // _SECTOR


class Payload:
    """The segments of a volume, unlocked; it has the duty to wipe the key.

    :param segments: in their order.
    :param key: the volume key; copied.
    """

    def __init__(self, graph: Graph, segments: Sequence[PayloadSegment], key: Buffer) -> None:
        self._parts: list[_Part] = []
        ciphers: dict[tuple[object, int], TiledCipher] = {}
        start = 0
        for segment in segments:
            kind = segment.spec, segment.sector_size
            if kind not in ciphers:
                sectors = SectorCipher(segment.spec, key, segment.sector_size, memory=graph.key_memory)
                ciphers[kind] = TiledCipher(sectors, graph.cipher_pool)
            end = _ENDLESS if segment.size is None else start + segment.size
            first = segment.first_sector - start // _SECTOR
            self._parts.append(_Part(start, end, segment.offset - start, first, ciphers[kind]))
            start = end
        self._ciphers = list(ciphers.values())
        #: Requests must begin and end at multiples of this many bytes.
        self.alignment = max(segment.sector_size for segment in segments)

    def close(self) -> None:
        """Wipe the key, here and in the processes that have it.  May be called again."""
        for cipher in self._ciphers:
            cipher.close()

    @property
    def is_dynamic(self) -> bool:
        """Whether it goes to the end of its file."""
        return self._parts[-1].end == _ENDLESS

    def size(self, file_size: int) -> int:
        """How long it is, in bytes, if its file has `file_size`."""
        last = self._parts[-1]
        if not self.is_dynamic:
            return last.end
        there = max(file_size - last.shift, last.start)
        return there - (there - last.start) % self.alignment

    def file_size(self, size: int) -> int:
        """How long the file has to be for a dynamic payload of at least `size` bytes."""
        return in_sectors(size, self.alignment) + self._parts[-1].shift

    def copy_key(self) -> KeyBuffer:
        """A copy of the volume key, for the caller to wipe."""
        return self._ciphers[0].cipher.copy_key()

    async def read(self, file: Node, offset: int, length: int) -> Data:
        """Read plaintext.

        :param offset: in the payload, in bytes.
        :raise OSError: what the file says.
        """
        if len(self._parts) == 1:
            part = self._parts[0]
            return await part.cipher.read(file, offset + part.shift, length, part.sector(offset))
        plain = unset(length)
        for part, start, size in self._divide(offset, length):
            piece = await part.cipher.read(file, start + part.shift, size, part.sector(start))
            plain[start - offset : start - offset + size] = piece
        return plain

    async def write(self, file: Node, offset: int, data: memoryview, *, grow: bool) -> None:
        """Write plaintext.

        :param offset: in the payload, in bytes.
        :param grow: as of :meth:`Node.pwrite`.
        :raise OSError: what the file says.
        """
        for part, start, size in self._divide(offset, len(data)):
            piece = data[start - offset : start - offset + size]
            await part.cipher.write(file, start + part.shift, piece, part.sector(start), grow=grow)

    def read_cached(self, file: Node, requests: Sequence[Extent], into: memoryview) -> list[bool]:
        """Serve what needs no waiting; as :meth:`Node.read_cached`."""
        part = self._parts[0]
        if len(self._parts) > 1 or (any(length >= LONG for _, length in requests) and part.cipher.has_room):
            return [False] * len(requests)
        shift = part.shift
        served = file.read_cached([(offset + shift, length) for offset, length in requests], into)
        if True in served:
            first = part.first_sector
            runs = [(first + offset // _SECTOR, length) for offset, length in requests]
            part.cipher.cipher.decrypt_runs(into, runs, into)
        return served

    def encrypt_many(self, writes: Sequence[tuple[int, Data]]) -> list[tuple[int, Data]] | None:
        """What to write to the file instead of several small writes to the payload.

        :returns: None if they are not small, or the payload has several segments.
        """
        if len(self._parts) > 1 or sum(len(data) for _, data in writes) > TILE:
            return None
        part = self._parts[0]
        first = part.first_sector
        joined = bytearray().join([data for _, data in writes])
        runs = [(first + offset // _SECTOR, len(data)) for offset, data in writes]
        part.cipher.cipher.encrypt_runs(joined, runs, joined)
        rest = memoryview(joined)
        encrypted: list[tuple[int, Data]] = []
        for offset, data in writes:
            encrypted.append((offset + part.shift, rest[: len(data)]))
            rest = rest[len(data) :]
        return encrypted

    def _divide(self, offset: int, length: int) -> Iterator[tuple[_Part, int, int]]:
        """The parts in which a request lies, and where it begins and how long it is there, in bytes."""
        end = offset + length
        for part in self._parts:
            start, stop = max(offset, part.start), min(end, part.end)
            if start < stop:
                yield part, start, stop - start
