from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qmpd.block.graph import Graph
from qmpd.block.permissions import Permission
from qmpd.errors import DeviceNotFound, Error
from qmpd.qom.devices import Devices
from qmpd.qom.tree import ObjectTree

Events = list[tuple[str, dict[str, Any]]]

BLK = {"driver": "virtio-blk-pci"}
PERIPHERAL = "/machine/peripheral"


def disk(name: str, node: str = "ro", **options: Any) -> dict[str, Any]:
    return {**BLK, "id": name, "drive": node, **options}


async def change(tree: ObjectTree, path: str, name: str, value: Any) -> None:
    """`qom-set`, up to its reply."""
    rest = tree.set(path, name, value)
    if rest is not None:
        await rest


def scsi(name: str, node: str = "ro", **options: Any) -> dict[str, Any]:
    return {"driver": "scsi-hd", "id": name, "drive": node, **options}


def snapshot(graph: Graph, tree: ObjectTree) -> tuple[int, list[str], list[int]]:
    machine = tree.absolute(PERIPHERAL)
    return (
        len(graph.backends),
        [] if machine is None else list(machine.children),
        [len(node.parents) for node in graph.nodes()],
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "Parameter 'driver' is missing"),
        ({"driver": 1}, "Parameter 'driver' is missing"),
        ({"driver": "nope"}, "'nope' is not a valid device model name"),
        ({"driver": "secret"}, "'secret' is not a valid device model name"),
        ({"driver": "virtio-blk-pci-base"}, "Parameter 'driver' expects a non-abstract device type"),
        (
            {"driver": "virtio-blk-device"},
            "No 'virtio-bus' bus found for device 'virtio-blk-device'",
        ),
        ({"driver": "scsi-hd", "drive": "n"}, "No 'SCSI' bus found for device 'scsi-hd'"),
        ({**BLK, "bus": "nope", "bogus": 1}, "Bus 'nope' not found"),
        ({**BLK, "bogus": 1, "drive": "nope"}, "Property 'virtio-blk-pci.bogus' not found"),
        ({**BLK, "type": "x"}, "Property 'virtio-blk-pci.type' is not writable"),
        ({**BLK, "hotplugged": False}, "Property 'virtio-blk-pci.hotplugged' is not writable"),
        ({"driver": "virtio-blk", "x": 1}, "Property 'virtio-blk-pci.x' not found"),
        (BLK, "drive property not set"),
        ({**BLK, "drive": ""}, "drive property not set"),
        ({**BLK, "drive": "nope"}, "Property 'virtio-blk-device.drive' can't find value 'nope'"),
        ({**BLK, "drive": 1}, "Invalid parameter type for 'drive', expected: string"),
        (disk("x", **{"num-queues": 0}), "num-queues property must be larger than 0"),
        (disk("x", **{"num-queues": -1}), "Parameter 'num-queues' expects uint16_t"),
        (disk("x", **{"num-queues": "many"}), "Parameter 'num-queues' expects uint64"),
        (disk("x", **{"share-rw": 1}), "Invalid parameter type for 'share-rw', expected: boolean"),
        (disk("x", **{"share-rw": "maybe"}), "Invalid parameter type for 'share-rw', expected: boolean"),
        (disk("x", **{"write-cache": "maybe"}), "Parameter 'write-cache' does not accept value 'maybe'"),
        (
            disk("x", **{"queue-size": 100}),
            "invalid queue-size property (100), must be a power of 2 (max 1024)",
        ),
        (disk("x", **{"queue-size": 2}), "invalid queue-size property (2), must be > 2"),
        (
            disk("x", logical_block_size=777),
            "parameter logical_block_size must be a power of 2 between 512 and 2097152",
        ),
        (disk("x", logical_block_size=4096), "logical_block_size > physical_block_size not supported"),
        (disk("x", opt_io_size=100), "opt_io_size must be a multiple of logical_block_size"),
        (disk("x", min_io_size=65536 * 512), "min_io_size must not exceed 65535 logical blocks"),
        *(
            (
                disk("x", **{name: size}),
                f"Property virtio-blk-device.{name} doesn't take value {told} (maximum: 4294967295)",
            )
            for name in ("min_io_size", "opt_io_size", "discard_granularity")
            for size, told in ((1 << 32, 1 << 32), (-1, (1 << 64) - 1))
        ),
        (
            disk("x", logical_block_size=-1),
            "parameter logical_block_size must be a power of 2 between 512 and 2097152",
        ),
        (disk("x", heads=300), "cyls must be between 1 and 65535"),
        (disk("x", cyls=65536, heads=1, secs=1), "cyls must be between 1 and 65535"),
        (disk("x", cyls=1), "heads must be between 1 and 255"),
        (disk("x", cyls=1, heads=256, secs=1), "heads must be between 1 and 255"),
        (disk("x", cyls=1, heads=255), "secs must be between 1 and 255"),
        (disk("x", cyls=1, heads=1, secs=256), "secs must be between 1 and 255"),
        (disk("x", heads=1, opt_io_size=100), "cyls must be between 1 and 65535"),
        (disk("x", iothread="nope"), "Device 'nope' not found"),
        (disk("x", iothread="/objects"), "Invalid parameter type for 'iothread', expected: iothread"),
        (disk("x", addr="nonsense"), "Property 'virtio-blk-pci.addr' doesn't take value 'nonsense'"),
        (disk("x", addr="1f.8"), "Property 'virtio-blk-pci.addr' doesn't take value '1f.8'"),
        (disk("x", addr="20"), "Property 'virtio-blk-pci.addr' doesn't take value '20'"),
        (disk("x", addr=256), "Parameter 'addr' expects a value between -1 and 255"),
        (disk("x", addr=True), "Invalid parameter type for 'addr', expected int or str"),
        (
            disk("x", scsi="on"),
            "Parameter 'scsi' can only be off: virtio-blk passes no SCSI requests on any more",
        ),
        (
            {"driver": "virtio-scsi-pci", "num_queues": 0},
            "Invalid number of queues (= 0), must be a positive integer less than 1022.",
        ),
        *(
            (
                {**options, "disable-legacy": "on", "disable-modern": True},
                "device cannot work as neither modern nor legacy mode is enabled",
            )
            for options in (disk("x"), BLK, {"driver": "virtio-scsi-pci", "num_queues": 0})
        ),
        (
            {"driver": "virtio-blk-pci-transitional", "disable-legacy": "on"},
            "Property 'virtio-blk-pci-transitional.disable-legacy' not found",
        ),
        ({**BLK, "bus": "main-system-bus"}, "Device 'virtio-blk-pci' can't go on System bus"),
        ({**BLK, "bus": "/"}, "Device 'virtio-blk-pci' can't go on System bus"),
        ({**BLK, "bus": ""}, "Bus '' not found"),
    ],
)
def test_what_cannot_be_plugged_in_is_refused_and_leaves_nothing(
    devices: Devices, graph: Graph, tree: ObjectTree, options: dict[str, Any], text: str
) -> None:
    before = snapshot(graph, tree)
    with pytest.raises(Error) as error:
        devices.add(options)
    assert error.value.desc == text
    assert snapshot(graph, tree) == before
    assert tree.absolute("/machine") is None


