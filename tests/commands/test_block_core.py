from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.commands.block_core import block_info
from qmpd.qapi import load, schema_directory
from qmpd.qom.devices import Devices
from qmpd.qom.tree import ObjectTree


@pytest_asyncio.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph(DRIVERS, secrets=ObjectTree(load(schema_directory())).secret_bytes)
    await graph.add({"driver": "null-co", "node-name": "n", "size": 1 << 20})
    yield graph
    await graph.close()


@pytest.fixture
def devices(graph: Graph) -> Devices:
    devices = Devices(graph, ObjectTree(load(schema_directory())), lambda name, data: None)
    devices.add({"driver": "virtio-scsi-pci", "id": "sc"})
    return devices


def info(devices: Devices, graph: Graph, **options: Any) -> dict[str, Any]:
    devices.add({"driver": "scsi-hd", "id": "d", "drive": "n", **options})
    (disk,) = graph.disks()
    return block_info(disk)


def test_a_disk_is_described_by_its_device(devices: Devices, graph: Graph) -> None:
    described = info(devices, graph)
    assert described.pop("inserted")["cache"] == {"writeback": True, "direct": False, "no-flush": False}
    assert described == {
        "io-status": "ok",
        "device": "",
        "locked": False,
        "removable": False,
        "qdev": "d",
        "type": "unknown",
    }


def test_a_removable_disk_has_a_closed_tray(devices: Devices, graph: Graph) -> None:
    described = info(devices, graph, removable=True)
    assert (described["removable"], described["tray_open"]) == (True, False)


def test_an_empty_id_is_no_name(devices: Devices, graph: Graph) -> None:
    assert "qdev" not in info(devices, graph, id="")


@pytest.mark.parametrize(("setting", "writeback"), [("on", True), ("auto", True), ("off", False)])
def test_the_cache_is_the_guest_s(devices: Devices, graph: Graph, setting: str, writeback: bool) -> None:
    described = info(devices, graph, **{"write-cache": setting})
    assert described["inserted"]["cache"]["writeback"] is writeback


@pytest.mark.parametrize("driver", ["scsi-hd", "virtio-blk-pci"])
@pytest.mark.parametrize("rerror", ["auto", "report", "ignore", "enospc", "stop"])
@pytest.mark.parametrize("werror", ["auto", "report", "ignore", "enospc", "stop"])
def test_there_is_an_io_status_where_an_error_may_stop_the_machine(
    devices: Devices, graph: Graph, driver: str, werror: str, rerror: str
) -> None:
    described = info(devices, graph, driver=driver, werror=werror, rerror=rerror)
    expected = rerror == "stop" or werror not in ("report", "ignore")
    assert described.get("io-status") == ("ok" if expected else None)
