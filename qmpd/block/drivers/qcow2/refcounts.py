"""Reference counts: how often each cluster of the image file is used.

The refcount table holds the offsets of refcount blocks; a block is a cluster full of
counts of 1 to 64 bits each.  In memory a block is a numpy array with a number for
each cluster, so that a run of free clusters is found with one call.

Source: qcow2 specification, section "Host cluster management".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: The bits of an entry of the refcount table that hold an offset; the others are reserved.
TABLE_OFFSET: Final = 0xFFFF_FFFF_FFFF_FE00

Counts = NDArray[Any]

#: Numbers narrower than a byte are spread over bytes.
_WIRE: Final[Mapping[int, np.dtype[Any]]] = {
    3: np.dtype("u1"),
    4: np.dtype(">u2"),
    5: np.dtype(">u4"),
    6: np.dtype(">u8"),
}


def block_entries(cluster_bytes: int, order: int) -> int:
    """How many clusters a refcount block counts; `order` is the binary logarithm of a count's bits."""
    return cluster_bytes * 8 >> order


def highest(order: int) -> int:
    """The largest count that fits."""
    return (1 << (1 << order)) - 1


def parse_block(data: bytes | bytearray | memoryview, order: int) -> Counts:
    """The counts of a refcount block, writable and in the machine's byte order."""
    if order >= 3:
        return np.frombuffer(data, _WIRE[order]).astype(_WIRE[order].newbyteorder("="))
    width = 1 << order
    raw = np.frombuffer(data, np.uint8)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    # The first count of a byte is in its lowest bits.
    counts: Counts = raw[:, None] >> shifts & np.uint8((1 << width) - 1)
    return counts.reshape(-1)


def build_block(counts: Counts, order: int) -> bytes:
    """The bytes of counts; their number has to fill whole bytes."""
    if order >= 3:
        return counts.astype(_WIRE[order]).tobytes()
    width = 1 << order
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    raw: Counts = np.bitwise_or.reduce(counts.reshape(-1, 8 // width) << shifts, axis=1)
    return raw.astype(np.uint8).tobytes()


def free_run(counts: Counts, start: int, wanted: int) -> tuple[int, int]:
    """The first run of zeroes from index `start` on: its index and its length, at most `wanted`.

    The length is 0 if there is none.
    """
    step = max(64, wanted)
    size = len(counts)
    while start < size:
        piece = counts[start : start + step]
        free = piece == 0
        first = int(free.argmax())
        if free[first]:
            start += first
            used = counts[start : start + wanted] != 0
            length = int(used.argmax()) if used.any() else len(used)
            return start, length
        start += len(piece)
        step = min(step * 4, 1 << 16)
    return size, 0
