"""What a device needs to work: the last look at its properties before it is plugged in.

What was left open is chosen here, as QEMU chooses it, and what does not go
together is refused.  A device is on its bus by then, with a place of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from qmpd.block.node import SECTOR, Node
from qmpd.errors import Error
from qmpd.qom.buses import PCIBus
from qmpd.qom.device import Device
from qmpd.qom.models import AUTO_UINT16, AUTO_UINT32

_UNSET_DISCARD: Final = AUTO_UINT32

#: What a virtio or SCSI disk can tell the guest about its smallest efficient request, in logical blocks.
_MIN_IO_BLOCKS_MAX: Final = (1 << 16) - 1

#: The largest geometry.
_GEOMETRY_MAX: Final = (("cyls", 65535), ("heads", 255), ("secs", 255))

_MAX_QUEUES: Final = 1024
_SCSI_FIXED_QUEUES: Final = 2
#: The most sectors that a virtio disk can discard or zero at once: less than 2 GiB.
_MAX_REQUEST_SECTORS: Final = (1 << 22) - 1
#: What a SCSI disk calls itself is its serial number unless it is told, and has no more room.
_SCSI_DEVICE_ID_MAX: Final = 20
_SCSI_SERIAL_MAX: Final = 36


def _drive(node: Node | None) -> Node:
    if node is None:
        raise Error("drive property not set")
    return node


def _settle_virtio(device: Device) -> None:
    """Settle which forms of virtio there are.

    The oldest one needs I/O ports, which are scarce behind PCI Express ports: there it is off by default.
    """
    values = device.values
    if values["disable-legacy"] == "auto":
        in_port = isinstance(device.bus, PCIBus) and device.bus.root_port
        values["disable-legacy"] = "on" if in_port else "off"
    if values["disable-legacy"] == "on" and values["disable-modern"]:
        raise Error("device cannot work as neither modern nor legacy mode is enabled")


def _settle_block_sizes(device: Device) -> None:
    """Check the sizes of requests, and fill in what was left open."""
    values = device.values
    values["logical_block_size"] = logical = values["logical_block_size"] or SECTOR
    values["physical_block_size"] = values["physical_block_size"] or SECTOR
    if logical > values["physical_block_size"]:
        raise Error("logical_block_size > physical_block_size not supported")
    if values["min_io_size"] % logical:
        raise Error("min_io_size must be a multiple of logical_block_size")
    if values["min_io_size"] // logical > _MIN_IO_BLOCKS_MAX:
        raise Error(f"min_io_size must not exceed {_MIN_IO_BLOCKS_MAX} logical blocks")
    if values["opt_io_size"] % logical:
        raise Error("opt_io_size must be a multiple of logical_block_size")
    if values["discard_granularity"] != _UNSET_DISCARD and values["discard_granularity"] % logical:
        raise Error("discard_granularity must be a multiple of logical_block_size")


def _settle_geometry(device: Device, node: Node) -> None:
    """Check the geometry if there is one, or else make one up."""
    values = device.values
    if not (values["cyls"] or values["heads"] or values["secs"]):
        values["heads"], values["secs"] = 16, 63
        values["cyls"] = min(max(node.size // SECTOR // (16 * 63), 2), 16383)
    for name, most in _GEOMETRY_MAX:
        if not 1 <= values[name] <= most:
            raise Error(f"{name} must be between 1 and {most}")


def _check_io_thread(device: Device) -> None:
    if device.values["iothread"] and not device.values["ioeventfd"]:
        raise Error("ioeventfd is required for iothread")


def _prepare_virtio_blk(device: Device, node: Node | None) -> None:
    _settle_virtio(device)
    disk, values = _drive(node), device.values
    if values["num-queues"] == AUTO_UINT16:
        values["num-queues"] = 1
    if values["num-queues"] == 0:
        raise Error("num-queues property must be larger than 0")
    if values["num-queues"] > _MAX_QUEUES:
        raise Error(f"num-queues property must not be larger than {_MAX_QUEUES}")
    size = values["queue-size"]
    if size > 1024 or size & (size - 1):
        raise Error(f"invalid queue-size property ({size}), must be a power of 2 (max 1024)")
    if size <= 2:
        raise Error(f"invalid queue-size property ({size}), must be > 2")
    _settle_geometry(device, disk)
    _settle_block_sizes(device)
    for feature in ("discard", "write-zeroes"):
        sectors = values[f"max-{feature}-sectors"]
        if values[feature] and not 1 <= sectors <= _MAX_REQUEST_SECTORS:
            raise Error(
                f"invalid max-{feature}-sectors property ({sectors}), "
                f"must be between 1 and {_MAX_REQUEST_SECTORS}"
            )
    _check_io_thread(device)
    if values["vectors"] == AUTO_UINT32:
        values["vectors"] = values["num-queues"] + 1


def _prepare_virtio_scsi(device: Device, node: Node | None) -> None:
    _settle_virtio(device)
    values = device.values
    if values["num_queues"] == AUTO_UINT32:
        values["num_queues"] = 1
    most = _MAX_QUEUES - _SCSI_FIXED_QUEUES
    if not 0 < values["num_queues"] <= most:
        raise Error(
            f"Invalid number of queues (= {values['num_queues']}), "
            f"must be a positive integer less than {most}."
        )
    _check_io_thread(device)
    if values["vectors"] == AUTO_UINT32:
        values["vectors"] = values["num_queues"] + _SCSI_FIXED_QUEUES + 1


def _prepare_scsi_disk(device: Device, node: Node | None) -> None:
    disk, values = _drive(node), device.values
    _settle_block_sizes(device)
    _settle_geometry(device, disk)
    if len(values["serial"]) > _SCSI_SERIAL_MAX:
        raise Error(f"The serial number can't be longer than {_SCSI_SERIAL_MAX} characters")
    if "device_id" not in device.given and values["serial"]:
        if len(values["serial"]) > _SCSI_DEVICE_ID_MAX:
            raise Error(
                f"The serial number can't be longer than {_SCSI_DEVICE_ID_MAX} characters "
                "when it is also used as the default for device_id"
            )
        values["device_id"] = values["serial"]
    if values["discard_granularity"] == _UNSET_DISCARD:
        values["discard_granularity"] = 4096


#: By the model's family; others need nothing.
_PREPARE: Final[Mapping[str, Callable[[Device, Node | None], None]]] = {
    "virtio-blk": _prepare_virtio_blk,
    "virtio-scsi": _prepare_virtio_scsi,
    "scsi-hd": _prepare_scsi_disk,
}


def realize(device: Device, node: Node | None) -> None:
    """Check and complete a device's properties.

    :param node: its drive, if it has one.
    :raise Error: if it could not work.
    """
    prepare = _PREPARE.get(device.model.family)
    if prepare is not None:
        prepare(device, node)
