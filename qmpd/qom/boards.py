"""Boards: what is soldered in when a daemon starts.

A board is a table: which root bus there is, who provides it, and which places
on it the chip set takes.  The chip set is there by its types and places only, so
that addresses mean here what they mean in QEMU; its controllers do nothing.

A storage daemon has no board: see :class:`qmpd.qom.devices.Devices`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Soldered:
    """A device of the chip set.

    :param type_name: its type in QOM.
    :param slot: where it is on the root bus.
    :param function: which function of that slot it is.
    :param path: where it is in the object tree, below ``/machine``.
    :param multifunction: its slot may hold further functions.
    """

    type_name: str
    slot: int
    function: int
    path: str
    multifunction: bool = False


@dataclass(frozen=True, slots=True)
class RootBus:
    """The PCI bus that everything else hangs from.

    :param name: what `device_add` calls it.
    :param type_name: its type in QOM: ``PCI`` or ``PCIE``.
    :param host: the type of the host bridge that provides it.
    :param host_name: the host bridge's name below ``/machine``.
    :param hotplug: whether devices may come and go.
    :param chip_set: the devices on it that nobody can unplug.
    """

    name: str
    type_name: str
    host: str
    host_name: str
    hotplug: bool
    chip_set: tuple[Soldered, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """What devices are plugged into.

    :param root: its PCI bus, if it has one.
    """

    root: RootBus | None = None


#: The boards by the family of machine types that have them.  The numbers in the paths are QEMU's; those in
#: between are of what is not here, the processor (0) first.
BOARDS: Final[Mapping[str, Board]] = {
    "none": Board(),
    "pc": Board(
        RootBus(
            name="pci.0",
            type_name="PCI",
            host="i440FX-pcihost",
            host_name="i440fx",
            hotplug=True,
            chip_set=(
                Soldered("i440FX", 0, 0, "unattached/device[2]"),
                Soldered("PIIX3", 1, 0, "unattached/device[3]", multifunction=True),
                Soldered("piix3-ide", 1, 1, "unattached/device[3]/ide"),
                Soldered("PIIX4_PM", 1, 3, "unattached/device[3]/pm"),
            ),
        )
    ),
    "q35": Board(
        RootBus(
            name="pcie.0",
            type_name="PCIE",
            host="q35-pcihost",
            host_name="q35",
            hotplug=False,
            chip_set=(
                Soldered("mch", 0, 0, "q35/mch"),
                Soldered("ICH9-LPC", 31, 0, "unattached/device[2]", multifunction=True),
                Soldered("ich9-ahci", 31, 2, "unattached/device[12]", multifunction=True),
                Soldered("ICH9-SMB", 31, 3, "unattached/device[13]", multifunction=True),
            ),
        )
    ),
}
