"""The data path's ratios as a plot: what each program does beside qemu-storage-daemon.

The only module that needs matplotlib (requirements-bench.txt).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from matplotlib.figure import Figure

from bench.data_path import Measured
from bench.servers import QMPD, STORAGE_DAEMON
from bench.table import Row, Samples

#: What is better when it is more: the plot has these rows alone.
RATES: Final = ("MB/s", "IOPS")

COLOURS: Final = {"nbdkit": "#9aa5b1", QMPD: "#1f6feb"}
AIM: Final = "#d1242f"


def draw(results: Sequence[Measured], peers: Sequence[str], file: Path) -> None:
    """Write a PNG with a column of bars for every chain, if qemu-storage-daemon is among *peers*."""
    shown = [result for result in results if _rows(result.samples)]
    if STORAGE_DAEMON not in peers or not shown:
        print("Nothing is drawn: that takes figures of qemu-storage-daemon.")
        return
    programs = [*(peer for peer in peers if peer != STORAGE_DAEMON), QMPD]
    height = 1.6 + 0.3 * max(len(_rows(result.samples)) for result in shown)
    figure = Figure(figsize=(6.2 * len(shown), height), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _panel(axes, result, programs)
    named: dict[str, Any] = {}  # one legend for all panels, of which not all have aims
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=len(named), fontsize=9)
    figure.suptitle(f"Throughput as a ratio to {STORAGE_DAEMON}'s in the same round (log scale)", fontsize=11)
    figure.savefig(file, format="png", dpi=110)


def _rows(samples: Samples) -> list[Row]:
    return [row for row in samples.rows() if row.unit in RATES]


def _panel(axes: Any, result: Measured, programs: Sequence[str]) -> None:
    """Draw a chain: medians as bars from 1, least and greatest ratio as whiskers, aims as strokes."""
    rows = _rows(result.samples)
    thick = 0.8 / len(programs)
    for index, program in enumerate(programs):
        places, lengths, below, above = [], [], [], []
        for place, row in enumerate(rows):
            ratios = result.samples.ratios(row, program, STORAGE_DAEMON)
            if ratios:
                middle = median(ratios)
                places.append(place - 0.4 + (index + 0.5) * thick)
                lengths.append(middle)
                below.append(middle - min(ratios))
                above.append(max(ratios) - middle)
        axes.barh(
            places,
            [length - 1 for length in lengths],
            left=1,
            height=thick,
            xerr=(below, above),
            error_kw={"lw": 0.8, "ecolor": "#57606a"},
            color=COLOURS[program],
            label=program,
        )
    aims = [
        (aim.bound, place) for place, row in enumerate(rows) for aim in row.aims if aim.peer == STORAGE_DAEMON
    ]
    if aims:
        axes.vlines(
            [bound for bound, _ in aims],
            [place - 0.45 for _, place in aims],
            [place + 0.45 for _, place in aims],
            color=AIM,
            lw=1.4,
            label=f"aim of {QMPD}",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), [row.title for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(result.chain.title, fontsize=10)
    axes.grid(axis="x", lw=0.4)
