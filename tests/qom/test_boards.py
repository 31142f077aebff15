"""A machine's board: its root bus, what the chip set takes, and its place in the object tree."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from qmpd.block.graph import Graph
from qmpd.errors import DeviceNotFound, Error
from qmpd.qapi import Schema
from qmpd.qom.boards import BOARDS
from qmpd.qom.devices import Devices
from qmpd.qom.machine import MachineObject
from qmpd.qom.tree import ObjectTree

NAMES = {"pc": "pc-i440fx-10.0", "q35": "pc-q35-10.0", "none": "none"}

Events = list[tuple[str, dict[str, Any]]]
Make = Callable[[str], Devices]


@pytest_asyncio.fixture
async def machine(schema: Schema, graph: Graph, events: Events) -> AsyncIterator[Make]:
    """Makes the devices of a machine of this family, on the graph with the nodes "n", "n2" and "n3"."""
    made: list[Devices] = []

    def make(family: str) -> Devices:
        tree = ObjectTree(schema, machine=MachineObject(NAMES[family], {"memory": {"size": 1 << 27}}))
        devices = Devices(graph, tree, lambda name, data: events.append((name, data)), BOARDS[family])
        made.append(devices)
        return devices

    yield make
    for devices in made:
        devices.close()


def disk(device_id: str | None = None, drive: str = "n", **properties: Any) -> dict[str, Any]:
    named = {} if device_id is None else {"id": device_id}
    return {"driver": "virtio-blk-pci", "drive": drive, "share-rw": True, **named, **properties}


def port(device_id: str, **properties: Any) -> dict[str, Any]:
    return {"driver": "pcie-root-port", "id": device_id, **properties}


def refused(devices: Devices, options: dict[str, Any], **how: bool) -> str:
    with pytest.raises(Error) as error:
        devices.add(options, **how)
    return error.value.desc


def get(devices: Devices, path: str, name: str) -> Any:
    return devices._tree.get(path, name)


@pytest.mark.parametrize(
    ("family", "addr", "text"),
    [
        ("pc", "0", "slot 0 function 0 not available for virtio-blk-pci, in use by i440FX,id=(null)"),
        ("pc", "1.1", "slot 1 function 1 not available for virtio-blk-pci, in use by piix3-ide,id=(null)"),
        ("pc", "1.3", "slot 1 function 3 not available for virtio-blk-pci, in use by PIIX4_PM,id=(null)"),
        ("q35", "0", "slot 0 function 0 not available for virtio-blk-pci, in use by mch,id=(null)"),
        ("q35", "0.1", "single function device can't be populated in function 0.1"),
        ("q35", "1f", "slot 31 function 0 not available for virtio-blk-pci, in use by ICH9-LPC,id=(null)"),
        ("q35", "1f.2", "slot 31 function 2 not available for virtio-blk-pci, in use by ich9-ahci,id=(null)"),
        ("q35", "1f.3", "slot 31 function 3 not available for virtio-blk-pci, in use by ICH9-SMB,id=(null)"),
    ],
)
def test_what_the_chip_set_takes_is_taken(machine: Make, family: str, addr: str, text: str) -> None:
    assert refused(machine(family), disk(addr=addr), hotplugged=False) == f"PCI: {text}"


@pytest.mark.parametrize(("family", "first"), [("pc", 2), ("q35", 1)])
def test_the_first_slot_that_the_chip_set_leaves_is_taken(machine: Make, family: str, first: int) -> None:
    devices = machine(family)
    devices.add(disk("d"), hotplugged=False)
    assert get(devices, "d", "addr") == first * 8


def test_q35s_root_bus_takes_nothing_later(machine: Make) -> None:
    devices = machine("q35")
    devices.add(disk("cold"), hotplugged=False)
    for options in (disk("d"), disk("d", bus="pcie.0", addr="5"), port("p")):
        assert refused(devices, options) == "Bus 'pcie.0' does not support hotplugging"
    with pytest.raises(Error, match=r"^Bus 'pcie\.0' does not support hotplugging$"):
        devices.delete("cold")
    assert get(devices, "cold", "hotpluggable") is False


@pytest.mark.parametrize(
    ("family", "bus", "text"),
    [
        ("pc", "pcie.0", "Bus 'pcie.0' not found"),
        ("q35", "pci.0", "Bus 'pci.0' not found"),
        ("none", "pci.0", "Bus 'pci.0' not found"),
        ("none", None, "No 'PCI' bus found for device 'virtio-blk-pci'"),
        ("none", "main-system-bus", "Device 'virtio-blk-pci' can't go on System bus"),
        ("pc", "/", "Device 'virtio-blk-pci' can't go on System bus"),
        ("pc", "/q35-pcihost", "Device 'q35-pcihost' not found"),
        ("q35", "/q35-pcihost/pcie.0", "Bus 'pcie.0' does not support hotplugging"),
    ],
)
def test_a_machine_has_its_own_buses_only(machine: Make, family: str, bus: str | None, text: str) -> None:
    assert refused(machine(family), disk(**({} if bus is None else {"bus": bus}))) == text


@pytest.fixture
def ports(machine: Make) -> Devices:
    """A q35 with root ports as libvirt writes them."""
    devices = machine("q35")
    for function in range(4):
        several = {"multifunction": True} if function == 0 else {}
        options = port(
            f"pci.{function + 1}",
            bus="pcie.0",
            port=16 + function,
            chassis=1 + function,
            addr=f"0x2.{function}",
        )
        devices.add(options | several, hotplugged=False)
    return devices


async def test_a_port_takes_one_device_and_another_one_when_that_is_gone(ports: Devices) -> None:
    for name in ("a", "b", "c"):
        ports.add(disk(name, bus="pci.2", addr="0x0"))
        assert refused(ports, disk("x", bus="pci.2")).startswith("PCI: slot 0 function 0 already occupied by")
        assert refused(ports, disk("x", bus="pci.2", addr="0x0")).endswith(
            f"in use by virtio-blk-pci,id={name}"
        )
        ports.delete(name)


def test_a_port_is_known_by_its_chassis_and_slot(ports: Devices) -> None:
    same = port("p", chassis=3)
    assert refused(ports, same, hotplugged=False) == "Can't add chassis slot, error -16"
    ports.add(same | {"slot": 1}, hotplugged=False)


def test_a_port_that_is_not_hot_pluggable_takes_nothing_later(machine: Make) -> None:
    devices = machine("q35")
    devices.add(port("p", hotplug="off"), hotplugged=False)
    assert refused(devices, disk(bus="p")) == "Bus 'p' does not support hotplugging"
    devices.add(disk(bus="p"), hotplugged=False)


def test_further_functions_come_before_function_0_when_a_guest_is_there(ports: Devices) -> None:
    ports.add(disk("f1", bus="pci.1", addr="0.1"))
    assert refused(ports, disk("f0", bus="pci.1")).startswith("PCI: 0.0 indicates single function")
    ports.add(disk("f0", bus="pci.1", multifunction=True))
    assert "cannot be exposed to guest" in refused(ports, disk("f2", bus="pci.1", addr="0.2"))


def test_before_the_start_functions_come_in_any_order(machine: Make) -> None:
    devices = machine("q35")
    devices.add(disk("f0", addr="4", multifunction=True), hotplugged=False)
    devices.add(disk("f1", addr="4.1"), hotplugged=False)
    devices.add(disk("other", addr="5"), hotplugged=False)
    text = refused(devices, disk("x", addr="5.1"), hotplugged=False)
    assert text == "PCI: single function device can't be populated in function 5.1"


async def test_all_functions_of_a_slot_go_together_the_newest_first(ports: Devices, events: Events) -> None:
    for name, addr in (("f1", "0.1"), ("f0", "0.0")):
        ports.add(disk(name, bus="pci.3", addr=addr, multifunction=True))
    ports.add(disk("elsewhere", bus="pci.1"))
    ports.delete("f1")
    ports.send_deleted()
    assert [data["device"] for _, data in events if "device" in data] == ["f0", "f1"]
    assert ports.disk("elsewhere") is not None
    ports.add(disk("f0", bus="pci.3"))


def test_a_place_that_a_guest_cannot_see_is_warned_of(
    ports: Devices, caplog: pytest.LogCaptureFixture
) -> None:
    ports.add(disk("d", bus="pci.1", addr="3"))
    assert "slot 3 is not valid for virtio-blk-pci" in caplog.text


@pytest.mark.parametrize(
    ("family", "path", "text"),
    [
        ("pc", "/machine/unattached/device[3]", "Device 'PIIX3' does not support hotplugging"),
        ("pc", "/machine/i440fx", "Bus 'main-system-bus' does not support hotplugging"),
        ("q35", "/machine/q35/mch", "Bus 'pcie.0' does not support hotplugging"),
        ("q35", "/machine", "/machine is not a device"),
    ],
)
def test_what_is_soldered_in_stays(machine: Make, family: str, path: str, text: str) -> None:
    with pytest.raises(Error) as error:
        machine(family).delete(path)
    assert error.value.desc == text


@pytest.mark.parametrize("driver", ["mch", "PIIX3", "q35-pcihost"])
def test_what_is_soldered_in_cannot_be_plugged_in(machine: Make, driver: str) -> None:
    text = "Parameter 'driver' expects a pluggable device type"
    assert refused(machine("pc"), {"driver": driver}) == text


def test_the_tree_has_the_machine_and_no_processor(machine: Make) -> None:
    devices = machine("q35")
    assert get(devices, "/machine", "type") == "pc-q35-10.0-machine"
    assert get(devices, "/machine", "memory") == {"size": 1 << 27}
    assert get(devices, "/machine/q35/pcie.0", "child[1]") == "/machine/unattached/device[2]"
    assert get(devices, "/machine/q35", "parent_bus") == "/machine/unattached/sysbus"
    with pytest.raises(DeviceNotFound):
        devices._tree.properties("/machine/unattached/device[0]")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("share-rw", "perhaps", "Parameter 'share-rw' expects 'on' or 'off'"),
        ("num-queues", "two", "Parameter 'num-queues' expects integer"),
        ("discard_granularity", "much", "Parameter 'discard_granularity' expects size"),
    ],
)
def test_text_on_the_command_line_is_refused_in_its_words(
    machine: Make, name: str, value: str, text: str
) -> None:
    options = {"driver": "virtio-blk-pci", "drive": "n", name: value}
    assert refused(machine("pc"), options, hotplugged=False, written=True) == text


def test_a_storage_daemon_does_not_know_an_emulators_types(schema: Schema) -> None:
    tree = ObjectTree(schema)
    assert {"tcg-accel", "mch", "machine"}.isdisjoint(each["name"] for each in tree.list_types(abstract=True))
    with pytest.raises(DeviceNotFound, match="^Class 'memory-backend-file' not found$"):
        tree.list_properties("memory-backend-file")


def test_a_pci_device_is_shown_by_its_numbers_at_its_place(machine: Make) -> None:
    devices = machine("pc")
    devices.add(disk("d", addr="4"))
    devices.add({"driver": "virtio-scsi-pci", "id": "s", "addr": "3", "disable-legacy": "on", "vectors": 0})
    (bus,) = devices.pci_info()
    shown = [(each["slot"], each["function"], each["qdev_id"]) for each in bus["devices"]]
    assert shown == [(0, 0, ""), (1, 0, ""), (1, 1, ""), (1, 3, ""), (3, 0, "s"), (4, 0, "d")]
    modern, transitional = bus["devices"][-2:]
    assert (modern["id"]["vendor"], modern["id"]["device"]) == (0x1AF4, 0x1048)
    assert (transitional["id"]["vendor"], transitional["id"]["device"]) == (0x1AF4, 0x1001)
    assert [region["bar"] for region in modern["regions"]] == [4]
    assert [region["bar"] for region in transitional["regions"]] == [0, 1, 4]


def test_nothing_is_seen_behind_a_port_to_which_nobody_gave_a_number(machine: Make) -> None:
    devices = machine("q35")
    devices.add(port("p", addr="2"), hotplugged=False)
    devices.add(disk("d", bus="p"))
    (bus,) = devices.pci_info()
    assert [each["qdev_id"] for each in bus["devices"] if each["qdev_id"]] == ["p"]
    (bridge,) = [each["pci_bridge"] for each in bus["devices"] if "pci_bridge" in each]
    assert bridge["bus"]["secondary"] == 0
    assert "devices" not in bridge


def test_a_machine_without_pci_has_no_bus_to_show(machine: Make) -> None:
    assert machine("none").pci_info() == []
