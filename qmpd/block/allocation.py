"""How a file takes up space: fallocate(2) with its modes, and hints to the file system.

Python's `os` offers neither.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import struct
from collections.abc import Callable

#: Modes of fallocate(2), from <linux/falloc.h>.
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10

#: ioctl(2) requests of <linux/fs.h>: a file's attributes, in two forms.
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
_GET_EXTENDED, _SET_EXTENDED = 0x801C581F, 0x401C5820
_FLAGS = struct.Struct("@i")
#: struct fsxattr: fsx_xflags, fsx_extsize, and three more words and padding that stay as they are.
_EXTENDED = struct.Struct("@II20s")
_NO_COPY_ON_WRITE = 0x00800000
_HAS_EXTENT_SIZE = 0x00000800


@functools.cache
def _libc_fallocate() -> Callable[[int, int, int, int], int]:
    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    return function


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocate, zero or give back `length` bytes at `offset`, all at once.

    :raise OSError: EOPNOTSUPP where the file system can't, and the others of fallocate(2).
    """
    if _libc_fallocate()(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def ask_no_copy_on_write(fd: int) -> None:
    """Ask the file system to overwrite this (still empty) file in place, where it has a choice."""
    try:
        (flags,) = _FLAGS.unpack(fcntl.ioctl(fd, _GET_FLAGS, bytes(_FLAGS.size)))
        fcntl.ioctl(fd, _SET_FLAGS, _FLAGS.pack(flags | _NO_COPY_ON_WRITE))
    except OSError:
        pass  # Most file systems have no such choice; it is a hint.


def hint_extent_size(fd: int, size: int) -> None:
    """Ask the file system to hand out space for this (still empty) file in pieces of `size` bytes."""
    try:
        flags, _, rest = _EXTENDED.unpack(fcntl.ioctl(fd, _GET_EXTENDED, bytes(_EXTENDED.size)))
        fcntl.ioctl(fd, _SET_EXTENDED, _EXTENDED.pack(flags | _HAS_EXTENT_SIZE, size & 0xFFFFFFFF, rest))
    except OSError:
        pass  # Only XFS takes such hints.
