from __future__ import annotations

import io
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.commands import human
from qmpd.commands.parts import Parts
from qmpd.descriptors import Allowance, ClientDescriptors, FdSets
from qmpd.export.exports import Exports
from qmpd.hotplug import Hotplug
from qmpd.jobs import Jobs
from qmpd.qapi import load, schema_directory
from qmpd.qom.devices import Devices
from qmpd.qom.tree import ObjectTree


@pytest_asyncio.fixture
async def parts() -> AsyncIterator[Parts]:
    def emit(name: str, data: dict[str, Any]) -> None:
        pass

    async def quit_nothing() -> None:
        pass

    schema = load(schema_directory())
    tree = ObjectTree(schema)
    graph = Graph(DRIVERS, secrets=tree.secret_bytes)
    for name in ("n", "n2"):
        await graph.add({"driver": "null-co", "node-name": name, "size": 1 << 20, "read-zeroes": True})
    await graph.add({"driver": "null-co", "node-name": "ro", "size": 1 << 20, "read-only": True})
    devices = Devices(graph, tree, emit)
    devices.add({"driver": "virtio-blk-pci", "id": "d", "drive": "n2"})
    exports = Exports(graph, emit)
    yield Parts(
        schema=schema,
        graph=graph,
        objects=tree,
        devices=devices,
        exports=exports,
        fdsets=FdSets(Allowance()),
        hotplug=Hotplug(graph, devices, exports),
        jobs=Jobs(emit),
        emit=emit,
        version={"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "pack"},
        chardevs=list,
        quit=quit_nothing,
        stdout=io.StringIO(),
    )
    devices.close()
    await graph.close()


async def execute(parts: Parts, line: str, client: ClientDescriptors | None = None) -> str:
    return await human.execute(parts, client or ClientDescriptors(), line)


def printed(parts: Parts) -> str:
    assert isinstance(parts.stdout, io.StringIO)
    return parts.stdout.getvalue()


TRY = 'Try "help {}" for more information\r\n'


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("", ""),
        ("   ", ""),
        ("frob", "unknown command: 'frob'\r\n"),
        ("frob  ", "unknown command: 'frob'\r\n"),
        ('"qemu-io"', "unknown command: '\"qemu-io\"'\r\n"),
        ("info frob", "unknown command: 'info frob'\r\n"),
        ("help frob", "unknown command: 'frob'\r\n"),
        ("info\nversion", "1.2.3pack\r\n"),
        ("info block-jobs", "No active jobs\r\n"),
        ("info block -x", "block: unsupported option -x\r\n" + TRY.format("info block")),
        ("qemu-io", "qemu-io: block device name expected\r\n" + TRY.format("qemu-io")),
        ("qemu-io n", "qemu-io: string expected\r\n" + TRY.format("qemu-io")),
        ('qemu-io n "length', "qemu-io: string expected\r\n" + TRY.format("qemu-io")),
        (r'qemu-io n "\q"', "qemu-io: string expected\r\n" + TRY.format("qemu-io")),
        ("qemu-io -z n length", "qemu-io: unsupported option -z\r\n" + TRY.format("qemu-io")),
        (
            'qemu-io n "length" extra',
            "qemu-io: extraneous characters at the end of line\r\n" + TRY.format("qemu-io"),
        ),
        ("qemu-io nope length", "Error: Cannot find device='' nor node-name='nope'\r\n"),
        ("qemu-io -d nope length", "Error: Device 'nope' not found\r\n"),
        ("qemu-io -d d length", "Error: Device does not have a block device backend\r\n"),
        ("qemu-io -d /objects length", "Error: /objects is not a device\r\n"),
        ('qemu-io ro "write 0 512"', "Block node is read-only\r\n"),
    ],
)
async def test_refusals_are_qemu_s(parts: Parts, line: str, answer: str) -> None:
    assert await execute(parts, line) == answer
    assert printed(parts) == ""


@pytest.mark.parametrize(
    "line",
    [
        "qemu-io n length",
        '  qemu-io   n   "length"  ',
        'qemu-io "n" "len\\\\gth"',
        "qemu-io -d d/virtio-backend length",
        "qemu-io -d /machine/peripheral/d/virtio-backend length",
    ],
)
async def test_qemu_io_prints_and_replies_nothing(parts: Parts, line: str) -> None:
    assert await execute(parts, line) == ""
    assert printed(parts) == ("" if "\\" in line else "1 MiB\n")


async def test_a_device_s_node_is_written_through_the_device_only(parts: Parts) -> None:
    conflict = await execute(parts, 'qemu-io n2 "write 0 512"')
    assert conflict == (
        "Permission conflict on node 'n2': permissions 'write' are both required by an unnamed block "
        "device (uses node 'n2' as 'root' child) and unshared by block device "
        "'/machine/peripheral/d/virtio-backend' (uses node 'n2' as 'root' child).\r\n"
    )
    assert await execute(parts, 'qemu-io -d d/virtio-backend "write -q 0 512"') == ""
    assert len(parts.graph.backends) == 1


async def test_info_block_describes_disks_and_nodes(parts: Parts) -> None:
    json = 'json:{"driver": "null-co", "size": 1048576, "read-zeroes": true}'
    n2 = parts.graph.find("n2")
    assert n2 is not None
    assert n2.filename == json
    attached = "    Attached to:      /machine/peripheral/d/virtio-backend\r\n"
    cache = "    Cache mode:       writeback\r\n"
    assert await execute(parts, "info block") == f"n2: {json} (null-co)\r\n{attached}{cache}"
    assert await execute(parts, "info block n2") == f"\r\nn2: {json} (null-co)\r\n{cache}"
    assert await execute(parts, "info block nope") == ""
    nodes = await execute(parts, "info block -n")
    assert nodes.count(cache) == 3
    assert "(null-co, read-only)" in nodes


