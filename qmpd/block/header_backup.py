"""A LUKS header saved to a file, and put back from one.

What belongs into a backup, and in which order one is put back, is said in
:mod:`qmpd.crypto.luks1_backup` and :mod:`qmpd.crypto.luks2_backup`; here it is
read, written, and judged.

A backup is a new file: none is ever overwritten, and none that is not whole
stays behind, be it that the disk is full or that the job was cancelled.  If the
daemon itself is killed there may be a part of one, but not with a header in it,
which comes last.  The header is read twice, before and after the key material:
since every change of a slot's key material goes along with one of the header,
what was between two equal ones belongs together, even if another process was
at it.

Before a backup is put back, the volume key that is in memory is shown to fit its
digest, so it is of this volume; the header that is overwritten need not be
readable any more.  Where there is no backup at all, and only the header's own
sectors were overwritten, what is known of them in memory is as good.

Without `force` what is put back must be openable by a passphrase that is at
hand, and may neither bring another UUID nor take away a header of another
volume.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

from qmpd.block import keyslots, luks_header
from qmpd.block.keyslot_holder import KeyslotHolder
from qmpd.block.luks_header import HeaderArea
from qmpd.crypto import luks, luks_backup
from qmpd.crypto.luks import LuksHeader
from qmpd.crypto.luks_backup import HeaderState
from qmpd.crypto.memory import Buffer
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.graph import Graph

#: How often a header is read that somebody else changes meanwhile.
_ATTEMPTS: Final = 3

#: Only its owner may read a backup, and nobody write it: that is what cryptsetup makes.
_MODE: Final = 0o400


# -- saving


async def save(holder: KeyslotHolder, filename: str) -> None:
    """Save a node's header to a new file.

    :raise Error: if the header is not the one that the node was opened with, or not the volume key's.
    :raise OSError: what the system says of the file.
    """
    graph = holder.graph
    # Slots change in this daemon before or after, and not meanwhile.
    async with graph.turn(holder.header_identity):
        header, beginning, materials = await _read_whole(holder)
    with holder.copy_volume_key() as key:
        if not await graph.in_key_thread(header.fitting(key.data)):
            raise Error("The volume key does not fit the digest in the LUKS header")
    await save_image(graph, filename, header, beginning, materials)


async def save_image(
    graph: Graph, filename: str, header: LuksHeader, beginning: Buffer, materials: Mapping[int, bytes]
) -> None:
    """Make a backup out of what was read; afterwards it is whole and on the storage, or not there.

    :param beginning: the first :attr:`~LuksHeader.beginning_bytes` bytes of the header's volume.
    :param materials: the key material of the slots in use, by slot number.
    :raise OSError: what the system says of the file.
    """
    file = _NewFile(filename)
    image = header.backup_image(beginning)
    pieces = [(header.material_extent(slot)[0], material) for slot, material in materials.items()]
    try:
        # The header last: without it the file is no backup.
        await graph.in_io_thread(file.write, header.length, [*pieces, (0, image)])
    except BaseException:
        await graph.in_io_thread(file.remove)
        raise


async def _read_whole(holder: KeyslotHolder) -> tuple[LuksHeader, bytes, dict[int, bytes]]:
    """A header, what it begins with, and the key material of the slots in use, all of one moment."""
    for _ in range(_ATTEMPTS):
        header = await keyslots.read_again(holder)
        materials = await key_materials(holder.header_area, header)
        beginning = bytes(await holder.header_area.read(0, header.beginning_bytes))
        if await keyslots.read_again(holder) == header:
            return header, beginning, materials
    raise Error("The LUKS header is being changed by somebody else")


async def key_materials(area: HeaderArea, header: LuksHeader) -> dict[int, bytes]:
    """The key material of the slots in use, by slot number."""
    return {slot: bytes(await area.read(*header.material_extent(slot))) for slot in header.active_slots}


class _NewFile:
    """A file that is made, written once, and taken away again if that was not to be."""

    def __init__(self, filename: str) -> None:
        self._filename = filename
        #: What the file is that was made here: its device and its number there.
        self._made: tuple[int, int] | None = None

    def write(self, length: int, pieces: list[tuple[int, bytes]]) -> None:
        """Make the file, and see that it reaches the storage; called in a thread.

        :param length: in bytes.
        :param pieces: offset and data; all but the last reach the storage before it is written.
        :raise OSError: what the system says; EEXIST if there is something of that name.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._filename, flags, _MODE)
        try:
            status = os.fstat(descriptor)
            self._made = status.st_dev, status.st_ino
            os.ftruncate(descriptor, length)
            for number, (offset, data) in enumerate(pieces, 1):
                if number == len(pieces):
                    os.fsync(descriptor)
                _write_at(descriptor, offset, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _sync_directory(os.path.dirname(self._filename) or ".")

    def remove(self) -> None:
        """Take the file away, if it was made and is still there under its name; called in a thread."""
        with suppress(OSError):
            status = os.lstat(self._filename)
            if self._made == (status.st_dev, status.st_ino):
                os.unlink(self._filename)


def _write_at(descriptor: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        offset += written
        view = view[written:]


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems can't do that for a directory.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


# -- putting back


async def put_back(
    holder: KeyslotHolder,
    filename: str | None,
    *,
    secret: str | None,
    force: bool,
    commit: Callable[[], None],
) -> None:
    """Make the slots of a node's header those of a backup.

    :param filename: the backup; if None the header becomes what was known of it last, provided that it
        can't be read any more, and key material stays as it is.
    :param secret: the id of the secret whose passphrase has to open the backup; the one that the node was
        opened with if None.
    :param force: no passphrase need open it, its UUID may be another one, and a header of another volume
        may be overwritten.
    :param commit: is called when nothing but writing is left: from there on it can't be cancelled.
    :raise Error: why it can't be put back, or what the storage says; then all is as before, if the storage
        let us undo it.
    """
    graph = holder.graph
    assert holder.luks_header is not None, "whoever is given a backup has keyslots"
    known = holder.luks_header
    detached = holder.header_role == "header"
    async with _backup_area(holder, filename) as source, keyslots.exclusive(holder) as access:
        if filename is None:
            backup = known
        else:
            beginning = await source.read(0, min(source.node.size, luks.MOST_BEGINNING_BYTES))
            backup = _parse_backup(beginning, known, source.node.size, detached=detached)
        await _check_digest(holder, backup)
        state, present, beginning = await read_state(holder)
        if filename is None and present is not None:
            raise Error("The LUKS header can be read: to change it back, name a backup")
        if not force:
            await _check_unforced(graph, source, backup, known, state, secret or holder.opened_with)
        materials = await key_materials(source, backup)
        if present is None:
            header, plan = known.rewriting(backup, materials)
        else:
            there = await key_materials(holder.header_area, present)
            header, plan = present.restoring(there, backup, materials)
        keyslots.check_extents(holder, header, plan)
        commit()
        await access.carry_out(plan, expected=present or bytes(beginning))
        access.announce(header)


async def read_state(holder: KeyslotHolder) -> tuple[HeaderState, LuksHeader | None, bytearray]:
    """What lies where a node's header was.

    :returns: the header as well, if it is one of this volume, and the bytes that there are where it begins.
    :raise Error: if they can't be read.
    """
    known = holder.luks_header
    assert known is not None, "whoever is asked has keyslots"
    beginning = await holder.header_area.read(0, known.beginning_bytes)
    found = None
    with suppress(Error):
        found = await luks_header.read_header(holder.header_area, detached=holder.header_role == "header")
    state = luks_backup.state_of(known, found, beginning)
    return state, found if state.is_ours else None, beginning


@asynccontextmanager
async def _backup_area(holder: KeyslotHolder, filename: str | None) -> AsyncIterator[HeaderArea]:
    """Where the slots are that are put back: in the file, if there is one."""
    if filename is None:
        yield holder.header_area
        return
    options = {"driver": "file", "filename": filename, "read-only": True}
    async with holder.graph.borrow(options) as file:
        yield HeaderArea(file, failure="Unable to read LUKS header backup")


def _parse_backup(beginning: Buffer, known: LuksHeader, size: int, *, detached: bool) -> LuksHeader:
    """The header in a backup, of which no more is believed than what the known one says too.

    :param beginning: of the file, which has `size` bytes.
    """
    try:
        backup = luks.parse(beginning, detached=detached)
    except Error as error:
        raise Error(f"The backup holds no LUKS header that can be used: {error.desc}") from None
    what = known.difference(backup)
    if what is not None:
        raise Error(f"The backup is of another volume: its {what} is not the one of this volume")
    if not backup.volume_slots:
        raise Error("No keyslot is active in the backup")
    end = max(sum(backup.material_extent(slot)) for slot in backup.active_slots)
    if size < end:
        raise Error(f"The backup is cut short: it has {size} bytes, and its keyslots take {end}")
    return backup


async def _check_digest(holder: KeyslotHolder, backup: LuksHeader) -> None:
    with holder.copy_volume_key() as key:
        if not await holder.graph.in_key_thread(backup.fitting(key.data)):
            raise Error("The backup is of another volume: the volume key does not fit its digest")


async def _check_unforced(
    graph: Graph,
    source: HeaderArea,
    backup: LuksHeader,
    known: LuksHeader,
    state: HeaderState,
    secret: str,
) -> None:
    """Refuse what somebody may not have meant."""
    if state is HeaderState.OTHER:
        raise Error("There is a LUKS header of another volume now - refusing to overwrite it")
    if backup.uuid != known.uuid:
        raise Error(f"The backup has the UUID '{backup.uuid}', and the volume '{known.uuid}'")
    with graph.secrets(secret) as password:
        for slot in backup.volume_slots:
            # A slot with absurd costs does not keep the others from being tried.
            with suppress(Error):
                if await luks_header.opens(graph, source, backup, slot, password):
                    return
    raise Error(f"The passphrase of secret '{secret}' opens no keyslot of the header that would be put back")