def test_a_disk_takes_and_shares_what_a_guest_s_disk_does(devices: Devices, graph: Graph) -> None:
    devices.add(disk("a", "n"))
    devices.add(disk("b", "ro"))
    devices.add(disk("c", "n2", **{"share-rw": True}))
    shared = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED | Permission.RESIZE
    taken = [(each.qdev, each.perm, each.shared) for each in graph.disks()]
    read, write = Permission.CONSISTENT_READ, Permission.WRITE
    assert taken == [
        ("/machine/peripheral/a/virtio-backend", read | write, shared),
        ("/machine/peripheral/b/virtio-backend", read, shared),
        ("/machine/peripheral/c/virtio-backend", read | write, shared | write),
    ]


def test_two_disks_do_not_get_one_node(devices: Devices, graph: Graph, tree: ObjectTree) -> None:
    devices.add(disk("x", "n"))
    before = snapshot(graph, tree)
    with pytest.raises(Error) as error:
        devices.add(disk("y", "n"))
    assert error.value.desc == (
        "Permission conflict on node 'n': permissions 'write' are both required by block device "
        "'/machine/peripheral/x/virtio-backend' (uses node 'n' as 'root' child) and unshared by block "
        "device '/machine/peripheral/y/virtio-backend' (uses node 'n' as 'root' child)."
    )
    assert snapshot(graph, tree) == before


