"""The block drivers, one file or folder each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qmpd.block.drivers.file import FileNode
from qmpd.block.drivers.luks import GluksNode, LuksNode
from qmpd.block.drivers.null import NullAioNode, NullCoNode
from qmpd.block.drivers.raw import RawNode
from qmpd.block.node import Node

#: The driver classes by their QAPI names (enum BlockdevDriver).
DRIVERS: Final[Mapping[str, type[Node]]] = {
    driver.driver: driver for driver in (FileNode, GluksNode, LuksNode, NullAioNode, NullCoNode, RawNode)
}
