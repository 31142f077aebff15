"""How the C library's allocator treats the memory of a daemon.

By default glibc gives every freed buffer of some 100 KiB back to the system,
and the next request of that size pays for having it mapped, zeroed and put
into the page tables again: more than for reading its data.  A daemon that moves
disks' data needs such buffers all the time, so freed memory stays with the
process; what may be under way at once bounds it.

Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

#: Bytes of free memory at the heap's top from which on some is given back.
_KEPT: Final = 64 << 20
#: Blocks from this many bytes on are mapped one by one; the most that glibc takes.
_MAPPED: Final = 32 << 20
#: Heaps, so that what threads have freed is not lost to the others.
_ARENAS: Final = 2


def keep_freed_memory() -> None:
    """Set it so; does nothing where the C library is another one."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for parameter, value in (
        (_M_TRIM_THRESHOLD, _KEPT),
        (_M_MMAP_THRESHOLD, _MAPPED),
        (_M_ARENA_MAX, _ARENAS),
    ):
        mallopt(ctypes.c_int(parameter), ctypes.c_int(value))
