"""The node `qcow2`: guests' requests on an image.

A request is cut where the mapping changes.  Reading looks a run of clusters up and gets it from the
data file, from the backing file, from a compressed cluster, or from nowhere (zeroes).

Writing to clusters that have a place of their own goes straight there.  All other writes are
*allocations*: they take a run of free clusters, write the data together with what surrounds it in its first
and last cluster, and then change the L2 entries in memory (`metadata` says when the storage learns
of it).  Allocations that touch the same cluster wait for each other; so do other writes to it.

With an external data file every cluster has the place there that it has on the disk, and none is counted.
Where the image is encrypted (`encryption`), guests' data passes a cipher right above the file.

Source: qcow2 specification.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import numpy as np

from qmpd.block.change import Change
from qmpd.block.drivers.qcow2 import amending, mapping
from qmpd.block.drivers.qcow2.amending import check_size
from qmpd.block.drivers.qcow2.bitmaps import not_to_be_believed
from qmpd.block.drivers.qcow2.compression import decompress
from qmpd.block.drivers.qcow2.gathering import CachedReads, JoinedWrite, Piece
from qmpd.block.drivers.qcow2.header import (
    AUTOCLEAR_POSITION,
    FULL_BYTES,
    INCOMPATIBLE_POSITION,
    L1_POSITION,
    MAX_BACKING_NAME,
    SIZE_POSITION,
    SUBCLUSTERS,
    V2_BYTES,
    V3_BYTES,
    Autoclear,
    Compatible,
    Encryption,
    ExtensionType,
    Header,
    Incompatible,
    check_encryption,
)
from qmpd.block.drivers.qcow2.internal_snapshots import InternalSnapshots
from qmpd.block.drivers.qcow2.mapping import BACKING_KINDS, COPIED, OFFSET, ZERO, ZERO_KINDS, Kind
from qmpd.block.drivers.qcow2.metadata import L2Slice, Metadata, WordTable, shown
from qmpd.block.drivers.qcow2.repair import rebuild_refcounts
from qmpd.block.drivers.qcow2.settings import Settings
from qmpd.block.keyslot_holder import KeyslotHolder
from qmpd.block.node import (
    SECTOR,
    BlockStatus,
    Data,
    Extent,
    InternalSnapshot,
    Node,
    NotSupported,
    errno_error,
    outcome_of,
)
from qmpd.block.options import NodeOptions
from qmpd.block.permissions import Permission
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.encryption import DataCipher
    from qmpd.block.drivers.qcow2.snapshots import Snapshot
    from qmpd.block.graph import Graph
    from qmpd.block.luks_header import HeaderArea, OpenedSlot
    from qmpd.crypto.luks import LuksHeader
    from qmpd.crypto.memory import KeyBuffer

#: Decompressed clusters that are kept for the next small read.
_INFLATED: Final = 4

#: Zeroes around data in a new cluster are written with it if they are no more than these bytes, else apart.
_MERGED_ZEROES: Final = 64 << 10

#: Tables of snapshots are read in pieces of so many bytes.
_TABLE_PIECE: Final = 64 << 10

#: Preallocated data is written in pieces of so many bytes.
_PREALLOCATED: Final = 1 << 20


class Run(NamedTuple):
    """What the mapping says of `length` bytes of the disk.

    `place` is the offset in the data file, or the L2 entry of a compressed cluster.
    """

    kind: Kind
    place: int
    length: int


class _Allocation:
    """Clusters of the disk, from `first` up to `end`, whose entries are about to change."""

    __slots__ = ("done", "end", "first")

    def __init__(self, first: int, end: int) -> None:
        self.first = first
        self.end = end
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Qcow2Node(KeyslotHolder):
    """An image in the format qcow2."""

    driver = "qcow2"
    supports_backing = True
    supports_internal_snapshots = True
    amendable = True
    strong_options = ("encrypt.key-secret",)
    resettable_options = frozenset(
        {
            "cache-clean-interval",
            "cache-size",
            "discard-no-unref",
            "l2-cache-entry-size",
            "l2-cache-size",
            "lazy-refcounts",
            "overlap-check",
            "pass-discard-other",
            "pass-discard-request",
            "pass-discard-snapshot",
            "refcount-cache-size",
        }
    )
    changeable_options = resettable_options | {"encrypt.format", "encrypt.key-secret"}

    def __init__(
        self, graph: Graph, name: str, options: Mapping[str, Any], node_options: NodeOptions
    ) -> None:
        super().__init__(graph, name, options, node_options)
        self._header = Header()
        self._meta: Metadata | None = None
        self._settings: Settings | None = None
        self._snapshots = InternalSnapshots()
        self._allocations: list[_Allocation] = []
        self._inflated: dict[int, bytes] = {}
        self._cipher: DataCipher | None = None
        #: Set when damage was found that makes every further request fail.
        self._dead = False
        self._complained = False
        self._dirtying = asyncio.Lock()
        self._amending = asyncio.Lock()
        #: Whether clusters may become zero clusters; not while the image is to become one of version 2.
        self.zero_flags_wanted = True
        self._marking: asyncio.Task[None] | None = None

    # -- opening and closing

    async def open(self) -> None:
        """Read the header and the tables, and see that a writer finds an image in order."""
        try:
            await self._open()
        except OSError as error:
            raise Error(f"Could not read qcow2 image: {error.strerror}") from None

    async def _open(self) -> None:
        file = self.file
        start = await _padded(file, 0, FULL_BYTES)
        cluster = Header.cluster_bytes_of(start)
        if (int.from_bytes(start[4:8], "big") >= 3 and file.size < V3_BYTES) or file.size < V2_BYTES:
            raise Error("qcow2 header too short")
        header = self._header = Header.parse(await _padded(file, 0, cluster))
        if not self.read_only and header.incompatible & Incompatible.CORRUPT:
            raise Error("qcow2: Image is corrupt; cannot be opened read/write")
        settings = self._settings = Settings.parse(
            self.options, header, unmap=self.node_options.discard == "unmap"
        )
        check_encryption(header.encryption, old=self.graph.old_encryption)
        _check_encryption_options(self.options.get("encrypt"), header)
        await self._unlock(header)
        await self._open_data_file(header)
        if header.encryption is not Encryption.NONE and self._cipher is None:
            await self._open_without_header(header)
        name = header.backing_name
        self.backing_filename = name.decode(errors="surrogateescape") if name else None
        self.backing_format = header.backing_format
        self._bits = header.cluster_bits
        self._cluster = header.cluster_bytes
        self._mask = header.cluster_bytes - 1
        #: Bytes of what is allocated or zero as a whole.
        self._grain = header.cluster_bytes // SUBCLUSTERS if header.extended_l2 else header.cluster_bytes
        self._external = header.external_data
        self._size = header.size // SECTOR * SECTOR
        meta = self._meta = Metadata(file, header, settings, self._corrupt)
        self._map_crypto_header(meta)
        await meta.load()
        await self._snapshots.load(meta)
        if self._external:
            meta.data_barrier = self._flush_both
        if not self.read_only:
            await self._prepare_to_write(meta, header, settings)

    async def _open_data_file(self, header: Header) -> None:
        reference = self.options.get("data-file")
        if reference is None and header.external_data:
            if header.data_file_name is None:
                raise Error("'data-file' is required for this image")
            reference = {"driver": "file", "filename": header.data_file_name}
        if reference is not None:
            await self.graph.open_child(self, "data-file", reference)
        if not header.external_data:
            if reference is not None:
                raise Error("'data-file' can only be set for images with an external data file")
            if header.raw_external_data:
                raise Error("data-file-raw requires a data file")

    async def _unlock(self, header: Header) -> None:
        """Unlock the LUKS header, if there is one."""
        if header.crypto is None:
            return
        encryption = await self._encryption()
        self._cipher = await encryption.open_luks(
            self.graph, self.file, header.crypto, self.options.get("encrypt", {})
        )
        self.request_alignment = SECTOR

    async def _open_without_header(self, header: Header) -> None:
        if header.encryption is not Encryption.AES:
            raise Error(f"Missing CRYPTO header for crypt method {int(header.encryption)}")
        encryption = await self._encryption()
        self._cipher = encryption.open_aes(self.graph, self.options.get("encrypt", {}))
        self.request_alignment = SECTOR

    async def _encryption(self) -> type[DataCipher]:
        """What only encrypted images need."""
        module = await self.graph.in_io_thread(import_module, f"{__package__}.encryption")
        found: type[DataCipher] = module.DataCipher
        return found

    def _map_crypto_header(self, meta: Metadata) -> None:
        if self._cipher is not None:
            meta.header_clusters.update(self._cipher.header_clusters(self._header.cluster_bytes))

    async def _prepare_to_write(self, meta: Metadata, header: Header, settings: Settings) -> None:
        known = Autoclear.DATA_FILE_RAW
        if header.bitmaps is not None:
            known |= Autoclear.BITMAPS
            await self._doubt_bitmaps()
        if header.autoclear & ~int(known):
            # Whoever set them relies on that nobody writes who does not keep their promises.
            header.autoclear &= int(known)
            await self.file.pwrite(AUTOCLEAR_POSITION, header.autoclear.to_bytes(8, "big"))
            await self.file.flush()
        if header.incompatible & Incompatible.DIRTY:
            await rebuild_refcounts(meta, self._snapshots.entries, self._snapshots.table_bytes)
            await self._set_incompatible(header.incompatible & ~Incompatible.DIRTY)
        if settings.lazy_refcounts:
            meta.lazy = True
            meta.before_change = self._become_dirty

    async def _doubt_bitmaps(self, *, resized: bool = False) -> None:
        """See that nobody believes bitmaps which miss what is about to happen."""
        bitmaps = self._header.bitmaps
        if bitmaps is None:
            return
        length = min(bitmaps.directory_bytes, max(0, self.file.size - bitmaps.directory_offset))
        directory = bytes(await self.file.pread(bitmaps.directory_offset, length))
        doubted = not_to_be_believed(directory, resized=resized)
        if doubted != directory:
            await self.file.pwrite(bitmaps.directory_offset, doubted)
            await self.file.flush()

    async def _become_dirty(self) -> None:
        """With lazy refcounts: the header says that the counts are not to be relied on."""
        async with self._dirtying:
            if not self._header.incompatible & Incompatible.DIRTY:
                await self._set_incompatible(self._header.incompatible | Incompatible.DIRTY)

    async def _set_incompatible(self, bits: int) -> None:
        await self.file.flush()
        await self.file.pwrite(INCOMPATIBLE_POSITION, int(bits).to_bytes(8, "big"))
        await self.file.flush()
        self._header.incompatible = int(bits)

    async def reopen(self, options: Mapping[str, Any], node_options: NodeOptions, change: Change) -> None:
        """Load the tables anew with the new settings; everything has been written back."""
        await super().reopen(options, node_options, change)
        header = self._header
        _check_encryption_options(options.get("encrypt"), header)
        if not self.read_only and header.incompatible & Incompatible.CORRUPT:
            raise Error("qcow2: Image is corrupt; cannot be opened read/write")
        settings = Settings.parse(options, header, unmap=node_options.discard == "unmap")
        meta = Metadata(self.file, header, settings, self._corrupt)
        change.on_failure(setattr, self, "_meta", self._meta)
        change.on_failure(setattr, self, "_settings", self._settings)
        self._meta, self._settings = meta, settings
        self._map_crypto_header(meta)
        try:
            await meta.load()
            await self._snapshots.note_places(meta)
        except OSError as error:
            raise Error(f"Could not read qcow2 image: {error.strerror}") from None
        if self._external:
            meta.data_barrier = self._flush_both
        if not self.read_only:
            # The file may be written to only when the change is complete.
            change.on_success(self._begin_to_write, meta, header, settings)

    async def _begin_to_write(self, meta: Metadata, header: Header, settings: Settings) -> None:
        try:
            await self._prepare_to_write(meta, header, settings)
        except BaseException:
            self.read_only = True
            raise

    async def change_backing_name(self, filename: str | None, image_format: str | None) -> None:
        """Write the header's first cluster anew."""
        meta = self._alive()
        name = None if filename is None else filename.encode(errors="surrogateescape")
        if name is not None and len(name) > MAX_BACKING_NAME:
            raise errno_error(errno.EINVAL)
        header = self._header.copy()
        before = len(header.build())
        header.backing_name = name
        kind = ExtensionType.BACKING_FORMAT
        header.set_extension(kind, None if image_format is None else image_format.encode())
        try:
            data = header.build()
        except Error:
            raise errno_error(errno.ENOSPC) from None
        await meta.commit()
        await self.file.pwrite(0, data.ljust(before, b"\0"))
        await self.file.flush()
        self._header.backing_name = name
        self._header.set_extension(kind, header.extension(kind))
        self.backing_filename, self.backing_format = filename, header.backing_format
        self.implied_backing = None

    # -- keyslots

    header_role = "file"

    @property
    def header_area(self) -> HeaderArea:
        """The part of the image that its header names."""
        return self._encrypted_data.header_area(self.file)

    @property
    def luks_header(self) -> LuksHeader | None:
        """The LUKS header, if the image is encrypted with one."""
        return None if self._cipher is None else self._cipher.luks_header

    @luks_header.setter
    def luks_header(self, header: LuksHeader) -> None:
        self._encrypted_data.luks_header = header
        self._map_crypto_header(self._alive())

    @property
    def opened_with(self) -> str:
        """The option `encrypt.key-secret`."""
        secret: str = self.options["encrypt"]["key-secret"]
        return secret

    @property
    def opened_slot(self) -> OpenedSlot:
        """The slot that the passphrase opened."""
        return self._encrypted_data.opened_slot

    def copy_volume_key(self) -> KeyBuffer:
        """A copy of what the cipher has."""
        return self._encrypted_data.copy_key()

    @property
    def _encrypted_data(self) -> DataCipher:
        assert self._cipher is not None, "only an encrypted image has keyslots"
        return self._cipher

    # -- amending

    async def amend(
        self,
        options: Mapping[str, Any],
        *,
        force: bool,
        progress: Callable[[int, int], None],
        commit: Callable[[], None],
    ) -> None:
        """Change keyslots, or what else the header says.

        :param options: BlockdevAmendOptionsQcow2.
        """
        async with self._amending:
            if "encrypt" in options and self._cipher is None:
                raise Error("image is not encrypted, can't amend")
            others = not amending.OPTIONS.isdisjoint(options)
            if others and "encrypt" in options:
                await amending.check(self, options, force=force)
            if self._cipher is not None and "encrypt" in options:
                await self._cipher.amend(self, options["encrypt"], force=force, commit=commit)
            if others:
                await amending.amend(self, options, force=force, progress=progress, commit=commit)

    @property
    def tables(self) -> Metadata:
        """The tables at work.

        :raise OSError: ENOMEDIUM if they can't be trusted any more.
        """
        return self._alive()

    @property
    def snapshot_entries(self) -> list[Snapshot]:
        """The entries of the snapshot table."""
        return self._snapshots.entries

    @property
    def resizing(self) -> asyncio.Lock:
        """Held by whoever gives the disk another size."""
        return self._resizing

    async def resize(self, size: int) -> None:
        """What `truncate` does, for whoever holds `resizing`."""
        await self._truncate(size, "off")

    async def complete_snapshot_table(self) -> None:
        """See `InternalSnapshots.complete`."""
        await self._snapshots.complete(self._alive())

    async def place_zero_clusters(self, first: int, most: int) -> bool:
        """Give zero clusters of a piece of an L2 table places that are full of zeroes.

        :param first: the number of a cluster on the disk that the piece has the entry of.
        :param most: bytes to write, if a cluster is not larger.
        :returns: whether there may be more of them.
        """
        meta = self._alive()
        first -= first % meta.slice_entries
        most = max(1, most >> self._bits)
        piece = await meta.slice_for(first)
        index = None if piece is None else mapping.first_zero(piece.words)
        if index is None:
            return False
        cluster = first + index
        epoch = meta.epoch
        epoch.requests += 1
        try:
            async with self._changing(cluster, min(cluster + most, first + meta.slice_entries)):
                piece = await meta.writable_slice(cluster)
                count = mapping.zero_run(piece.words, index, most)
                if count:
                    data = memoryview(bytes(count << self._bits))
                    await self._allocate_and_write(meta, piece, cluster << self._bits, data)
        finally:
            epoch.requests -= 1
        return True

    async def write_to_place(self, place: int, data: Data, offset: int) -> None:
        """Write the disk's data at `offset` to its place in the file, enciphered if need be."""
        await self._write_data(place, data, offset)

    def be_lazy(self) -> None:
        """Postpone refcounts from now on; the header says already that they are not to be relied on."""
        meta = self._alive()
        meta.lazy, meta.before_change = True, self._become_dirty

    async def stop_being_lazy(self) -> None:
        """Write the refcounts, and do not postpone them any more.

        :raise OSError: what the storage says.
        """
        meta = self._alive()
        meta.lazy = False
        await meta.commit(refcounts_too=True)
        meta.before_change = None
        # If this fails the bit may stay until the image is closed; it does no harm.
        async with self._dirtying:
            if self._header.incompatible & Incompatible.DIRTY:
                await self._set_incompatible(self._header.incompatible & ~Incompatible.DIRTY)

    def name_backing(self) -> None:
        """The header has another name for the backing image."""
        name = self._header.backing_name
        self.backing_filename = name.decode(errors="surrogateescape") if name else None
        self.backing_format = self._header.backing_format
        self.implied_backing = None

    async def settle(self) -> None:
        """Write back all tables, and say that the image was closed properly."""
        if self._marking is not None:
            await self._marking
        meta = self._meta
        if meta is None or self.read_only or self._dead:
            return
        await meta.settle()
        if self._header.incompatible & Incompatible.DIRTY:
            await self._set_incompatible(self._header.incompatible & ~Incompatible.DIRTY)

    async def close(self) -> None:
        """Wipe the key."""
        self._inflated.clear()
        if self._cipher is not None:
            self._cipher.close()
            self._cipher = None

    # -- damage

    def _corrupt(self, message: str, *, offset: int = -1, size: int = -1, fatal: bool = True) -> NoReturn:
        """The image is damaged: tell, and if it may be written mark it and refuse everything from now on.

        :raise OSError: EIO.
        """
        fatal = fatal and not self.read_only
        if not self._dead and (fatal or not self._complained):
            self._complained = True
            self.graph.report_corruption(self, message, offset, size, fatal)
        if fatal and not self._dead:
            self._dead = True
            if self._header.version >= 3:
                self._header.incompatible |= Incompatible.CORRUPT
                bits = self._header.incompatible.to_bytes(8, "big")
                self._marking = asyncio.create_task(self._mark_corrupt(bits))
        raise errno_error(errno.EIO)

    async def _mark_corrupt(self, bits: bytes) -> None:
        try:
            await self.file.pwrite(INCOMPATIBLE_POSITION, bits)
            await self.file.flush()
        except OSError:
            pass  # It was told already.

    def _alive(self) -> Metadata:
        """The tables, as long as they can be trusted.

        :raise OSError: ENOMEDIUM afterwards.
        """
        if self._dead or self._meta is None:
            raise errno_error(errno.ENOMEDIUM)
        return self._meta

    # -- what it is

    @property
    def size(self) -> int:
        """The disk's size."""
        return self._size

    _size = 0

    @property
    def cluster_size(self) -> int | None:
        """Bytes of a cluster."""
        return self._header.cluster_bytes

    @property
    def dirty(self) -> bool:
        """Whether the counts in the file are not to be relied on."""
        return bool(self._header.incompatible & Incompatible.DIRTY)

    @property
    def has_info(self) -> bool:
        """There is always something to tell."""
        return True

    @property
    def encrypted(self) -> bool:
        """Whether the data is encrypted inside the format."""
        return self._header.encryption is not Encryption.NONE

    @property
    def ejected(self) -> bool:
        """After damage that makes every further request fail."""
        return self._dead

    @property
    def lists_internal_snapshots(self) -> bool:
        """Not if the data is in another file."""
        return not self._external

    @property
    def internal_snapshots(self) -> list[InternalSnapshot]:
        """The internal snapshots as all formats have them."""
        second = 1_000_000_000
        return [
            InternalSnapshot(
                id=snapshot.id,
                name=snapshot.name,
                vm_state_size=snapshot.vm_state_bytes,
                date=snapshot.seconds * second + snapshot.nanoseconds,
                vm_clock=snapshot.guest_clock,
                icount=snapshot.instructions,
            )
            for snapshot in self._snapshots.entries
        ]

    async def create_internal_snapshot(self, name: str, now: float) -> InternalSnapshot:
        """See `InternalSnapshots.create`."""
        meta = self._alive()
        await self._snapshots.create(meta, name, now, self._size)
        return self.internal_snapshots[-1]

    async def delete_internal_snapshot(self, snapshot_id: str) -> None:
        """See `InternalSnapshots.delete`."""
        meta = self._alive()
        if self.read_only:
            raise errno_error(errno.EPERM)
        await self._snapshots.delete(meta, snapshot_id)

    def format_specific(self) -> dict[str, Any] | None:
        """ImageInfoSpecificQCow2."""
        header = self._header
        data: dict[str, Any] = {
            "compat": "0.10" if header.version == 2 else "1.1",
            "refcount-bits": 1 << header.refcount_order,
            "compression-type": header.compression.name.lower(),
        }
        if header.version >= 3:
            data["lazy-refcounts"] = bool(header.compatible & Compatible.LAZY_REFCOUNTS)
            data["corrupt"] = bool(header.incompatible & Incompatible.CORRUPT)
            data["extended-l2"] = header.extended_l2
            if header.external_data:
                if header.data_file_name is not None:
                    data["data-file"] = header.data_file_name
                data["data-file-raw"] = header.raw_external_data
        if self._cipher is not None:
            data["encrypt"] = self._cipher.info()
        return {"type": "qcow2", "data": data}

    def child_permissions(
        self, role: str, perm: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """The image file is ours alone, for its tables are in our memory; data goes where it goes.

        What fills a hole with what is there already allocates clusters, so it is a write below.
        """
        if perm & Permission.WRITE_UNCHANGED:
            perm |= Permission.WRITE
        if role == "data-file":
            if perm & Permission.WRITE:
                perm |= Permission.RESIZE
            return perm, shared & ~Permission.RESIZE
        perm |= Permission.CONSISTENT_READ
        if not self.read_only:
            perm |= Permission.WRITE | Permission.RESIZE
        shared = shared & ~(Permission.WRITE | Permission.RESIZE) | Permission.WRITE_UNCHANGED
        return self.header_access.permissions(perm, shared)

    @property
    def _data(self) -> Node:
        """The node that holds guests' data."""
        edge = self.children.get("data-file")
        return self.file if edge is None else edge.child

    # -- looking things up

    async def _look_up(self, offset: int, length: int) -> Run:
        """The first run of bytes from `offset` on that is in one place.

        :raise OSError: EIO on entries that make no sense, or what the storage says.
        """
        meta = self._alive()
        cluster, within = offset >> self._bits, offset & self._mask
        piece = await meta.slice_for(cluster)
        if piece is None:
            return self._no_table(offset, length)
        index = cluster % meta.slice_entries
        if meta.entry_words == 2:
            return self._look_up_subclusters(piece, index, offset, length)
        return self._look_up_clusters(piece, index, cluster, within, length)

    async def _look_up_joined(self, offset: int, length: int) -> Run:
        """The same, also across pieces of the tables: those of small clusters are short."""
        run = await self._look_up(offset, length)
        while run.length < length and run.kind is not Kind.COMPRESSED:
            more = await self._look_up(offset + run.length, length - run.length)
            apart = run.kind is Kind.DATA and more.place != run.place + run.length
            if more.kind is not run.kind or apart:
                break
            run = Run(run.kind, run.place, run.length + more.length)
        return run

    def _no_table(self, offset: int, length: int) -> Run:
        """What is where there is no L2 table."""
        table_bytes = self._header.l2_entries << self._bits
        return Run(Kind.UNALLOCATED, 0, min(length, table_bytes - offset % table_bytes))

    def _look_up_clusters(self, piece: L2Slice, index: int, cluster: int, within: int, length: int) -> Run:
        words = piece.words
        entry = words[index]
        kind = mapping.kind_of(entry, self._external)
        place = entry & OFFSET
        found = self._cluster - within
        if kind is Kind.COMPRESSED:
            if self._external:
                self._complain(
                    "Compressed cluster entry found in image with external data file", piece, index
                )
            return Run(kind, entry, min(found, length))
        if kind is Kind.DATA:
            self._check_place("Cluster allocation", place, cluster, piece, index)
        elif kind in ZERO_KINDS:
            if self._header.version < 3:
                self._complain("Zero cluster entry found in pre-v3 image", piece, index)
            if place:
                self._check_place("Preallocated zero cluster", place, cluster, piece, index)
        if found < length:
            limit = min(len(words) - index, -(-(within + length) // self._cluster))
            if kind is Kind.DATA:
                kept = mapping.WORD if self._external else mapping.WORD ^ COPIED
                count = mapping.ascending_run(words, index, limit, self._cluster, kept)
            else:
                count = mapping.kind_run(words, index, limit, self._external)
            found = (count << self._bits) - within
        return Run(kind, place + within, min(found, length))

    def _look_up_subclusters(self, piece: L2Slice, index: int, offset: int, length: int) -> Run:
        words = piece.words
        entry, bitmap = words[2 * index], words[2 * index + 1]
        grain = self._grain
        within = offset & self._mask
        number = within // grain
        kind = mapping.subcluster_kind(entry, bitmap, number, self._external)
        place = entry & OFFSET
        if kind is Kind.COMPRESSED:
            if self._external:
                self._complain(
                    "Compressed cluster entry found in image with external data file", piece, index
                )
            return Run(kind, entry, min(self._cluster - within, length))
        if kind is Kind.INVALID:
            self._complain("Invalid cluster entry found", piece, index)
        if place:
            self._check_place("Cluster allocation", place, offset >> self._bits, piece, index)
        found = grain - within % grain
        expected = place
        position, entries = index, len(words) // 2
        while found < length:
            number += 1
            if number == SUBCLUSTERS:
                number = 0
                position += 1
                if position == entries:
                    break
                entry, bitmap = words[2 * position], words[2 * position + 1]
                expected += self._cluster
                if kind is Kind.DATA and entry & OFFSET != expected:
                    break
            if mapping.subcluster_kind(entry, bitmap, number, self._external) is not kind:
                break
            found += grain
        return Run(kind, place + within, min(found, length))

    def _complain(self, what: str, piece: L2Slice, index: int) -> NoReturn:
        table = piece.offset // self._cluster * self._cluster
        number = (piece.offset - table) // self._header.l2_entry_bytes + index
        self._corrupt(f"{what} (L2 offset: {shown(table)}, L2 index: {shown(number)})")

    def _check_place(self, what: str, place: int, cluster: int, piece: L2Slice, index: int) -> None:
        if place & self._mask:
            self._complain(f"{what} offset {shown(place)} unaligned", piece, index)
        if self._external and place != cluster << self._bits:
            table = piece.offset // self._cluster * self._cluster
            number = (piece.offset - table) // self._header.l2_entry_bytes + index
            self._corrupt(
                f"External data file host cluster offset {shown(place)} does not match guest cluster "
                f"offset: {shown(cluster << self._bits)}, L2 index: {shown(number)})"
            )

    # -- reading

    async def _pread(self, offset: int, length: int) -> Data:
        meta = self._alive()
        epoch = meta.epoch
        epoch.requests += 1
        try:
            # Most small requests are for a cluster whose entry is in memory; this is all that they need.
            cluster = offset >> self._bits
            if self._cipher is None and meta.entry_words == 1 and (piece := meta.peek(cluster)) is not None:
                index = cluster % meta.slice_entries
                run = self._look_up_clusters(piece, index, cluster, offset & self._mask, length)
                if run.kind is Kind.DATA and run.length == length:
                    data = self._data
                    if run.place + length <= data.size:
                        return await data.pread(run.place, length)
            return await self._read(offset, length)
        finally:
            epoch.requests -= 1

    @property
    def _is_plain(self) -> bool:
        """Whether guests' data is in the data file as it is, so that requests can be passed on."""
        return self._header.encryption is Encryption.NONE

    def _read_cached(self, requests: Sequence[Extent], into: memoryview) -> list[bool]:
        meta = self._meta
        if meta is None or self._dead or not self._is_plain:
            return [False] * len(requests)
        if meta.entry_words == 1 and not self._external and not _follow(requests):
            alike = self._all_alike(meta, requests)
            if alike is not None:
                node, extents = alike
                if node is not None:
                    return node.read_cached(extents, into)
                into[:] = bytes(len(into))
                return [True] * len(requests)
        reads = CachedReads(into)
        for offset, length in requests:
            reads.add(length, self._pieces_in_memory(meta, offset, length))
        return reads.read()

    def _all_alike(
        self, meta: Metadata, requests: Sequence[Extent]
    ) -> tuple[Node | None, Sequence[Extent]] | None:
        """The node that has all of several small reads, each of them in one cluster, and where it has them.

        That is what most batches are, so it is found out in the shortest way.

        :returns: None as the node if they are zeroes; None if they are of different kinds, or of another.
        """
        bits, mask, entries = self._bits, self._mask, meta.slice_entries
        zero, other = ZERO if self._header.version >= 3 else 0, mapping.COMPRESSED | ZERO | mask & OFFSET
        limit, holes = self._data.size, 0
        extents: list[Extent] = []
        words: array[int] | None = None
        known = -1
        for offset, length in requests:
            cluster, within = offset >> bits, offset & mask
            if within + length > mask + 1:
                return None
            number = cluster // entries
            if number != known:
                known = number
                piece = meta.peek(cluster)
                if piece is None and not meta.has_no_table(cluster):
                    return None
                words = None if piece is None else piece.words
            entry = 0 if words is None else words[cluster % entries]
            place = entry & OFFSET
            if not entry & other and place:
                if place + within + length > limit:
                    return None
                extents.append((place + within, length))
            elif not entry:
                holes += 1
            elif entry != zero:
                return None
        if not holes:
            return (
                (None if not extents else self._data, extents) if len(extents) in (0, len(requests)) else None
            )
        if holes < len(requests):
            return None
        backing = self.backing
        if backing is None:
            return None, requests
        return (backing, requests) if max(requests)[0] + mask + 1 <= backing.size else None

    def _pieces_in_memory(self, meta: Metadata, offset: int, length: int) -> list[Piece] | None:
        """What a read consists of, as far as the tables in memory say so; None if more has to be done."""
        pieces: list[Piece] = []
        data, backing = self._data, self.backing
        end = offset + length
        while offset < end:
            run = self._run_in_memory(meta, offset, end - offset)
            if run is None:
                return None
            if run.kind is Kind.DATA:
                if run.place + run.length > data.size:
                    return None
                pieces.append((data, run.place, run.length))
            elif run.kind in ZERO_KINDS or backing is None:
                pieces.append((None, 0, run.length))
            else:
                there = max(0, min(run.length, backing.size - offset))
                if there:
                    pieces.append((backing, offset, there))
                if there < run.length:
                    pieces.append((None, 0, run.length - there))
            offset += run.length
        return pieces

    def _run_in_memory(self, meta: Metadata, offset: int, length: int) -> Run | None:
        """The first run of bytes from `offset` on; None if it can't be told yet, or something is wrong."""
        cluster = offset >> self._bits
        piece = meta.peek(cluster)
        if piece is None:
            return self._no_table(offset, length) if meta.has_no_table(cluster) else None
        index = cluster % meta.slice_entries
        entry = piece.words[index * meta.entry_words]
        place = entry & OFFSET
        if entry & mapping.COMPRESSED or place & self._mask or (entry & ZERO and self._header.version < 3):
            return None
        if self._external and place and place != cluster << self._bits:
            return None
        if meta.entry_words == 1:
            return self._look_up_clusters(piece, index, cluster, offset & self._mask, length)
        number = (offset & self._mask) // self._grain
        if mapping.subcluster_kind(entry, piece.words[2 * index + 1], number, self._external) is Kind.INVALID:
            return None
        return self._look_up_subclusters(piece, index, offset, length)

    async def _read(self, offset: int, length: int) -> Data:
        """What the guest finds there; the disk's last cluster is full of zeroes behind its end."""
        run = await self._look_up_joined(offset, length)
        if run.length == length:
            return await self._read_run(run, offset)
        buffer = memoryview(bytearray(length))
        done = 0
        while True:
            if run.kind not in ZERO_KINDS and (run.kind not in BACKING_KINDS or self.backing is not None):
                buffer[done : done + run.length] = await self._read_run(run, offset + done)
            done += run.length
            if done == length:
                return buffer
            run = await self._look_up_joined(offset + done, length - done)

    async def _read_run(self, run: Run, offset: int) -> Data:
        if run.kind is Kind.DATA:
            return await self._read_data(run.place, run.length, offset)
        if run.kind is Kind.COMPRESSED:
            start = offset & self._mask
            return (await self._inflate(run.place))[start : start + run.length]
        if run.kind in BACKING_KINDS:
            return await self.pread_backing(offset, run.length)
        return bytes(run.length)

    async def _read_data(self, place: int, length: int, offset: int) -> Data:
        """The disk's data at `offset`, from its place in the file."""
        if self._cipher is not None:
            return await self._cipher.read(self._data, place, length, offset)
        return await _padded(self._data, place, length)

    async def _inflate(self, entry: int) -> memoryview:
        """The cluster that a compressed entry stands for."""
        found = self._inflated.get(entry)
        if found is None:
            place = mapping.compressed_place(entry, self._bits)
            data = await self._alive().read(place.offset, place.length)
            try:
                found = await self.graph.in_io_thread(
                    decompress, self._header.compression, data, self._cluster
                )
            except ValueError:
                raise errno_error(errno.EIO) from None
            while len(self._inflated) >= _INFLATED:
                del self._inflated[next(iter(self._inflated))]
            self._inflated[entry] = found
        return memoryview(found)

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        run = await self._look_up(offset, length)
        if run.kind in BACKING_KINDS:
            return BlockStatus(run.length, data=False, depth=0)
        if run.kind in ZERO_KINDS:
            return BlockStatus(run.length, data=False, zero=True)
        return BlockStatus(run.length)

    # -- writing

    async def _pwrite(self, offset: int, data: memoryview) -> None:
        epoch = self._alive().epoch
        epoch.requests += 1
        try:
            done = 0
            while done < len(data):
                done += await self._write_some(offset + done, data[done:])
        finally:
            epoch.requests -= 1

    async def _pwrite_many(self, writes: Sequence[tuple[int, Data]]) -> list[OSError | None]:
        meta = self._meta
        if meta is None or self._dead or not self._is_plain:
            return await super()._pwrite_many(writes)
        epoch = meta.epoch
        epoch.requests += 1
        try:
            in_place: list[tuple[int, Data]] = []
            numbers: list[int] = []
            others: list[JoinedWrite] = []
            for number, (offset, data) in enumerate(writes):
                place = self._place_of_its_own(meta, offset, len(data))
                if place is not None:
                    in_place.append((place, data))
                    numbers.append(number)
                elif not others or not others[-1].add(offset, data, number):
                    others.append(JoinedWrite(offset, data, number))
            if not others:
                return await self._data.pwrite_many(in_place, grow=True)
            return await self._write_mixed(len(writes), in_place, numbers, others)
        finally:
            epoch.requests -= 1

    async def _write_mixed(
        self, count: int, in_place: list[tuple[int, Data]], numbers: list[int], others: list[JoinedWrite]
    ) -> list[OSError | None]:
        """Write what has a place, and at the same time what has none; returns the outcome of each."""
        outcomes: list[OSError | None] = [None] * count
        tasks = [
            asyncio.ensure_future(outcome_of(self._pwrite(each.offset, memoryview(each.data).cast("B"))))
            for each in others
        ]
        if in_place:
            written = await self._data.pwrite_many(in_place, grow=True)
            for number, outcome in zip(numbers, written, strict=True):
                outcomes[number] = outcome
        for each, outcome in zip(others, await asyncio.gather(*tasks), strict=True):
            for number in each.numbers:
                outcomes[number] = outcome
        return outcomes

    def _place_of_its_own(self, meta: Metadata, offset: int, length: int) -> int | None:
        """Where all of a write can go without a change of any table; None if that is not known."""
        cluster, within = offset >> self._bits, offset & self._mask
        last = offset + length - 1 >> self._bits
        piece = meta.peek(cluster)
        if piece is None or (self._allocations and self._allocation_in(cluster, last + 1) is not None):
            return None
        position = cluster % meta.slice_entries * meta.entry_words
        entry = piece.words[position]
        place = entry & OFFSET
        if not entry & COPIED or entry & mapping.COMPRESSED or place & self._mask:
            return None
        if meta.entry_words == 2:
            if last != cluster or not self._has_subclusters(piece.words[position + 1], within, length):
                return None
        elif last != cluster:
            if self._own_run(piece, cluster, within, length).length < length:
                return None
        elif entry & ZERO:
            return None
        if not self._external:
            return place + within if place and meta.is_guests_place(place, within + length) else None
        return place + within if place == cluster << self._bits else None

    def _has_subclusters(self, bitmap: int, within: int, length: int) -> bool:
        """Whether all subclusters are allocated that these bytes of a cluster touch."""
        touched = mapping.subcluster_mask(within // self._grain, -(-(within + length) // self._grain))
        return bitmap & (touched | touched << SUBCLUSTERS) == touched

    @asynccontextmanager
    async def _changing(self, first: int, end: int) -> AsyncIterator[None]:
        """Nobody else changes the entries of these clusters for the time of an ``async with``."""
        while (other := self._allocation_in(first, end)) is not None:
            await asyncio.shield(other.done)
        allocation = _Allocation(first, end)
        self._allocations.append(allocation)
        try:
            yield
        finally:
            self._allocations.remove(allocation)
            allocation.done.set_result(None)

    def _allocation_in(self, first: int, end: int) -> _Allocation | None:
        """The first allocation under way that touches these clusters."""
        touching = [a for a in self._allocations if a.first < end and first < a.end]
        return min(touching, key=lambda a: a.first) if touching else None

    async def _write_some(self, offset: int, data: memoryview) -> int:
        """Write the beginning of `data`, as far as it goes to one place; returns how many bytes."""
        meta = self._alive()
        cluster, within = offset >> self._bits, offset & self._mask
        # An entry's change is made in one slice, so that nobody sees half of it.
        slice_end = (cluster // meta.slice_entries + 1) * meta.slice_entries << self._bits
        length = min(len(data), slice_end - offset)
        while True:
            piece = meta.peek(cluster) or await meta.slice_for(cluster)
            if not self._allocations:
                break
            busy = self._allocation_in(cluster, (offset + length - 1 >> self._bits) + 1)
            if busy is None:
                break
            if busy.first > cluster:
                length = (busy.first << self._bits) - offset
                break
            await asyncio.shield(busy.done)
            self.check_request(offset, length)
            self._alive()
        if piece is not None:
            run = self._own_run(piece, cluster, within, length)
            if run.length:
                if not self._external:
                    meta.check_inside(run.place)
                    meta.check_overlap(run.place, run.length)
                await self._write_data(run.place, data[: run.length], offset)
                return run.length
        end = offset + length
        async with self._changing(cluster, (end - 1 >> self._bits) + 1):
            return await self._allocate_and_write(meta, piece, offset, data[:length])

    def _own_run(self, piece: L2Slice, cluster: int, within: int, length: int) -> Run:
        """The bytes that can be written in place without a change of any entry; none if its length is 0."""
        meta = self._alive()
        words = piece.words
        index = cluster % meta.slice_entries
        if meta.entry_words == 2:
            entry = words[2 * index]
            if not entry & COPIED or entry & mapping.COMPRESSED:
                return Run(Kind.UNALLOCATED, 0, 0)
            run = self._look_up_subclusters(piece, index, (cluster << self._bits) + within, length)
            if run.kind is not Kind.DATA:
                return Run(run.kind, 0, 0)
            # Only as far as the copied flag was looked at.
            return Run(run.kind, run.place, min(run.length, self._cluster - within))
        entry = words[index]
        if not entry & COPIED or entry & (mapping.COMPRESSED | ZERO):
            return Run(Kind.UNALLOCATED, 0, 0)
        place = entry & OFFSET
        if not place and not self._external:
            return Run(Kind.UNALLOCATED, 0, 0)
        if place & self._mask:
            self._corrupt(
                f"Data cluster offset {shown(place)} unaligned (guest offset: {shown(cluster << self._bits)})"
            )
        found = self._cluster - within
        expected = entry
        while found < length:
            index += 1
            expected += self._cluster
            if index == len(words) or words[index] != expected:
                break
            found += self._cluster
        return Run(Kind.DATA, place + within, min(found, length))

    def _reusable(self, words: array[int], index: int) -> int | None:
        """The place that a cluster has for itself, although its entry has to change; None if it has none."""
        entry = words[index * self._alive().entry_words]
        if entry & mapping.COMPRESSED or not entry & COPIED or not mapping.is_placed(entry, self._external):
            return None
        place = entry & OFFSET
        if place & self._mask:
            self._corrupt(f"Preallocated zero cluster offset {shown(place)} unaligned")
        return place

    async def _allocate_and_write(
        self, meta: Metadata, piece: L2Slice | None, offset: int, data: memoryview
    ) -> int:
        """Find a place for the clusters of `data`, write them, and change their entries."""
        cluster = offset >> self._bits
        piece = await meta.writable_slice(cluster)
        index = cluster % meta.slice_entries
        wanted = (offset + len(data) - 1 >> self._bits) + 1 - cluster
        count, place, whole = self._classify(meta, piece, index, wanted)
        taken = fresh = False
        if place is None:
            if self._external:
                place = cluster << self._bits
            else:
                async with meta.allocating:
                    place, count, fresh = await meta.take(count)
                if not place:
                    self._corrupt("Preventing invalid allocation of data cluster at offset 0")
                taken = True
        elif not self._external:
            meta.check_inside(place)
            meta.check_overlap(place, count << self._bits)
        try:
            data = data[: ((cluster + count) << self._bits) - offset]
            grain = self._cluster if whole else self._grain
            start = offset // grain * grain
            end = self._end_of_change(piece, index, offset + len(data), grain, reused=not (taken or whole))
            first_place = place + (start - (cluster << self._bits))
            await self._write_around(first_place, start, end, offset, data, fresh)
            piece = await meta.writable_slice(cluster)
        except BaseException:
            if taken:
                meta.free(place, count << self._bits)
            raise
        self._link(meta, piece, index, count, place, start, end)
        if meta.much_freed:
            await meta.commit()
        return len(data)

    def _end_of_change(self, piece: L2Slice, index: int, end: int, grain: int, *, reused: bool) -> int:
        """Where an allocating write up to `end` has to end on the disk.

        In a cluster that keeps its place the last subcluster may be there already; then its rest stays as
        it is, for another request may be writing it just now.

        :param index: of the first cluster in `piece`; if it has subclusters and its place is `reused`, it is
            the only one.
        """
        if reused and self._grain != self._cluster and end % grain:
            number = (end & self._mask) // grain
            words = piece.words[2 * index : 2 * index + 2]
            if mapping.subcluster_kind(words[0], words[1], number, self._external) is Kind.DATA:
                return end
        return -(-end // grain) * grain

    def _classify(
        self, meta: Metadata, piece: L2Slice, index: int, wanted: int
    ) -> tuple[int, int | None, bool]:
        """How the clusters of an allocating write are to be had.

        :returns: how many of them in the same way; their place if they have one of their own; and whether
            what is in them has to be kept as a whole (else as a subcluster).
        """
        words = piece.words
        step = meta.entry_words
        place = self._reusable(words, index)
        if place is not None:
            count = 1
            while count < wanted and step == 1:
                entry = words[index + count]
                if not entry & ZERO or self._reusable(words, index + count) != place + (count << self._bits):
                    break
                count += 1
            return count, place, False
        whole = step == 1 or bool(words[index * step] & (OFFSET | mapping.COMPRESSED))
        count = 1
        while count < wanted:
            entry = words[(index + count) * step]
            own = entry & COPIED and not entry & mapping.COMPRESSED
            if own or (step == 2 and bool(entry & (OFFSET | mapping.COMPRESSED)) != whole):
                break
            count += 1
        return count, None, whole

    async def _write_around(
        self, place: int, start: int, end: int, offset: int, data: memoryview, fresh: bool
    ) -> None:
        """Write `data` of `offset` to a new place, and around it what was at `start` to `end` before.

        :param fresh: the new place reads as zeroes.
        """
        plain = self._cipher is None
        fresh = fresh and plain  # Zeroes in the file mean nothing where it is deciphered.
        head = await self._surroundings(start, offset)
        tail = await self._surroundings(offset + len(data), end)
        if head is None and tail is None and fresh:
            await self._write_data(place + (offset - start), data, offset)
            return
        before, after = offset - start, end - offset - len(data)
        apart = False
        if head is None and (fresh or (plain and before > _MERGED_ZEROES)):
            apart = not fresh
            head, skipped = b"", before
        else:
            skipped = 0
        if tail is None and (fresh or (plain and after > _MERGED_ZEROES)):
            apart = apart or not fresh
            tail, cut = b"", after
        else:
            cut = 0
        if apart and skipped:
            await self._write_zeroes(place, skipped)
        if apart and cut:
            await self._write_zeroes(place + (end - start) - cut, cut)
        parts = (
            bytes(before) if head is None else head,
            data,
            bytes(after) if tail is None else tail,
        )
        await self._write_data(
            place + skipped,
            data if not parts[0] and not parts[2] else memoryview(b"".join(parts)),
            start + skipped,
        )

    async def _surroundings(self, start: int, end: int) -> Data | None:
        """What a guest finds from `start` up to `end`; None if that is zeroes (or nothing)."""
        length = end - start
        if not length:
            return b""
        run = await self._look_up(start, length)
        if run.length == length:
            if run.kind in ZERO_KINDS:
                return None
            if run.kind in BACKING_KINDS:
                backing = self.backing
                if backing is None or start >= backing.size:
                    return None
        return await self._read(start, length)

    async def _write_data(self, place: int, data: Data, offset: int) -> None:
        """Write the disk's data at `offset` to its place in the file."""
        if self._cipher is not None:
            await self._cipher.write(self._data, place, data, offset)
            return
        await self._data.pwrite(place, data, grow=True)

    async def _write_zeroes(self, place: int, length: int, *, unmap: bool = False) -> None:
        data = self._data
        inside = max(0, min(length, data.size - place))
        if inside:
            await data.pwrite_zeroes(place, inside, unmap=unmap)
        if inside < length and not data.grows_with_zeroes:
            await data.pwrite(place + inside, bytes(length - inside), grow=True)

    def _link(
        self, meta: Metadata, piece: L2Slice, index: int, count: int, place: int, start: int, end: int
    ) -> None:
        """Let the entries of `count` clusters point at their place, for the bytes from `start` to `end`."""
        words = piece.words
        for number in range(count):
            position = (index + number) * meta.entry_words
            new_place = place + (number << self._bits)
            old = words[position]
            if meta.entry_words == 2:
                base = (start >> self._bits) + number << self._bits
                first = max(start - base, 0) // self._grain
                last = min(end - base, self._cluster) // self._grain
                touched = mapping.subcluster_mask(first, last)
                bitmap = (words[position + 1] | touched) & ~(touched << SUBCLUSTERS)
                words[position + 1] = touched if old & mapping.COMPRESSED else bitmap
            words[position] = new_place | COPIED
            if old & mapping.COMPRESSED or old & OFFSET != new_place:
                self._free_entry(meta, old)
        piece.mark(index * meta.entry_words, (index + count) * meta.entry_words)

    def _free_entry(self, meta: Metadata, entry: int, *, discard: bool = False) -> None:
        """Give up the place that an entry had."""
        if entry & mapping.COMPRESSED:
            place = mapping.compressed_place(entry, self._bits)
            meta.free(place.offset, place.length, discard=discard)
        elif entry & OFFSET and not self._external:
            if entry & OFFSET & self._mask:
                try:
                    self._corrupt(f"Cannot free unaligned cluster {shown(entry & OFFSET)}", fatal=False)
                except OSError:
                    return  # The request itself is none the worse for it.
            meta.free(entry & OFFSET, self._cluster, discard=discard)

    # -- zeroes and discards

    async def _pwrite_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        meta = self._alive()
        # As it is now: the image may be about to become one of version 2, and waits for this request then.
        flag = ZERO if self._has_zero_flag else 0
        if not flag and (self.backing is not None or not unmap):
            raise NotSupported
        epoch = meta.epoch
        epoch.requests += 1
        try:
            grain = self._grain if self._header.version >= 3 else self._cluster
            start = min(offset + -offset % grain, offset + length)
            at_end = offset + length == self._size
            # The disk's last cluster may be cut off by its end.
            end = offset + length if at_end else max((offset + length) // grain * grain, start)
            for first, last in ((offset, start), (end, offset + length)):
                if first < last and await self._surroundings(first, last) is not None:
                    await self._pwrite(first, memoryview(bytes(last - first)))
            if self._external and self._header.raw_external_data and start < end:
                await self._write_zeroes(start, end - start, unmap=unmap)
            while start < end:
                start = await self._zero_some(meta, start, end, unmap, flag)
        finally:
            epoch.requests -= 1

    async def _zero_some(self, meta: Metadata, start: int, end: int, unmap: bool, flag: int) -> int:
        """Make clusters read as zeroes, as far as one slice goes; returns where the next ones begin."""
        cluster = start >> self._bits
        slice_end = (cluster // meta.slice_entries + 1) * meta.slice_entries << self._bits
        end = min(end, slice_end)
        async with self._changing(cluster, -(-end // self._cluster)):
            piece = await meta.writable_slice(cluster)
            while start < end:
                base = start & ~self._mask
                stop = min(end, base + self._cluster)
                whole = start == base and (stop == base + self._cluster or stop == self._size)
                index = (start >> self._bits) % meta.slice_entries
                position = index * meta.entry_words
                entry = piece.words[position]
                if whole:
                    self._zero_cluster(meta, piece, position, unmap, flag)
                elif entry & mapping.COMPRESSED:
                    # Part of a compressed cluster: the rest of it needs a place of its own.
                    await self._allocate_and_write(meta, piece, start, memoryview(bytes(stop - start)))
                    piece = await meta.writable_slice(cluster)
                else:
                    last = -(-(stop - base) // self._grain)
                    touched = mapping.subcluster_mask((start - base) // self._grain, last)
                    bitmap = piece.words[position + 1]
                    piece.words[position + 1] = bitmap & ~touched | touched << SUBCLUSTERS
                    piece.mark(position, position + 2)
                start = stop
        if meta.much_freed:
            await meta.commit()
        return start

    def _zero_cluster(self, meta: Metadata, piece: L2Slice, position: int, unmap: bool, flag: int) -> None:
        entry = piece.words[position]
        compressed = bool(entry & mapping.COMPRESSED)
        keep = not compressed and (not unmap or self._keeps_places)
        new = (entry if keep else 0) | (flag if meta.entry_words == 1 else 0)
        if meta.entry_words == 2:
            piece.words[position + 1] = mapping.ALL_SUBCLUSTERS << SUBCLUSTERS
        elif new == entry:
            return
        piece.words[position] = new
        piece.mark(position, position + meta.entry_words)
        if not keep:
            self._free_entry(meta, entry, discard=self._passes_request)

    @property
    def _has_zero_flag(self) -> bool:
        return self._header.version >= 3 and self.zero_flags_wanted

    @property
    def _keeps_places(self) -> bool:
        return self._settings is not None and self._settings.discard_no_unref

    @property
    def _passes_request(self) -> bool:
        return self._settings is not None and self._settings.pass_request

    async def _pdiscard(self, offset: int, length: int) -> None:
        meta = self._alive()
        flag = ZERO if self._has_zero_flag else 0
        if not flag and self.backing is not None:
            # What was hidden would come to light again.
            raise NotSupported
        start = offset + -offset % self._cluster
        end = offset + length
        if end != self._size:
            end = end // self._cluster * self._cluster
        epoch = meta.epoch
        epoch.requests += 1
        try:
            if self._external and start < end:
                if self._header.raw_external_data:
                    await self._write_zeroes(start, end - start, unmap=True)
                elif self._passes_request and start < self._data.size:
                    await self._data.pdiscard(start, min(end, self._data.size) - start)
            while start < end:
                cluster = start >> self._bits
                until = (cluster // meta.slice_entries + 1) * meta.slice_entries
                async with self._changing(cluster, min(until, -(-end // self._cluster))):
                    start = await self._discard_some(meta, start, end, flag)
        finally:
            epoch.requests -= 1

    async def _discard_some(
        self, meta: Metadata, start: int, end: int, flag: int, *, full: bool = False
    ) -> int:
        """Give clusters up, as far as one slice goes; returns where the next ones begin.

        :param flag: of entries that are to read as zeroes.
        :param full: what is behind the disk's end does not even have to read as zeroes.
        """
        cluster = start >> self._bits
        slice_end = (cluster // meta.slice_entries + 1) * meta.slice_entries << self._bits
        end = min(end, slice_end)
        hidden = self.backing is not None
        if await meta.slice_for(cluster) is None and (full or not hidden):
            return end
        piece = await meta.writable_slice(cluster)
        index = cluster % meta.slice_entries
        count = -(-(end - start) // self._cluster)
        for position in range(index * meta.entry_words, (index + count) * meta.entry_words, meta.entry_words):
            self._discard_cluster(meta, piece, position, flag, hidden=hidden, full=full)
        if meta.much_freed:
            await meta.commit()
        return end

    def _discard_cluster(
        self, meta: Metadata, piece: L2Slice, position: int, flag: int, *, hidden: bool, full: bool
    ) -> None:
        words = piece.words
        entry = words[position]
        bitmap = words[position + 1] if meta.entry_words == 2 else 0
        extended = meta.entry_words == 2
        compressed = bool(entry & mapping.COMPRESSED)
        keep = not full and self._keeps_places and not compressed
        new, new_bitmap = entry, bitmap
        if full:
            new = new_bitmap = 0
        elif hidden or compressed or mapping.is_placed(entry, self._external) or entry & OFFSET:
            new = entry if keep else 0
            if extended:
                new_bitmap = mapping.ALL_SUBCLUSTERS << SUBCLUSTERS
            else:
                new |= flag
        if (new, new_bitmap) == (entry, bitmap):
            return
        words[position] = new
        if extended:
            words[position + 1] = new_bitmap
        piece.mark(position, position + meta.entry_words)
        if not keep:
            self._free_entry(meta, entry, discard=self._passes_request)

    # -- flushing

    async def _flush(self) -> None:
        meta = self._alive()
        if not self.read_only:
            await meta.commit()
        await self._flush_both()

    async def _flush_both(self) -> None:
        if self._external:
            await self._data.flush()
        await self.file.flush()

    # -- another size

    async def _truncate(self, size: int, preallocation: str) -> None:
        meta = self._alive()
        if size % SECTOR == 0 and preallocation != "off" and size < self._size:
            raise Error("Preallocation can't be used for shrinking an image")
        check_size(size, self._header, version=self._header.version, snapshots=bool(self._snapshots.entries))
        old = self._size
        try:
            await self._doubt_bitmaps(resized=size != old)
            # As long as this holds all clusters, nobody else writes.
            async with self._changing(0, 1 << 62):
                if size < old:
                    self._size = size
                    await self._cut(meta, size, old)
                elif size > old:
                    await self._grow(meta, size)
                await self._write_size(size)
                self._size = self._header.size = size
                if size < old and not self._external:
                    # The counts of what was cut off, then what they no longer hold.
                    await meta.commit()
                    async with meta.allocating:
                        await meta.cut_file()
        except OSError as error:
            self._size = old
            raise Error(f"Failed to resize the image: {error.strerror}") from None
        # What is new reads as zeroes, whatever the image behind has there, or the last cluster had.
        hidden = 0 if self.backing is None else self.backing.size
        end = min(size, max(hidden, -(-old // self._cluster) * self._cluster))
        if old < end:
            await self.pwrite_zeroes(old, end - old)
        if preallocation != "off":
            await self._preallocate(old, size)

    async def _preallocate(self, old: int, size: int) -> None:
        """Give all that is new a place that is written: that no mode promises less is all that counts.

        :raise Error: if there is no room; the disk has its old size then.
        """
        zeroes = memoryview(bytes(_PREALLOCATED))
        try:
            for start in range(old, size, _PREALLOCATED):
                await self._pwrite(start, zeroes[: min(size - start, _PREALLOCATED)])
        except OSError as error:
            await self._truncate(old, "off")
            raise Error(f"Could not preallocate data for the new image: {error.strerror}") from None

    async def _write_size(self, size: int) -> None:
        if self._external and self._header.raw_external_data:
            await self._data.truncate(size)
        meta = self._alive()
        await meta.data_barrier()
        old = self._header.size
        await meta.change_header(SIZE_POSITION, size.to_bytes(8, "big"), old.to_bytes(8, "big"))

    async def _cut(self, meta: Metadata, size: int, old: int) -> None:
        """Give up what is behind the new end, tables included."""
        first = -(-size // self._cluster) * self._cluster
        table_bytes = self._header.l2_entries << self._bits
        kept = self._header.l1_entries_for(size)
        # Most of a large disk has no L2 tables at all.
        for index in np.flatnonzero(np.frombuffer(meta.l1.words, np.uint64) & np.uint64(OFFSET)).tolist():
            start, end = max(first, index * table_bytes), min(old, (index + 1) * table_bytes)
            while start < end:
                start = await self._discard_some(meta, start, end, 0, full=True)
        await meta.commit()
        for index in np.flatnonzero(np.frombuffer(meta.l1.words, np.uint64) & np.uint64(OFFSET)).tolist():
            if index >= kept:
                entry = meta.l1.words[index]
                meta.l1.set(index, 0)
                meta.free(entry & OFFSET, self._cluster, table=True)
        await meta.commit()
        meta.map_all()

    async def _grow(self, meta: Metadata, size: int) -> None:
        """Move the L1 table to where there is room for more entries, if there have to be more."""
        needed = self._header.l1_entries_for(size)
        have = len(meta.l1.words)
        if needed <= have:
            return
        clusters = -(-needed * 8 // self._cluster)
        async with meta.allocating:
            place = await meta.take_in_one_piece(clusters)
        words = meta.l1.words + array("Q", bytes((needed - have) * 8))
        try:
            # What is known in memory only is in neither table yet.
            await meta.commit(refcounts_too=True)
            table = mapping.build_table(words).ljust(-(-needed * 8 // SECTOR) * SECTOR, b"\0")
            await self.file.pwrite(place, table, grow=True)
            await self.file.flush()
            await meta.change_header(
                L1_POSITION,
                needed.to_bytes(4, "big") + place.to_bytes(8, "big"),
                self._header.l1_entries.to_bytes(4, "big") + self._header.l1_offset.to_bytes(8, "big"),
            )
        except BaseException:
            meta.free(place, clusters << self._bits)
            raise
        meta.free(self._header.l1_offset, have * 8)
        self._header.l1_entries, self._header.l1_offset = needed, place
        meta.l1 = WordTable(place, words)
        meta.map_all()


def _check_encryption_options(wanted: Mapping[str, Any] | None, header: Header) -> None:
    """Refuse options for another encryption than the image has.

    :param wanted: BlockdevQcow2Encryption; in an image's header its "format" may be missing.
    :raise Error: in QEMU's words.
    """
    if wanted is None or "format" not in wanted:
        return
    if header.encryption is Encryption.NONE:
        raise Error(f"No encryption in image header, but options specified format '{wanted['format']}'")
    found = header.encryption.name.lower()
    if wanted["format"] != found:
        raise Error(f"Header reported '{found}' encryption format but options specify '{wanted['format']}'")


def _clusters(offset: int, length: int, cluster: int) -> range:
    return range(offset // cluster, -(-(offset + length) // cluster))


def _follow(requests: Sequence[Extent]) -> bool:
    """Whether the first two of several requests are one behind the other, as when a disk is read through."""
    return len(requests) > 1 and requests[0][0] + requests[0][1] == requests[1][0]


async def _padded(node: Node, offset: int, length: int) -> Data:
    """Bytes of a node; what lies behind its end reads as zeroes."""
    available = min(length, node.size - offset)
    if available >= length:
        return await node.pread(offset, length)
    if available <= 0:
        return bytes(length)
    return bytes(await node.pread(offset, available)).ljust(length, b"\0")