def test_the_strings_of_the_classic_transcripts_are_taken(devices: Devices, tree: ObjectTree) -> None:
    devices.add(disk("d", "n", **{"num-queues": "1", "scsi": "off", "share-rw": "on", "addr": "0x5"}))
    assert tree.get("d", "num-queues") == 1
    assert tree.get("d", "share-rw") is True
    assert tree.get("d", "legacy-addr") == "05.0"
    with pytest.raises(Error, match="not found"):
        tree.get("d", "scsi")


def test_the_tree_shows_both_halves_of_a_virtio_device(devices: Devices, tree: ObjectTree) -> None:
    devices.add(disk("d", "n", serial="s" * 30))
    assert tree.properties(PERIPHERAL) == [
        {"name": "type", "type": "string"},
        {"name": "d", "type": "child<virtio-blk-pci>"},
    ]
    assert tree.get("d", "virtio-backend") == f"{PERIPHERAL}/d/virtio-backend"
    for path in (f"{PERIPHERAL}/d", f"{PERIPHERAL}/d/virtio-backend"):
        values = {name: tree.get(path, name) for name in ("drive", "num-queues", "serial", "heads")}
        assert values == {"drive": "n", "num-queues": 1, "serial": "s" * 30, "heads": 16}
    assert tree.get(f"{PERIPHERAL}/d/virtio-backend", "type") == "virtio-blk-device"
    assert tree.get("d", "parent_bus") == "/machine/pci.0"
    shown = {each["name"] for each in tree.properties(f"{PERIPHERAL}/d/virtio-backend")}
    assert "num-queues" in shown
    assert "addr" not in shown


def test_the_oldest_form_of_virtio_is_off_by_default_in_a_port(devices: Devices, tree: ObjectTree) -> None:
    devices.add({"driver": "pcie-root-port", "id": "rp"})
    devices.add({"driver": "pcie-root-port", "id": "rp2"})
    devices.add(disk("a", **{"disable-legacy": "auto"}))
    with pytest.raises(Error, match="^device cannot work as neither modern nor legacy mode is enabled$"):
        devices.add(disk("b", bus="rp", **{"disable-modern": True}))
    devices.add(disk("b", bus="pci.0/rp"))
    devices.add(disk("c", bus="rp2", **{"disable-legacy": "off", "disable-modern": True}))
    assert [tree.get(name, "disable-legacy") for name in "abc"] == ["off", "on", "off"]


def test_a_type_for_one_form_of_virtio_has_no_switches_for_it(devices: Devices, tree: ObjectTree) -> None:
    devices.add(disk("d", driver="virtio-blk-pci-transitional"))
    for switch in ("disable-legacy", "disable-modern"):
        with pytest.raises(Error, match="not found$"):
            tree.get("d", switch)
        assert switch not in {each["name"] for each in tree.list_properties("virtio-blk-pci-transitional")}
        assert switch in {each["name"] for each in tree.list_properties("virtio-blk-pci")}


def test_a_machine_has_its_containers_from_the_first_device_on(devices: Devices, tree: ObjectTree) -> None:
    devices.add(disk("d"))
    for name in ("unattached", "peripheral-anon", "peripheral"):
        assert tree.get(f"/machine/{name}", "type") == "container"


