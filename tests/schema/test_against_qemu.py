"""The schema says of each command what QEMU's own introspection says.

A client that was written for QEMU finds the same arguments here, under the
same names, optional where they are optional there, and of the same kind in
JSON; in replies it finds nothing that QEMU would not send.  What QEMU has and
qmpd has not is in one table, with the reason, and an entry that is not needed
any more fails.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from qmpd.qapi import load, schema_directory

Entity = Mapping[str, Any]

LATER: Final = "comes with the driver, object or job that it belongs to"
NO_GUEST: Final = "about a guest's processors, memory or devices, of which there are none"
NOT_MEANT: Final = "tuning without an effect here"
NO_IMAGE_CHAIN: Final = "about backing images, snapshots and bitmaps, which no driver of ours has"
NO_LIMITS: Final = "limits of a disk, which come with the throttle driver"

#: What a type of QEMU's has and ours has not, by a path from a command: ``command(argument.member)``
#: for what is taken, ``command -> member`` for what is answered; values of enumerations after ``=``.
NOT_HERE: Final[Mapping[str, str]] = json.loads((Path(__file__).parent / "not_here.json").read_text())

#: What ours has and QEMU's has not.
ONLY_HERE: Final[Mapping[str, str]] = {
    "blockdev-add(driver=gluks)": "the driver's name in early proposals",
    "blockdev-add(gluks)": "the driver's name in early proposals",
    "blockdev-add(luks.header-file)": "the member's name in early proposals",
}
