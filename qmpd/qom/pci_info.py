"""What ``query-pci`` tells of the devices on the root bus.

No firmware has been at work here, as in a machine of QEMU's that has not run yet:
buses behind root ports have no number, so nothing is seen of what is on them, and
no window of a device is mapped.  The numbers are those of QEMU's devices, as its
``query-pci`` shows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qmpd.qom.models import MODELS

if TYPE_CHECKING:
    from qmpd.qom.buses import Bus
    from qmpd.qom.device import Device

_INTEL: Final = 0x8086
_RED_HAT: Final = 0x1B36
_QUMRANET: Final = 0x1AF4

#: The subsystem of what has none of its own.
_SUBSYSTEM: Final = 0x1100

#: What classes of devices are called.
_CLASSES: Final[Mapping[int, str]] = {
    0x0100: "SCSI controller",
    0x0101: "IDE controller",
    0x0106: "SATA controller",
    0x0600: "Host bridge",
    0x0601: "ISA bridge",
    0x0604: "PCI bridge",
    0x0680: "Bridge",
    0x0C05: "SMBus",
}

#: Of a window that is not mapped.
_NOWHERE: Final = -1

_PAGE: Final = 4096

#: A bridge's windows before anybody has set them up end in front of their beginning.
_NO_RANGE: Final = {"base": 0xFFF00000, "limit": 0xFFFFF}
_NO_IO_RANGE: Final = {"base": 0xF000, "limit": 0xFFF}


def _io(bar: int, size: int) -> dict[str, Any]:
    return {"bar": bar, "type": "io", "address": _NOWHERE, "size": size}


def _memory(bar: int, size: int, *, wide: bool = False) -> dict[str, Any]:
    """A window into memory; the wide ones have addresses of 64 bits and may be prefetched."""
    return {
        "bar": bar,
        "type": "memory",
        "address": _NOWHERE,
        "size": size,
        "prefetch": wide,
        "mem_type_64": wide,
    }


@dataclass(frozen=True, slots=True)
class _Chip:
    """Numbers of a device that can't be configured.

    :param subsystem: whether it has the number of a subsystem.
    :param interrupt: whether it has a pin for interrupts.
    """

    vendor: int
    device: int
    class_: int
    regions: tuple[dict[str, Any], ...] = ()
    subsystem: bool = True
    interrupt: bool = False


_CHIPS: Final[Mapping[str, _Chip]] = {
    "i440FX": _Chip(_INTEL, 0x1237, 0x0600),
    "PIIX3": _Chip(_INTEL, 0x7000, 0x0601),
    "piix3-ide": _Chip(_INTEL, 0x7010, 0x0101, (_io(4, 16),)),
    "PIIX4_PM": _Chip(_INTEL, 0x7113, 0x0680, interrupt=True),
    "mch": _Chip(_INTEL, 0x29C0, 0x0600),
    "ICH9-LPC": _Chip(_INTEL, 0x2918, 0x0601),
    "ich9-ahci": _Chip(_INTEL, 0x2922, 0x0106, (_io(4, 32), _memory(5, _PAGE)), interrupt=True),
    "ICH9-SMB": _Chip(_INTEL, 0x2930, 0x0C05, (_io(4, 64),), interrupt=True),
    "pcie-root-port": _Chip(_RED_HAT, 0x000C, 0x0604, (_memory(0, _PAGE),), subsystem=False, interrupt=True),
}


@dataclass(frozen=True, slots=True)
class _Virtio:
    """Numbers of a virtio device.

    :param kind: virtio's number of this kind of device.
    :param transitional: the device's number in the form that drivers of the oldest virtio know.
    :param registers: how many bytes these drivers' registers take.
    """

    kind: int
    transitional: int
    registers: int


_VIRTIO: Final[Mapping[str, _Virtio]] = {
    "virtio-blk-device": _Virtio(2, 0x1001, 128),
    "virtio-scsi-device": _Virtio(8, 0x1004, 64),
}

#: To it a kind's number is added in the form that only newer drivers know.
_MODERN: Final = 0x1040


def pci_info(bus: Bus) -> dict[str, Any]:
    """PciInfo of a bus, which has the number 0."""
    devices = sorted(bus.devices, key=lambda device: int(device.values["addr"]))
    return {"bus": 0, "devices": [_device(each) for each in devices]}


def _device(device: Device) -> dict[str, Any]:
    model = MODELS.get(device.type_name)
    inner = None if model is None else model.inner
    chip = _CHIPS[device.type_name] if inner is None else _virtio_chip(device, _VIRTIO[inner])
    number = {"device": chip.device, "vendor": chip.vendor}
    if chip.subsystem:
        kind = inner is not None and chip.device < _MODERN and _VIRTIO[inner].kind
        number |= {"subsystem": kind or _SUBSYSTEM, "subsystem-vendor": _QUMRANET}
    slot, function = divmod(int(device.values["addr"]), 8)
    desc = _CLASSES.get(chip.class_)
    return {
        "bus": 0,
        "slot": slot,
        "function": function,
        "class_info": {"class": chip.class_} | ({} if desc is None else {"desc": desc}),
        "id": number,
        **({"irq": 0} if chip.interrupt else {}),
        "irq_pin": int(chip.interrupt),
        "qdev_id": device.device_id or "",
        **({"pci_bridge": {"bus": _unnumbered_bus()}} if device.own_bus and inner is None else {}),
        "regions": [dict(region) for region in chip.regions],
    }


def _virtio_chip(device: Device, virtio: _Virtio) -> _Chip:
    modern = not device.values["disable-modern"] or device.type_name.endswith("transitional")
    legacy = not device.type_name.endswith("-non-transitional") and device.values["disable-legacy"] != "on"
    number = virtio.transitional if legacy else _MODERN + virtio.kind
    return _Chip(
        _QUMRANET,
        number,
        device.values["class"] & 0xFFFF or 0x0100,
        tuple(_virtio_regions(device, virtio.registers if legacy else 0, modern=modern)),
        interrupt=True,
    )


def _virtio_regions(device: Device, registers: int, *, modern: bool) -> Iterator[dict[str, Any]]:
    if registers:
        yield _io(0, registers)
    if vectors := int(device.values["vectors"]):
        # 16 bytes for each vector, and a bit in words of 64.
        table = 16 * vectors + 8 * -(-vectors // 64)
        yield _memory(1, max(_PAGE, 1 << (table - 1).bit_length()))
    if modern and device.values["modern-pio-notify"]:
        yield _io(2, 4)
    if modern:
        yield _memory(4, 8 << 20 if device.values["page-per-vq"] else 4 * _PAGE, wide=True)


def _unnumbered_bus() -> dict[str, Any]:
    return {
        "number": 0,
        "secondary": 0,
        "subordinate": 0,
        "io_range": dict(_NO_IO_RANGE),
        "memory_range": dict(_NO_RANGE),
        "prefetchable_range": dict(_NO_RANGE),
    }
