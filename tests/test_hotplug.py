"""Doors: a device's export comes and goes with the device."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from fake_clock import FakeClock
from nbd_wire import WRITE, Wire

from qmpd.block.backend import Backend
from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.block.qemu_io import QemuIO
from qmpd.block.throttle_groups import ThrottleGroups
from qmpd.block.throttling import UNLIMITED
from qmpd.errors import Error
from qmpd.export.exports import Exports
from qmpd.hotplug import Hotplug, _places
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


@pytest.mark.parametrize(
    ("address", "place"),
    [
        (("0.0.0.0", 10809), "://127.0.0.1:10809/d"),
        (("::", 10809, 0, 0), "://[::1]:10809/d"),
        (("fe80::1", 10809, 0, 2), "://[fe80::1]:10809/d"),
        ((1, 10809), None),
        (b"\0abstract", None),
        ("", None),
    ],
)
def test_the_uri_names_an_address_that_can_be_reached(address: Any, place: str | None) -> None:
    assert list(_places([address], "d")) == ([] if place is None else [place])


async def test_the_uri_says_that_tls_is_needed(house: House, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    await house.exports.start_nbd_server(house.address, credentials=lambda: context)
    house.plug("d", "n")
    assert house.hotplug.nbd_uri(house.backend("d")) == f"nbds+unix:///d?socket={tmp_path}/nbd.sock"


async def test_an_abstract_socket_has_no_uri(house: House, tmp_path: Path) -> None:
    await house.exports.start_nbd_server({"type": "unix", "path": str(tmp_path), "abstract": True})
    house.plug("d", "n")
    assert house.served == {"d": True}
    assert house.hotplug.nbd_uri(house.backend("d")) is None


def taken(directory: Path) -> Wire:
    """A client of the door "d"."""
    client = Wire(directory / "nbd.sock")
    client.go("d")
    return client


async def change_drive(house: House, name: str) -> None:
    """Let the device "d" use the node `name`."""
    change = house.devices.find("d").device.change("drive", name)
    assert change is not None
    await change


async def test_clients_are_parted_from_when_the_server_stops_and_come_back_by_the_same_door(
    house: House, tmp_path: Path
) -> None:
    await house.start_server()
    house.plug("d", "n")
    for _ in range(2):
        client = await asyncio.to_thread(taken, tmp_path)
        await house.exports.stop_nbd_server()
        assert await asyncio.to_thread(client.socket.recv, 1) == b""
        client.close()
        await house.start_server()
    assert house.served == {"d": True}
    assert house.events == []


async def test_a_device_gets_another_node_when_nobody_uses_its_door(house: House, tmp_path: Path) -> None:
    await house.graph.add({"driver": "null-co", "node-name": "large", "size": 4 << 20})
    await house.start_server()
    house.plug("d", "n")
    client = await asyncio.to_thread(taken, tmp_path)
    with pytest.raises(Error, match="^Device 'd' is in use by an NBD client$"):
        await change_drive(house, "large")
    assert house.backend("d").node.name == "n"
    client.close()
    (door,) = (house.exports.nbd_server or pytest.fail("no server")).exports.values()
    while door.connections:
        await asyncio.sleep(0)
    with pytest.raises(Error, match="^Block node is read-only$"):
        await change_drive(house, "ro")
    await change_drive(house, "large")
    assert door.offer().size == 4 << 20
    await house.graph.delete("n")


async def test_a_device_gets_another_node_when_no_request_is_under_way_any_more(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.plug("d", "n")
    backend, release = house.backend("d"), asyncio.Event()

    async def slow_flush() -> None:
        await release.wait()

    monkeypatch.setattr(backend.node, "flush", slow_flush)
    request = asyncio.create_task(backend.flush())
    await asyncio.sleep(0)
    change = asyncio.create_task(change_drive(house, "m"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert backend.node.name == "n"
    release.set()
    await asyncio.gather(request, change)
    assert backend.node.name == "m"


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


# -- limits


class Limited:
    """The disk "d" of a house, whose time is the test's, and a client of its door."""

    def __init__(self, house: House, directory: Path) -> None:
        self.house = house
        self.clock = FakeClock()
        house.tree.throttle_groups = ThrottleGroups(self.clock)
        house.plug("d", "n")
        self.disk = house.backend("d")
        self.directory = directory

    def limit(self, **limits: int) -> None:
        wanted = {**UNLIMITED, **{name.replace("_", "-"): value for name, value in limits.items()}}
        self.disk.set_limits(self.house.tree.throttle_groups, wanted, "d")

    async def write(self, number: int) -> Wire:
        """A client that has sent so many writes, all of which the daemon has begun."""
        client = await asyncio.to_thread(taken, self.directory)
        for cookie in range(number):
            client.request(WRITE, cookie * 512, 512, bytes(512), cookie=cookie)
        while self.waiting < number - 1:
            await asyncio.sleep(0.001)
        return client

    @property
    def waiting(self) -> int:
        group = self.disk.throttle_group
        return 0 if group is None else group.waiting


