"""The hot-plug sequence and its reverse, as each of the usual clients plays it.

All of them send the same commands: those of the transcripts that people
copy from, where ``num-queues`` is a string and ``scsi`` is "off".
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import PATIENCE, RunningDaemon
from qemu.qmp import QMPClient
from qemu.qmp.qmp_shell import QMPShell

Command = tuple[str, dict[str, Any]]

SEQUENCE: Final[tuple[Command, ...]] = (
    ("object-add", {"qom-type": "secret", "id": "sec0", "data": "abc123"}),
    ("blockdev-add", {"node-name": "libvirt-1-storage", "driver": "file", "filename": "test-header.img"}),
    ("blockdev-add", {"node-name": "libvirt-1-format", "driver": "raw", "file": "libvirt-1-storage"}),
    ("blockdev-add", {"node-name": "libvirt-2-storage", "driver": "file", "filename": "test-payload.raw"}),
    (
        "blockdev-add",
        {
            "node-name": "libvirt-3-format",
            "driver": "luks",
            "file": "libvirt-2-storage",
            "header": "libvirt-1-format",
            "key-secret": "sec0",
        },
    ),
    (
        "device_add",
        {
            "driver": "virtio-blk-pci",
            "num-queues": "1",
            "scsi": "off",
            "drive": "libvirt-3-format",
            "id": "virtio-disk1",
        },
    ),
)

REVERSE: Final[tuple[Command, ...]] = (
    ("device_del", {"id": "virtio-disk1"}),
    ("blockdev-del", {"node-name": "libvirt-3-format"}),
    ("blockdev-del", {"node-name": "libvirt-2-storage"}),
    ("blockdev-del", {"node-name": "libvirt-1-format"}),
    ("blockdev-del", {"node-name": "libvirt-1-storage"}),
    ("object-del", {"id": "sec0"}),
)

NODES: Final = {"libvirt-1-storage", "libvirt-1-format", "libvirt-2-storage", "libvirt-3-format"}


@pytest.fixture
def disk(tmp_path: Path, start_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """A daemon that runs where a detached header and its payload are, and holds neither."""
    (tmp_path / "test-header.img").touch()
    with (tmp_path / "test-payload.raw").open("wb") as payload:
        payload.truncate(8 << 20)
    maker = start_daemon("--object", "secret,id=sec0,data=abc123", name="maker")
    maker.execute("blockdev-add", {"node-name": "header", "driver": "file", "filename": "test-header.img"})
    options = {"driver": "luks", "header": "header", "size": 0, "key-secret": "sec0", "iter-time": 1}
    assert maker.monitor.run_job("blockdev-create", "create", options) is None
    assert maker.quit() == 0
    return start_daemon()


def assert_disk_works(daemon: RunningDaemon) -> None:
    """Write through the hot-plugged device, read back, and find no plaintext in the payload."""
    assert daemon.node_names() == NODES
    (entry,) = daemon.execute("query-block")
    assert entry["inserted"]["node-name"] == "libvirt-3-format"
    device = "-d /machine/peripheral/virtio-disk1/virtio-backend"
    assert "wrote 65536/65536 bytes at offset 4096" in daemon.qemu_io(device, "write -P 0x5a 4k 64k")
    answer = daemon.qemu_io(device, "read -P 0x5a 4k 64k")
    assert "read 65536/65536 bytes at offset 4096" in answer
    assert "verification failed" not in answer
    assert "verification failed" in daemon.qemu_io(device, "read -P 0x5b 4k 64k")
    payload = (daemon.directory / "test-payload.raw").read_bytes()
    assert b"LUKS" not in payload[:4096]
    assert b"\x5a" * 16 not in payload


def assert_nothing_left(daemon: RunningDaemon) -> None:
    assert daemon.node_names() == set()
    assert daemon.execute("query-block") == []
    objects = daemon.execute("qom-list", {"path": "/objects"})
    assert "sec0" not in [entry["name"] for entry in objects]
    daemon.assert_alive()


async def test_the_qemu_qmp_library_plays_the_sequence(disk: RunningDaemon) -> None:
    client = QMPClient("test")
    await client.connect(str(disk.socket))
    try:
        for command, arguments in SEQUENCE:
            assert await client.execute(command, arguments) == {}
        assert_disk_works(disk)
        with client.listener("DEVICE_DELETED") as deleted:
            for command, arguments in REVERSE:
                assert await client.execute(command, arguments) == {}
            events = [await deleted.get(), await deleted.get()]
    finally:
        await client.disconnect()
    backend = "/machine/peripheral/virtio-disk1/virtio-backend"
    assert [event["data"] for event in events] == [
        {"path": backend},
        {"device": "virtio-disk1", "path": "/machine/peripheral/virtio-disk1"},
    ]
    assert_nothing_left(disk)


def shell_line(command: str, arguments: Mapping[str, Any]) -> str:
    """Spell a command as qmp-shell wants it."""
    return " ".join([command, *(f"{name}={value}" for name, value in arguments.items())])


def play_in_shell(daemon: RunningDaemon, commands: tuple[Command, ...]) -> list[dict[str, Any]]:
    """Type *commands* into qmp-shell and return the replies that it shows."""
    shell = Path(sys.executable).with_name("qmp-shell")
    typed = "".join(shell_line(command, arguments) + "\n" for command, arguments in commands)
    shown = subprocess.run(
        [shell, str(daemon.socket)],
        input=typed,
        env={**os.environ, "HOME": str(daemon.directory)},  # where it keeps its history
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "Connected to QEMU" in shown.stdout
    prompts = [part.strip() for part in shown.stdout.split("(QEMU)")[1:]]
    return [json.loads(part) for part in prompts if part]


def test_qmp_shell_plays_the_sequence(disk: RunningDaemon) -> None:
    assert play_in_shell(disk, SEQUENCE) == [{"return": {}}] * len(SEQUENCE)
    assert_disk_works(disk)
    assert play_in_shell(disk, REVERSE) == [{"return": {}}] * len(REVERSE)
    assert_nothing_left(disk)


def test_qmp_shell_completes_command_names(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tab in qmp-shell offers what query-commands names."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shell = QMPShell(str(daemon.socket))
    shell.connect()
    try:
        offered: list[str] = []
        while (match := shell._completer.complete("blockdev-", len(offered))) is not None:
            offered.append(match)
        assert sorted(offered) == [
            "blockdev-add",
            "blockdev-amend",
            "blockdev-create",
            "blockdev-del",
            "blockdev-reopen",
            "blockdev-snapshot",
            "blockdev-snapshot-delete-internal-sync",
            "blockdev-snapshot-internal-sync",
            "blockdev-snapshot-sync",
        ]
        assert shell._completer.complete("device_a", 0) == "device_add"
    finally:
        shell.close()


def replies_in(stream: str) -> list[dict[str, Any]]:
    """Return the replies, neither greeting nor events, of what a monitor said."""
    messages = [json.loads(line) for line in stream.splitlines()]
    return [message for message in messages if "return" in message or "error" in message]


@pytest.mark.peer("socat")
def test_socat_plays_the_sequence_in_multi_line_json(disk: RunningDaemon) -> None:
    """Pretty-printed as people paste it, several commands in one go, and the answers in order."""
    socat = shutil.which("socat")
    assert socat is not None

    def play(commands: tuple[Command, ...]) -> list[dict[str, Any]]:
        pasted = [{"execute": "qmp_capabilities"}]
        pasted += [{"execute": command, "arguments": arguments} for command, arguments in commands]
        shown = subprocess.run(
            [socat, "-t", "10", "-", f"UNIX-CONNECT:{disk.socket}"],
            input="\n".join(json.dumps(command, indent=4) for command in pasted),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        return replies_in(shown.stdout)

    assert play(SEQUENCE) == [{"return": {}}] * (1 + len(SEQUENCE))
    assert_disk_works(disk)
    assert play(REVERSE) == [{"return": {}}] * (1 + len(REVERSE))
    assert_nothing_left(disk)
