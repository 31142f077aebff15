"""What a daemon has loaded when it greets its first client."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import pytest
from daemons import CHECKOUT

#: What takes long to import, and is of no use before a client asks for something.
LATER: Final = frozenset(
    {"argon2", "bench", "cryptography", "jsonschema", "numpy", "qemu.qmp", "qmpd.commands.human", "zstandard"}
)

START: Final = """
import asyncio, sys
import qmpd.cli.serve
from qmpd.cli.options import Option
from qmpd.cli.start import Start
from qmpd.daemon import Daemon
from qmpd.machine.config import MachineConfig

async def start(machine):
    daemon = Daemon(machine=machine)
    await Start(daemon).run([Option("qmp", "unix:{path},server=on,wait=off", "-qmp")])
    await daemon.close()

asyncio.run(start({machine}))
print(*sys.modules)
"""


@pytest.mark.parametrize("machine", ["None", "MachineConfig(type='none')"], ids=["daemon", "emulator"])
def test_nothing_is_imported_before_it_is_wanted(
    machine: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("s") / "qmp"
    loaded = subprocess.run(
        [sys.executable, "-c", START.format(machine=machine, path=path)],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "qmpd.commands.table" in loaded
    assert not LATER & set(loaded)
