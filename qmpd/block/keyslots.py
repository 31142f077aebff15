"""Changing the keyslots of a LUKS header that lies on a node.

Which slots are meant, whether that may be, the keys' derivation in threads, and
then the writes of a plan (:mod:`qmpd.crypto.luks1_keyslots`).  The drivers that
have such a header (`luks`, and `qcow2` with encryption inside) are
:class:`~qmpd.block.keyslot_holder.KeyslotHolder`.

While it happens nobody else may read or write the header's node: whoever has it
open with other permissions, in this daemon or in another process, makes the
change fail before anything has happened.  Other holders of the same header in
this daemon are no obstacle: they need the header's node for nothing meanwhile,
so they let go of it until the change is over, and then know the new slots.

The header is read again for each change, because somebody else may have changed
slots since the node was opened.  It is looked at once more when the first write is
due, because the derivation of a key takes time, and not everybody asks for locks.

If a write fails, the plan is undone step by step, the last one first, for each
state on the way there is one in which a passphrase opens the disk.  Where that
fails too, it stops in such a state.  In any case the nodes know afterwards what
the storage has.

Source: LUKS On-Disk Format Specification 1.2.3, sections 4.1 to 4.3.  The rules
and the texts of refusals are QEMU's.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final

from qmpd.block import luks_header
from qmpd.block.keyslot_holder import HeaderAccess, KeyslotHolder, holders_beside
from qmpd.block.luks_header import HeaderArea
from qmpd.crypto.luks import LuksHeader
from qmpd.crypto.luks1 import SECTOR
from qmpd.crypto.luks1_keyslots import HEADER_SECTORS_BYTES
from qmpd.crypto.memory import KeyBuffer
from qmpd.crypto.plan import Plan, Write
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.graph import Graph

_LOG: Final = logging.getLogger(__name__)

#: What is said if a header can't be written; what QEMU says of a luks volume.
WRITE_FAILURE: Final = "Could not write encryption header"

#: What is added if that could not be undone.
NOT_UNDONE: Final = "the keyslots could not be put back as they were"


async def amend(
    holder: KeyslotHolder, options: Mapping[str, Any], *, force: bool, commit: Callable[[], None]
) -> None:
    """Add, replace or erase keys.

    :param options: QCryptoBlockAmendOptionsLUKS.
    :param force: slots in use may be overwritten, and the last one erased; and if no passphrase is at
        hand that opens the volume any more, the volume key in memory will do.
    :param commit: is called when nothing but writing is left: from there on it can't be cancelled.
    :raise Error: in QEMU's words; then all is as before, if the storage let us put it back.
    """
    async with exclusive(holder) as access:
        header = await read_again(holder)
        plan_change = _activation if options["state"] == "active" else _erasure
        changed, plan = await plan_change(holder, header, options, force)
        check_extents(holder, changed, plan)
        commit()
        await access.carry_out(plan, expected=header)
        access.announce(changed)


class Access:
    """Sole access to a LUKS header.

    :param holder: who has it.
    :param others: the other holders of the same header.
    """

    def __init__(self, holder: KeyslotHolder, others: list[KeyslotHolder]) -> None:
        self._holder = holder
        self._others = others

    async def carry_out(self, plan: Plan, *, expected: LuksHeader | bytes | None = None) -> None:
        """Write what a plan says; if that fails, undo what has been done.

        :param expected: the header that is there, or what its area begins with, if the plan relies on it.
        :raise Error: what the storage says, and whether not all could be undone.
        """
        area = self._holder.header_area
        if self._holder.read_only:
            # QEMU says so when it has done everything but writing.
            raise Error(f"{area.failure}: {os.strerror(errno.EPERM)}")
        # Nobody reopens or replaces the nodes below meanwhile.
        async with self._holder.graph.change():
            if expected is not None and not await self._has(expected):
                raise Error("The LUKS header has been changed by somebody else meanwhile")
            try:
                await write_plan(area, plan)
            except BaseException:
                await self._read_back()
                raise

    async def _has(self, expected: LuksHeader | bytes) -> bool:
        """Whether this is what the storage has."""
        if isinstance(expected, bytes):
            return await self._holder.header_area.read(0, len(expected)) == expected
        return await _read(self._holder) == expected

    def announce(self, header: LuksHeader) -> None:
        """Tell all holders what the header is now."""
        for holder in (self._holder, *self._others):
            holder.luks_header = header

    async def _read_back(self) -> None:
        """Tell all holders what the storage has, if it can be read."""
        try:
            header = await read_again(self._holder)
        except Error as error:
            _LOG.warning("the header of node '%s' can't be read: %s", self._holder.name, error.desc)
        else:
            self.announce(header)


async def write_plan(area: HeaderArea, plan: Plan) -> None:
    """Write what a plan says; if that fails, undo what has been done.

    :raise Error: what the storage says, and whether not all could be undone.
    """
    overwritten: list[tuple[int, bytes]] = []
    try:
        for step in plan:
            if isinstance(step, Write):
                overwritten.append((step.offset, bytes(await area.read(step.offset, len(step.data)))))
                await area.write(step.offset, step.data)
            else:
                await area.node.flush()
    except BaseException as error:
        undone = await _undo(area, overwritten)
        if not isinstance(error, OSError | Error):
            raise
        reason = error.desc if isinstance(error, Error) else f"{WRITE_FAILURE}: {error.strerror}"
        raise Error(reason if undone else f"{reason}; {NOT_UNDONE}") from None


async def _undo(area: HeaderArea, overwritten: Sequence[tuple[int, bytes]]) -> bool:
    """Go back the way that a plan came, as far as the storage allows; whether that was all of it.

    :param overwritten: what each write, in their order, has overwritten: the offset, and what was there.
    """
    complete = True
    for offset, data in reversed(overwritten):
        try:
            await _put_back(area, offset, data)
        except (OSError, Error) as error:
            # What would come next relies on this one.
            _LOG.error("a change of keyslots could not be undone: %s", error)
            return False
        try:
            await area.node.flush()
        except OSError as error:
            # To stop here would leave more of the change, and nothing that is more certain.
            _LOG.error("the undoing of a change of keyslots could not be flushed: %s", error.strerror)
            complete = False
    return complete


async def _put_back(area: HeaderArea, offset: int, data: bytes) -> None:
    """Write those sectors of `data` that differ: on a full disk the others may still have no room."""
    try:
        present = bytes(await area.read(offset, len(data)))
    except Error:
        await area.write(offset, data)
        return
    start = 0
    while start < len(data):
        end = start
        while data[end : end + SECTOR] != present[end : end + SECTOR]:
            end += SECTOR
        if end > start:
            await area.write(offset + start, data[start : min(end, len(data))])
        start = end + SECTOR


def check_extents(holder: KeyslotHolder, header: LuksHeader, plan: Plan) -> None:
    """See that a plan keeps within the header and its key area.

    A detached header is not held against a payload when it is read, and says itself where its slots are.

    :raise Error: if it does not.
    """
    area = holder.header_area
    end = header.key_area_end(area.node.size)
    if area.length is not None:
        end = min(end, area.length)
    for step in plan:
        if isinstance(step, Write) and step.offset + len(step.data) > max(end, HEADER_SECTORS_BYTES):
            slot = next(n for n in range(header.slot_count) if header.material_extent(n)[0] == step.offset)
            raise Error(f"Keyslot {slot} ends behind the LUKS header's key area, at byte {end}")


# -- sole access


@asynccontextmanager
async def exclusive(holder: KeyslotHolder) -> AsyncIterator[Access]:
    """Keep everybody else from the header's node for the time of an ``async with``; one waits for another.

    :raise Error: if somebody else has it open.
    """
    async with holder.graph.turn(holder.header_identity):
        with _sole_access(holder) as access:
            yield access


def check_access(holder: KeyslotHolder) -> None:
    """See that nobody has the header open who would not let it change, as things are now.

    Who changes it at this moment is no obstacle: for him one waits.

    :raise Error: if somebody else has it open.
    """
    if not holder.graph.has_turn(holder.header_identity):
        with _sole_access(holder):
            pass


@contextmanager
def _sole_access(holder: KeyslotHolder) -> Iterator[Access]:
    graph = holder.graph
    # Whoever has the header in front of the payload keeps its permissions, and so keeps us out.
    others = [node for node in holders_beside(holder) if node.header_role == "header"]
    # Those on the same node change their permissions in one step with us, so nobody slips in between.
    # Those on another node of the same file have locks of their own there, which have to go first.
    source = holder.header_area.node
    beside = [node for node in others if node.header_area.node is source]
    elsewhere = [node for node in others if node not in beside]
    try:
        _set_access(graph, elsewhere, HeaderAccess.SUSPENDED)
        for node in beside:
            node.header_access = HeaderAccess.SUSPENDED
        holder.header_access = HeaderAccess.EXCLUSIVE
        graph.settle(holder, *beside)
        yield Access(holder, others)
    finally:
        for node in (holder, *others):
            node.header_access = HeaderAccess.ORDINARY
        for nodes in ([holder, *beside], elsewhere):
            try:
                graph.settle(*nodes)
            except Error as error:
                # Another process has taken a lock in the moment between.
                _LOG.warning("a node could not take its permissions on a LUKS header again: %s", error.desc)


def _set_access(graph: Graph, holders: list[KeyslotHolder], access: HeaderAccess) -> None:
    for holder in holders:
        holder.header_access = access
    graph.settle(*holders)


async def read_again(holder: KeyslotHolder) -> LuksHeader:
    """The header as it is now.

    :raise Error: if it can't be read, or is that of another volume.
    """
    known = holder.luks_header
    assert known is not None, "whoever changes keyslots has some"
    header = await _read(holder)
    if not header.is_of_same_volume(known):
        raise Error("The LUKS header is another one than when the node was opened")
    return header


async def _read(holder: KeyslotHolder) -> LuksHeader:
    detached = holder.header_role == "header"
    return await luks_header.read_header(holder.header_area, detached=detached)


# -- what is to change


async def _activation(
    holder: KeyslotHolder, header: LuksHeader, options: Mapping[str, Any], force: bool
) -> tuple[LuksHeader, Plan]:
    """Put a new passphrase into the slots that the options mean."""
    graph = holder.graph
    if "new-secret" not in options:
        raise Error("'new-secret' is required to activate a keyslot")
    slots = await _slots_to_activate(holder, header, options, force)
    choice = luks_header.kdf_choice(graph, options)
    with (
        await _volume_key(holder, header, options.get("secret"), force) as key,
        graph.secrets(options["new-secret"]) as password,
    ):
        async with graph.derivation_memory.reserve(choice.most_memory if header.version > 1 else 0):
            costs = await graph.in_key_thread(header.calibrating(choice))
            return await graph.in_key_thread(header.activating(slots, key.data, password.data, costs))


async def _slots_to_activate(
    holder: KeyslotHolder, header: LuksHeader, options: Mapping[str, Any], force: bool
) -> list[int]:
    # QEMU never takes an old passphrase here.  With `force` it says which slots to overwrite.
    if "old-secret" in options and not force:
        raise Error("'old-secret' must not be given when activating keyslots")
    if "keyslot" in options:
        slot = _checked(header, options["keyslot"], unsigned=True)
        if slot in header.active_slots and not force:
            raise Error(f"Refusing to overwrite active keyslot {slot} - please erase it first")
        if "old-secret" in options:
            await _slots_opened(holder, header, options["old-secret"], slot)
        return [slot]
    if "old-secret" in options:
        return await _slots_opened(holder, header, options["old-secret"])
    free = header.free_slot()
    if free is None:
        raise Error("Can't add a keyslot - all keyslots are in use")
    return [free]


async def _erasure(
    holder: KeyslotHolder, header: LuksHeader, options: Mapping[str, Any], force: bool
) -> tuple[LuksHeader, Plan]:
    """Erase the slots that the options mean."""
    for member in ("new-secret", "iter-time", "secret", "pbkdf", "pbkdf-memory", "pbkdf-parallel"):
        if member in options:
            raise Error(f"'{member}' must not be given when erasing keyslots")
    if "keyslot" in options:
        given = options["keyslot"]
        slots = [_checked(header, given)] if "old-secret" not in options else []
        if "old-secret" in options:
            slots = await _slots_opened(holder, header, options["old-secret"], given)
        slot = slots[0]
        if slot not in header.active_slots and not force:
            raise Error(f"Given keyslot {slot} is already erased (inactive) ")
        if header.volume_slots == [slot] and not force:
            raise Error(
                f"Attempt to erase the only active keyslot {slot} which will erase all the data in the image "
                "irreversibly - refusing operation"
            )
    elif "old-secret" in options:
        slots = await _slots_opened(holder, header, options["old-secret"])
        if slots == header.volume_slots and not force:
            raise Error(
                "All the active keyslots match the (old) password that was given and erasing them will erase "
                "all the data in the image irreversibly - refusing operation"
            )
    else:
        raise Error(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them "
            "must be given"
        )
    return header.erasing(slots)


def _checked(header: LuksHeader, slot: int, *, unsigned: bool = False) -> int:
    if not 0 <= slot < header.slot_count:
        # A number is never cut to 32 bits, so that 2^32 would mean slot 0, as it does in QEMU.
        shown = slot + (1 << 32) if unsigned and -(1 << 31) <= slot < 0 else slot
        raise Error(f"Invalid keyslot {shown} specified, must be between 0 and {header.slot_count - 1}")
    return slot


async def _slots_opened(
    holder: KeyslotHolder, header: LuksHeader, secret: str, slot: int | None = None
) -> list[int]:
    """The slots that a secret's passphrase opens.

    :param slot: the only one to try.
    :raise Error: if there is none.
    """
    graph = holder.graph
    with graph.secrets(secret) as password:
        if slot is not None:
            if not await luks_header.opens(
                graph, holder.header_area, header, _checked(header, slot), password
            ):
                raise Error(
                    f"Given keyslot {slot} doesn't contain the given old password for erase operation"
                )
            return [slot]
        slots = [
            number
            for number in header.volume_slots
            if await luks_header.opens(graph, holder.header_area, header, number, password)
        ]
        if not slots:
            raise Error("No keyslots match given (old) password for erase operation")
        return slots


async def _volume_key(
    holder: KeyslotHolder, header: LuksHeader, secret: str | None, force: bool
) -> KeyBuffer:
    """The volume key: whoever adds a key has to know one, as in QEMU; with `force` it need not be so.

    :param secret: what the client has named, which has to be there in any case, or None.
    """
    graph = holder.graph
    if secret is not None:
        with graph.secrets(secret):
            pass
    try:
        with graph.secrets(holder.opened_with if secret is None else secret) as password:
            _, key = await luks_header.find_key(graph, holder.header_area, header, password)
            return key
    except Error:
        if not force:
            raise
        return holder.copy_volume_key()
