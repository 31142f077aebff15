"""Locks on an image file, byte for byte those of QEMU.

Each permission has a byte at 100 plus its bit number, locked (shared) by every
process that takes the permission, and one at 200 plus its bit number, locked
by every process that does not share it.  Whoever takes a permission looks
whether somebody has locked its "not shared" byte, and the other way round.
The locks belong to the open file description (Linux's F_OFD_SETLK), so two
nodes of one daemon on the same file keep each other out as well.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from qmpd.block.permissions import NAMES, Permission
from qmpd.errors import Error

TAKEN_BASE = 100
UNSHARED_BASE = 200

#: struct flock: l_type, l_whence, l_start, l_len, l_pid (fcntl(2)).
_FLOCK = struct.Struct("@hhqqi4x")


class ImageLocks:
    """The locks that one descriptor holds.

    :param fd: open for reading at least.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._taken = Permission.nothing()
        self._unshared = Permission.nothing()
        self._before = (self._taken, self._unshared)

    def prepare(self, perm: Permission, shared: Permission) -> None:
        """Lock for `perm` and `shared` besides what is locked now, and look for conflicts.

        :raise Error: if another open file takes or does not share something.
        """
        unshared = ~shared & Permission.everything()
        self._before = (self._taken, self._unshared)
        self._set(self._taken | perm, self._unshared | unshared)
        for permission, name in NAMES:
            bit = permission.value.bit_length() - 1
            if perm & permission and self._is_locked(UNSHARED_BASE + bit):
                raise Error(f'Failed to get "{name}" lock')
            if unshared & permission and self._is_locked(TAKEN_BASE + bit):
                raise Error(f'Failed to get shared "{name}" lock')
        self._wanted = (perm, unshared)

    def commit(self) -> None:
        """Keep only what was prepared last."""
        self._set(*self._wanted)

    def abort(self) -> None:
        """Go back to what was locked before `prepare`."""
        self._set(*self._before)

    def _set(self, taken: Permission, unshared: Permission) -> None:
        for permission, _ in NAMES:
            bit = permission.value.bit_length() - 1
            self._change(TAKEN_BASE + bit, bool(self._taken & permission), bool(taken & permission))
            self._change(UNSHARED_BASE + bit, bool(self._unshared & permission), bool(unshared & permission))
        self._taken, self._unshared = taken, unshared

    def _change(self, byte: int, now: bool, wanted: bool) -> None:
        if now == wanted:
            return
        kind = fcntl.F_RDLCK if wanted else fcntl.F_UNLCK
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise Error(f"Failed to lock byte {byte}") from None
            raise Error(f"Failed to lock byte {byte}: {error.strerror}") from None

    def _is_locked(self, byte: int) -> bool:
        """Whether another open file description holds a lock on this byte."""
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
