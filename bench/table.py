"""Samples of several programs become medians, ratios and a Markdown table."""

from __future__ import annotations

import os
import platform
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final


@dataclass(frozen=True)
class Row:
    """One line of the table.

    :param unit: "/s", "ms" or "MiB".
    :param aim: the ratio that we aim at, in words; empty for none.
    """

    title: str
    unit: str
    aim: str = ""


_DECIMALS: Final = {"/s": 0, "ms": 0, "MiB": 1}


class Samples:
    """What was measured: for every row and program, a few values."""

    def __init__(self) -> None:
        self._values: defaultdict[tuple[Row, str], list[float]] = defaultdict(list)

    def add(self, row: Row, program: str, value: float) -> None:
        """Note one value, in the row's unit."""
        self._values[row, program].append(value)

    def median(self, row: Row, program: str) -> float | None:
        """Return the median, or None where nothing was measured."""
        values = self._values.get((row, program))
        return median(values) if values else None

    def rows(self) -> list[Row]:
        """Return the rows in the order of their first value."""
        return list(dict.fromkeys(row for row, _ in self._values))

    def markdown(self, ours: str, peer: str | None) -> str:
        """Return the table: the peer's median, ours, and ours divided by the peer's."""
        head = ["", *([peer] if peer else []), ours, *(["ratio", "aim"] if peer else [])]
        lines = [head, ["---", *["---:"] * (len(head) - 1)]]
        for row in self.rows():
            line = [f"{row.title} ({row.unit})"]
            theirs = self.median(row, peer) if peer else None
            own = self.median(row, ours)
            if peer:
                line.append(_shown(theirs, row.unit))
            line.append(_shown(own, row.unit))
            if peer:
                line += [f"{own / theirs:.2f}" if own and theirs else "", row.aim]
            lines.append(line)
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:,.{_DECIMALS[unit]}f}"


def machine(versions: Sequence[str]) -> str:
    """Name the machine and the programs in one sentence."""
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    processor = found[1] if found else platform.machine()
    return (
        f"Measured on {processor}, {os.cpu_count()} cores (one of them used), Linux {platform.release()}, "
        f"Python {platform.python_version()}; {', '.join(versions)}."
    )
