"""Buses: which places there are, and which of them a new device takes."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

from qmpd.errors import DeviceNotFound, Error
from qmpd.qom.models import ALIASES, AUTO_UINT32
from qmpd.qom.object import Object, Property

if TYPE_CHECKING:
    from qmpd.qom.device import Device

_LOG: Final = logging.getLogger(__name__)

_SLOTS: Final = 32
_FUNCTIONS: Final = 8

#: Where most machines have their chip set: on a bus of no particular machine no disk goes there.
CHIP_SET_SLOTS: Final = frozenset({0, 1})

_MAX_TARGET: Final = 255
_MAX_LUN: Final = 16383

#: Slot and function in hexadecimal digits.
_ADDRESS: Final = re.compile(r"(?:0[xX])?([0-9a-fA-F]+)(?:\.(?:0[xX])?([0-9a-fA-F]+))?")


class Bus(Object):
    """What devices are plugged into.

    :param type_name: its type in QOM, which messages call it by.
    :param hotplug: whether devices may come and go.
    """

    #: What goes on it: "PCI", "SCSI", or "System".
    kind: str

    def __init__(self, type_name: str, *, hotplug: bool = True) -> None:
        super().__init__(type_name)
        self.hotplug = hotplug
        #: Oldest first.
        self.devices: list[Device] = []

    def own_properties(self) -> Mapping[str, Property]:
        """The devices, as links."""
        properties = {"realized": Property("realized", "bool", lambda: True)}
        for index, device in enumerate(self.devices):
            name = f"child[{index}]"
            properties[name] = Property(name, f"link<{device.type_name}>", partial(_path, device))
        return properties

    @property
    def label(self) -> str:
        """What it is called outside of the object tree."""
        return self.name

    def unplugged_with(self, device: Device) -> list[Device]:
        """The devices on this bus that go when `device` goes, itself included."""
        return [device]

    def check_hotplug(self) -> None:
        """See that devices may come and go.

        :raise Error: if they may not.
        """
        if not self.hotplug:
            raise Error(f"Bus '{self.label}' does not support hotplugging")


class SystemBus(Bus):
    """The bus of what a machine consists of: nothing that can be plugged in goes there."""

    kind = "System"

    def __init__(self) -> None:
        super().__init__("System", hotplug=False)

    @property
    def label(self) -> str:
        """In the object tree it goes by a shorter name."""
        return "main-system-bus"


class PCIBus(Bus):
    """A PCI bus; of a root port's a guest sees slot 0 only.

    A place is slot times 8 plus function.

    :param reserved: the slots that nothing goes into.
    """

    kind = "PCI"

    def __init__(
        self,
        type_name: str = "PCI",
        *,
        hotplug: bool = True,
        root_port: bool = False,
        reserved: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(type_name, hotplug=hotplug)
        self.root_port = root_port
        self._reserved = reserved

    def place(self, device: Device) -> int:
        """Where `device` goes: its ``addr``, or the first free slot.

        :raise Error: if that place is not free.
        """
        taken = {int(each.values["addr"]): each for each in self.devices}
        wanted: int = device.values["addr"]
        if wanted < 0:
            wanted = self._free(taken, device)
        slot, function = divmod(wanted, _FUNCTIONS)
        name = device.type_name
        if slot in self._reserved:
            raise Error(f"PCI: slot {slot} function {function} not available for {name}, reserved")
        if wanted in taken:
            user = taken[wanted]
            raise Error(
                f"PCI: slot {slot} function {function} not available for {name}, "
                f"in use by {user.type_name},id={'(null)' if user.device_id is None else user.device_id}"
            )
        if device.hotplugged:
            self._check_visible(taken, 0 if self.root_port else slot, name)
        self._check_functions(taken, slot, function, device)
        if self.root_port and slot:
            _LOG.warning(
                "PCI: slot %d is not valid for %s, parent device only allows plugging into slot 0.",
                slot,
                name,
            )
        return wanted

    def unplugged_with(self, device: Device) -> list[Device]:
        """All functions of the slot, the newest first: it is switched off as a whole."""
        slot = device.values["addr"] // _FUNCTIONS
        return [each for each in reversed(self.devices) if each.values["addr"] // _FUNCTIONS == slot]

    def _check_visible(self, taken: Mapping[int, Device], slot: int, name: str) -> None:
        """See that a guest can find a new device: it looks at a slot when function 0 of that comes."""
        first = taken.get(slot * _FUNCTIONS)
        if first is not None:
            raise Error(
                f"PCI: slot {slot} function 0 already occupied by {first.type_name}, "
                f"new func {name} cannot be exposed to guest."
            )

    def _check_functions(self, taken: Mapping[int, Device], slot: int, function: int, device: Device) -> None:
        """See that a slot with several functions says so in function 0."""
        base = slot * _FUNCTIONS
        if function:
            first = taken.get(base)
            if first is not None and not first.values["multifunction"]:
                raise Error(
                    f"PCI: single function device can't be populated in function {slot:x}.{function:x}"
                )
        elif not device.values["multifunction"]:
            for other in range(1, _FUNCTIONS):
                if base + other in taken:
                    raise Error(
                        f"PCI: {slot:x}.0 indicates single function, but {slot:x}.{other:x} "
                        "is already populated."
                    )

    def _free(self, taken: Mapping[int, Device], device: Device) -> int:
        for slot in range(_SLOTS):
            if slot not in self._reserved and slot * _FUNCTIONS not in taken:
                return slot * _FUNCTIONS
        raise Error(f"PCI: no slot/function available for {device.type_name}, all in use or reserved")


class SCSIBus(Bus):
    """The bus of a SCSI controller: a device is found by channel, target and LUN."""

    kind = "SCSI"

    def __init__(self) -> None:
        super().__init__("SCSI")

    def place(self, device: Device) -> tuple[int, int, int]:
        """Channel, target and LUN for `device`: those that it names, and the first free ones.

        :raise Error: if the place does not exist or is taken.
        """
        channel, target, lun = (int(device.values[name]) for name in ("channel", "scsi-id", "lun"))
        if channel > 0:
            raise Error(f"bad scsi channel id: {channel}")
        if target != AUTO_UINT32 and target > _MAX_TARGET:
            raise Error(f"bad scsi device id: {target}")
        if lun != AUTO_UINT32 and lun > _MAX_LUN:
            raise Error(f"bad scsi device lun: {lun}")
        taken = {(each.values["scsi-id"], each.values["lun"]): each for each in self.devices}
        if target == AUTO_UINT32:
            lun = 0 if lun == AUTO_UINT32 else lun
            free = (number for number in range(_MAX_TARGET + 1) if (number, lun) not in taken)
            target = next(free, AUTO_UINT32)
            if target == AUTO_UINT32:
                raise Error("no free target")
        elif lun == AUTO_UINT32:
            free = (number for number in range(_MAX_LUN + 1) if (target, number) not in taken)
            lun = next(free, AUTO_UINT32)
            if lun == AUTO_UINT32:
                raise Error("no free lun")
        elif user := taken.get((target, lun)):
            raise Error(f"lun already used by '{user.device_id or ''}'")
        return channel, target, lun


def _path(each: Object) -> str:
    return each.path


def descend(bus: Bus, names: list[str], path: str) -> Bus:
    """The bus below `bus` that a path of buses and devices in turns leads to.

    A device at the end stands for the bus that it provides.

    :param names: the path's parts from `bus` on, the first one a device: its id, or its type.
    :param path: the whole path, for messages.
    :raise Error: if a part is not there, or the last one takes no more devices.
    """
    parts = deque(names)
    while parts:
        name = parts.popleft()
        device = _on_bus(bus, name)
        if device.model.inner is not None:
            # The other half of a virtio device is on a bus that has room for it only.
            _check_name("virtio-bus", parts)
            if not parts:
                raise Error(f"Bus '{path}' is full")
            name = parts.popleft()
            if name != device.model.inner:
                raise DeviceNotFound(f"Device '{name}' not found")
        provided = device.own_bus
        _check_name(None if provided is None else provided.name, parts)
        if provided is None:
            raise Error(f"Device '{name}' has no child bus")
        bus = provided
    return bus


def _check_name(bus_name: str | None, parts: deque[str]) -> None:
    """Take the name of a device's bus from a path, where there may be one."""
    if parts and (wanted := parts.popleft()) != bus_name:
        raise Error(f"Bus '{wanted}' not found")


def _on_bus(bus: Bus, name: str) -> Device:
    for device in bus.devices:
        if device.device_id == name:
            return device
    for device in bus.devices:
        if device.type_name == ALIASES.get(name, name):
            return device
    raise DeviceNotFound(f"Device '{name}' not found")


def pci_address(type_name: str, value: object) -> int:
    """The place that the property ``addr`` means; -1 if it leaves it open.

    :param type_name: the device's type, for messages.
    :param value: a number, or slot and function in hexadecimal digits ("0x5", "5.0").
    :raise Error: if it is neither, or no place.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Error("Invalid parameter type for 'addr', expected int or str")
    if isinstance(value, int):
        last = _SLOTS * _FUNCTIONS - 1
        if not -1 <= value <= last:
            raise Error(f"Parameter 'addr' expects a value between -1 and {last}")
        return value
    match = _ADDRESS.fullmatch(value)
    if match is not None:
        slot, function = int(match[1], 16), int(match[2] or "0", 16)
        if slot < _SLOTS and function < _FUNCTIONS:
            return slot * _FUNCTIONS + function
    raise Error(f"Property '{type_name}.addr' doesn't take value '{value}'")
