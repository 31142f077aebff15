"""The benchmark of sector sizes runs, and has a figure for each."""

from __future__ import annotations

import subprocess
import sys

import pytest
from daemons import CHECKOUT


@pytest.mark.timeout(120)  # seconds on an idle machine
@pytest.mark.peer("nbdcopy")
def test_both_sector_sizes_are_measured_by_themselves_and_through_a_daemon() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "bench", "--only", "sectors", "--quick"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ended.returncode == 0, ended.stderr
    rows = [line.split("|")[1:-1] for line in ended.stdout.splitlines() if "(MB/s)" in line]
    titles = [row[0].split(",")[0].strip() for row in rows]
    assert titles.count("nbdcopy") == 2
    assert sum(title.startswith(("decrypt", "encrypt")) for title in titles) == 8
    for _, small, large, ratio in rows:
        assert all(figure.strip() for figure in (small, large, ratio))