def test_every_property_of_a_device_can_be_read(devices: Devices, tree: ObjectTree) -> None:
    devices.add({"driver": "virtio-scsi-pci", "id": "sc"})
    devices.add(scsi("h", "n"))
    devices.add(disk("d"))
    devices.add({"driver": "pcie-root-port", "id": "rp"})
    paths = [f"{PERIPHERAL}/{name}" for name in ("sc", "h", "d", "rp", "sc/virtio-backend", "rp/rp")]
    for path in [*paths, f"{PERIPHERAL}/sc/virtio-backend/sc.0", "/machine/pci.0"]:
        for each in tree.properties(path):
            tree.get(path, each["name"])


@pytest.mark.parametrize(
    ("path", "name", "text"),
    [
        (
            "d",
            "num-queues",
            "Attempt to set property 'num-queues' on anonymous device (type 'virtio-blk-device') "
            "after it was realized",
        ),
        (
            "d",
            "addr",
            "Attempt to set property 'addr' on device 'd' (type 'virtio-blk-pci') after it was realized",
        ),
        ("d", "type", "Property 'virtio-blk-pci.type' is not writable"),
        ("d", "realized", "Property 'virtio-blk-pci.realized' can't be set; use device_del"),
        ("d", "nope", "Property 'virtio-blk-pci.nope' not found"),
        ("d", "drive", "Cannot find device='nope' nor node-name='nope'"),
    ],
)
async def test_a_plugged_in_device_hardly_changes(
    devices: Devices, tree: ObjectTree, path: str, name: str, text: str
) -> None:
    devices.add(disk("d", "n"))
    with pytest.raises(Error) as error:
        await change(tree, path, name, "nope")
    assert error.value.desc == text


async def test_a_disk_can_be_given_another_node(devices: Devices, graph: Graph, tree: ObjectTree) -> None:
    devices.add(disk("d", "n"))
    devices.add(disk("e", "n2"))
    await change(tree, "d", "drive", "n3")
    assert tree.get("d", "drive") == "n3"
    assert [each.node.name for each in graph.disks()] == ["n3", "n2"]
    with pytest.raises(Error, match="^Permission conflict on node 'n2'"):
        await change(tree, "d", "drive", "n2")
    assert tree.get("d", "drive") == "n3"
    assert [each.node.name for each in graph.disks()] == ["n3", "n2"]


def test_boot_indexes_are_unique(devices: Devices, tree: ObjectTree) -> None:
    devices.add(disk("a", bootindex=1))
    with pytest.raises(Error, match="^The bootindex 1 has already been used$"):
        devices.add(disk("b", bootindex="1"))
    devices.add(disk("b", bootindex=2))
    with pytest.raises(Error, match="^The bootindex 1 has already been used$"):
        tree.set("b", "bootindex", 1)
    tree.set("b", "bootindex", 3)
    assert tree.get("b", "bootindex") == 3


async def test_an_iothread_is_shown_as_a_link(devices: Devices, tree: ObjectTree) -> None:
    await tree.add({"qom-type": "iothread", "id": "io"})
    devices.add(disk("d", iothread="io"))
    assert tree.get("d", "iothread") == "/objects/io"


# -- ids


def test_an_id_is_used_once(devices: Devices) -> None:
    devices.add(disk("x", "n"))
    for taken in ("x", "type"):
        with pytest.raises(Error) as error:
            devices.add(disk(taken, "nope", bogus=1))
        assert error.value.desc == f"Duplicate device ID '{taken}'"


def test_ids_are_not_checked_for_form(devices: Devices, tree: ObjectTree) -> None:
    for name in ("q q", "z/z"):
        devices.add(disk(name))
    assert {"q q", "z/z"} <= {each["name"] for each in tree.properties(PERIPHERAL)}


async def test_a_device_without_an_id_is_found_by_its_path(
    devices: Devices, tree: ObjectTree, events: Events
) -> None:
    devices.add(disk(7, "n"))  # type: ignore[arg-type]
    path = "/machine/peripheral-anon/device[0]"
    assert tree.get(path, "drive") == "n"
    with pytest.raises(DeviceNotFound):
        devices.delete("device[0]")
    devices.delete(path)
    devices.send_deleted()
    assert events == [
        ("DEVICE_DELETED", {"path": f"{path}/virtio-backend"}),
        ("DEVICE_DELETED", {"path": path}),
    ]


