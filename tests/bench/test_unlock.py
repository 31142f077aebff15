"""The benchmark of unlocking runs, and measures what it says."""

from __future__ import annotations

import subprocess
import sys

import pytest
from daemons import CHECKOUT


@pytest.mark.timeout(300)  # seconds on an idle machine; it starts some thirty processes
@pytest.mark.peer("qemu-storage-daemon", "qemu-img", "qemu-io", "cryptsetup")
def test_every_program_unlocks_every_header() -> None:
    """With headers that take no time; the table has a figure for everybody."""
    ended = subprocess.run(
        [sys.executable, "-m", "bench", "--only", "unlock", "--quick"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    rows = [
        line.split("|")[1:-1] for line in ended.stdout.splitlines() if line.startswith("| unlocking, sha")
    ]
    assert len(rows) == 4
    luks2 = [
        line.split("|")[1:-1] for line in ended.stdout.splitlines() if line.startswith("| unlocking, LUKS2, ")
    ]
    # argon2id with one lane and, where there are several processors, with more; and pbkdf2.
    assert len(luks2) in (2, 3)
    for row in luks2:
        assert all(figure.strip() for figure in (row[3], row[5])), row
    for row in rows:
        daemon, qemu_io, cryptsetup, _, ours = row[1:6]
        assert all(figure.strip() for figure in (daemon, qemu_io, cryptsetup, ours)), row