@pytest.mark.parametrize("line", ["help", "?", "info", "help qemu-io"])
async def test_help_lines_end_as_the_monitor_ends_them(parts: Parts, line: str) -> None:
    answer = await execute(parts, line)
    assert answer.endswith("\r\n")
    assert answer.count("\n") == answer.count("\r\n") > 0


async def test_qemu_io_takes_the_plain_id_of_a_device(parts: Parts) -> None:
    assert await execute(parts, 'qemu-io d "write -P 7 0 64k"') == ""
    assert printed(parts).startswith("wrote 65536/65536 bytes at offset 0\n")


async def test_qemu_io_by_node_name_asks_the_device_above_for_permission(parts: Parts) -> None:
    answer = await execute(parts, 'qemu-io n2 "write 0 512"')
    assert answer.startswith("Permission conflict on node 'n2'")
    assert await execute(parts, 'qemu-io n2 "read 0 512"') == ""


@pytest.mark.parametrize(
    "line",
    [
        "object_add secret,id=s,data=hun,ter2",
        "object_add secret,id=s,data=hun,ter2=x",
        "object_add secret,id=s,data=hun,ter2.x=y",
        "object_add secret,id=s,data=x,hunter2",
        "object_add secret,id=s,data.hunter2=x",
        "object_add id=s,qom-type=secret,hunter2=x",
        "object_add qom-type=secret,id=hunter2 x,data=y",
        'object_add {"qom-type": "secret", "id": "s", "data": "x"hunter2"}',
        'object_add {"qom-type": "secret", "id": "s", "hunter2": "x"}',
        "object_add secret,id=s,data=hunter2!,format=base64",
        "object_add secret,id=s,data=hunter2,keyid=nope",
        "object_add secret,data=hunter2",
        "object_add data=hun,ter2",
        "object_add secret data hunter2",
        "object_add secret id=s data=hunter2",
        "objectadd secret,id=s,data=hunter2",
        "object_add/secret,id=s,data=hunter2",
        'object_del "hunter2',
    ],
)
async def test_no_answer_holds_a_piece_of_a_secret(parts: Parts, line: str) -> None:
    answer = await execute(parts, line)
    assert answer
    assert "ter2" not in answer
    assert "s" not in parts.objects.objects.children


async def test_a_secret_made_by_a_person_is_used_and_never_shown(parts: Parts) -> None:
    assert await execute(parts, "object_add secret,id=s,data=hun,,ter2 x") == ""
    assert parts.objects.secret_bytes("s").data == b"hun,ter2 x"
    for line in ("qom-get /objects/s data", "qom-list /objects/s", "info qom-tree /objects"):
        assert "ter2" not in await execute(parts, line)


@pytest.mark.parametrize(
    "line",
    ["stop", "cont", "c", "s", "system_powerdown", "info status", "info name", "info uuid", "info kvm"],
)
async def test_without_a_machine_there_is_no_run_state(parts: Parts, line: str) -> None:
    assert await execute(parts, line) == f"unknown command: '{line}'\r\n"
    usages = await execute(parts, "help") + await execute(parts, "info")
    assert f"\n{line} " not in usages
    assert "|s " not in usages


async def test_a_descriptor_comes_with_the_line_that_names_it(parts: Parts, tmp_path: Path) -> None:
    client = ClientDescriptors()
    missing = "Error: No file descriptor supplied via SCM_RIGHTS\r\n"
    assert await execute(parts, "getfd x", client) == missing
    client.passed.put(os.open(tmp_path, os.O_RDONLY))
    assert await execute(parts, "getfd x", client) == ""
    assert "x" in client.named
    assert await execute(parts, "closefd x", client) == ""
    assert await execute(parts, "closefd x", client) == "Error: File descriptor named 'x' not found\r\n"


async def test_help_tells_of_every_command_what_it_takes(parts: Parts) -> None:
    for prefix, text in (("", await execute(parts, "help")), ("info ", await execute(parts, "info"))):
        for line in text.splitlines():
            name = line.removeprefix(prefix).split()[0].split("|")[0]
            if name != "info":
                assert await execute(parts, f"help {prefix}{name}") == f"{line}\r\n"
    assert await execute(parts, "help info") == await execute(parts, "info")


async def test_device_help_lists_models_and_properties(parts: Parts) -> None:
    assert 'name "virtio-blk-pci", bus PCI, alias "virtio-blk"\r\n' in await execute(parts, "device_add help")
    assert "  share-rw=<bool> (default: off)\r\n" in await execute(parts, "device_add virtio-blk,help")
    assert await execute(parts, "device_add nope,help") == "Device 'nope' not found\r\n"
    assert "  secret\r\n" in await execute(parts, "object_add help")
    assert "  data=<string>\r\n" in await execute(parts, "object_add secret,help")


async def test_a_refused_line_changes_nothing(parts: Parts) -> None:
    before = await execute(parts, "info qom-tree /") + await execute(parts, "info block -n -v")
    for line in (
        "device_add virtio-blk-pci,drive=n,id=e,queue-size=3",
        "object_add iothread,id=i,poll-max-ns=-1",
        "nbd_server_start -a unix:/nowhere/at/all",
        "drive_del n2",
        "snapshot_blkdev n",
        "block_resize n 1M",
    ):
        assert await execute(parts, line), line
    assert await execute(parts, "info qom-tree /") + await execute(parts, "info block -n -v") == before
