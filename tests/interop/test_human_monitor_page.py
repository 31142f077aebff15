"""docs/human-monitor.md lists the commands that there are, and its examples work as they are shown there."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

import pytest
from daemons import CHECKOUT
from documents import assert_in_order, typed

from qmpd.commands.human.command import Command
from qmpd.commands.human.execute import COMMANDS
from qmpd.commands.human.info import INFO
from qmpd.qapi import load, schema_directory

PAGE: Final = (CHECKOUT / "docs" / "human-monitor.md").read_text()


def row(command: Command, prefix: str, storage_commands: frozenset[str]) -> str:
    """What the table says about a command."""
    names = command.names.split("|")
    first = f"{prefix}{names[0]} {command.takes}".strip()
    shown = " or ".join([f"`{first}`", *(f"`{prefix}{name}`" for name in names[1:])])
    everywhere = command.needs is None or command.needs in storage_commands
    return f"| {shown} | {command.does} | {'both' if everywhere else 'emulator'} |"


def test_the_page_lists_the_commands_that_there_are() -> None:
    storage_commands = frozenset(load(schema_directory()).commands)
    table = [*((each, "") for each in COMMANDS), *((each, "info ") for each in INFO)]
    expected = [row(command, prefix, storage_commands) for command, prefix in table]
    assert re.findall(r"^\| `.*$", PAGE, re.MULTILINE) == expected


@pytest.mark.peer("socat", "jq")
def test_the_commands_of_the_page_work(tmp_path: Path) -> None:
    commands = "\n".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    # The checkout that this test is part of, wherever the environment is.
    commands = commands.replace('"$PWD/.venv/bin:$PATH"', f'"{Path(sys.executable).parent}:$PATH"')
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}
    shown = typed(commands, tmp_path / "printed", environment).replace("\r\n", "\n")
    printed = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    expected = (
        *printed,
        '"first"\n',
        "disk: disk.img (raw)\n    Attached to:      /machine/peripheral/d0/virtio-backend\n",
        'dev: virtio-blk-pci, id "d0"\n',
        "Error: Property 'virtio-blk-device.drive' can't find value 'nowhere'\n",
        "block_resize device size -- ",
    )
    assert_in_order(shown, expected)
    assert shown.count("Error") == 1
