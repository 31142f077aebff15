"""A daemon that is told to end does so, whatever it is doing."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path

import pytest
from daemons import CHECKOUT, PATIENCE, QMPD

from qmpd.cli.process import until_read
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks1 import formatting
from qmpd.crypto.plan import Write
from qmpd.crypto.steps import run


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A LUKS image whose only keyslot takes minutes to try."""
    spec = CipherSpec.from_options("aes-128", "xts", "plain64", None)
    header, _, plan = run(formatting(spec, "sha512", b"pw", 1000, 1000))
    image = bytearray(header.payload_offset * 512 + 4096)
    for step in plan:
        if isinstance(step, Write):
            image[step.offset : step.offset + len(step.data)] = step.data
    # The iteration count of keyslot 0 (LUKS1 specification, figures 1 and 2).
    struct.pack_into(">I", image, 208 + 4, 900_000_000)
    path = tmp_path / "endless.luks"
    path.write_bytes(image)
    return path


@pytest.mark.parametrize("way", ["quit", "signal"])
def test_a_key_that_is_being_derived_does_not_hold_the_end_up(start_daemon, endless: Path, way: str) -> None:
    daemon = start_daemon("--object", "secret,id=s,data=pw")
    with daemon.connect() as busy, daemon.connect() as other:
        options = {
            "driver": "luks",
            "node-name": "l",
            "key-secret": "s",
            "file": {"driver": "file", "filename": str(endless)},
        }
        busy.send(json.dumps({"execute": "blockdev-add", "arguments": options}).encode())
        other.execute("query-version")
        if way == "quit":
            other.execute("quit")
        else:
            daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(20) == 0
    assert not daemon.socket.exists()


def test_a_failing_start_is_explained_before_the_monitor_closes(tmp_path: Path) -> None:
    # Whoever started the daemon is connected already, and looks for the reason when the connection ends.
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "monitor"))
    listener.listen()
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(PATIENCE)
    client.connect(str(tmp_path / "monitor"))
    fd = listener.fileno()
    chardev = ("--chardev", f"socket,id=m,fd={fd},server=on,wait=off", "--monitor", "chardev=m")
    with (tmp_path / "stderr").open("wb") as stderr:
        daemon = subprocess.Popen(
            [*QMPD, *chardev, "--blockdev", "driver=file,node-name=n,filename=/missing"],
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            stderr=stderr,
            pass_fds=[fd],
        )
    listener.close()
    with client:
        try:
            while client.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        said = (tmp_path / "stderr").read_text()
    assert daemon.wait(PATIENCE) == 1
    assert "No such file or directory" in said


def test_what_is_said_of_a_failing_start_has_been_read_when_the_monitor_closes() -> None:
    # libvirt's log is written by a process of its own, which reads the daemon's standard error.
    reader, writer = os.pipe()
    os.write(writer, b"the reason")
    log = threading.Timer(0.05, lambda: os.read(reader, 100))
    log.start()
    until_read(writer, PATIENCE)
    assert not select.select([reader], [], [], 0)[0]
    log.join()
    os.close(reader)
    os.close(writer)
    until_read(writer, 10 * PATIENCE)  # longer than a test may take


def test_nobody_waits_until_a_file_is_read(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+b", buffering=0) as log:
        log.write(b"the reason")
        log.seek(0)
        until_read(log.fileno(), 10 * PATIENCE)


def test_a_reason_that_nobody_reads_is_not_waited_for_for_ever() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"the reason")
    until_read(writer, 0.02)
    os.close(reader)
    os.close(writer)
