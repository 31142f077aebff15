"""The snapshot table: the names of internal snapshots, and where their L1 tables are.

Source: qcow2 specification, section "Snapshots".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from qmpd.errors import Error

#: The table has at most this many bytes.
MAX_TABLE_BYTES: Final = 1024 * 65536
#: An entry's extra data has at most this many bytes, in what QEMU accepts.
MAX_EXTRA_BYTES: Final = 1024
#: QEMU cuts a name off after so many bytes.
MAX_NAME_BYTES: Final = 255

_ENTRY: Final = struct.Struct(">QIHHIIQII")
_VM_STATE: Final = struct.Struct(">Q")
_V3_EXTRA: Final = 24
_NO_COUNT: Final = (1 << 64) - 1


@dataclass
class Snapshot:
    """An internal snapshot; offsets and sizes are bytes, times are as the format counts them."""

    id: str
    name: str
    l1_offset: int
    l1_entries: int
    seconds: int = 0
    nanoseconds: int = 0
    #: Nanoseconds for which the guest had run.
    guest_clock: int = 0
    vm_state_bytes: int = 0
    #: The disk's size when it was taken; None in entries of old programs.
    disk_size: int | None = None
    #: Instructions executed, for record and replay; None if nobody counted.
    instructions: int | None = None
    #: What newer programs put behind that.
    unknown_extra: bytes = b""


def parse_table(data: bytes | bytearray | memoryview, count: int) -> tuple[list[Snapshot], int]:
    """The entries at the start of `data`, and how many bytes they take.

    :param data: as much of the table as there is; at most MAX_TABLE_BYTES are looked at.
    :raise Error: if it ends before the last entry does, or makes no sense.
    """
    data = bytes(data[:MAX_TABLE_BYTES])
    found: list[Snapshot] = []
    position = 0
    for _ in range(count):
        position = -(-position // 8) * 8
        if position + _ENTRY.size > len(data):
            raise Error("Snapshot table is too large")
        (l1_offset, l1_entries, id_length, name_length, seconds, nanoseconds, clock, vm_state,
         extra_length) = _ENTRY.unpack_from(data, position)  # fmt: skip
        position += _ENTRY.size
        end = position + extra_length + id_length + name_length
        if end > len(data):
            raise Error("Snapshot table is too large")
        if extra_length > MAX_EXTRA_BYTES:
            raise Error("Too much extra metadata in snapshot table entry")
        extra = data[position : position + extra_length]
        position += extra_length
        snapshot = Snapshot(
            id=data[position : position + id_length].decode(errors="surrogateescape"),
            name=data[position + id_length : end].decode(errors="surrogateescape"),
            l1_offset=l1_offset,
            l1_entries=l1_entries,
            seconds=seconds,
            nanoseconds=nanoseconds,
            guest_clock=clock,
            vm_state_bytes=vm_state,
        )
        if len(extra) >= 8:
            (snapshot.vm_state_bytes,) = _VM_STATE.unpack_from(extra)
        if len(extra) >= 16:
            (snapshot.disk_size,) = _VM_STATE.unpack_from(extra, 8)
        if len(extra) >= _V3_EXTRA:
            (instructions,) = _VM_STATE.unpack_from(extra, 16)
            snapshot.instructions = None if instructions == _NO_COUNT else instructions
            snapshot.unknown_extra = extra[_V3_EXTRA:]
        found.append(snapshot)
        position = end
    return found, position


def build_table(snapshots: list[Snapshot], default_size: int) -> bytes:
    """The bytes of the table.

    :param default_size: the disk size to be written where a snapshot does not know its own.
    """
    data = bytearray()
    for snapshot in snapshots:
        data += bytes(-len(data) % 8)
        name, id_ = (text.encode(errors="surrogateescape") for text in (snapshot.name, snapshot.id))
        size = default_size if snapshot.disk_size is None else snapshot.disk_size
        instructions = _NO_COUNT if snapshot.instructions is None else snapshot.instructions
        extra = struct.pack(">QQQ", snapshot.vm_state_bytes, size, instructions) + snapshot.unknown_extra
        small_state = snapshot.vm_state_bytes if snapshot.vm_state_bytes < 1 << 32 else 0
        data += _ENTRY.pack(
            snapshot.l1_offset, snapshot.l1_entries, len(id_), len(name), snapshot.seconds,
            snapshot.nanoseconds, snapshot.guest_clock, small_state, len(extra),
        )  # fmt: skip
        data += extra + id_ + name
    return bytes(data)
