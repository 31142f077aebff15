"""The device models: what can be plugged in, and what its properties start with.

The names and types of the properties are structs in ``schema/qdev.json``; here
are their defaults, and which half of a device has them.  A virtio device is two
objects: the PCI device, and the device proper behind it ("virtio-backend"),
whose properties the first shows too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qmpd.qapi import Schema
from qmpd.qom.object import DEVICE_TYPE_NAMES, schema_properties
from qmpd.qom.types import TYPES


@dataclass(frozen=True, slots=True)
class Model:
    """A kind of device.

    :param name: its type in QOM.
    :param family: what it is apart from variants of that type.
    :param bus: the kind of bus that it goes on.
    :param inner: the type of its other half, if it has one.
    :param provides: the kind of bus that it provides, if any.
    :param disk: it has a drive.
    :param pluggable: it can be plugged in and out; otherwise it is soldered to a board.
    """

    name: str
    family: str
    bus: str
    inner: str | None = None
    provides: str | None = None
    disk: bool = False
    pluggable: bool = True

    @property
    def struct(self) -> str:
        """The schema's struct with its properties."""
        struct = TYPES[self.name].struct
        assert struct is not None, "every model has a struct"
        return struct

    def owner(self, name: str) -> str:
        """The type that has the property `name`: the other half's, if that is where it is."""
        return self.name if self.inner is None or name in _PCI_SIDE else self.inner


_MODELS: Final = (
    *(
        Model(f"virtio-blk-pci{suffix}", "virtio-blk", "PCI", inner="virtio-blk-device", disk=True)
        for suffix in ("", "-transitional", "-non-transitional")
    ),
    *(
        Model(f"virtio-scsi-pci{suffix}", "virtio-scsi", "PCI", inner="virtio-scsi-device", provides="SCSI")
        for suffix in ("", "-transitional", "-non-transitional")
    ),
    Model("scsi-hd", "scsi-hd", "SCSI", disk=True),
    Model("pcie-root-port", "pcie-root-port", "PCI", provides="PCI"),
)

MODELS: Final[Mapping[str, Model]] = {model.name: model for model in _MODELS}

_CHIP_SET: Final = ("i440FX", "PIIX3", "piix3-ide", "PIIX4_PM", "mch", "ICH9-LPC", "ich9-ahci", "ICH9-SMB")

#: What boards have of themselves.
SOLDERED: Final[Mapping[str, Model]] = {
    **{
        name: Model(name, "host-bridge", "System", pluggable=False)
        for name in ("i440FX-pcihost", "q35-pcihost")
    },
    **{name: Model(name, "chip-set", "PCI", pluggable=False) for name in _CHIP_SET},
}

#: Other names that `device_add` takes.
ALIASES: Final[Mapping[str, str]] = {
    "virtio-blk": "virtio-blk-pci",
    "virtio-scsi": "virtio-scsi-pci",
}

#: "Not said": a number that the daemon chooses.
AUTO_UINT16: Final = (1 << 16) - 1
AUTO_UINT32: Final = (1 << 32) - 1
_AUTO_SIZE: Final = (1 << 64) - 1

#: The bus that a half of a device would need, for those that can't be plugged in alone.
INNER_BUS: Final[Mapping[str, str]] = {
    "virtio-blk-device": "virtio-bus",
    "virtio-scsi-device": "virtio-bus",
}

