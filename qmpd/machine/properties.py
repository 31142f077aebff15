"""The machine's properties in the object tree: what the command line says, and what there is not."""

from __future__ import annotations

from typing import Any

from qmpd.machine import types
from qmpd.machine.config import MachineConfig


def properties(config: MachineConfig) -> dict[str, Any]:
    """The values of the machine's properties by name."""
    return {
        "kernel": "",
        "initrd": "",
        "append": "",
        "memory": {"size": types.find(config.type).memory_of(config.memory)},
        "graphics": False,
        "usb": False,
    }
