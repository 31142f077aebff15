"""LUKS2's binary headers: two copies of everything, each with a sequence number and a checksum.

A volume begins with the primary copy: a binary header of 4 KiB, and an area
with JSON text.  The secondary copy comes right after it.  Both say the same,
but for magic, offset, salt and checksum.  Whoever changes something gives both
the next sequence number.  A copy whose checksum is wrong does not count; of
two good ones the newer counts, and at the next change both become good again.

Functions here take and give bytes; whoever calls them reads and writes.

Source: LUKS2 On-Disk Format Specification 1.1, sections 2.1 to 2.3.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from qmpd.crypto import digests
from qmpd.crypto.memory import Buffer
from qmpd.errors import Error

#: Of a binary header, without the JSON area.
BINARY_BYTES: Final = 4096

#: How long a copy may be, JSON area included; also where the secondary copy may begin (section 2.1, table 1).
SIZES: Final = tuple(1 << shift for shift in range(14, 23))

MAGIC: Final = b"LUKS\xba\xbe"
SECONDARY_MAGIC: Final = b"SKUL\xba\xbe"
VERSION: Final = 2

#: magic, version, hdr_size, seqid, label, csum_alg, salt, uuid, subsystem, hdr_offset, padding,
#: csum (section 2.1, figure 2); 3584 zeroes follow.
_BINARY: Final = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
_MAX_SEQUENCE: Final = (1 << 64) - 1
_CHECKSUM_BYTES: Final = 64
_CHECKSUM_OFFSET: Final = _BINARY.size - _CHECKSUM_BYTES
_SALT_BYTES: Final = 64


@dataclass(frozen=True)
class BinaryHeader:
    """What both copies say.

    :param size: of a copy, JSON area included, in bytes.
    :param sequence: the number of the change that they come from.
    :param label: for people and udev, at most 47 bytes.
    :param checksum_hash: the checksum's hash.
    :param uuid: as text.
    :param subsystem: a second label, at most 47 bytes.
    """

    size: int
    sequence: int
    label: str
    checksum_hash: str
    uuid: str
    subsystem: str

    @property
    def json_bytes(self) -> int:
        """Length of the JSON area."""
        return self.size - BINARY_BYTES

    def next(self) -> BinaryHeader:
        """The header of the next change.

        :raise Error: there can't be another one.
        """
        if self.sequence == _MAX_SEQUENCE:
            raise Error("The sequence number of the LUKS2 header can't grow any more")
        return replace(self, sequence=self.sequence + 1)

    def pack(self, json: bytes, *, secondary: bool, random: Callable[[int], bytes] = os.urandom) -> bytes:
        """Return a whole copy.

        :param json: the text, shorter than the JSON area.
        :param random: gives as many random bytes as it is asked for.
        :raise Error: the text is too long.
        """
        if len(json) >= self.json_bytes:
            raise Error(f"LUKS2 metadata needs {len(json) + 1} bytes, and there are {self.json_bytes}")
        binary = _BINARY.pack(
            SECONDARY_MAGIC if secondary else MAGIC,
            VERSION,
            self.size,
            self.sequence,
            self.label.encode(errors="surrogateescape"),
            self.checksum_hash.encode(),
            random(_SALT_BYTES),
            self.uuid.encode(errors="surrogateescape"),
            self.subsystem.encode(errors="surrogateescape"),
            self.size if secondary else 0,
            b"",
            b"",
        )
        copy = bytearray(binary.ljust(BINARY_BYTES, b"\0") + json.ljust(self.json_bytes, b"\0"))
        checksum = _checksum(self.checksum_hash, copy)
        copy[_CHECKSUM_OFFSET : _CHECKSUM_OFFSET + len(checksum)] = checksum
        return bytes(copy)


@dataclass(frozen=True)
class Copy:
    """One of the two copies, as it was read.

    :param offset: where it was, in bytes.
    :param header: what its binary header says.
    :param json: the text of its JSON area, without the zeroes behind; whatever else is behind belongs to it.
    """

    offset: int
    header: BinaryHeader
    json: bytes


def claimed_size(beginning: Buffer, offset: int) -> int | None:
    """How long the copy is that seems to begin here.

    :param beginning: at least the first 16 bytes.
    :param offset: where they are from, in bytes.
    :returns: bytes, or None if this is no beginning of a copy.
    """
    magic, version, size = struct.unpack_from(">6sHQ", bytes(beginning[:16]).ljust(16, b"\0"))
    if magic != (SECONDARY_MAGIC if offset else MAGIC) or version != VERSION:
        return None
    if size not in SIZES or offset not in (0, size):
        return None
    return int(size)


def claimed_uuid(beginning: Buffer) -> str:
    """The UUID of a binary header, of which nothing else is believed; version 1 has it in the same place.

    :param beginning: at least the first :data:`BINARY_BYTES` bytes, or all that there are.
    """
    raw: bytes = _BINARY.unpack_from(bytes(beginning[: _BINARY.size]).ljust(_BINARY.size, b"\0"))[7]
    return raw.partition(b"\0")[0].decode(errors="surrogateescape")


def parse_copy(data: Buffer, offset: int) -> Copy:
    """Read a copy, and see that it is whole.

    :param data: as many bytes as :func:`claimed_size` says.
    :param offset: where they are from.
    :raise Error: what is wrong with it.
    """
    what = "secondary" if offset else "primary"
    size = claimed_size(data, offset)
    if size is None or len(data) < size:
        raise Error(f"There is no {what} LUKS2 header")
    fields = _BINARY.unpack_from(data)
    _, _, _, sequence, label, checksum_hash, _, uuid, subsystem, own_offset, _, checksum = fields
    if own_offset != offset:
        raise Error(f"The {what} LUKS2 header says that it is at {own_offset}, and it is at {offset}")
    names = [_text(field, what) for field in (label, checksum_hash, uuid, subsystem)]
    copy = bytearray(data[:size])
    copy[_CHECKSUM_OFFSET : _BINARY.size] = bytes(_CHECKSUM_BYTES)
    expected = _checksum(names[1], copy)
    if not hmac.compare_digest(expected, checksum[: len(expected)]):
        raise Error(f"The checksum of the {what} LUKS2 header is wrong")
    json = bytes(copy[BINARY_BYTES:]).rstrip(b"\0")
    if len(json) == size - BINARY_BYTES:
        raise Error(f"The JSON text of the {what} LUKS2 header is not NUL terminated")
    return Copy(offset, BinaryHeader(size, sequence, names[0], names[1], names[2], names[3]), json)


def choose(primary: Copy | None, secondary: Copy | None) -> Copy:
    """The copy that counts (section 2.3): the newer one, and the primary one of two equals.

    :param primary: None if it is damaged; so is `secondary`.
    :raise Error: both are damaged.
    """
    if primary is None and secondary is None:
        raise Error("Both LUKS2 headers are damaged")
    if primary is None or (secondary is not None and secondary.header.sequence > primary.header.sequence):
        assert secondary is not None, "one of them is there"
        return secondary
    return primary


def _checksum(hash_name: str, copy: Buffer) -> bytearray:
    """Of a copy with zeroes in the checksum's place."""
    checksum = bytearray(digests.algorithm(hash_name).digest_size)
    digests.digest_into(hash_name, copy, memoryview(checksum))
    return checksum


def _text(raw: bytes, what: str) -> str:
    text, nul, _ = raw.partition(b"\0")
    if not nul:
        raise Error(f"A name in the {what} LUKS2 header is not NUL terminated")
    return text.decode(errors="surrogateescape")