#: What properties are unless told otherwise; the same name means the same in all models.
DEFAULTS: Final[Mapping[str, Any]] = {
    # PCI
    "addr": -1,
    "multifunction": False,
    "acpi-index": 0,
    "rombar": -1,
    "romsize": AUTO_UINT32,
    # virtio on PCI
    "disable-legacy": "auto",
    "disable-modern": False,
    "aer": False,
    "ats": False,
    "page-per-vq": False,
    "modern-pio-notify": False,
    "migrate-extra": True,
    "virtio-pci-bus-master-bug-migration": False,
    "vectors": AUTO_UINT32,
    "ioeventfd": True,
    "class": 0,
    # virtio
    "any_layout": True,
    "event_idx": True,
    "in_order": False,
    "indirect_desc": True,
    "iommu_platform": False,
    "notify_on_empty": True,
    "packed": False,
    "queue_reset": True,
    "use-started": True,
    "use-disabled-flag": True,
    # disks
    "share-rw": False,
    "write-cache": "auto",
    "rerror": "auto",
    "werror": "auto",
    "logical_block_size": 0,
    "physical_block_size": 0,
    "min_io_size": 0,
    "opt_io_size": 0,
    "discard_granularity": AUTO_UINT32,
    "account-invalid": "auto",
    "account-failed": "auto",
    "backend_defaults": "auto",
    "cyls": 0,
    "heads": 0,
    "secs": 0,
    "lcyls": 0,
    "lheads": 0,
    "lsecs": 0,
    # virtio-blk
    "num-queues": AUTO_UINT16,
    "queue-size": 256,
    "config-wce": True,
    "discard": True,
    "write-zeroes": True,
    "max-discard-sectors": 4194303,
    "max-write-zeroes-sectors": 4194303,
    "report-discard-granularity": True,
    "request-merging": True,
    "seg-max-adjust": True,
    # virtio-scsi
    "num_queues": AUTO_UINT32,
    "virtqueue_size": 256,
    "seg_max_adjust": True,
    "max_sectors": 65535,
    "cmd_per_lun": 128,
    "hotplug": True,
    "param_change": True,
    # SCSI disks
    "channel": 0,
    "scsi-id": AUTO_UINT32,
    "lun": AUTO_UINT32,
    "wwn": 0,
    "port_wwn": 0,
    "port_index": 0,
    "removable": False,
    "dpofua": False,
    "rotation_rate": 0,
    "scsi_version": 5,
    "max_unmap_size": 1 << 30,
    "max_io_size": (1 << 31) - 1,
    "migrate-emulated-scsi-request": True,
    "quirk_mode_page_vendor_specific_apple": False,
    # root ports
    "port": 0,
    "chassis": 0,
    "slot": 0,
    "bus-reserve": AUTO_UINT32,
    "io-reserve": _AUTO_SIZE,
    "mem-reserve": _AUTO_SIZE,
    "pref32-reserve": _AUTO_SIZE,
    "pref64-reserve": _AUTO_SIZE,
    "aer_log_max": 8,
    "disable-acs": False,
    "power_controller_present": True,
}

#: Values of a device that are no defaults on paper: strings, and what goes without saying.
REALIZED: Final[Mapping[str, Any]] = {
    "bootindex": -1,
    "failover_pair_id": "",
    "romfile": "",
    "drive": "",
    "serial": "",
    "iothread": "",
    "device_id": "",
    "vendor": "QEMU",
    "product": "QEMU HARDDISK",
    "ver": "2.5+",
}

#: The members of `device_add` that are no properties of the device.
_NOT_PROPERTIES: Final = frozenset({"id", "bus"})

#: Taken for the sake of older clients; it means nothing any more, so nobody can see it.
HISTORIC: Final = frozenset({"scsi"})

#: The properties of a virtio device that its PCI half has.
_PCI_SIDE: Final = frozenset(
    {
        *("addr", "multifunction", "acpi-index", "failover_pair_id", "rombar", "romfile", "romsize"),
        *("disable-legacy", "disable-modern", "aer", "ats", "page-per-vq", "modern-pio-notify"),
        *("migrate-extra", "virtio-pci-bus-master-bug-migration", "vectors", "ioeventfd", "class"),
    }
)

#: Which forms of virtio a device has; the types whose name tells it have no such properties.
_VIRTIO_FORMS: Final = frozenset({"disable-legacy", "disable-modern"})

#: What every device has besides the members of its struct.
OF_ALL_DEVICES: Final[Mapping[str, str]] = {
    "parent_bus": "link<bus>",
    "realized": "bool",
    "hotplugged": "bool",
    "hotpluggable": "bool",
}


def absent_properties(type_name: str) -> frozenset[str]:
    """The members of a device type's struct that are properties of its relatives only."""
    return _VIRTIO_FORMS if type_name.endswith("-transitional") else frozenset()


def device_property_types(schema: Schema, type_name: str) -> dict[str, str]:
    """The QOM types of a device type's properties by name, without "type"."""
    properties = dict(OF_ALL_DEVICES)
    info = TYPES[type_name]
    struct = info.struct
    if struct is None:
        return properties
    hidden = _NOT_PROPERTIES | HISTORIC | absent_properties(type_name)
    if info.implements("virtio-device"):
        hidden |= _PCI_SIDE
    members = schema_properties(schema, struct, DEVICE_TYPE_NAMES)
    properties.update((name, type_) for name, type_ in members.items() if name not in hidden)
    if "iothread" in properties:
        properties["iothread"] = "link<iothread>"
    if "addr" in properties:
        properties["legacy-addr"] = "str"
        properties["busnr"] = "busnr"
    if type_name in MODELS and (inner := MODELS[type_name].inner):
        properties["virtio-backend"] = f"child<{inner}>"
    return properties
