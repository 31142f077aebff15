"""Samples of several programs become medians, ratios and Markdown tables.

Values are kept by round.  A ratio is computed within each round, where both
programs met the same state of the machine, and the median is of those ratios:
it need not be the ratio of the medians.
"""

from __future__ import annotations

import os
import platform
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Aim:
    """What qmpd should reach in a row.

    :param bound: with *peer*, the least ratio to it; without, what the value itself must stay below.
    """

    bound: float
    peer: str | None = None

    def met(self, value: float) -> bool:
        """Tell whether *value*, a ratio or a value of the row, is good enough."""
        return value < self.bound if self.peer is None else value >= self.bound

    def words(self) -> str:
        """Return the aim without the peer's name, as it stands beside the figure."""
        return f"< {self.bound:g}" if self.peer is None else f"≥ {self.bound:g}"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    :param unit: what the values are in, as it is shown behind the title.
    """

    title: str
    unit: str
    aims: tuple[Aim, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """An aim beside what was measured: a ratio if the aim has a peer, else a value of the row."""

    row: Row
    aim: Aim
    measured: float

    @property
    def met(self) -> bool:
        """Whether the aim is met."""
        return self.aim.met(self.measured)


class Samples:
    """What was measured: for every row and program one value a round, or none where it failed."""

    def __init__(self) -> None:
        self._values: defaultdict[tuple[Row, str], dict[int, float]] = defaultdict(dict)
        self._round = 0

    def next_round(self) -> None:
        """Let what is added from here on belong to another round."""
        self._round += 1

    def add(self, row: Row, program: str, value: float) -> None:
        """Note this round's value, in the row's unit."""
        self._values[row, program][self._round] = value

    def values(self, row: Row, program: str) -> list[float]:
        """Return the values of all rounds."""
        return list(self._values.get((row, program), {}).values())

    def median(self, row: Row, program: str) -> float | None:
        """Return the median, or None where nothing was measured."""
        values = self.values(row, program)
        return median(values) if values else None

    def ratios(self, row: Row, program: str, peer: str) -> list[float]:
        """Return *program*'s value divided by *peer*'s, for every round that has both."""
        own, theirs = (self._values.get((row, name), {}) for name in (program, peer))
        return [value / theirs[number] for number, value in own.items() if theirs.get(number)]

    def ratio(self, row: Row, program: str, peer: str) -> float | None:
        """Return the median of the ratios, or None where there are none."""
        ratios = self.ratios(row, program, peer)
        return median(ratios) if ratios else None

    def rows(self) -> list[Row]:
        """Return the rows in the order of their first value."""
        return list(dict.fromkeys(row for row, _ in self._values))

    def verdicts(self, ours: str) -> list[Verdict]:
        """Return every aim of which there is something to say."""
        verdicts = []
        for row in self.rows():
            for aim in row.aims:
                measured = self.median(row, ours) if aim.peer is None else self.ratio(row, ours, aim.peer)
                if measured is not None:
                    verdicts.append(Verdict(row, aim, measured))
        return verdicts

    def markdown(self, ours: str, peers: Sequence[str], *, spread: bool = False) -> str:
        """Return the table: each program's median, then the ratios of ours to each peer's.

        A figure with an aim has it in brackets behind it, with a mark.  A row of other programs is left out.

        :param spread: show the least and the greatest value behind each median.
        """
        programs = [*peers, ours]
        lines = [["", *programs, *(f"{ours} / {peer}" for peer in peers)]]
        for row in self.rows():
            if not any(self.values(row, program) for program in programs):
                continue
            verdicts = {verdict.aim.peer: verdict for verdict in self.verdicts(ours) if verdict.row == row}
            line = [f"{row.title} ({row.unit})"]
            for program in programs:
                cell = self._cell(row, program, spread)
                line.append(cell + (_marked(verdicts.get(None)) if program == ours else ""))
            for peer in peers:
                ratio = self.ratio(row, ours, peer)
                line.append("" if ratio is None else f"{ratio:.2f}" + _marked(verdicts.get(peer)))
            lines.append(line)
        return markdown_table(lines)

    def _cell(self, row: Row, program: str, spread: bool) -> str:
        values = self.values(row, program)
        if not values:
            return ""
        shown = figure(median(values))
        if not spread or len(values) == 1:
            return shown
        return f"{shown} ({figure(min(values))} … {figure(max(values))})"


def aims_table(groups: Iterable[tuple[str, Samples]], ours: str) -> str:
    """Return every aim of *groups* (a title and its samples) with what was measured, and how many are met."""
    lines = [["", "", "aim", "measured", "met"]]
    met = 0
    for title, samples in groups:
        for verdict in samples.verdicts(ours):
            aim, measured = verdict.aim, verdict.measured
            of = "" if aim.peer is None else f" of {aim.peer}"
            unit = f" {verdict.row.unit}" if aim.peer is None else ""
            shown = figure(measured) if aim.peer is None else f"{measured:.2f}"
            mark = "✓" if verdict.met else "✗"
            lines.append([title, verdict.row.title, f"{aim.words()}{of}{unit}", f"{shown}{of}{unit}", mark])
            met += verdict.met
    return f"{met} of {len(lines) - 1} aims are met.\n\n{markdown_table(lines)}"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return *lines*, the first of which is the head, with all columns but the first to the right."""
    head, *rest = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rest))


def figure(value: float) -> str:
    """Return *value* with about three digits that mean something, and all of those before the point."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f}"


def _marked(verdict: Verdict | None) -> str:
    return "" if verdict is None else f" ({verdict.aim.words()} {'✓' if verdict.met else '✗'})"


def machine(versions: Sequence[str], *, used: str) -> str:
    """Name the machine and the programs in one sentence.

    :param used: which of the cores took part, in words.
    """
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    processor = found[1] if found else platform.machine()
    return (
        f"Measured on {processor}, {os.cpu_count()} cores ({used}), Linux {platform.release()}, "
        f"Python {platform.python_version()}; {', '.join(versions)}."
    )
