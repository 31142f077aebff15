"""What nodes with a LUKS header have in common, whose keyslots can be changed.

Apart from :mod:`qmpd.block.keyslots`, which changes them, so that a node that
turns out to have none needs no ciphers.
"""

from __future__ import annotations

import enum
from abc import abstractmethod
from collections.abc import Hashable
from typing import TYPE_CHECKING, Final

from qmpd.block.node import Node
from qmpd.block.permissions import Permission
from qmpd.errors import Error

if TYPE_CHECKING:
    from qmpd.block.luks_header import HeaderArea, OpenedSlot
    from qmpd.crypto.luks import LuksHeader
    from qmpd.crypto.memory import KeyBuffer

#: What a change of keyslots keeps others from.
_UNSHARED: Final = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE


class HeaderAccess(enum.Enum):
    """How a node uses the node on which its LUKS header lies."""

    #: As the node's users want.
    ORDINARY = enum.auto()
    #: To change it, alone.
    EXCLUSIVE = enum.auto()
    #: Not at all, while another holder changes it.
    SUSPENDED = enum.auto()

    def permissions(self, perm: Permission, shared: Permission) -> tuple[Permission, Permission]:
        """What is taken and shared on the header's node.

        :param perm: what would be taken ordinarily, and is needed to change the header.
        :param shared: what would be shared ordinarily.
        """
        if self is HeaderAccess.EXCLUSIVE:
            return perm, shared & ~_UNSHARED
        if self is HeaderAccess.SUSPENDED:
            return Permission.nothing(), Permission.everything()
        return perm, shared


class KeyslotHolder(Node):
    """A node that may have a LUKS header, and if so was opened by a passphrase of one of its keyslots."""

    header_access = HeaderAccess.ORDINARY

    @property
    @abstractmethod
    def header_role(self) -> str:
        """The child on which the header is."""

    @property
    @abstractmethod
    def header_area(self) -> HeaderArea:
        """Where the header is."""

    @property
    @abstractmethod
    def luks_header(self) -> LuksHeader | None:
        """The header as it was read last, or None if there is none."""

    @luks_header.setter
    @abstractmethod
    def luks_header(self, header: LuksHeader) -> None: ...

    @property
    @abstractmethod
    def opened_with(self) -> str:
        """The id of the secret whose passphrase opened it."""

    @property
    @abstractmethod
    def opened_slot(self) -> OpenedSlot:
        """The keyslot that it was opened by."""

    @abstractmethod
    def copy_volume_key(self) -> KeyBuffer:
        """A copy of the volume key, for the caller to wipe."""

    @property
    def header_identity(self) -> Hashable:
        """Equal for two holders of the same header."""
        area = self.header_area
        return area.node.identity, area.offset


def keyslot_holder(node: Node) -> KeyslotHolder:
    """The node, if it has a LUKS header.

    :raise Error: if it has none.
    """
    if not isinstance(node, KeyslotHolder) or node.luks_header is None:
        raise Error(f"Node '{node.name}' has no LUKS header")
    return node


def holders_beside(holder: KeyslotHolder) -> list[KeyslotHolder]:
    """The other nodes with the same header."""
    identity = holder.header_identity
    return [
        node
        for node in holder.graph.nodes()
        if isinstance(node, KeyslotHolder)
        and node is not holder
        and node.luks_header is not None
        and node.header_identity == identity
    ]
