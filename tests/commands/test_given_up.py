"""Whoever asked for a key to be derived may go, or change their mind: then it is not derived to the end."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemons import PATIENCE, RunningDaemon

from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks1 import formatting
from qmpd.crypto.plan import Write
from qmpd.crypto.steps import run

#: Where a keyslot's description and its iteration count are (LUKS1 specification, figures 1 and 2).
SLOT, SLOT_BYTES = 208, 48


def tedious(path: Path, iterations: tuple[int, ...]) -> dict[str, Any]:
    """The options for a LUKS image whose first keyslots have so many iterations; no passphrase opens it."""
    spec = CipherSpec.from_options("aes-128", "xts", "plain64", None)
    header, _, plan = run(formatting(spec, "sha512", b"nobody knows", 1000, 1000))
    image = bytearray(header.payload_offset * 512 + 4096)
    for step in plan:
        if isinstance(step, Write):
            image[step.offset : step.offset + len(step.data)] = step.data
    for slot, count in enumerate(iterations):
        struct.pack_into(">II", image, SLOT + slot * SLOT_BYTES, 0x00AC71F3, count)
    path.write_bytes(image)
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "luks", "node-name": "l", "key-secret": "s", "file": file}


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "that takes too long"
        time.sleep(0.02)


def has_open(daemon: RunningDaemon, path: Path) -> bool:
    descriptors = Path(f"/proc/{daemon.process.pid}/fd")
    return any(os.path.realpath(descriptor) == str(path) for descriptor in descriptors.iterdir())


@pytest.mark.parametrize("way", ["close", "shutdown, then close"])
def test_when_a_client_goes_no_further_keyslot_is_tried_and_the_name_is_free(
    start_daemon: Callable[..., RunningDaemon], tmp_path: Path, way: str
) -> None:
    daemon = start_daemon("--object", "secret,id=s,data=pw")
    # The first takes a second or two, each of the others minutes.
    image = tmp_path / "tedious.luks"
    options = tedious(image, (3_000_000, *[900_000_000] * 7))
    with daemon.connect() as client:
        client.send(json.dumps({"execute": "blockdev-add", "arguments": options}).encode())
        wait_until(lambda: has_open(daemon, image))
        if way != "close":
            client.socket.shutdown(socket.SHUT_WR)
    wait_until(lambda: not has_open(daemon, image))
    daemon.execute("blockdev-add", {"driver": "null-co", "node-name": "l"})
    assert daemon.node_names() == {"l"}
    # A thread is free for another key.
    file = {"driver": "file", "filename": str(tmp_path / "new.luks")}
    Path(file["filename"]).touch()
    for number in range(3):
        create = {"driver": "luks", "file": file, "size": 512, "key-secret": "s", "iter-time": 1}
        assert daemon.monitor.run_job("blockdev-create", f"j{number}", create) is None
    daemon.assert_alive()


def test_a_creation_that_is_cancelled_writes_nothing(
    start_daemon: Callable[..., RunningDaemon], tmp_path: Path
) -> None:
    daemon = start_daemon("--object", "secret,id=s,data=pw")
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"before" * 100)
    daemon.execute("blockdev-add", {"driver": "file", "node-name": "f", "filename": str(disk)})
    options = {"driver": "luks", "file": "f", "size": 1 << 20, "key-secret": "s", "iter-time": 5000}
    daemon.execute("blockdev-create", {"job-id": "j", "options": options})
    daemon.execute("job-cancel", {"id": "j"})
    daemon.monitor.wait_event("JOB_STATUS_CHANGE", id="j", status="concluded")
    (info,) = daemon.execute("query-jobs")
    assert info["error"] == "Operation canceled"
    daemon.execute("blockdev-del", {"node-name": "f"})
    assert disk.read_bytes() == b"before" * 100
    daemon.assert_alive()
