"""The driver `file`: a regular file of the host.

Reads try the page cache first (`RWF_NOWAIT`); only what is not there, and
everything that writes, goes to a thread, so the event loop never waits for
storage.  With `cache.direct` the whole pages of a request go past the page
cache, and only ragged ends through it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qmpd.block import allocation, creation
from qmpd.block.buffers import unset
from qmpd.block.change import Change
from qmpd.block.file_locks import ImageLocks, is_supported
from qmpd.block.node import SECTOR, BlockStatus, Data, Extent, Node, NotSupported
from qmpd.block.options import NodeOptions
from qmpd.block.permissions import Permission
from qmpd.descriptors import PREFIX, FdSets
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.graph import Graph

#: O_DIRECT wants memory, offsets and lengths in units of this many bytes.
PAGE = mmap.PAGESIZE

#: `fallocate` modes that a file system may not have.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)

#: Preallocation in full is written in pieces of this many bytes.
_PIECE = 1 << 20

#: What every file is opened with.
_OPEN_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def open_regular(fdsets: FdSets, filename: str, flags: int, *, same_as: int | None = None) -> int:
    """A descriptor of a regular file, which :meth:`FdSets.close` closes; never waits for a FIFO's other end.

    :param filename: also of a set (`/dev/fdset/N`).
    :param flags: as for open(2).
    :param same_as: a descriptor of the file that it has to be, which matters for a set.
    :raise OSError: as open(2).
    :raise Error: if it is no regular file, or can't be written to as a disk is.
    """
    if filename.startswith(PREFIX):
        descriptor = open_passed(fdsets, filename, flags, same_as=same_as)
    else:
        descriptor = os.open(filename, flags | _OPEN_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        fdsets.close(descriptor)
        raise Error(f"'file' driver requires '{filename}' to be a regular file")
    return descriptor


def open_passed(fdsets: FdSets, filename: str, flags: int, *, same_as: int | None = None) -> int:
    """A copy of a descriptor of a set, which :meth:`FdSets.close` closes.

    :param filename: `/dev/fdset/N`.
    :param flags: as for open(2).
    :param same_as: a descriptor of the file that it has to be.
    :raise Error: if there is none that fits, or it can't be written to as a disk is.
    """
    descriptor = fdsets.open(filename, flags, same_as=same_as)
    if flags & os.O_ACCMODE != os.O_RDONLY and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
        # pwrite(2): the system would not care for the offset.
        fdsets.close(descriptor)
        raise Error(f"'{filename}' can only be appended to: it was opened with O_APPEND")
    return descriptor


def resize(descriptor: int, size: int, preallocation: str) -> None:
    """Set a file's size in bytes, and make room for what is new.

    :param preallocation: "off", "falloc" or "full" (PreallocMode); "full" writes zeroes.
    :raise Error: if the file can't have that size, or not in that way.
    """
    if preallocation not in ("off", "falloc", "full"):
        raise Error(f"Unsupported preallocation mode: {preallocation}")
    if size >= 1 << 63:
        # off_t is signed: such a size is negative to the system.
        raise Error(f"Could not resize file: {os.strerror(errno.EINVAL)}")
    current = os.fstat(descriptor).st_size
    if preallocation != "off" and size < current:
        raise Error("Preallocation can't be used for shrinking files")
    try:
        if preallocation == "off":
            os.ftruncate(descriptor, size)
        elif preallocation == "falloc":
            if size > current:
                os.posix_fallocate(descriptor, current, size - current)
        else:
            os.ftruncate(descriptor, size)
            zeroes = bytes(_PIECE)
            for offset in range(current, size, _PIECE):
                os.pwrite(descriptor, zeroes[: size - offset], offset)
            os.fsync(descriptor)
    except OSError as error:
        if preallocation != "off":
            os.ftruncate(descriptor, current)
            raise Error(f"Could not preallocate data for the new file: {error.strerror}") from None
        raise Error(f"Could not resize file: {error.strerror}") from None


class FileNode(Node):
    """One regular file, opened for as much as its options allow."""

    driver = "file"
    is_protocol = True
    changeable_options = frozenset({"drop-cache"})

    def __init__(
        self, graph: Graph, name: str, options: Mapping[str, Any], node_options: NodeOptions
    ) -> None:
        super().__init__(graph, name, options, node_options)
        self._filename: str = options["filename"]
        self._descriptor = -1
        self._direct_descriptor = -1
        #: The locks belong to the first open file description, whatever is opened later.
        self._lock_descriptor = -1
        self._retired: list[int] = []
        self._writable = False
        self._locks: ImageLocks | None = None
        self._size = 0
        self._discards_done = 0
        self._discards_failed = 0
        self._discarded_bytes = 0
        if not self._filename:
            raise Error("The 'file' block driver requires a file name")
        if options.get("aio") == "native" and not node_options.direct:
            raise Error("aio=native was specified, but it requires cache.direct=on, which was not specified.")

    async def open(self) -> None:
        """Open the file: for writing at once, or with `auto-read-only` when somebody wants to write."""
        writable = not self.read_only and not self.node_options.auto_read_only
        self._descriptor, self._direct_descriptor = self._open_descriptors(writable)
        self._writable = writable
        if self._shall_lock(self.options.get("locking", "auto")):
            self._lock_descriptor = os.dup(self._descriptor)
            if self._was_passed:
                self._locks = self.graph.passed_locks.join(self._lock_descriptor, self._filename)
            else:
                self._locks = ImageLocks(self._lock_descriptor, self._filename)
        self._size = os.fstat(self._descriptor).st_size

    def _shall_lock(self, locking: str) -> bool:
        """Whether to lock the image.

        :param locking: OnOffAuto.
        :raise Error: if it has to be, but the system has no locks that could be relied on.
        """
        if locking == "off" or is_supported(self._descriptor):
            return locking != "off"
        if locking == "on":
            # The older kind is lost when any descriptor of the file is closed.
            raise Error("locking=on was specified, but the system has no locks of open file descriptions")
        return False

    async def reopen(self, options: Mapping[str, Any], node_options: NodeOptions, change: Change) -> None:
        """Open the same file again if it is to be used in another way."""
        before = self.node_options
        await super().reopen(options, node_options, change)
        writable = not self.read_only and (self._writable or not node_options.auto_read_only)
        if writable == self._writable and node_options.direct == before.direct:
            return
        try:
            new = self._try_open(self._same_file, writable)
        except OSError as error:
            raise Error(f"Could not reopen file: {error.strerror}") from None
        old = self._descriptor, self._direct_descriptor
        change.on_failure(self._go_back, *old, self._writable)
        change.on_success(self._close, *old)
        self._descriptor, self._direct_descriptor = new
        self._writable = writable

    def _go_back(self, descriptor: int, direct_descriptor: int, writable: bool) -> None:
        self._close(self._descriptor, self._direct_descriptor)
        self._descriptor, self._direct_descriptor = descriptor, direct_descriptor
        self._writable = writable

    def _close(self, *descriptors: int) -> None:
        for descriptor in descriptors:
            if descriptor >= 0:
                self.graph.fdsets.close(descriptor)

    @property
    def _was_passed(self) -> bool:
        """Whether somebody else has opened the file."""
        return self._filename.startswith(PREFIX)

    @property
    def _same_file(self) -> str:
        """A name of the file that is open: its own may mean another one by now, which is not locked."""
        return self._filename if self._was_passed else f"/proc/self/fd/{self._descriptor}"

    def _open_descriptors(self, writable: bool) -> tuple[int, int]:
        """A descriptor through the page cache, and with `cache.direct` one past it (else -1)."""
        try:
            return self._try_open(self._filename if self._descriptor < 0 else self._same_file, writable)
        except OSError as error:
            raise Error(f"Could not open '{self._filename}': {error.strerror}") from None

    def _try_open(self, filename: str, writable: bool) -> tuple[int, int]:
        flags = os.O_RDWR if writable else os.O_RDONLY
        fdsets = self.graph.fdsets
        same_as = self._descriptor if self._descriptor >= 0 else None
        if not self.node_options.direct:
            return open_regular(fdsets, filename, flags, same_as=same_as), -1
        direct = open_regular(fdsets, filename, flags | os.O_DIRECT, same_as=same_as)
        try:
            if self._was_passed:
                # Who passes one with O_DIRECT, as QEMU wants it, need not know that here it takes two.
                return open_regular(fdsets, f"/proc/self/fd/{direct}", flags), direct
            return open_regular(fdsets, filename, flags), direct
        except BaseException:
            fdsets.close(direct)
            raise

    async def close(self) -> None:
        """Close the descriptors and give back the locks."""
        if self._locks is not None and self._was_passed:
            self.graph.passed_locks.leave(self._locks)
        self._locks = None
        self._close(self._descriptor, self._direct_descriptor, self._lock_descriptor, *self._retired)
        self._retired.clear()
        self._descriptor = self._direct_descriptor = self._lock_descriptor = -1

    # -- permissions are locks

    def prepare_permissions(self, perm: Permission, shared: Permission) -> None:
        """Open the file for writing if need be, and take the locks that the permissions stand for."""
        if perm & (Permission.WRITE | Permission.RESIZE) and not self._writable and not self.read_only:
            # The descriptors from before stay valid until the end: a request may be using them.
            before = [self._descriptor, self._direct_descriptor]
            self._descriptor, self._direct_descriptor = self._open_descriptors(writable=True)
            self._retired += before
            self._writable = True
        if self._locks is not None:
            self._locks.prepare(perm, shared)

    def commit_permissions(self) -> None:
        """Give back the locks that are no more needed."""
        if self._locks is not None:
            self._locks.commit()

    def abort_permissions(self) -> None:
        """Hold the locks from before."""
        if self._locks is not None:
            self._locks.abort()

    # -- what it is

    @property
    def size(self) -> int:
        """The file's size, rounded up to sectors."""
        return -(-self._size // SECTOR) * SECTOR

    @property
    def exact_filename(self) -> str | None:
        """The name that it was opened with."""
        return self._filename

    @property
    def protocol_filename(self) -> str | None:
        """The same."""
        return self._filename

    @property
    def identity(self) -> Hashable:
        """Which file it is, whatever its name."""
        status = os.fstat(self._descriptor)
        return self.driver, status.st_dev, status.st_ino

    def full_options(self) -> dict[str, Any]:
        """Driver and file name."""
        return {"driver": self.driver, "filename": self._filename}

    @property
    def allocated_size(self) -> int:
        """What the file occupies, in bytes (its blocks of 512 bytes as stat(2) counts them)."""
        return os.fstat(self._descriptor).st_blocks * 512

    @property
    def can_grow(self) -> bool:
        """As files do."""
        return True

    @property
    def grows_with_zeroes(self) -> bool:
        """Holes are zeroes."""
        return True

    @property
    def has_info(self) -> bool:
        """A file is never dirty, but it can say so."""
        return True

    def format_specific(self) -> dict[str, Any] | None:
        """Nothing special, under the driver's name."""
        return {"type": "file", "data": {}}

    def driver_statistics(self) -> dict[str, Any] | None:
        """What became of discards."""
        return {
            "driver": self.driver,
            "discard-nb-ok": self._discards_done,
            "discard-nb-failed": self._discards_failed,
            "discard-bytes-ok": self._discarded_bytes,
        }

    # -- requests

    async def _pread(self, offset: int, length: int) -> memoryview:
        if self._direct_descriptor >= 0 and offset % PAGE == 0 and length % PAGE == 0 and length:
            return await self.graph.in_io_thread(self._read_direct, offset, length)
        buffer = unset(length)
        try:
            done = os.preadv(self._descriptor, [buffer], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            done = 0
        if done < length:
            await self.graph.in_io_thread(self._read, buffer[done:], offset + done)
        return buffer

    def _read(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`, with zeroes behind the end of the file."""
        while buffer:
            done = os.preadv(self._descriptor, [buffer], offset)
            if not done:
                buffer[:] = bytes(len(buffer))
                return
            buffer, offset = buffer[done:], offset + done

    def _read_direct(self, offset: int, length: int) -> memoryview:
        buffer = memoryview(mmap.mmap(-1, length))
        done = os.preadv(self._direct_descriptor, [buffer], offset)
        if done < length:
            self._read(buffer[done:], offset + done)
        return buffer

    def _read_cached(self, requests: Sequence[Extent], into: memoryview) -> list[bool]:
        if self._direct_descriptor >= 0:
            return [False] * len(requests)
        preadv, descriptor, nowait = os.preadv, self._descriptor, os.RWF_NOWAIT
        served = []
        start = 0
        for offset, length in requests:
            end = start + length
            try:
                served.append(preadv(descriptor, [into[start:end]], offset, nowait) == length)
            except OSError:
                served.append(False)
            start = end
        return served

    async def _pwrite(self, offset: int, data: memoryview) -> None:
        await self.graph.in_io_thread(self._write, data, offset)
        self._size = max(self._size, offset + len(data))

    async def _pwrite_many(self, writes: Sequence[tuple[int, Data]]) -> list[OSError | None]:
        # Handing something to a thread costs more than a small write does.
        failures = await self.graph.in_io_thread(self._write_all, writes)
        for (offset, data), failure in zip(writes, failures, strict=True):
            if failure is None and offset + len(data) > self._size:
                self._size = offset + len(data)
        return failures

    def _write_all(self, writes: Iterable[tuple[int, Data]]) -> list[OSError | None]:
        """What became of each write; one that fails does not concern the others."""
        return [self._outcome(offset, data) for offset, data in writes]

    def _outcome(self, offset: int, data: Data) -> OSError | None:
        try:
            self._write(data, offset)
        except OSError as error:
            return error
        return None

    def _write(self, data: Data, offset: int) -> None:
        if self._direct_descriptor >= 0 and offset % PAGE == 0 and len(data) % PAGE == 0:
            with mmap.mmap(-1, len(data)) as aligned:
                aligned[:] = data
                done = os.pwrite(self._direct_descriptor, aligned, offset)
            data, offset = memoryview(data)[done:], offset + done
        while data:
            done = os.pwrite(self._descriptor, data, offset)
            if done == len(data):
                return
            data, offset = memoryview(data)[done:], offset + done

    async def _pwrite_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        mode = allocation.PUNCH_HOLE | allocation.KEEP_SIZE if unmap else allocation.ZERO_RANGE
        if await self._fallocate(mode, offset, length):
            return
        if unmap and await self._fallocate(allocation.ZERO_RANGE, offset, length):
            return
        raise NotSupported

    async def _pdiscard(self, offset: int, length: int) -> None:
        if await self._fallocate(allocation.PUNCH_HOLE | allocation.KEEP_SIZE, offset, length):
            self._discards_done += 1
            self._discarded_bytes += length
        else:
            self._discards_failed += 1
            raise NotSupported

    async def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Whether the file system could do it."""
        try:
            await self.graph.in_io_thread(allocation.fallocate, self._descriptor, mode, offset, length)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        if not mode & allocation.KEEP_SIZE:
            self._size = max(self._size, offset + length)
        return True

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        return await self.graph.in_io_thread(self._seek, offset, length)

    def _seek(self, offset: int, length: int) -> BlockStatus:
        """Where the file's next hole or data begins (lseek(2), SEEK_HOLE and SEEK_DATA)."""
        try:
            data = os.lseek(self._descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return BlockStatus(length, data=False, zero=True)
            if error.errno in _UNSUPPORTED:
                return BlockStatus(length)
            raise
        if data > offset:
            return BlockStatus(min(data - offset, length), data=False, zero=True)
        try:
            hole = os.lseek(self._descriptor, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            # It was cut short in between.
            return BlockStatus(length, data=False, zero=True)
        return BlockStatus(min(hole - offset, length) if hole > offset else length)

    async def _flush(self) -> None:
        await self.graph.in_io_thread(os.fdatasync, self._descriptor)

    async def _truncate(self, size: int, preallocation: str) -> None:
        await self.graph.in_io_thread(resize, self._descriptor, size, preallocation)
        self._size = size


async def create(graph: Graph, options: Mapping[str, Any]) -> None:
    """Make a file, or cut an existing one down to nothing and give it a new size.

    :param options: BlockdevCreateOptions, validated, in QAPI's names.
    :raise Error: what went wrong.
    """
    filename = options["filename"]
    if not filename.startswith(PREFIX):
        await graph.in_io_thread(_create_file, options)
        return
    _check_preallocation(options)
    descriptor = open_passed(graph.fdsets, filename, os.O_RDWR | os.O_CREAT)
    try:
        locks = graph.passed_locks.join(descriptor, filename)
        try:
            await graph.in_io_thread(_make_contents, descriptor, locks, options)
        finally:
            graph.passed_locks.leave(locks)
    finally:
        graph.fdsets.close(descriptor)


def _create_file(options: Mapping[str, Any]) -> None:
    filename = options["filename"]
    _check_preallocation(options)
    try:
        descriptor = os.open(filename, os.O_RDWR | os.O_CREAT | _OPEN_FLAGS, 0o644)
    except OSError as error:
        raise Error(f"Could not create '{filename}': {error.strerror}") from None
    try:
        _make_contents(descriptor, ImageLocks(descriptor, filename), options)
    finally:
        os.close(descriptor)


def _check_preallocation(options: Mapping[str, Any]) -> None:
    preallocation = options.get("preallocation", "off")
    if preallocation not in ("off", "falloc", "full"):
        raise Error(f"Unsupported preallocation mode: {preallocation}")


def _make_contents(descriptor: int, locks: ImageLocks, options: Mapping[str, Any]) -> None:
    if is_supported(descriptor):
        locks.prepare(creation.PERMISSIONS, Permission.everything() & ~Permission.RESIZE)
    resize(descriptor, 0, "off")
    if options.get("nocow"):
        allocation.ask_no_copy_on_write(descriptor)
    if options.get("extent-size-hint"):
        allocation.hint_extent_size(descriptor, options["extent-size-hint"])
    resize(descriptor, options["size"], options.get("preallocation", "off"))
