"""Which bytes of an image are locked, as another process finds out."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

#: struct flock of fcntl(2).
FLOCK: Final = struct.Struct("@hhqqi4x")


def locked(path: Path) -> list[int]:
    """The bytes that anybody has locked."""
    found = []
    with path.open("rb") as file:
        for byte in (*range(100, 104), *range(200, 204)):
            asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            if FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK:
                found.append(byte)
    return found
