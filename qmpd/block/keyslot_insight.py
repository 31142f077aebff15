"""What can be told of a LUKS header's keyslots without any key: which are in use, what each costs to try,
which of them opened the node, and whether the header is still the one that was opened.

The costs are for this machine: how fast it derives keys is measured in a key thread, once in a while.
argon2 is measured with less memory and fewer passes than it may be made for, and the rest is reckoned.
Nothing of a slot is told that is worth anything without its passphrase; salts and key material are not told
at all, nor what is in a token besides its type.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from qmpd.block.header_backup import read_state
from qmpd.block.keyslot_holder import KeyslotHolder, holders_beside
from qmpd.block.luks_header import DEFAULT_ITER_TIME, shown
from qmpd.crypto import kdf, luks2_kdf
from qmpd.crypto.luks import Luks2, LuksHeader
from qmpd.crypto.luks2_kdf import Kdf
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.graph import Graph

#: A slot is weak if trying a passphrase takes less than this, in milliseconds: a tenth of the default.
WEAK_BELOW: Final = DEFAULT_ITER_TIME // 10


async def query(holder: KeyslotHolder) -> dict[str, Any]:
    """What a header's keyslots are like.

    The slots are those that are on the storage now, if that is a header of this volume, else those
    that were known last.

    :returns: __org.qmpd_LuksKeyslots.
    :raise Error: if the header can't be read.
    """
    graph = holder.graph
    state, found, _ = await read_state(holder)
    header = found or holder.luks_header
    assert header is not None, "whoever is asked has keyslots"
    opened = holder.opened_slot.find(header)
    info: dict[str, Any] = {
        "type": f"luks{header.version}",
        "uuid": shown(header.uuid),
        "header-node": holder.header_area.node.name,
        "state": str(state),
        "digest": await _derivation(graph, header.digest_derivation, header.derived_bytes(None)),
        "slots": [
            await _slot(graph, header, number, opened=number == opened) for number in header.listed_slots
        ],
        "shared-with": sorted(node.name for node in holders_beside(holder)),
    }
    if isinstance(header, Luks2):
        info |= _only_version_2(header)
    return info if opened is None else info | {"opened-by": opened}


def _only_version_2(header: Luks2) -> dict[str, Any]:
    binary = header.header.binary
    info: dict[str, Any] = {"sequence": binary.sequence, "damaged": list(header.damaged)}
    for name, text in (("label", binary.label), ("subsystem", binary.subsystem)):
        if text:
            info[name] = shown(text)
    return info


async def _slot(graph: Graph, header: LuksHeader, number: int, *, opened: bool) -> dict[str, Any]:
    there = number in header.active_slots
    active = number in header.volume_slots
    info: dict[str, Any] = {"slot": number, "active": active, "opened-node": opened}
    if not there:
        return info
    # Nobody knows what a slot costs that is of a kind or with a hash that is not known here.
    with suppress(Error):
        costs = await _derivation(graph, header.derivation(number), header.derived_bytes(number))
        info["kdf"] = costs
        if active:
            info["weak"] = costs["milliseconds"] < WEAK_BELOW
    if isinstance(header, Luks2):
        info |= _slot_only_version_2(header, number, active)
    return info


def _slot_only_version_2(header: Luks2, number: int, active: bool) -> dict[str, Any]:
    said = header.header
    info: dict[str, Any] = {
        "unbound": not active,
        "tokens": [
            {"token": token, "type": shown(kind)} for token, kind, slots in said.tokens if number in slots
        ],
    }
    if number in said.keyslots:
        info["priority"] = said.keyslots[number].priority
    return info


async def _derivation(graph: Graph, derivation: Kdf, derived_bytes: int) -> dict[str, Any]:
    """__org.qmpd_LuksKdf.

    :raise Error: no such hash.
    """
    per_millisecond = await _speed(graph, derivation, derived_bytes)
    return derivation.parameters() | {"milliseconds": max(1, round(derivation.work / per_millisecond))}


async def _speed(graph: Graph, derivation: Kdf, derived_bytes: int) -> float:
    """How much of :attr:`Kdf.work` this machine does in a millisecond."""
    trial = luks2_kdf.trial(derivation, graph.derivation_memory.limit)
    what = (trial.kind, trial.hash_name, trial.memory, trial.cpus, derived_bytes)
    # Whoever asks at the same time has the same answer.
    async with graph.turn(what):
        return await graph.derivation_speed.of(what, partial(_measure, graph, trial, derived_bytes))


async def _measure(graph: Graph, trial: Kdf, derived_bytes: int) -> float:
    if trial.kind == "pbkdf2":
        return await graph.in_key_thread(kdf.calibrating(trial.hash_name, 1000, derived_bytes)) / 1000
    async with graph.derivation_memory.reserve(trial.memory):
        return await graph.in_key_thread(luks2_kdf.measuring(trial, derived_bytes))
