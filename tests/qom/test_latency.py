from __future__ import annotations

import pytest

from qmpd.errors import Error
from qmpd.qom.latency import TimedAccounting


def bins(accounting: TimedAccounting) -> dict[str, list[int]]:
    return {kind: histogram.bins for kind, histogram in accounting.histograms.items()}


def test_a_time_on_a_boundary_counts_above_it() -> None:
    accounting = TimedAccounting()
    accounting.set_histograms("d", [10, 20], {})
    for time in (0, 9, 10, 19, 20, 10**12):
        accounting.done("rd", 512, time)
    accounting.failed("rd", 15)
    accounting.done("unmap", 512, 1)
    assert bins(accounting) == {"rd": [2, 3, 2], "wr": [0] * 3, "zone_append": [0] * 3, "flush": [0] * 3}
    assert accounting.counters["rd"].operations == 6


def test_setting_boundaries_forgets_what_was_counted_of_that_kind_only() -> None:
    accounting = TimedAccounting()
    accounting.set_histograms("d", None, {"rd": [10], "wr": [10]})
    accounting.done("rd", 1, 1)
    accounting.done("wr", 1, 1)
    accounting.set_histograms("d", None, {"wr": []})
    assert bins(accounting) == {"rd": [1, 0], "wr": [0]}
    accounting.set_histograms("d", None, {})
    assert bins(accounting) == {}


@pytest.mark.parametrize(
    ("common", "own", "word"),
    [
        ([20, 10], {}, "read"),
        ([0, 10], {}, "read"),
        ([10, 10], {}, "read"),
        ([10], {"wr": [2, 1]}, "write"),
        (None, {"rd": [10], "flush": [7, 3]}, "flush"),
        ([10], {"zone_append": [7, 3]}, "append write"),
    ],
)
def test_boundaries_ascend_from_above_zero_or_nothing_changes(
    common: list[int] | None, own: dict[str, list[int]], word: str
) -> None:
    accounting = TimedAccounting()
    accounting.set_histograms("d", [5], {})
    with pytest.raises(Error, match=f"^Device 'd' set {word} boundaries fail$"):
        accounting.set_histograms("d", common, own)
    assert all(histogram.boundaries == [5] for histogram in accounting.histograms.values())


def test_a_negative_boundary_is_a_very_large_one() -> None:
    accounting = TimedAccounting()
    accounting.set_histograms("d", [-5], {})
    assert accounting.histograms["rd"].boundaries == [(1 << 64) - 5]
