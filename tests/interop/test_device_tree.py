"""What `info qtree` shows of a device is what QEMU shows of it."""

from __future__ import annotations

import re
import sys
from typing import Any, Final

import pytest
from daemons import CHECKOUT
from harness import load_qmpdiff

qmpdiff = load_qmpdiff()

PLUGGED: Final = (
    {"driver": "virtio-blk-pci", "id": "d0", "drive": "a", "addr": "0x5", "serial": "x,y", "num-queues": 3},
    {"driver": "virtio-scsi-pci", "id": "sc", "disable-legacy": "on"},
    {"driver": "scsi-hd", "id": "hd", "bus": "sc.0", "drive": "b", "removable": True, "write-cache": "off"},
    {"driver": "scsi-hd", "bus": "sc.0", "drive": "c", "share-rw": True, "lun": 3},
    {"driver": "virtio-blk-pci", "drive": "d", "discard_granularity": 65536, "physical_block_size": 4096},
)

#: Seconds for one step of a daemon.
PATIENCE: Final = 20


def step(command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"cmd": {"execute": command, "arguments": arguments}}


def devices(text: str) -> dict[str, set[str]]:
    """The lines about each device, without those about its buses, by where it is."""
    found: dict[str, set[str]] = {}
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        indent, shown = len(line) - len(line.lstrip()), line.strip()
        above = [each for each in above if each[0] < indent]
        if re.match("(bus|dev): ", shown):
            name = f"{above[-1][1]} > {shown}" if above else shown
            while name in found:
                # Devices without an id are told apart by which one comes first.
                name += "'"
            above.append((indent, name))
            found[name] = set()
        elif above:
            found[above[-1][1]].add(shown)
    return found


@pytest.mark.peer("qemu-system-x86_64")
def test_every_line_about_a_device_is_one_of_qemu_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    steps = [
        *(step("blockdev-add", {"driver": "null-co", "node-name": name, "size": 5 << 20}) for name in "abcd"),
        *(step("device_add", options) for options in PLUGGED),
        step("human-monitor-command", {"command-line": "info qtree"}),
    ]
    case = qmpdiff.Case(name="qtree", persona="system", machine="pc", steps=steps)
    sides = {
        "QEMU": ("qemu-system-x86_64", "system"),
        "qmpd": (f"{sys.executable} -m qmpd.cli.system", "system"),
    }
    results = qmpdiff.run_case(case, sides, PATIENCE, keep=False)
    theirs, ours = (devices(results[side][-1][-1]["return"]) for side in ("QEMU", "qmpd"))
    plugged = [name for name in ours if re.search("dev: (virtio|scsi)[^>]*$", name)]
    assert len(plugged) == len(PLUGGED) + 3, "virtio devices have two halves"
    for name in plugged:
        assert name in theirs
        assert ours[name] <= theirs[name]
    assert sum(len(ours[name]) for name in plugged) > 150
