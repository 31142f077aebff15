"""fallocate(2), which Python's `os` does not offer with its modes."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

#: Modes of fallocate(2), from <linux/falloc.h>.
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10


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
