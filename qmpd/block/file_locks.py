"""Locks on an image file, byte for byte those of QEMU.

Each permission has a byte at 100 plus its bit number, locked (shared) by every
process that takes the permission, and one at 200 plus its bit number, locked
by every process that does not share it.  Whoever takes a permission looks
whether somebody has locked its "not shared" byte, and the other way round.
All bytes are locked before any is looked at, so that of two who come at the
same time at least one sees the other.

The locks belong to the open file description (Linux's F_OFD_SETLK), so two
nodes of one daemon on the same file keep each other out as well.

Unless the file was opened by somebody else, who passed the descriptor: copies of it
share one description, with its locks.  So those who use passed descriptors of one
file are *fellows* (:class:`PassedLocks`): they look at each other's locks
themselves, and a byte is unlocked when none of them needs it.  (QEMU unlocks what
another node relies on.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Collection, Iterable
from contextlib import suppress

from qmpd.block.permissions import NAMES, Permission
from qmpd.errors import Error

TAKEN_BASE = 100
UNSHARED_BASE = 200

#: struct flock: l_type, l_whence, l_start, l_len, l_pid (fcntl(2)).
_FLOCK = struct.Struct("@hhqqi4x")

#: What the system says where it, or a sandbox, has no locks of this kind.
_UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.EPERM)


def is_supported(fd: int) -> bool:
    """Whether the system knows locks of open file descriptions.

    A file system that has none is another matter: it says so when a byte is locked.
    """
    try:
        _first_lock(fd, 0)
    except OSError as error:
        return error.errno not in _UNKNOWN
    return True


class ImageLocks:
    """The locks that one descriptor holds.

    :param fd: open for reading at least.
    :param filename: how hints for people name the image.
    :param fellows: those whose descriptors may be copies of this one, and maybe itself.
    """

    def __init__(self, fd: int, filename: str = "", fellows: Collection[ImageLocks] = ()) -> None:
        self._fellows = fellows
        self._fd = fd
        self._filename = filename
        self._held: set[int] = set()
        self._before: frozenset[int] = frozenset()
        self._wanted: frozenset[int] = frozenset()

    def prepare(self, perm: Permission, shared: Permission) -> None:
        """Lock for `perm` and `shared` besides what is locked now, and look for conflicts.

        :raise Error: if another open file takes or does not share something, or there are no locks;
            `abort` then goes back.
        """
        taken = [index for index, (permission, _) in enumerate(NAMES) if perm & permission]
        unshared = [index for index, (permission, _) in enumerate(NAMES) if not shared & permission]
        self._before = frozenset(self._held)
        self._wanted = frozenset(
            [TAKEN_BASE + index for index in taken] + [UNSHARED_BASE + index for index in unshared]
        )
        for byte in sorted(self._wanted - self._held):
            self._lock(byte)
        for index in taken:
            self._look(UNSHARED_BASE + index, f'Failed to get "{NAMES[index][1]}" lock')
        for index in unshared:
            self._look(TAKEN_BASE + index, f'Failed to get shared "{NAMES[index][1]}" lock')

    def commit(self) -> None:
        """Keep only what was prepared last."""
        self._unlock(self._held - self._wanted)
        self._before = frozenset(self._held)

    def abort(self) -> None:
        """Go back to what was locked before `prepare`, also if that failed on its way or was never called."""
        self._unlock(self._held - self._before)

    def release(self) -> None:
        """Give back all of them.  Closing the descriptor does not, if there are copies."""
        self._unlock(set(self._held))

    def _others(self) -> list[ImageLocks]:
        return [fellow for fellow in self._fellows if fellow is not self]

    def _lock(self, byte: int) -> None:
        try:
            _set_lock(self._fd, fcntl.F_RDLCK, byte)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                # Only who does not go by these rules locks a byte for itself alone.
                raise Error(f"Failed to lock byte {byte}") from None
            raise Error(f"Failed to lock byte {byte}: {error.strerror}") from None
        self._held.add(byte)

    def _unlock(self, bytes_: Iterable[int]) -> None:
        others = self._others()
        for byte in bytes_:
            if any(byte in other._held for other in others):
                self._held.discard(byte)
                continue
            for other in others:
                # It may have been left there for this one's sake.
                with suppress(OSError):
                    _set_lock(other._fd, fcntl.F_UNLCK, byte)
            # What can't be given back stays locked, which is safe, and goes with the file.
            with suppress(OSError):
                _set_lock(self._fd, fcntl.F_UNLCK, byte)
                self._held.discard(byte)

    def _look(self, byte: int, complaint: str) -> None:
        """Refuse if another open file description holds a lock on this byte."""
        hint = f"Is another process using the image [{self._filename}]?" if self._filename else ""
        try:
            lock = _first_lock(self._fd, byte)
        except OSError as error:
            raise Error(f"{complaint}: {error.strerror}", hint=hint) from None
        if lock != fcntl.F_UNLCK or any(byte in other._held for other in self._others()):
            raise Error(complaint, hint=hint)


class PassedLocks:
    """The locks on descriptors that were passed to the process, of all files."""

    def __init__(self) -> None:
        self._by_file: dict[tuple[int, int], list[ImageLocks]] = {}

    def join(self, fd: int, filename: str) -> ImageLocks:
        """The locks of one more descriptor, which keep clear of those on the same file."""
        status = os.fstat(fd)
        fellows = self._by_file.setdefault((status.st_dev, status.st_ino), [])
        locks = ImageLocks(fd, filename, fellows)
        fellows.append(locks)
        return locks

    def leave(self, locks: ImageLocks) -> None:
        """Give its locks back; harmless if it has not joined."""
        locks.release()
        for file, fellows in list(self._by_file.items()):
            if locks in fellows:
                fellows.remove(locks)
            if not fellows:
                del self._by_file[file]


def _set_lock(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _first_lock(fd: int, byte: int) -> int:
    """The kind of lock with which another open file description holds a byte; F_UNLCK if none does."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return int(_FLOCK.unpack(answer)[0])
