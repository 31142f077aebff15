"""The devices on their buses as people read them: `info qtree`.

Of a device are shown the properties that it has here, each as QEMU shows it.
A virtio device is shown as two, with a bus of its own between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from qmpd.commands.human import printed
from qmpd.qom.buses import Bus
from qmpd.qom.device import DeviceHalf

#: What is shown in another way, or not at all: places in the object tree, and what every device has.
_NOT_SHOWN: Final = frozenset(
    {
        *("parent_bus", "realized", "hotplugged", "hotpluggable"),
        *("legacy-addr", "virtio-backend", "bootindex", "iothread"),
    }
)
_MASK: Final = (1 << 64) - 1


def lines(bus: Bus, *, brief: bool, indent: str = "") -> Iterator[str]:
    """A bus and all that is plugged in below it, the newest first.

    :param brief: without properties.
    """
    yield f"{indent}bus: {bus.label}"
    yield f"{indent}  type {bus.type_name}"
    for device in reversed(bus.devices):
        yield from _device(device, brief, f"{indent}  ")


def _device(half: DeviceHalf, brief: bool, indent: str) -> Iterator[str]:
    whole = half.device
    device_id = whole.device_id if half is whole and whole.device_id is not None else ""
    yield f'{indent}dev: {half.type_name}, id "{device_id}"'
    indent += "  "
    if not brief:
        yield from (f"{indent}{line}" for line in _properties(half))
    if half is not whole.inner:
        yield f"{indent}bus: virtio-bus"
        yield f"{indent}  type virtio-pci-bus"
        yield from _device(whole.inner, brief, f"{indent}  ")
    elif whole.own_bus is not None:
        yield from lines(whole.own_bus, brief=brief, indent=indent)


def _properties(half: DeviceHalf) -> Iterator[str]:
    whole = half.device
    for name, found in half.own_properties().items():
        if name == "addr":
            yield f"addr = {whole.value('legacy-addr')}"
        elif name not in _NOT_SHOWN and whole.model.owner(name) == half.type_name:
            yield f"{name} = {_value(found.type, found.get())}"


def _value(type_: str, value: Any) -> str:
    if value is None:
        return "<null>"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value} ({printed.size(value) if type_ == 'size' else hex(value & _MASK)})"
    return f'"{value}"'
