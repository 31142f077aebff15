"""The types of objects: what extends what, and what can be made.

The names are QEMU's; the table holds the types that qmpd has, and those that
they extend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """A type of objects.

    :param parent: the type that it extends.
    :param abstract: there is no object of just this type.
    :param interfaces: what else it can be used as.
    :param struct: the schema's struct with its properties, inherited ones included.
    :param properties: the QOM types of properties that no struct has, inherited by what extends it.
    :param emulator: only a daemon with a machine has it.
    """

    name: str
    parent: str | None
    abstract: bool = False
    interfaces: tuple[str, ...] = ()
    struct: str | None = None
    properties: Mapping[str, str] = field(default_factory=dict)
    emulator: bool = False

    def ancestry(self) -> Iterator[TypeInfo]:
        """The type and all that it extends, itself first."""
        info: TypeInfo | None = self
        while info is not None:
            yield info
            info = TYPES.get(info.parent or "")

    def all_properties(self) -> dict[str, str]:
        """The QOM types of its properties that no struct has, inherited ones included."""
        inherited = [each.properties for each in self.ancestry()]
        return {name: type_ for properties in reversed(inherited) for name, type_ in properties.items()}

    def implements(self, wanted: str) -> bool:
        """Whether it is, extends, or can be used as another type."""
        return any(wanted == info.name or wanted in info.interfaces for info in self.ancestry())


_USER: Final = ("user-creatable",)
_EXPRESS: Final = ("pci-express-device",)
_BOTH: Final = ("conventional-pci-device", "pci-express-device")

_TABLE: Final = (
    TypeInfo("object", None, abstract=True),
    TypeInfo("interface", None, abstract=True),
    TypeInfo("user-creatable", "interface", abstract=True),
    TypeInfo("container", "object"),
    TypeInfo("secret_common", "object", abstract=True, interfaces=_USER, struct="SecretCommonProperties"),
    TypeInfo("secret", "secret_common", interfaces=_USER, struct="SecretProperties"),
    TypeInfo("secret_keyring", "secret_common", interfaces=_USER, struct="SecretKeyringProperties"),
    TypeInfo("event-loop-base", "object", abstract=True, interfaces=_USER, struct="EventLoopBaseProperties"),
    TypeInfo("iothread", "event-loop-base", struct="IothreadProperties"),
    TypeInfo("throttle-group", "object", interfaces=_USER, struct="ThrottleGroupProperties"),
    TypeInfo("authz", "object", abstract=True),
    TypeInfo("authz-list", "authz", interfaces=_USER, struct="AuthZListProperties"),
    TypeInfo("authz-simple", "authz", interfaces=_USER, struct="AuthZSimpleProperties"),
    TypeInfo("tls-creds", "object", abstract=True, struct="TlsCredsProperties"),
    TypeInfo("tls-creds-anon", "tls-creds", interfaces=_USER, struct="TlsCredsAnonProperties"),
    TypeInfo("tls-creds-psk", "tls-creds", interfaces=_USER, struct="TlsCredsPskProperties"),
    TypeInfo("tls-creds-x509", "tls-creds", interfaces=_USER, struct="TlsCredsX509Properties"),
    TypeInfo("chardev", "object", abstract=True),
    TypeInfo("chardev-fd", "chardev", abstract=True),
    TypeInfo("chardev-socket", "chardev"),
    TypeInfo("chardev-stdio", "chardev-fd"),
    TypeInfo("conventional-pci-device", "interface", abstract=True),
    TypeInfo("pci-express-device", "interface", abstract=True),
    TypeInfo("hotplug-handler", "interface", abstract=True),
    TypeInfo("bus", "object", abstract=True),
    TypeInfo("PCI", "bus"),
    TypeInfo("PCIE", "PCI"),
    TypeInfo("SCSI", "bus", interfaces=("hotplug-handler",)),
    TypeInfo("device", "object", abstract=True),
    TypeInfo("pci-device", "device", abstract=True),
    TypeInfo("virtio-pci", "pci-device", abstract=True),
    TypeInfo("virtio-blk-pci-base", "virtio-pci", abstract=True),
    TypeInfo("virtio-blk-pci", "virtio-blk-pci-base", interfaces=_BOTH, struct="VirtioBlkPciProperties"),
    TypeInfo(
        "virtio-blk-pci-transitional",
        "virtio-blk-pci-base",
        interfaces=_BOTH[:1],
        struct="VirtioBlkPciProperties",
    ),
    TypeInfo(
        "virtio-blk-pci-non-transitional",
        "virtio-blk-pci-base",
        interfaces=_BOTH,
        struct="VirtioBlkPciProperties",
    ),
    TypeInfo("virtio-scsi-pci-base", "virtio-pci", abstract=True),
    TypeInfo("virtio-scsi-pci", "virtio-scsi-pci-base", interfaces=_BOTH, struct="VirtioScsiPciProperties"),
    TypeInfo(
        "virtio-scsi-pci-transitional",
        "virtio-scsi-pci-base",
        interfaces=_BOTH[:1],
        struct="VirtioScsiPciProperties",
    ),
    TypeInfo(
        "virtio-scsi-pci-non-transitional",
        "virtio-scsi-pci-base",
        interfaces=_BOTH,
        struct="VirtioScsiPciProperties",
    ),
    TypeInfo("virtio-device", "device", abstract=True),
    TypeInfo("virtio-blk-device", "virtio-device", struct="VirtioBlkPciProperties"),
    TypeInfo("virtio-scsi-common", "virtio-device", abstract=True),
    TypeInfo(
        "virtio-scsi-device",
        "virtio-scsi-common",
        interfaces=("hotplug-handler",),
        struct="VirtioScsiPciProperties",
    ),
    TypeInfo("scsi-device", "device", abstract=True),
    TypeInfo("scsi-disk-base", "scsi-device", abstract=True),
    TypeInfo("scsi-hd", "scsi-disk-base", struct="ScsiHdProperties"),
    TypeInfo("base-pci-bridge", "pci-device", abstract=True),
    TypeInfo("pcie-port", "base-pci-bridge", abstract=True),
    TypeInfo("pcie-slot", "pcie-port", abstract=True, interfaces=("hotplug-handler",)),
    TypeInfo("pcie-root-port-base", "pcie-slot", abstract=True, interfaces=_EXPRESS),
    TypeInfo(
        "pcie-root-port",
        "pcie-root-port-base",
        struct="PcieRootPortProperties",
    ),
)


def _soldered(name: str, parent: str = "pci-device", interfaces: tuple[str, ...] = _BOTH[:1]) -> TypeInfo:
    return TypeInfo(name, parent, interfaces=interfaces, struct="PCIDeviceProperties", emulator=True)


#: The properties of objects that would be memory.
_OF_MEMORY: Final[Mapping[str, str]] = {
    **dict.fromkeys(("dump", "merge", "prealloc", "reserve", "share"), "bool"),
    **dict.fromkeys(("host-nodes", "prealloc-threads", "size"), "int"),
    "policy": "HostMemPolicy",
    "prealloc-context": "link<thread-context>",
    "x-use-canonical-path-for-ramblock-id": "bool",
}
_OF_FILE_MEMORY: Final[Mapping[str, str]] = {
    **dict.fromkeys(("discard-data", "pmem", "readonly"), "bool"),
    **dict.fromkeys(("align", "offset"), "int"),
    "mem-path": "string",
    "rom": "OnOffAuto",
}
_OF_MEMFD_MEMORY: Final[Mapping[str, str]] = {"hugetlb": "bool", "hugetlbsize": "int", "seal": "bool"}

#: The properties of every machine.
_OF_MACHINES: Final[Mapping[str, str]] = {
    "kernel": "string",
    "initrd": "string",
    "append": "string",
    "memory": "MemorySizeConfiguration",
    "memory-backend": "link<memory-backend>",
    "graphics": "bool",
    "usb": "bool",
}

#: What only a daemon with a machine has: the machine, its chip set, and what executes its instructions
#: (libvirt takes ``tcg-accel`` for leave to start a domain without KVM).
_OF_EMULATOR: Final = (
    TypeInfo("accel", "object", abstract=True, emulator=True),
    TypeInfo("tcg-accel", "accel", emulator=True),
    TypeInfo(
        "memory-backend", "object", abstract=True, interfaces=_USER, properties=_OF_MEMORY, emulator=True
    ),
    TypeInfo("memory-backend-file", "memory-backend", properties=_OF_FILE_MEMORY, emulator=True),
    TypeInfo("memory-backend-memfd", "memory-backend", properties=_OF_MEMFD_MEMORY, emulator=True),
    TypeInfo("memory-backend-ram", "memory-backend", emulator=True),
    TypeInfo("machine", "object", abstract=True, properties=_OF_MACHINES, emulator=True),
    TypeInfo("x86-machine", "machine", abstract=True, emulator=True),
    TypeInfo(
        "generic-pc-machine", "x86-machine", abstract=True, interfaces=("hotplug-handler",), emulator=True
    ),
    TypeInfo("System", "bus", emulator=True),
    TypeInfo("sys-bus-device", "device", abstract=True, emulator=True),
    TypeInfo("pci-host-bridge", "sys-bus-device", abstract=True, emulator=True),
    TypeInfo("pcie-host-bridge", "pci-host-bridge", abstract=True, emulator=True),
    TypeInfo("i440FX-pcihost", "pci-host-bridge", struct="DeviceProperties", emulator=True),
    TypeInfo("q35-pcihost", "pcie-host-bridge", struct="DeviceProperties", emulator=True),
    TypeInfo("pci-piix", "pci-device", abstract=True, interfaces=_BOTH[:1], emulator=True),
    TypeInfo("pci-ide", "pci-device", abstract=True, interfaces=_BOTH[:1], emulator=True),
    _soldered("i440FX"),
    _soldered("PIIX3", "pci-piix"),
    _soldered("piix3-ide", "pci-ide"),
    _soldered("PIIX4_PM", interfaces=(*_BOTH[:1], "hotplug-handler")),
    _soldered("mch"),
    _soldered("ICH9-LPC", interfaces=(*_BOTH[:1], "hotplug-handler")),
    _soldered("ich9-ahci"),
    _soldered("ICH9-SMB"),
)

TYPES: Final[Mapping[str, TypeInfo]] = {info.name: info for info in (*_TABLE, *_OF_EMULATOR)}


def machine_type(machine: str) -> TypeInfo:
    """The QOM type of a machine.

    :param machine: its full name, as `query-machines` shows it.
    """
    return TypeInfo(
        f"{machine}-machine", "machine" if machine == "none" else "generic-pc-machine", emulator=True
    )
