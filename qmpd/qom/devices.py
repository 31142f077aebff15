"""Plugging devices in and out.

`add` goes the way that QEMU goes, because which of several mistakes a client
is told of depends on it: the model, the bus, the id, the properties one by one,
the place on the bus, and last what the device needs to work.  Only its last
step, taking the permissions of a guest's disk on the node, changes anything
outside; after it nothing can fail.

There is no guest that would have to let go of a device, so `delete` unplugs it
at once, and its node can be deleted by the next command.  The events come a
little later, see `_EVENT_DELAY`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from qmpd.block.backend import Backend
from qmpd.block.graph import Graph
from qmpd.block.node import SECTOR, Node
from qmpd.block.permissions import Permission
from qmpd.errors import DeviceNotFound, Error
from qmpd.qom.boards import Board
from qmpd.qom.buses import CHIP_SET_SLOTS, Bus, PCIBus, SCSIBus, SystemBus, descend, pci_address
from qmpd.qom.device import Device, DeviceHalf
from qmpd.qom.guest_disk import GuestDisk
from qmpd.qom.iothread import IOThread
from qmpd.qom.models import (
    ALIASES,
    AUTO_UINT32,
    HISTORIC,
    INNER_BUS,
    MODELS,
    SOLDERED,
    Model,
    absent_properties,
)
from qmpd.qom.object import Object, schema_properties
from qmpd.qom.pci_info import pci_info
from qmpd.qom.realize import realize
from qmpd.qom.tree import ObjectTree
from qmpd.qom.types import TYPES

Emit = Callable[[str, dict[str, Any]], None]

#: Seconds between `device_del` and DEVICE_DELETED.  In QEMU a guest's answer lies between
#: the two; a SCSI disk needs none, and its event comes about as late.  libvirt begins to
#: wait for the event when it has the reply; one that arrives in the same burst is looked
#: at before that, as if the guest had unplugged the device by itself.
_EVENT_DELAY: Final = 0.02

#: The members of `device_add` itself; all others are properties.
_COMMAND_MEMBERS: Final = frozenset({"driver", "id", "bus"})

_MAX_BLOCK: Final = 2 << 20

#: Properties that are written as a size of any length, and have 32 bits.
_SIZES_32: Final = ("min_io_size", "opt_io_size", "discard_granularity")

_ACPI_INDEX_MAX: Final = (1 << 14) - 1

#: What a guest's disk lets others do with its node.
_SHARED: Final = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED | Permission.RESIZE


class Devices:
    """The devices of a daemon.

    :param graph: has the nodes that disks are on.
    :param tree: the object tree that devices appear in.
    :param emit: sends an event to clients.
    :param board: what everything is plugged into; None for a bus that takes what any machine takes.
    """

    def __init__(self, graph: Graph, tree: ObjectTree, emit: Emit, board: Board | None = None) -> None:
        self._graph = graph
        self._tree = tree
        self._emit = emit
        self._system_bus = SystemBus()
        self._root_bus: PCIBus | None = None
        #: SCSI buses, newest first; root ports' buses are found by name only.
        self._buses: list[Bus] = []
        self._anonymous = 0
        self._flexible = board is None
        if board is None:
            self._root_bus = PCIBus(reserved=CHIP_SET_SLOTS)
            self._root_bus.name = "pci.0"
            self._buses.append(self._root_bus)
        else:
            self._solder(board)
        self._waiting_events: list[dict[str, Any]] = []
        self._timer: asyncio.TimerHandle | None = None

    # -- the board

    def _solder(self, board: Board) -> None:
        """Put what the board has of itself into the tree."""
        self._put("unattached/sysbus", self._system_bus)
        root = board.root
        if root is None:
            return
        host = self._soldered(root.host, self._system_bus, root.host_name)
        host.own_bus = self._root_bus = PCIBus(root.type_name, hotplug=root.hotplug)
        host.add(root.name, self._root_bus)
        self._buses.append(self._root_bus)
        for chip in root.chip_set:
            device = self._soldered(chip.type_name, self._root_bus, chip.path)
            device.values.update({"addr": chip.slot * 8 + chip.function, "multifunction": chip.multifunction})

    def _soldered(self, type_name: str, bus: Bus, path: str) -> Device:
        device = Device(SOLDERED[type_name], self._tree.schema, None, bus, hotplugged=False)
        bus.devices.append(device)
        self._put(path, device)
        return device

    def _put(self, path: str, found: Object) -> None:
        """Give an object its place below the machine."""
        above, _, name = path.rpartition("/")
        parent = self._tree.absolute(f"/machine/{above}")
        assert parent is not None, "what is soldered is listed after what it is on"
        parent.add(name, found)

    # -- plugging in

    def add(self, options: Mapping[str, Any], *, hotplugged: bool = True, written: bool = False) -> Device:
        """Plug a device in, as `device_add` does.

        :param options: the members of `device_add`, as the client sent them.
        :param hotplugged: False on the command line, where buses take what they don't take later.
        :param written: the options were written as ``key=value``; errors are worded accordingly.
        :return: the device.
        :raise Error: if that can't be done; then nothing has changed.
        """
        self.send_deleted()
        model = _model(options.get("driver"))
        bus = self._find_bus(model, options.get("bus"))
        if hotplugged:
            bus.check_hotplug()
        device_id = options.get("id")
        if not isinstance(device_id, str):
            # QEMU's way with an id that is no string.
            device_id = None
        device = Device(model, self._tree.schema, device_id, bus, hotplugged=hotplugged)
        name = self._reserve_name(device_id)
        self._set_properties(device, options, written=written)
        node = self._drive(device)
        self._check_pci(device)
        self._place(device)
        path = f"/machine/{'peripheral-anon' if device_id is None else 'peripheral'}/{name}"
        realize(device, node)
        self._check_chassis(device)
        if node is not None:
            self._attach(device, node, path)
        self._commit(device, name)
        return device

    def pci_info(self) -> list[dict[str, Any]]:
        """What is on the root bus, as PciInfo; nothing if there is none."""
        return [] if self._root_bus is None else [pci_info(self._root_bus)]

    @property
    def top_bus(self) -> Bus:
        """The bus that all others hang from: the machine's, or where there is none, the PCI bus."""
        if self._root_bus is None or self._system_bus.parent is not None:
            return self._system_bus
        return self._root_bus

    def _find_bus(self, model: Model, wanted: object) -> Bus:
        if isinstance(wanted, str):
            named = self._bus_at(wanted)
            if named.kind != model.bus:
                raise Error(f"Device '{model.name}' can't go on {named.type_name} bus")
            return named
        if self._root_bus is not None and model.bus == self._root_bus.kind:
            return self._root_bus
        found = next((bus for bus in self._buses if bus.kind == model.bus), None)
        if found is None:
            raise Error(f"No '{model.bus}' bus found for device '{model.name}'")
        return found

    def _bus_at(self, path: str) -> Bus:
        """The bus with this name, or at this path of buses and devices."""
        names = [name for name in path.split("/") if name]
        if path.startswith("/"):
            return descend(self._system_bus, names, path)
        first = names[0] if names else ""
        bus: Bus | None
        if self._flexible and first in ("pci.0", "pcie.0"):
            # Clients write one or the other after the machine that they know; there is one root.
            bus = self._root_bus
        else:
            bus = next((bus for bus in (*self._buses, self._system_bus) if bus.label == first), None)
        if bus is None:
            raise Error(f"Bus '{first}' not found")
        return descend(bus, names[1:], path)

    def _reserve_name(self, device_id: str | None) -> str:
        if device_id is None:
            self._anonymous += 1
            return f"device[{self._anonymous - 1}]"
        peripheral = self._tree.absolute("/machine/peripheral")
        if device_id == "type" or (peripheral is not None and device_id in peripheral.children):
            raise Error(f"Duplicate device ID '{device_id}'")
        return device_id

    def _set_properties(self, device: Device, options: Mapping[str, Any], *, written: bool) -> None:
        model, schema = device.model, self._tree.schema
        given = {name: value for name, value in options.items() if name not in _COMMAND_MEMBERS}
        known = schema_properties(schema, model.struct, {}).keys() - absent_properties(model.name)
        readable = device.own_properties()
        for name in given:
            if name in known:
                continue
            if name == "type" or name in readable:
                raise Error(f"Property '{model.name}.{name}' is not writable")
            raise Error(f"Property '{model.name}.{name}' not found")
        if "addr" in given and "addr" in known:
            given["addr"] = pci_address(model.name, given["addr"])
        values = schema.coerce(model.struct, given)
        if written:
            schema.validate_option(model.struct, values)
        else:
            schema.validate(model.struct, values)
        if values.get("scsi"):
            raise Error("Parameter 'scsi' can only be off: virtio-blk passes no SCSI requests on any more")
        for name in _SIZES_32:
            # QMP takes a negative number for an unsigned one, and so it is a very large one.
            size = values.get(name, 0) % (1 << 64)
            if size > AUTO_UINT32:
                raise Error(
                    f"Property {model.owner(name)}.{name} doesn't take value {size} (maximum: {AUTO_UINT32})"
                )
        for name in ("logical_block_size", "physical_block_size"):
            _check_block_size(name, values.get(name, 0))
        self._check_boot_index(values.get("bootindex", -1), device)
        if "iothread" in values:
            values["iothread"] = self._iothread(values["iothread"])
        device.given = frozenset(values)
        device.values.update((name, value) for name, value in values.items() if name not in HISTORIC)

    def _check_boot_index(self, index: int, device: Device | None) -> None:
        if index < 0:
            return
        for other in self._all():
            if other is not device and other.values["bootindex"] == index:
                raise Error(f"The bootindex {index} has already been used")

    def _iothread(self, path: str) -> str:
        if not path:
            return ""
        found = self._tree.resolve(path)
        if not isinstance(found, IOThread):
            raise Error("Invalid parameter type for 'iothread', expected: iothread")
        return found.path

    def _drive(self, device: Device) -> Node | None:
        name = device.values["drive"]
        if not device.model.disk or not name:
            return None
        node = self._graph.find(name)
        if node is None:
            owner = device.model.owner("drive")
            raise Error(f"Property '{owner}.drive' can't find value '{name}'")
        return node

    def _check_pci(self, device: Device) -> None:
        """See what a PCI device says about its number and its ROM."""
        index, size = device.values["acpi-index"], device.values["romsize"]
        if index > _ACPI_INDEX_MAX:
            raise Error(f"acpi-index should be less or equal to {_ACPI_INDEX_MAX}")
        if index and any(other.values["acpi-index"] == index for other in self._all()):
            raise Error(f"a PCI device with acpi-index = {index} already exist")
        if size != AUTO_UINT32 and (not size or size & (size - 1)):
            raise Error(f"ROM size {size} is not a power of two")

    def _check_chassis(self, device: Device) -> None:
        """See that no other root port of a machine calls itself the same slot of the same chassis."""
        if self._flexible or device.model.family != "pcie-root-port":
            return
        for other in self._all():
            if other.model is device.model and all(
                other.values[name] == device.values[name] for name in ("chassis", "slot")
            ):
                raise Error("Can't add chassis slot, error -16")

    def _place(self, device: Device) -> None:
        match device.bus:
            case PCIBus():
                device.values["addr"] = device.bus.place(device)
            case SCSIBus():
                place = device.bus.place(device)
                device.values.update(zip(("channel", "scsi-id", "lun"), place, strict=True))

    def _attach(self, device: Device, node: Node, path: str) -> None:
        qdev = path if device.device_id is None else device.device_id
        if device.model.inner is not None:
            qdev = f"{path}/virtio-backend"
        perm = Permission.CONSISTENT_READ
        if not node.read_only:
            perm |= Permission.WRITE
        shared = _SHARED | (Permission.WRITE if device.values["share-rw"] else Permission.nothing())
        disk = GuestDisk(
            self._graph,
            qdev=qdev,
            device_id=device.device_id,
            perm=perm,
            shared=shared,
            qom_path=path if device.model.inner is None else f"{path}/virtio-backend",
            values=device.values,
            emit=self._emit,
        )
        disk.attach(node)
        device.backend = disk

    def _commit(self, device: Device, name: str) -> None:
        """Put the device and what it brings into the tree.  Nothing here fails."""
        machine = self._tree.machine()
        peripheral, anonymous = machine.container("peripheral"), machine.container("peripheral-anon")
        if self._root_bus is not None and self._root_bus.parent is None:
            if device.model.name == "pcie-root-port" and not device.hotplugged:
                # Whoever has root ports from the start means a PCI Express machine, whose root takes
                # nothing later: hot-plugged devices go into the ports.
                self._root_bus.type_name, self._root_bus.name = "PCIE", "pcie.0"
                self._root_bus.hotplug = False
            machine.add(self._root_bus.name, self._root_bus)
        (anonymous if device.device_id is None else peripheral).add(name, device)
        device.bus.devices.append(device)
        device.setters = {
            "bootindex": lambda value: self._set_boot_index(device, value),
            **({"drive": lambda value: self._set_drive(device, value)} if device.model.disk else {}),
        }
        half: DeviceHalf = device
        if device.model.inner is not None:
            half = DeviceHalf(device.model.inner, device)
            half.backend, device.backend = device.backend, None
            device.add("virtio-backend", half)
        bus: Bus | None = None
        if device.model.provides == "SCSI":
            bus, bus_name = SCSIBus(), "scsi.0" if device.device_id is None else f"{device.device_id}.0"
        elif device.model.provides == "PCI":
            bus = PCIBus("PCIE", hotplug=device.values["hotplug"], root_port=True)
            bus_name = device.device_id or f"pcie.{self._anonymous}"
        if bus is not None:
            half.add(bus_name, bus)
            device.own_bus = bus
            self._buses.insert(0, bus)

    # -- changing

    def _set_boot_index(self, device: Device, index: int) -> None:
        # QEMU refuses the one that the device has already, too.
        self._check_boot_index(index, None)
        device.values["bootindex"] = index

    async def _set_drive(self, device: Device, name: str) -> None:
        self._graph.lookup(name, name)
        backend = device.inner.backend
        assert backend is not None, "a disk has a backend as long as it is plugged in"
        async with self._graph.drained(backend.node):
            # Meanwhile either may have gone.
            if backend.edge is None:
                raise DeviceNotFound(f"Device '{device.path}' not found")
            self._use_node(device, backend, self._graph.lookup(name, name), name)

    def _use_node(self, device: Device, backend: Backend, node: Node, name: str) -> None:
        before, place = backend.node, self._graph.backends.index(backend)
        backend.detach()
        try:
            backend.attach(node)
            device.values["drive"] = name
        except BaseException:
            backend.attach(before)
            raise
        finally:
            # query-block lists disks in the order in which they came.
            self._graph.backends.remove(backend)
            self._graph.backends.insert(place, backend)

    # -- unplugging

    def removable(self, device_id: str) -> Device:
        """The device that `delete` would unplug.

        :param device_id: its id, or its path in the object tree.
        :raise Error: if it is not there or can't be unplugged.
        """
        half = self.find(device_id)
        if half is not half.device:
            raise Error("Bus 'virtio-bus' does not support hotplugging")
        half.device.bus.check_hotplug()
        if not half.device.model.pluggable:
            raise Error(f"Device '{half.type_name}' does not support hotplugging")
        return half.device

    def take_out(self, device: Device) -> None:
        """Undo `add`: nobody is told."""
        self._unplug(device)

    def delete(self, device_id: str) -> None:
        """Unplug a device, as `device_del` does.

        :param device_id: its id, or its path in the object tree.
        :raise Error: if it is not there or can't be unplugged.
        """
        for device in self.removable(device_id).leaving():
            self._waiting_events += self._unplug(device)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_EVENT_DELAY, self.send_deleted)

    def _unplug(self, device: Device) -> list[dict[str, Any]]:
        """Unplug a device that nothing is plugged into; returns the events' data."""
        events: list[dict[str, Any]] = []
        if device.own_bus is not None:
            self._buses.remove(device.own_bus)
        if device.inner is not device:
            events.append({"path": device.inner.path})
        events.append(
            ({} if device.device_id is None else {"device": device.device_id}) | {"path": device.path}
        )
        if device.inner.backend is not None:
            device.inner.backend.detach()
            device.inner.backend.remove_limits()
        device.bus.devices.remove(device)
        assert device.parent is not None
        device.parent.remove(device)
        return events

    def send_deleted(self) -> None:
        """Send the DEVICE_DELETED events that are due; before the daemon ends, all are."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        events, self._waiting_events = self._waiting_events, []
        for event in events:
            self._emit("DEVICE_DELETED", event)

    def reset(self) -> None:
        """Start the machine over, as `system_reset` does; devices keep their state."""
        self._emit("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
        self.send_deleted()

    def forget_failures(self) -> None:
        """Call every disk's I/O status good again, as `cont` does."""
        for device in self._all():
            if isinstance(device.inner.backend, GuestDisk):
                device.inner.backend.forget_failure()

    def close(self) -> None:
        """Send the events that are due, and let go of all nodes."""
        self.send_deleted()
        for device in self._all():
            if device.inner.backend is not None:
                device.inner.backend.detach()
                device.inner.backend.remove_limits()

    # -- looking

    def _all(self) -> list[Device]:
        return [device for bus in self._buses for device in bus.devices]

    def find(self, device_id: str) -> DeviceHalf:
        """The device with this id or path.

        :raise DeviceNotFound: if there is nothing.
        :raise Error: if what is there is no device.
        """
        path = device_id if device_id.startswith("/") else f"/machine/peripheral/{device_id}"
        found = self._tree.absolute(path)
        if found is None:
            raise DeviceNotFound(f"Device '{device_id}' not found")
        if not isinstance(found, DeviceHalf):
            raise Error(f"{device_id} is not a device")
        return found

    def disk(self, device_id: str) -> Backend | None:
        """What moves the data of the device with this id, on whichever level it is; None if nothing does."""
        found = self._tree.absolute(f"/machine/peripheral/{device_id}")
        if not isinstance(found, DeviceHalf):
            return None
        halves = [found, *(child for child in found.children.values() if isinstance(child, DeviceHalf))]
        return next((half.backend for half in halves if half.backend is not None), None)

    def backend(self, device_id: str) -> Backend:
        """What moves the data of the device with this id or path.

        :raise Error: if there is no such device, or it has no disk (a virtio device's is one level below it).
        """
        backend = self.find(device_id).backend
        if backend is None:
            raise Error("Device does not have a block device backend")
        return backend


def _model(driver: object) -> Model:
    """The model that `device_add` means.

    :raise Error: if there is none, or it can't be plugged in.
    """
    if not isinstance(driver, str):
        raise Error("Parameter 'driver' is missing")
    name = ALIASES.get(driver, driver)
    if name in MODELS:
        return MODELS[name]
    if name in SOLDERED:
        raise Error("Parameter 'driver' expects a pluggable device type")
    if name in INNER_BUS:
        raise Error(f"No '{INNER_BUS[name]}' bus found for device '{name}'")
    if name in TYPES and TYPES[name].abstract and TYPES[name].implements("device"):
        raise Error("Parameter 'driver' expects a non-abstract device type")
    raise Error(f"'{driver}' is not a valid device model name")


def _check_block_size(name: str, size: int) -> None:
    if size and (not SECTOR <= size <= _MAX_BLOCK or size & (size - 1)):
        raise Error(f"parameter {name} must be a power of 2 between {SECTOR} and {_MAX_BLOCK}")
