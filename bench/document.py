"""The results in the documents: tables between two comments, which a run replaces.

<!-- bench: NAME -->
...
<!-- bench: end -->
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.data_path import Measured, Settings
from bench.servers import QMPD
from bench.table import aims_table

_CHECKOUT: Final = Path(__file__).parent.parent
README: Final = _CHECKOUT / "README.md"
BENCHMARKS: Final = _CHECKOUT / "docs" / "benchmarks.md"
PERFORMANCE: Final = _CHECKOUT / "docs" / "performance.md"
PLOT: Final = _CHECKOUT / "docs" / "data-path.png"


def replaced(text: str, name: str, content: str) -> str:
    """Return *text* with *content* between the comments of *name*.

    :raise ValueError: the comments are not there, exactly once.
    """
    pattern = re.compile(rf"(<!-- bench: {re.escape(name)} -->\n).*?(\n<!-- bench: end -->)", re.DOTALL)
    written, count = pattern.subn(lambda found: f"{found[1]}\n{content}\n{found[2]}", text)
    if count != 1:
        raise ValueError(f"{count} places are called '{name}' in the document, not one")
    return written


def _write(path: Path, name: str, content: str) -> None:
    path.write_text(replaced(path.read_text(), name, content))


def write_monitor(table: str) -> None:
    """Put the monitor's table into the README."""
    _write(README, "monitor", table)


def write_start(tables: str) -> None:
    """Put the tables of starts into docs/benchmarks.md."""
    _write(BENCHMARKS, "start", tables)


def write_libvirt(table: str) -> None:
    """Put the table of libvirt's emulators into docs/benchmarks.md."""
    _write(BENCHMARKS, "libvirt", table)


def write_unlock(table: str) -> None:
    """Put the table of unlocking into docs/benchmarks.md."""
    _write(BENCHMARKS, "unlock", table)


def write_sectors(table: str) -> None:
    """Put the table of sector sizes into docs/benchmarks.md."""
    _write(BENCHMARKS, "sectors", table)


def write_data_path(tables: str, aims: str) -> None:
    """Put the data path's tables into docs/benchmarks.md and the aims into docs/performance.md."""
    _write(BENCHMARKS, "data path", tables)
    _write(PERFORMANCE, "aims", aims)


def data_path_tables(
    results: Sequence[Measured], peers: Sequence[str], settings: Settings, machine: str
) -> str:
    """Return a table for every chain, what went wrong, and how it was measured."""
    parts = []
    for result in results:
        parts.append(f"### {result.chain.title}\n\n{result.samples.markdown(QMPD, peers, spread=True)}")
        if result.remarks:
            remarks = "\n".join(f"- {remark}" for remark in result.remarks)
            parts.append(f"What failed:\n\n{remarks}")
    rounds = "1 round" if settings.rounds == 1 else f"{settings.rounds} rounds"
    disk = f"A disk of {settings.size >> 20} MiB"
    parts.append(f"{machine} {disk}, {rounds}, {settings.seconds:g} s for each figure of fio.")
    return "\n\n".join(parts)


def aims(results: Sequence[Measured]) -> str:
    """Return the table of aims over all chains."""
    return aims_table([(result.chain.title, result.samples) for result in results], QMPD)
