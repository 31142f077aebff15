"""The driver `host_device`: a block device of the host, such as a logical volume.

It is a file in most respects: reads try the page cache first, writes go to threads, and locks are
taken on the device's node in the file system.  What is different is that its size is the system's to
change, and that space is given back by the device and not by a file system.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Hashable

from qmpd.block.drivers.file import FileNode, Kind
from qmpd.errors import Error

#: ioctl(2) of <linux/fs.h>: discard a range, of which offset and length are given in bytes.
_DISCARD = 0x1277
_RANGE = struct.Struct("=QQ")

#: What a device says that can't discard.
_CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL)


class HostDeviceNode(FileNode):
    """One block device (or character device, as QEMU has it), opened for as much as its options allow."""

    driver = "host_device"
    kind = Kind(frozenset({stat.S_IFBLK, stat.S_IFCHR}), "either a character or block device")

    def _measure(self) -> int:
        try:
            return os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError as error:
            raise Error(f"Could not get the size of '{self._filename}': {error.strerror}") from None

    @property
    def identity(self) -> Hashable:
        """Which device it is, whatever its name."""
        status = os.fstat(self._descriptor)
        return self.driver, stat.S_IFMT(status.st_mode), status.st_rdev

    @property
    def can_grow(self) -> bool:
        """Only the system can make it larger."""
        return False

    @property
    def grows_with_zeroes(self) -> bool:
        """Whatever was there before is in a larger device."""
        return False

    async def _give_back(self, offset: int, length: int) -> bool:
        try:
            await self.graph.in_io_thread(
                fcntl.ioctl, self._descriptor, _DISCARD, _RANGE.pack(offset, length)
            )
        except OSError as error:
            if error.errno in _CANNOT:
                return False
            raise
        return True

    async def _truncate(self, size: int, preallocation: str) -> None:
        """Take notice of the size that the device has by now; a smaller one is no mistake.

        :raise Error: if it shall be larger than it is.
        """
        if preallocation != "off":
            raise Error(f"Preallocation mode '{preallocation}' unsupported for this non-regular file")
        current = self._measure()
        if size > current:
            raise Error("Cannot grow device files")
        self._size = current
