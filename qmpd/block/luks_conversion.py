"""A LUKS header on a node that nobody uses is made one of the other version.

What is written in which order, and what can't be converted, is said in
:mod:`qmpd.crypto.luks_conversion`.  Here the header is read, saved, which is the answer
where a conversion could not be safe, and written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qmpd.block import creation, header_backup, keyslots, luks_header
from qmpd.block.luks_header import HeaderArea
from qmpd.block.permissions import Permission
from qmpd.crypto import luks_conversion
from qmpd.crypto.luks import Luks1, Luks2, LuksHeader
from qmpd.crypto.plan import Plan
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.graph import Graph


async def convert(
    graph: Graph,
    reference: str | Mapping[str, Any],
    version: int,
    *,
    backup: str,
    commit: Callable[[], None],
) -> None:
    """Make the header at the beginning of a node one of another version.

    :param reference: the node's name, or BlockdevOptions to open it with.
    :param version: what it gets.
    :param backup: the name of a new file that the header is saved to; it stays there.
    :param commit: is called when nothing but writing is left: from there on it can't be cancelled.
    :raise Error: why it can't be converted, or what the storage says; then all is as before, if the storage
        let us undo it.
    :raise OSError: what the system says of the backup.
    """
    # Nobody else may read it either: a luks node on it has the old header in memory.
    async with creation.disk_for(graph, reference, Permission.nothing(), reads=True) as disk:
        area = HeaderArea(disk.node)
        # Where the payload is counts only for the check that no keyslot lies in it, which is done below.
        header = await luks_header.read_header(area, detached=True)
        if header.version == version:
            raise Error(f"The LUKS header is of version {version} already")
        beginning = bytes(await area.read(0, header.beginning_bytes))
        materials = await header_backup.key_materials(area, header)
        plan = plan_for(header, materials, area.node.size)
        await header_backup.save_image(graph, backup, header, beginning, materials)
        commit()
        # Nobody reopens or replaces the nodes below meanwhile.
        async with graph.change():
            if await luks_header.read_header(area, detached=True) != header:
                raise Error("The LUKS header has been changed by somebody else meanwhile")
            await keyslots.write_plan(area, plan)


def plan_for(header: LuksHeader, materials: Mapping[int, bytes], volume_bytes: int) -> Plan:
    """What to write to make a header one of the other version.

    :param materials: the key material of the slots in use, by slot number.
    :param volume_bytes: how long the header's volume is.
    :raise Error: it can't be converted.
    """
    if isinstance(header, Luks1):
        return luks_conversion.to_version_2(header.header, header.sectors, materials, volume_bytes)[1]
    assert isinstance(header, Luks2), "there are two versions"
    return luks_conversion.to_version_1(header.header, materials, volume_bytes)[1]
