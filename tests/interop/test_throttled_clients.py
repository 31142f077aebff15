"""Other people's NBD clients on a disk with limits: the time that they take is what the limits say.

The time is the test's own: it goes on while requests wait, whatever the machine's speed is.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from fake_clock import FakeClock

from qmpd.block.drivers import DRIVERS
from qmpd.block.graph import Graph
from qmpd.block.throttle_groups import ThrottleGroups
from qmpd.block.throttling import UNLIMITED
from qmpd.export.exports import Exports
from qmpd.hotplug import Hotplug
from qmpd.qapi import load, schema_directory
from qmpd.qom.devices import Devices
from qmpd.qom.tree import ObjectTree

SIZE = 8 << 20
RATE = 1 << 20
#: The longest piece that a client's request is read in, in bytes: the last one has begun and need not wait.
PIECE = 1 << 20


async def copied(directory: Path, *command: str) -> tuple[float, int]:
    """How many of the test's seconds a command takes to read a limited disk, and how many bytes."""
    (directory / "disk.img").write_bytes(os.urandom(SIZE))
    clock = FakeClock()
    tree = ObjectTree(load(schema_directory()))
    tree.throttle_groups = ThrottleGroups(clock)
    graph = Graph(DRIVERS, secrets=tree.secret_bytes)
    devices = Devices(graph, tree, lambda name, data: None)
    exports = Exports(graph, lambda name, data: None)
    hotplug = Hotplug(graph, devices, exports)
    hotplug.doors = True
    path = str(directory / "disk.img")
    await graph.add({"driver": "file", "node-name": "n", "filename": path})
    await exports.start_nbd_server({"type": "unix", "path": str(directory / "nbd.sock")})
    hotplug.add({"driver": "virtio-blk-pci", "id": "d", "drive": "n"})
    disk = devices.disk("d")
    assert disk is not None
    disk.set_limits(tree.throttle_groups, {**UNLIMITED, "bps-read": RATE}, "d")
    began = clock.now
    uri = f"nbd+unix:///d?socket={directory}/nbd.sock"
    process = await asyncio.create_subprocess_exec(*command, uri, "copy.img", cwd=directory)
    ended = asyncio.create_task(process.wait())
    while not ended.done():
        if (delay := clock.next) is not None:
            clock.advance(delay)
        await asyncio.sleep(0.001)
    assert await ended == 0
    assert (directory / "copy.img").read_bytes() == (directory / "disk.img").read_bytes()
    took, count = clock.now - began, disk.accounting.counters["rd"].bytes
    await exports.close()
    devices.close()
    await graph.close()
    return took, count


@pytest.mark.peer("nbdcopy")
async def test_a_copy_with_many_requests_at_once_takes_as_long_as_the_limit_says(tmp_path: Path) -> None:
    took, count = await copied(tmp_path, "nbdcopy")
    assert count == SIZE
    assert (SIZE - PIECE) / RATE - 0.2 <= took <= SIZE / RATE


@pytest.mark.peer("qemu-img")
async def test_qemu_img_takes_as_long_as_the_limit_says(tmp_path: Path) -> None:
    took, count = await copied(tmp_path, "qemu-img", "convert", "-f", "raw", "-O", "raw")
    assert count >= SIZE
    assert (count - 2 * PIECE) / RATE - 0.2 <= took <= count / RATE
