"""Devices, and the doors that lead to them.

Where there is a virtual machine, a guest uses a device that was plugged in.
Here others can: told so (``--device-exports on``), the daemon serves each disk
to NBD clients under its device's id, writable unless its node is read-only, as
long as the NBD server runs.

A door is part of its device and no export of its own: its requests go through
the device's backend, under the permissions that the device holds on its node
and into its counters.  It opens and closes with the device, and when the
device is unplugged, what was begun is finished first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, urlencode

from qmpd.block.backend import Backend
from qmpd.block.graph import Graph
from qmpd.errors import Error
from qmpd.export.exports import Exports
from qmpd.export.nbd.export import NBDExport
from qmpd.qom.device import Device
from qmpd.qom.devices import Devices

#: Addresses that mean all of a machine's, and the one that it can be reached at from itself.
_ANY: Final[Mapping[str, str]] = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Hotplug:
    """Plugs devices in and out, and opens and closes their doors.

    :param exports: has the NBD server.
    """

    def __init__(self, graph: Graph, devices: Devices, exports: Exports) -> None:
        self._graph = graph
        self._devices = devices
        self._exports = exports
        #: Whether devices that are plugged in from now on get a door.
        self.doors = False
        self._doors: dict[Device, NBDExport] = {}
        self._leaving: set[Device] = set()

    def add(self, options: Mapping[str, Any], *, hotplugged: bool = True, written: bool = False) -> None:
        """Plug a device in, and give it a door if it is a disk with an id.

        :param options: the members of `device_add`, as the client sent them.
        :param hotplugged: False on the command line.
        :param written: the options were written as ``key=value``; errors are worded accordingly.
        :raise Error: if either can't be done; then nothing has changed.
        """
        device = self._devices.add(options, hotplugged=hotplugged, written=written)
        backend = device.inner.backend
        if not self.doors or backend is None or device.device_id is None:
            return
        door = NBDExport(device.device_id, backend, writable=not backend.node.read_only)
        server = self._exports.nbd_server
        if server is not None and door.name in server.exports:
            self._devices.take_out(device)
            raise Error(f"NBD server already has export named '{door.name}'")
        self._doors[device] = door
        change = device.setters["drive"]
        device.setters = {**device.setters, "drive": lambda name: self._change_drive(device, change, name)}
        self.open_doors()

    def open_doors(self) -> None:
        """Let the NBD server, if there is one, serve all disks that have a door."""
        server = self._exports.nbd_server
        if server is not None:
            for door in self._doors.values():
                server.exports.setdefault(door.name, door)

    async def _change_drive(
        self, device: Device, change: Callable[[Any], Awaitable[None] | None], name: str
    ) -> None:
        """Let a device with a door use another node.

        A client that is there already goes by the size and the abilities of the node that it was told of.

        :raise Error: if there is a client, or the device can't use that node.
        """
        door = self._doors.get(device)
        if door is not None and door.connections:
            raise Error(f"Device '{device.device_id}' is in use by an NBD client")
        changed = change(name)
        if changed is not None:
            await changed

    async def delete(self, device_id: str) -> None:
        """Unplug a device, after the doors of it and of all that is plugged into it were closed.

        :param device_id: its id, or its path in the object tree.
        :raise Error: if it is not there or can't be unplugged.
        """
        device = self._devices.removable(device_id)
        if device in self._leaving:
            raise Error(f"Device {device_id} is already in the process of unplug")
        going = device.leaving()
        self._leaving.update(going)
        try:
            for each in going:
                await self._close_door(each)
            disks = [each.inner.backend for each in going]
            async with self._graph.drained(*(disk.node for disk in disks if disk is not None)):
                self._devices.delete(device_id)
        finally:
            self._leaving.difference_update(going)

    async def _close_door(self, device: Device) -> None:
        door = self._doors.pop(device, None)
        if door is None:
            return
        server = self._exports.nbd_server
        if server is not None and server.exports.get(door.name) is door:
            del server.exports[door.name]
        await door.disconnect()

    def nbd_uri(self, backend: Backend) -> str | None:
        """Where NBD clients find a disk; None if they don't.

        In the form of the NBD project's "NBD URIs": ``nbds`` with TLS, ``+unix`` for a UNIX socket.
        """
        server = self._exports.nbd_server
        name = backend.device_id
        door = None if server is None or name is None else server.exports.get(name)
        if server is None or door is None or door.backend is not backend:
            return None
        scheme = "nbd" if server.tls is None else "nbds"
        return next((f"{scheme}{place}" for place in _places(server.addresses, door.name)), None)


def _places(addresses: list[Any], name: str) -> Iterator[str]:
    """The rest of an export's URI after "nbd" or "nbds", for each address that has one.

    :param addresses: as `socket.getsockname` says them.
    """
    path = f"/{quote(name, safe='')}"
    for address in addresses:
        if isinstance(address, str) and address:
            yield f"+unix://{path}?{urlencode({'socket': address}, safe='/')}"
        elif isinstance(address, tuple) and isinstance(address[0], str):
            host, port = _ANY.get(address[0], address[0]), address[1]
            yield f"://{f'[{host}]' if ':' in host else host}:{port}{path}"
