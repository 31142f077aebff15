"""A daemon that is told to end does so, whatever it is doing."""

from __future__ import annotations

import json
import signal
import struct
from pathlib import Path

import pytest

from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks1 import format_plan
from qmpd.crypto.plan import Write


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A LUKS image whose only keyslot takes minutes to try."""
    spec = CipherSpec.from_options("aes-128", "xts", "plain64", None)
    header, _, plan = format_plan(spec, "sha512", b"pw", 1000, 1000)
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
