"""The benchmark of starts runs, and has a figure for each program."""

from __future__ import annotations

import subprocess
import sys

import pytest
from daemons import CHECKOUT


@pytest.mark.peer("qemu-storage-daemon", "qemu-system-x86_64")
def test_every_program_greets_and_every_emulator_answers_libvirt() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "bench", "--only", "start", "--quick"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    tables = ended.stdout.split("\n\n")
    daemons, emulators = (table for table in tables if table.startswith("|  | qemu-"))
    for table, titles in (
        (daemons, ["start to greeting (ms)"]),
        (emulators, ["start to greeting (ms)", "start to the end of libvirt's probing (ms)"]),
    ):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
        assert [row[0] for row in rows] == titles
        for row in rows:
            assert len(row) == 4, row
            assert all(row), row
