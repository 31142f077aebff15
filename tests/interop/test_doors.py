"""Devices that are served to other people's NBD clients as long as they are plugged in."""

from __future__ import annotations

import json
import resource
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from daemons import PATIENCE, CommandError, RunningDaemon

SIZE = 1 << 20


@pytest.fixture
def house(start_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """A daemon with an NBD server and doors, and the file nodes "n" and "m"."""
    daemon = start_daemon("--nbd-server", "addr.type=unix,addr.path=nbd.sock", "--device-exports", "on")
    for name in ("n", "m"):
        (daemon.directory / f"{name}.img").write_bytes(bytes(SIZE))
        daemon.execute("blockdev-add", {"driver": "file", "node-name": name, "filename": f"{name}.img"})
    return daemon


def plug(daemon: RunningDaemon, device: str, node: str) -> str:
    """Plug a device in, and return where `query-block` says that it is served."""
    daemon.execute("device_add", {"driver": "virtio-blk-pci", "id": device, "drive": node})
    (uri,) = [entry["nbd-uri"] for entry in daemon.execute("query-block") if f"/{device}/" in entry["qdev"]]
    return str(uri)


def client(daemon: RunningDaemon, *command: str) -> str:
    done = subprocess.run(
        command, cwd=daemon.directory, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def statistics(daemon: RunningDaemon) -> dict[str, Any]:
    (entry,) = daemon.execute("query-blockstats")
    return dict(entry["stats"])


@pytest.mark.peer("qemu-io")
def test_what_a_client_does_is_the_device_s(house: RunningDaemon) -> None:
    uri = plug(house, "d", "n")
    house.execute(
        "block-latency-histogram-set",
        {"id": "/machine/peripheral/d/virtio-backend", "boundaries-write": [10**12]},
    )
    with pytest.raises(CommandError, match="Permission conflict on node 'n'"):
        plug(house, "second", "n")
    client(house, "qemu-io", "-f", "raw", "-c", "write -P 7 4k 64k", "-c", "read -P 7 4k 4k", uri)
    assert (house.directory / "n.img").read_bytes()[4096:69632] == b"\7" * 65536
    counted = statistics(house)
    assert (counted["wr_operations"], counted["wr_bytes"]) == (1, 65536)
    assert counted["rd_bytes"] >= 4096
    assert counted["wr_total_time_ns"] > 0
    assert counted["wr_latency_histogram"] == {"boundaries": [10**12], "bins": [1, 0]}
    assert "rd_latency_histogram" not in counted


@pytest.mark.peer("qemu-img")
def test_a_device_is_unplugged_from_under_a_busy_client(house: RunningDaemon) -> None:
    uri = plug(house, "d", "n")
    stays = plug(house, "e", "m")
    command = ("qemu-img", "bench", "-f", "raw", "-w", "-c", "100000000", "-d", "16", uri)
    busy = subprocess.Popen(command, cwd=house.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + PATIENCE
        while not house.execute("query-blockstats")[0]["stats"]["wr_operations"]:
            assert time.monotonic() < deadline, "the client does nothing"
        house.execute("device_del", {"id": "d"})
        house.execute("blockdev-del", {"node-name": "n"})
        house.monitor.wait_event("DEVICE_DELETED", device="d")
        _, said = busy.communicate(timeout=PATIENCE)
        assert busy.returncode != 0, "the client should have noticed"
        assert b"failed" in said.lower()
    finally:
        busy.kill()
        busy.wait()
    client(house, "qemu-img", "compare", "-f", "raw", "-F", "raw", stays, "m.img")
    house.assert_alive()


@pytest.mark.peer("nbdinfo")
def test_a_listing_names_devices_and_exports(house: RunningDaemon) -> None:
    plug(house, "d", "n")
    house.execute("block-export-add", {"type": "nbd", "id": "x", "node-name": "m", "name": "export"})
    listed = json.loads(client(house, "nbdinfo", "--list", "--json", "nbd+unix:///?socket=nbd.sock"))
    assert {entry["export-name"]: entry["is_read_only"] for entry in listed["exports"]} == {
        "d": False,
        "export": True,
    }
    assert [entry["id"] for entry in house.execute("query-block-exports")] == ["x"]


def test_quit_tells_of_the_end_of_exports_before_it_answers(house: RunningDaemon) -> None:
    for name in ("first", "second"):
        house.execute("block-export-add", {"type": "nbd", "id": name, "node-name": "n", "name": name})
    house.execute("quit")
    deleted = [
        event["data"]["id"] for event in house.monitor.events if event["event"] == "BLOCK_EXPORT_DELETED"
    ]
    assert deleted == ["second", "first"]


@pytest.mark.peer("qemu-io")
def test_a_client_whose_write_the_storage_refuses_is_told_and_so_is_the_monitor(house: RunningDaemon) -> None:
    uri = plug(house, "d", "n")
    resource.prlimit(house.process.pid, resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
    command = ("qemu-io", "-f", "raw", "-c", f"write {SIZE // 2} 4k", "-c", "write 0 4k", uri)
    done = subprocess.run(command, cwd=house.directory, capture_output=True, text=True, check=False)
    assert "write failed" in done.stdout + done.stderr
    assert "wrote 4096/4096 bytes at offset 0" in done.stdout
    assert house.monitor.wait_event("BLOCK_IO_ERROR")["data"] == {
        "device": "",
        "node-name": "n",
        "qom-path": "/machine/peripheral/d/virtio-backend",
        "operation": "write",
        "action": "report",
        "nospace": False,
        "reason": "File too large",
    }
    counted = statistics(house)
    assert (counted["failed_wr_operations"], counted["wr_operations"]) == (1, 1)
