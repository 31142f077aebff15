"""Block devices of the host beside qemu-storage-daemon: the same replies, the same bytes, the same locks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import QMPD, CommandError, RunningDaemon
from loop_devices import loop_device

StartDaemon = Callable[..., RunningDaemon]

SIZE: Final = 8 << 20
PASSPHRASE: Final = "abc123"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The file behind the device."""
    path = tmp_path / "image"
    path.write_bytes(bytes(range(256)) * (SIZE >> 8))
    return path


@pytest.fixture
def device(image: Path) -> Iterator[Path]:
    with loop_device(image) as path:
        yield path


def said(daemon: RunningDaemon, command: str, arguments: dict[str, Any]) -> Any:
    """What a daemon answers, success or not."""
    try:
        return daemon.execute(command, arguments)
    except CommandError as error:
        return {"class": error.error_class, "desc": error.desc}


def add(name: str, filename: Path, **options: Any) -> tuple[str, dict[str, Any]]:
    return "blockdev-add", {"driver": "host_device", "node-name": name, "filename": str(filename), **options}


@pytest.mark.peer("qemu-storage-daemon")
def test_replies_are_those_of_qemu(
    tmp_path: Path,
    image: Path,
    device: Path,
    daemon: RunningDaemon,
    start_storage_daemon: StartDaemon,
) -> None:
    peer = start_storage_daemon()
    conversation = [
        ("blockdev-add", {"driver": "file", "node-name": "f", "filename": str(device)}),
        add("h", image),
        add("h", tmp_path),
        add("h", tmp_path, **{"read-only": True}),
        add("h", tmp_path / "missing"),
        add("h", Path("/dev/tty"), **{"read-only": True}),
        ("blockdev-add", {"driver": "host_device", "node-name": "h", "filename": ""}),
        add("h", device),
        add("ro", device, **{"read-only": True}),
        add("auto", device, **{"auto-read-only": True, "discard": "unmap"}),
        add("direct", device, cache={"direct": True}),
        add("locked", device, locking="on"),
        add("native", device, aio="native"),
        add("zero", Path("/dev/zero"), **{"read-only": True}),
        ("query-named-block-nodes", {"flat": True}),
        ("block_resize", {"node-name": "h", "size": SIZE // 2}),
        ("block_resize", {"node-name": "h", "size": SIZE * 2}),
        ("block_resize", {"node-name": "h", "size": SIZE}),
        ("blockdev-add", {"driver": "raw", "node-name": "r", "file": "h"}),
        ("block_resize", {"node-name": "r", "size": SIZE // 2}),
        ("block_resize", {"node-name": "r", "size": SIZE * 2}),
        ("query-named-block-nodes", {"flat": True}),
        ("blockdev-reopen", {"options": [add("ro", device)[1]]}),
        ("blockdev-reopen", {"options": [add("ro", device, **{"read-only": True})[1]]}),
        ("blockdev-create", {"job-id": "j", "options": {"driver": "host_device"}}),
        ("blockdev-add", {"driver": "qcow2", "node-name": "q", "file": "h"}),
        ("blockdev-del", {"node-name": "h"}),
    ]
    for command, arguments in conversation:
        theirs, ours = said(peer, command, arguments), said(daemon, command, arguments)
        assert ours == theirs, (command, arguments)


@pytest.mark.peer("qemu-storage-daemon", "qemu-img")
def test_a_device_named_in_an_image_is_opened_as_one(
    tmp_path: Path, device: Path, daemon: RunningDaemon, start_storage_daemon: StartDaemon
) -> None:
    peer = start_storage_daemon()
    overlay = tmp_path / "overlay.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(device), "-F", "raw", str(overlay)], check=True
    )
    drivers = []
    for each in (peer, daemon):
        file = {"driver": "file", "filename": str(overlay)}
        each.execute("blockdev-add", {"driver": "qcow2", "node-name": "q", "read-only": True, "file": file})
        drivers.append([node["drv"] for node in each.execute("query-named-block-nodes", {"flat": True})])
    assert drivers[0] == drivers[1]
    assert "host_device" in drivers[1]


@pytest.mark.peer("cryptsetup", "nbdcopy", "qemu-img", "qemu-io")
def test_header_and_payload_on_two_volumes(tmp_path: Path, image: Path, device: Path) -> None:
    """cryptsetup formats, qmpd writes, QEMU reads: header and payload are block devices."""
    header = tmp_path / "header"
    header.write_bytes(bytes(4 << 20))
    key = tmp_path / "key"
    key.write_text(PASSPHRASE)
    with loop_device(header) as header_device:
        quickly = ("--type", "luks1", "--pbkdf-force-iterations", "1000")
        volumes = ("--header", str(header_device), "--key-file", str(key), str(device))
        subprocess.run(["cryptsetup", "luksFormat", "--batch-mode", *quickly, *volumes], check=True)
        daemon = RunningDaemon(
            QMPD,
            (
                *("--object", f"secret,id=pw,file={key}"),
                *("--blockdev", f"host_device,node-name=header,filename={header_device}"),
                *("--blockdev", f"host_device,node-name=payload,filename={device},discard=unmap"),
                *("--blockdev", "luks,node-name=disk,file=payload,header=header,key-secret=pw"),
            ),
            tmp_path,
        )
        try:
            with pytest.raises(CommandError, match="Cannot grow device files"):
                daemon.execute("block_resize", {"node-name": "disk", "size": SIZE * 2})
            assert "wrote 65536/65536" in daemon.qemu_io("disk", "write -P 0x5a 1M 64k")
            assert daemon.quit() == 0
        finally:
            daemon.kill()
        target = f"driver=luks,key-secret=pw,file.driver=host_device,file.filename={device}"
        target += f",header.driver=host_device,header.filename={header_device}"
        secret = ("--object", f"secret,id=pw,file={key}")
        shown = subprocess.run(
            ["qemu-io", *secret, "--image-opts", target, "-c", "read -P 0x5a 1M 64k"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert "Pattern verification failed" not in shown
        assert "read 65536/65536" in shown


@pytest.mark.peer("qemu-io", "qemu-img")
def test_processes_keep_each_other_out_of_a_device(
    tmp_path: Path, device: Path, daemon: RunningDaemon
) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(device), "4M"], check=True)
    daemon.execute(*add("h", device))
    daemon.execute("blockdev-add", {"driver": "qcow2", "node-name": "q", "file": "h"})
    write = ["qemu-io", "--image-opts", f"driver=qcow2,file.driver=host_device,file.filename={device}"]
    write += ["-c", "write 0 512"]
    refused = subprocess.run(write, check=False, capture_output=True, text=True)
    assert 'Failed to get "write" lock' in refused.stderr
    daemon.execute("blockdev-del", {"node-name": "q"})
    subprocess.run(write, check=True, capture_output=True)


def test_discarded_space_is_given_back(image: Path, device: Path, daemon: RunningDaemon) -> None:
    daemon.execute(*add("h", device, discard="unmap"))
    occupied = image.stat().st_blocks
    daemon.qemu_io("h", "discard 1M 4M")
    assert image.stat().st_blocks < occupied
    assert image.read_bytes()[1 << 20 : 5 << 20] == bytes(4 << 20)
    daemon.qemu_io("h", "write -z -u 6M 1M")
    daemon.qemu_io("h", "flush")
    assert image.read_bytes()[6 << 20 : 7 << 20] == bytes(1 << 20)
    (stats,) = daemon.execute("query-blockstats", {"query-nodes": True})
    assert stats["driver-specific"] == {
        "driver": "host_device",
        "discard-nb-ok": 1,
        "discard-nb-failed": 0,
        "discard-bytes-ok": 4 << 20,
    }


def test_a_device_that_has_grown_is_noticed_when_it_is_resized(
    image: Path, device: Path, daemon: RunningDaemon
) -> None:
    daemon.execute(*add("h", device))
    with image.open("r+b") as file:
        file.truncate(2 * SIZE)
    subprocess.run(["losetup", "--set-capacity", str(device)], check=True)
    daemon.execute("block_resize", {"node-name": "h", "size": 2 * SIZE})
    (node,) = daemon.execute("query-named-block-nodes")
    assert node["image"]["virtual-size"] == 2 * SIZE
    with pytest.raises(CommandError, match="^block_resize: Cannot grow device files$"):
        daemon.execute("block_resize", {"node-name": "h", "size": 2 * SIZE + 512})