@pytest.mark.parametrize(
    ("device_id", "class_", "text"),
    [
        ("y", "DeviceNotFound", "Device 'y' not found"),
        ("/nowhere", "DeviceNotFound", "Device '/nowhere' not found"),
        ("", "GenericError", " is not a device"),
        ("/machine/peripheral", "GenericError", "/machine/peripheral is not a device"),
        ("d/virtio-backend", "GenericError", "Bus 'virtio-bus' does not support hotplugging"),
    ],
)
def test_what_is_no_device_cannot_be_unplugged(
    devices: Devices, device_id: str, class_: str, text: str
) -> None:
    devices.add(disk("d"))
    with pytest.raises(Error) as error:
        devices.delete(device_id)
    assert (error.value.error_class, error.value.desc) == (class_, text)


# -- unplugging

GONE = [
    ("DEVICE_DELETED", {"path": "/machine/peripheral/d/virtio-backend"}),
    ("DEVICE_DELETED", {"device": "d", "path": "/machine/peripheral/d"}),
]


async def test_an_unplugged_disk_s_node_is_free_at_once(devices: Devices, graph: Graph) -> None:
    devices.add(disk("d", "n"))
    devices.delete("d")
    await graph.delete("n")
    with pytest.raises(DeviceNotFound):
        devices.delete("d")


async def test_the_events_come_by_themselves_but_not_with_the_reply(devices: Devices, events: Events) -> None:
    devices.add(disk("d"))
    devices.delete("d")
    await asyncio.sleep(0)
    assert events == []
    while len(events) < 2:
        await asyncio.sleep(0.01)
    assert events == GONE


