"""Doors: a device's export comes and goes with the device."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from qmpd.block.backend import Backend
from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.errors import Error
from qmpd.export.exports import Exports
from qmpd.hotplug import Hotplug
from qmpd.qapi import load, schema_directory
from qmpd.qom.devices import Devices
from qmpd.qom.tree import ObjectTree


class House:
    """Devices, an NBD server and doors between them."""

    def __init__(self, socket: Path) -> None:
        self.events: list[str] = []
        self.address = {"type": "unix", "path": str(socket)}
        self.tree = tree = ObjectTree(load(schema_directory()))
        self.graph = Graph(DRIVERS, secrets=tree.secret_bytes)
        self.devices = Devices(self.graph, tree, self.emit)
        self.exports = Exports(self.graph, self.emit)
        self.hotplug = Hotplug(self.graph, self.devices, self.exports)
        self.hotplug.doors = True

    def emit(self, name: str, data: dict[str, Any]) -> None:
        self.events.append(name)

    async def start_server(self) -> None:
        await self.exports.start_nbd_server(self.address)
        self.hotplug.open_doors()

    def plug(self, device_id: str, node: str) -> None:
        self.hotplug.add({"driver": "virtio-blk-pci", "id": device_id, "drive": node})

    def backend(self, device_id: str) -> Backend:
        found = self.devices.disk(device_id)
        assert found is not None
        return found

    @property
    def served(self) -> dict[str, bool]:
        """Which exports there are, and whether they can be written to."""
        server = self.exports.nbd_server
        assert server is not None
        return {name: export.writable for name, export in server.exports.items()}


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path / "nbd.sock")
    for name in ("n", "m"):
        await house.graph.add({"driver": "null-co", "node-name": name, "size": 1 << 20, "read-zeroes": True})
    await house.graph.add({"driver": "null-co", "node-name": "ro", "size": 1 << 20, "read-only": True})
    yield house
    await house.exports.close()
    house.devices.close()
    await house.graph.close()


async def test_a_disk_is_served_under_its_id_and_written_to_unless_read_only(house: House) -> None:
    await house.start_server()
    house.plug("d", "n")
    house.plug("r", "ro")
    house.hotplug.add({"driver": "virtio-blk-pci", "drive": "m"})
    assert house.served == {"d": True, "r": False}
    await house.hotplug.delete("d")
    assert house.served == {"r": False}


async def test_without_doors_nothing_is_served(house: House) -> None:
    await house.start_server()
    house.hotplug.doors = False
    house.plug("d", "n")
    assert house.served == {}
    assert house.hotplug.nbd_uri(house.backend("d")) is None


async def test_doors_open_whenever_there_is_a_server(house: House) -> None:
    house.plug("d", "n")
    assert house.hotplug.nbd_uri(house.backend("d")) is None
    await house.start_server()
    assert house.served == {"d": True}
    await house.exports.stop_nbd_server()
    await house.start_server()
    assert house.served == {"d": True}


async def test_a_controller_takes_the_doors_of_its_disks_with_it(house: House) -> None:
    await house.start_server()
    house.hotplug.add({"driver": "virtio-scsi-pci", "id": "s"})
    house.hotplug.add({"driver": "scsi-hd", "id": "d", "drive": "n"})
    assert house.served == {"d": True}
    await house.hotplug.delete("s")
    assert house.served == {}


async def test_a_taken_name_leaves_nothing_of_the_device(house: House) -> None:
    await house.start_server()
    house.exports.add({"type": "nbd", "id": "e", "node-name": "m", "name": "d"})
    with pytest.raises(Error, match="^NBD server already has export named 'd'$"):
        house.plug("d", "n")
    assert house.devices.disk("d") is None
    await house.graph.delete("n")
    assert house.events == []


async def test_a_refused_unplug_leaves_the_door_open(house: House) -> None:
    await house.start_server()
    house.hotplug.add({"driver": "pcie-root-port", "id": "p"}, hotplugged=False)
    house.hotplug.add({"driver": "virtio-blk-pci", "id": "d", "drive": "n"}, hotplugged=False)
    with pytest.raises(Error, match="does not support hotplugging"):
        await house.hotplug.delete("d")
    assert house.served == {"d": True}


async def test_a_device_goes_when_its_requests_are_done(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.start_server()
    house.plug("d", "n")
    backend, release = house.backend("d"), asyncio.Event()

    async def slow_read(offset: int, length: int) -> bytes:
        await release.wait()
        return b"data"

    monkeypatch.setattr(backend.node, "pread", slow_read)
    request = asyncio.create_task(backend.pread(0, 4))
    await asyncio.sleep(0)
    unplug = asyncio.create_task(house.hotplug.delete("d"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not unplug.done()
    assert house.served == {}
    assert house.devices.disk("d") is backend
    with pytest.raises(Error, match="^Device d is already in the process of unplug$"):
        await house.hotplug.delete("d")
    release.set()
    await unplug
    assert await request == b"data"
    assert house.devices.disk("d") is None
    await house.graph.delete("n")


@pytest.mark.parametrize(
    ("device_id", "address", "uri"),
    [
        ("d", {"type": "unix", "path": "{}/nbd.sock"}, "nbd+unix:///d?socket={}/nbd.sock"),
        ("a b", {"type": "unix", "path": "{}/nbd.sock"}, "nbd+unix:///a%20b?socket={}/nbd.sock"),
        ("d", {"type": "inet", "host": "127.0.0.1", "port": "0"}, "nbd://127.0.0.1:*/d"),
    ],
)
async def test_the_uri_leads_to_the_door(
    house: House, tmp_path: Path, device_id: str, address: dict[str, str], uri: str
) -> None:
    await house.exports.start_nbd_server({key: value.format(tmp_path) for key, value in address.items()})
    house.plug(device_id, "n")
    server = house.exports.nbd_server
    assert server is not None
    port = str(server.addresses[0][1])
    assert house.hotplug.nbd_uri(house.backend(device_id)) == uri.format(tmp_path).replace("*", port)


async def test_the_uri_of_someone_else_s_export_is_not_a_disk_s(house: House) -> None:
    await house.start_server()
    house.exports.add({"type": "nbd", "id": "e", "node-name": "m", "name": "d"})
    house.hotplug.doors = False
    house.plug("d", "n")
    assert house.hotplug.nbd_uri(house.backend("d")) is None


async def test_a_disk_that_gets_another_node_finishes_what_it_has_begun_on_the_old_one(house: House) -> None:
    options = {"driver": "null-co", "node-name": "slow", "latency-ns": 50_000_000}
    await house.graph.add(options)
    house.plug("d", "slow")
    disk = house.backend("d")
    begun = asyncio.create_task(disk.pread(0, 512))
    await asyncio.sleep(0)
    moving = house.tree.set("d", "drive", "n")
    assert moving is not None
    change = asyncio.ensure_future(moving)
    await asyncio.sleep(0)
    late = asyncio.create_task(disk.pread(0, 512))
    await change
    assert begun.done()
    assert disk.node.name == "n"
    await house.graph.delete("slow")
    assert len(await late) == 512


async def test_a_disk_is_unplugged_when_its_requests_have_ended(house: House) -> None:
    await house.graph.add({"driver": "null-co", "node-name": "slow", "latency-ns": 50_000_000})
    house.plug("d", "slow")
    disk = house.backend("d")
    begun = asyncio.create_task(disk.pread(0, 512))
    await asyncio.sleep(0)
    unplugged = asyncio.create_task(house.hotplug.delete("d"))
    await asyncio.sleep(0)
    late = asyncio.create_task(disk.pread(0, 512))
    await unplugged
    assert begun.done()
    await house.graph.delete("slow")
    with pytest.raises(OSError, match="No medium found"):
        await late
