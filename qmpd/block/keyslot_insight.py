"""What can be told of a LUKS header's keyslots without any key: which are in use, what each costs to try,
which of them opened the node, and whether the header is still the one that was opened.

The costs are for this machine: how fast it derives keys is measured in a key thread, once in a while.
Nothing of a slot is told that is worth anything without its passphrase; salts and key material are not told
at all.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from qmpd.block.keyslot_holder import KeyslotHolder, holders_beside
from qmpd.block.luks_header import DEFAULT_ITER_TIME
from qmpd.crypto import kdf, luks1_backup
from qmpd.crypto.luks1_keyslots import HEADER_SECTORS_BYTES

if TYPE_CHECKING:
    from qmpd.block.graph import Graph
    from qmpd.crypto import luks1

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
    known = holder.luks_header
    assert known is not None, "whoever is asked has keyslots"
    sectors = await holder.header_area.read(0, HEADER_SECTORS_BYTES)
    state, found = luks1_backup.state_of(sectors, known, detached=holder.header_role == "header")
    header = found or known
    opened = holder.opened_slot.find(header)
    key_speed = await _speed(graph, header.hash_name, header.key_bytes)
    digest_speed = await _speed(graph, header.hash_name, len(header.digest))
    info: dict[str, Any] = {
        "type": "luks1",
        "uuid": header.uuid,
        "header-node": holder.header_area.node.name,
        "state": str(state),
        "digest": _derivation(header, header.digest_iterations, digest_speed),
        "slots": [
            _slot(header, number, slot, key_speed, opened=number == opened)
            for number, slot in enumerate(header.slots)
        ],
        "shared-with": sorted(node.name for node in holders_beside(holder)),
    }
    return info if opened is None else info | {"opened-by": opened}


def _slot(
    header: luks1.Header, number: int, slot: luks1.Keyslot, speed: float, *, opened: bool
) -> dict[str, Any]:
    info: dict[str, Any] = {"slot": number, "active": slot.active, "opened-node": opened}
    if slot.active:
        derivation = _derivation(header, slot.iterations, speed)
        info |= {"kdf": derivation, "weak": derivation["milliseconds"] < WEAK_BELOW}
    return info


def _derivation(header: luks1.Header, iterations: int, speed: float) -> dict[str, Any]:
    return {
        "type": "pbkdf2",
        "milliseconds": max(1, round(iterations / speed)),
        "hash": header.hash_name,
        "iterations": iterations,
    }


async def _speed(graph: Graph, hash_name: str, key_bytes: int) -> float:
    """Iterations of PBKDF2 in a millisecond."""
    what = ("pbkdf2", hash_name, key_bytes)
    # Whoever asks at the same time has the same answer.
    async with graph.turn(what):
        return await graph.derivation_speed.of(what, partial(_measure, graph, hash_name, key_bytes))


async def _measure(graph: Graph, hash_name: str, key_bytes: int) -> float:
    return await graph.in_key_thread(kdf.calibrating(hash_name, 1000, key_bytes)) / 1000