async def test_a_reset_sends_the_events_that_are_due(devices: Devices, events: Events) -> None:
    devices.add(disk("d"))
    devices.delete("d")
    devices.reset()
    reset = ("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
    assert events == [reset, *GONE]
    devices.reset()
    assert events == [reset, *GONE, reset]


async def test_the_events_come_before_the_id_is_used_again(devices: Devices, events: Events) -> None:
    devices.add(disk("d"))
    devices.delete("d")
    devices.add(disk("d"))
    assert events == GONE


async def test_the_events_come_before_the_daemon_ends(devices: Devices, graph: Graph, events: Events) -> None:
    devices.add(disk("d"))
    devices.add(disk("e"))
    devices.delete("d")
    devices.close()
    assert events == GONE
    assert graph.backends == []


# -- PCI


def test_slots_are_taken_from_the_first_free_one_on(devices: Devices, tree: ObjectTree) -> None:
    devices.add(disk("a", addr="3"))
    for name in ("b", "c"):
        devices.add(disk(name))
    assert [tree.get(name, "addr") for name in ("a", "b", "c")] == [24, 16, 32]


@pytest.mark.parametrize(
    ("addr", "text"),
    [
        ("0x5", "PCI: slot 5 function 0 not available for virtio-blk-pci, in use by virtio-blk-pci,id=a"),
        (40, "PCI: slot 5 function 0 not available for virtio-blk-pci, in use by virtio-blk-pci,id=a"),
        (
            "5.1",
            "PCI: slot 5 function 0 already occupied by virtio-blk-pci, new func virtio-blk-pci "
            "cannot be exposed to guest.",
        ),
        ("6.0", "PCI: 6.0 indicates single function, but 6.7 is already populated."),
        ("1", "PCI: slot 1 function 0 not available for virtio-blk-pci, reserved"),
    ],
)
def test_a_taken_slot_is_refused(devices: Devices, addr: object, text: str) -> None:
    devices.add(disk("a", addr="5"))
    devices.add(disk("b", addr="6.7"))
    with pytest.raises(Error) as error:
        devices.add(disk("c", addr=addr))
    assert error.value.desc == text


def test_a_full_bus_takes_nothing_more(devices: Devices) -> None:
    for number in range(30):
        devices.add(disk(f"d{number}"))
    with pytest.raises(Error, match="^PCI: no slot/function available for virtio-blk-pci"):
        devices.add(disk("more"))


def test_root_ports_from_the_start_make_a_pci_express_machine(devices: Devices) -> None:
    for name in ("rp0", "rp1"):
        devices.add({"driver": "pcie-root-port", "id": name, "chassis": "1"}, hotplugged=False)
    with pytest.raises(Error, match=r"^Bus 'pcie\.0' does not support hotplugging$"):
        devices.add(disk("d"))
    devices.add(disk("d", bus="rp0"))
    with pytest.raises(Error) as error:
        devices.add(disk("e", bus="rp0"))
    assert error.value.desc == (
        "PCI: slot 0 function 0 already occupied by virtio-blk-pci, new func virtio-blk-pci "
        "cannot be exposed to guest."
    )
    with pytest.raises(Error, match=r"^Bus 'pcie\.0' does not support hotplugging$"):
        devices.delete("rp0")


@pytest.mark.parametrize("bus", ["pci.0", "pcie.0"])
def test_the_root_bus_answers_to_both_names(devices: Devices, bus: str) -> None:
    devices.add(disk("d", bus=bus))


# -- SCSI


@pytest.fixture
def controller(devices: Devices) -> Devices:
    devices.add({"driver": "virtio-scsi-pci", "id": "sc"})
    return devices


def place(tree: ObjectTree, name: str) -> tuple[int, int, int]:
    return (tree.get(name, "channel"), tree.get(name, "scsi-id"), tree.get(name, "lun"))


def test_a_scsi_disk_finds_the_newest_controller_and_a_free_target(
    controller: Devices, graph: Graph, tree: ObjectTree
) -> None:
    controller.add({"driver": "virtio-scsi", "id": "newer"})
    for name in ("a", "b"):
        controller.add(scsi(name))
    controller.add(scsi("c", lun=3))
    controller.add(scsi("d", **{"scsi-id": 1}))
    assert [place(tree, name) for name in "abcd"] == [(0, 0, 0), (0, 1, 0), (0, 0, 3), (0, 1, 1)]
    assert tree.get("a", "parent_bus") == f"{PERIPHERAL}/newer/virtio-backend/newer.0"
    assert [each.qdev for each in graph.disks()] == ["a", "b", "c", "d"]


def test_a_scsi_disk_without_an_id_is_named_by_its_path(controller: Devices, graph: Graph) -> None:
    controller.add({"driver": "scsi-hd", "drive": "n"})
    assert [each.qdev for each in graph.disks()] == ["/machine/peripheral-anon/device[0]"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scsi-id": 0, "lun": 0}, "lun already used by 'h'"),
        ({"scsi-id": 256}, "bad scsi device id: 256"),
        ({"channel": 1}, "bad scsi channel id: 1"),
        ({"lun": 16384}, "bad scsi device lun: 16384"),
        ({"drive": ""}, "drive property not set"),
        ({"drive": "nope"}, "Property 'scsi-hd.drive' can't find value 'nope'"),
        ({"serial": "0" * 37}, "The serial number can't be longer than 36 characters"),
        ({"serial": "0" * 37, "secs": 1}, "cyls must be between 1 and 65535"),
        ({"secs": 1, "opt_io_size": 1}, "opt_io_size must be a multiple of logical_block_size"),
        (
            {"min_io_size": 1 << 33},
            "Property scsi-hd.min_io_size doesn't take value 8589934592 (maximum: 4294967295)",
        ),
        ({"bus": "pci.0"}, "Device 'scsi-hd' can't go on PCI bus"),
        ({"addr": "1"}, "Property 'scsi-hd.addr' not found"),
    ],
)
def test_scsi_refusals(controller: Devices, options: dict[str, Any], text: str) -> None:
    controller.add(scsi("h"))
    with pytest.raises(Error) as error:
        controller.add(scsi("i", **options))
    assert error.value.desc == text