@pytest_asyncio.fixture
async def limited(house: House, tmp_path: Path) -> Limited:
    await house.start_server()
    limited = Limited(house, tmp_path)
    # The first of several goes at once.
    limited.limit(bps_total=512)
    return limited


def cookies(client: Wire, number: int) -> list[tuple[int, int]]:
    replies = [client.reply() for _ in range(number)]
    return [(reply.cookie, reply.error) for reply in replies]


async def test_a_client_s_requests_are_answered_one_by_one_as_the_limit_allows(limited: Limited) -> None:
    client = await limited.write(4)
    assert await asyncio.to_thread(cookies, client, 1) == [(0, 0)]
    limited.clock.advance(0.9)
    assert await asyncio.to_thread(cookies, client, 1) == [(1, 0)]
    assert limited.waiting == 2
    limited.clock.advance(2)
    assert await asyncio.to_thread(cookies, client, 2) == [(2, 0), (3, 0)]
    client.close()


async def test_a_limited_disk_is_unplugged_at_once_and_what_was_begun_is_answered(limited: Limited) -> None:
    client = await limited.write(5)
    await limited.house.hotplug.delete("d")
    assert await asyncio.to_thread(cookies, client, 5) == [(cookie, 0) for cookie in range(5)]
    assert client.at_end()
    assert limited.clock.next is None
    await limited.house.graph.delete("n")


async def test_the_server_stops_though_requests_wait_for_a_limit(limited: Limited) -> None:
    client = await limited.write(5)
    await limited.house.exports.stop_nbd_server()
    assert await asyncio.to_thread(cookies, client, 5) == [(cookie, 0) for cookie in range(5)]
    # The disk has its limits for those who come later.
    assert limited.disk.throttle_group is not None


async def test_a_client_that_leaves_does_not_leave_its_limit(limited: Limited) -> None:
    client = await limited.write(5)
    client.close()
    other = await asyncio.to_thread(taken, limited.directory)
    other.request(WRITE, 0, 512, bytes(512), cookie=9)
    while limited.waiting < 5:
        await asyncio.sleep(0.001)
    limited.clock.advance(3.9)
    assert limited.waiting == 1
    limited.clock.advance(1)
    assert await asyncio.to_thread(cookies, other, 1) == [(9, 0)]
    other.close()


async def test_a_limited_disk_gets_another_node_while_requests_wait(limited: Limited) -> None:
    house, disk = limited.house, limited.disk
    reads = [asyncio.create_task(disk.pread(0, 512)) for _ in range(3)]
    while limited.waiting < 2:
        await asyncio.sleep(0)
    await change_drive(house, "m")
    assert [each.done() for each in reads] == [True, False, False]
    assert disk.throttle_group is not None
    limited.clock.advance(1.9)
    assert [len(data) for data in await asyncio.gather(*reads)] == [512] * 3


async def test_who_reads_by_the_monitor_is_limited_and_let_go_when_the_disk_goes(limited: Limited) -> None:
    line = "read 0 1k"
    printed = StringIO()
    await QemuIO(limited.disk, printed, printed).execute(line)
    waiting = asyncio.create_task(QemuIO(limited.disk, printed, printed).execute(line))
    while not limited.waiting:
        await asyncio.sleep(0)
    await limited.house.hotplug.delete("d")
    await waiting
    assert "read failed: No medium found" in printed.getvalue()
