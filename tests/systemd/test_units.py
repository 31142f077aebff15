"""The systemd units: systemd takes them, and they stay as locked up as they are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from daemons import CHECKOUT

UNITS = CHECKOUT / "contrib" / "systemd"

analyze = pytest.mark.peer("systemd-analyze")


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as they would be installed, but with a program that is there whatever is installed."""
    for name in ("qmpd.service", "qmpd.socket"):
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/bin/qmpd ", f"{shutil.which('true')} "))
    return tmp_path


@analyze
def test_systemd_finds_nothing_wrong(units: Path) -> None:
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", units / "qmpd.service", units / "qmpd.socket"],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in result.stderr.splitlines() if "qmpd" in line]
    assert (result.returncode, ours) == (0, [])


@analyze
def test_the_service_is_hardened(units: Path) -> None:
    # In tenths; systemd's own judgement, "OK" up to 4.0.
    result = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", units / "qmpd.service"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def settings(name: str) -> set[str]:
    return {line for line in (UNITS / name).read_text().splitlines() if "=" in line and line[0] != "#"}


def test_the_service_keeps_what_was_promised() -> None:
    assert settings("qmpd.service") >= {
        "Type=notify",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "PrivateTmp=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
        "SystemCallFilter=@system-service",
        "CapabilityBoundingSet=",
        "MemoryDenyWriteExecute=yes",
        "LimitCORE=0",
        "LimitMEMLOCK=8M",
        "MemorySwapMax=0",
        "UMask=0077",
    }
    # It would hide from qmpd which user a client is.
    assert "PrivateUsers=yes" not in settings("qmpd.service")


def test_the_socket_is_for_a_group() -> None:
    assert settings("qmpd.socket") >= {"SocketMode=0660", "SocketGroup=qmpd"}
