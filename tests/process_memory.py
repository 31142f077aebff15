"""What is in a process's memory: for tests of what must not be there.

All mappings are read through ``/proc/PID/mem``, which for a process that writes no core dumps is root's
alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

_HEAD: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)")
_PIECE: Final = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where something was found.

    :param what: its name.
    :param address: in the process.
    :param mapping: the mapping's name, if it has one.
    :param flags: the mapping's, as in proc_pid_smaps(5): "lo" is locked, "dd" is not in a core dump.
    """

    what: str
    address: int
    mapping: str
    flags: frozenset[str]

    @property
    def in_key_memory(self) -> bool:
        """Whether it is locked, in no core dump, and would be empty in a forked process."""
        return self.flags >= {"lo", "dd", "wf"}


def needs_root() -> None:
    """Skip a test where other processes' memory can't be read."""
    if os.geteuid() != 0:
        pytest.skip("the memory of a process that writes no core dumps is root's to read")


def search(pid: int, wanted: Mapping[str, bytes]) -> list[Place]:
    """Find bytes in all memory that a process may write.

    :param wanted: what to look for, by names.
    """
    longest = max(map(len, wanted.values()))
    found = set()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for start, end, mapping, flags in _mappings(pid):
            for piece in range(start, end, _PIECE):
                memory.seek(piece)
                try:
                    # What begins here may end in the next piece.
                    data = memory.read(min(_PIECE + longest, end - piece))
                except OSError:
                    continue  # a device's, or the kernel's
                for name, value in wanted.items():
                    at = data.find(value)
                    while at >= 0:
                        found.add(Place(name, piece + at, mapping, flags))
                        at = data.find(value, at + 1)
    return sorted(found, key=lambda place: (place.what, place.address))


def _mappings(pid: int) -> list[tuple[int, int, str, frozenset[str]]]:
    mappings = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if head := _HEAD.fullmatch(line):
            start, end, mode, name = int(head[1], 16), int(head[2], 16), head[3], head[4]
        elif line.startswith("Rss:"):
            is_there = line.split()[1] != "0"
        elif line.startswith("VmFlags:") and mode.startswith("rw") and is_there:
            mappings.append((start, end, name, frozenset(line.split()[1:])))
    return mappings


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found
