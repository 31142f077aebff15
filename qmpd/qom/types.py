"""The types of objects: what extends what, and what can be made.

The names are QEMU's; the table holds the types that qmpd has, and those that
they extend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """A type of objects.

    :param parent: the type that it extends.
    :param abstract: there is no object of just this type.
    :param interfaces: what else it can be used as.
    :param struct: the schema's struct with its properties, inherited ones included.
    """

    name: str
    parent: str | None
    abstract: bool = False
    interfaces: tuple[str, ...] = ()
    struct: str | None = None


_USER: Final = ("user-creatable",)
_EXPRESS: Final = ("pci-express-device",)
_BOTH: Final = ("conventional-pci-device", "pci-express-device")

_TABLE: Final = (
    TypeInfo("object", None, abstract=True),
    TypeInfo("interface", None, abstract=True),
    TypeInfo("user-creatable", "interface", abstract=True),
    TypeInfo("container", "object"),
    TypeInfo("secret_common", "object", abstract=True, struct="SecretCommonProperties"),
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
    TypeInfo("accel", "object", abstract=True),
    TypeInfo("tcg-accel", "accel"),
    TypeInfo("machine", "object", abstract=True),
    TypeInfo("generic-pc-machine", "machine", abstract=True),
    TypeInfo("none-machine", "machine"),
    TypeInfo("memory-backend", "object", abstract=True),
    TypeInfo("memory-backend-file", "memory-backend"),
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
    TypeInfo("pcie-slot", "pcie-port", abstract=True),
    TypeInfo("pcie-root-port-base", "pcie-slot", abstract=True),
    TypeInfo(
        "pcie-root-port",
        "pcie-root-port-base",
        interfaces=(*_EXPRESS, "hotplug-handler"),
        struct="PcieRootPortProperties",
    ),
)

TYPES: Final[Mapping[str, TypeInfo]] = {info.name: info for info in _TABLE}


def ancestry(name: str) -> Iterator[TypeInfo]:
    """A type and all that it extends, itself first."""
    info = TYPES.get(name)
    while info is not None:
        yield info
        info = TYPES.get(info.parent or "")


def implements(name: str, wanted: str) -> bool:
    """Whether a type is, extends, or can be used as another one."""
    return any(wanted == info.name or wanted in info.interfaces for info in ancestry(name))