@pytest.mark.parametrize(
    ("bus", "text"),
    [
        ("/machine/peripheral/sc", "Device 'machine' not found"),
        ("///x//y", "Device 'x' not found"),
        ("nope/x", "Bus 'nope' not found"),
        ("pci.0/", "Device 'scsi-hd' can't go on PCI bus"),
        ("pci.0/nope", "Device 'nope' not found"),
        ("pci.0/sc", "Bus 'pci.0/sc' is full"),
        ("pcie.0//virtio-scsi/", "Bus 'pcie.0//virtio-scsi/' is full"),
        ("pci.0/sc/nope", "Bus 'nope' not found"),
        ("pci.0/sc/virtio-bus", "Bus 'pci.0/sc/virtio-bus' is full"),
        ("pci.0/sc/virtio-bus/virtio-scsi", "Device 'virtio-scsi' not found"),
        ("pci.0/sc/virtio-bus/virtio-scsi-device/x", "Bus 'x' not found"),
        ("pci.0/d/virtio-bus/virtio-blk-device", "Device 'virtio-blk-device' has no child bus"),
        ("pci.0/d/virtio-bus/virtio-blk-device/x", "Bus 'x' not found"),
        ("sc.0/h", "Device 'h' has no child bus"),
    ],
)
def test_a_bus_that_is_not_there(controller: Devices, bus: str, text: str) -> None:
    controller.add(disk("d"))
    controller.add(scsi("h"))
    with pytest.raises(Error) as error:
        controller.add(scsi("i", bus=bus))
    assert error.value.desc == text
    no_device = text.startswith("Device '") and text.endswith("not found")
    assert isinstance(error.value, DeviceNotFound) == no_device


@pytest.mark.parametrize(
    "bus",
    [
        *("sc.0", "sc.0/", "pci.0/sc/virtio-bus/virtio-scsi-device"),
        *("pci.0/virtio-scsi-pci/virtio-bus/virtio-scsi-device/sc.0",),
    ],
)
def test_a_bus_can_be_named_by_a_path_of_buses_and_devices(
    controller: Devices, tree: ObjectTree, bus: str
) -> None:
    controller.add(scsi("h", bus=bus))
    assert tree.get("h", "parent_bus") == f"{PERIPHERAL}/sc/virtio-backend/sc.0"


def test_a_pci_device_does_not_go_on_a_scsi_bus(controller: Devices) -> None:
    with pytest.raises(Error, match="^Device 'virtio-blk-pci' can't go on SCSI bus$"):
        controller.add(disk("d", bus="sc.0"))


async def test_a_scsi_disk_goes_at_once_and_its_event_comes_later(
    controller: Devices, graph: Graph, events: Events
) -> None:
    controller.add(scsi("h", "n"))
    controller.delete("h")
    assert events == []
    await graph.delete("n")
    controller.send_deleted()
    assert events == [("DEVICE_DELETED", {"device": "h", "path": "/machine/peripheral/h"})]


async def test_a_controller_takes_its_disks_with_it(
    controller: Devices, graph: Graph, events: Events
) -> None:
    controller.add(scsi("h", "n"))
    controller.add(scsi("i", "n2"))
    controller.delete("sc")
    assert graph.disks() == []
    controller.send_deleted()
    assert [data.get("device") for _, data in events] == ["i", "h", None, "sc"]
    with pytest.raises(Error, match="^No 'SCSI' bus found"):
        controller.add(scsi("j"))


# -- the way to the data


def test_the_data_of_a_virtio_disk_are_one_level_below_it(controller: Devices) -> None:
    controller.add(disk("d", "n"))
    controller.add(scsi("h", "n2"))
    assert controller.backend("h").node.name == "n2"
    assert controller.backend("d/virtio-backend").node.name == "n"
    assert controller.backend("/machine/peripheral/d/virtio-backend").node.name == "n"
    for name in ("d", "sc"):
        with pytest.raises(Error, match="^Device does not have a block device backend$"):
            controller.backend(name)
