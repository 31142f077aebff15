"""What becomes of samples: medians, ratios within a round, aims and their marks."""

from __future__ import annotations

import pytest

from bench.table import Aim, Row, Samples, aims_table, figure

RATE = Row("requests", "/s", (Aim(2, "peer"),))
LATENCY = Row("latency", "ms", (Aim(5),))


def samples(row: Row, **rounds: list[float | None]) -> Samples:
    """Return samples of *row*: for each program a value a round, None where it failed."""
    taken = Samples()
    for values in zip(*rounds.values(), strict=True):
        taken.next_round()
        for program, value in zip(rounds, values, strict=True):
            if value is not None:
                taken.add(row, program, value)
    return taken


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    """Its rounds are 4, 0.5 and 3: the ratio of the medians would be 30 / 20."""
    taken = samples(RATE, ours=[40, 10, 30], peer=[10, 20, 10])
    assert taken.ratios(RATE, "ours", "peer") == [4, 0.5, 3]
    assert taken.ratio(RATE, "ours", "peer") == 3
    assert taken.median(RATE, "ours") == 30


def test_a_round_in_which_one_failed_has_no_ratio_and_shifts_no_other() -> None:
    taken = samples(RATE, ours=[40, None, 30], peer=[10, 20, None])
    assert taken.ratios(RATE, "ours", "peer") == [4]
    assert taken.values(RATE, "ours") == [40, 30]


def test_what_was_never_measured_has_neither_median_nor_ratio_nor_verdict() -> None:
    taken = samples(RATE, peer=[1, 2])
    assert taken.median(RATE, "ours") is None
    assert taken.ratio(RATE, "ours", "peer") is None
    assert taken.verdicts("ours") == []
    assert "|  |" in taken.markdown("ours", ["peer"]).splitlines()[2]


def test_a_peer_that_did_nothing_at_all_gives_no_ratio() -> None:
    assert samples(RATE, ours=[1], peer=[0]).ratio(RATE, "ours", "peer") is None


@pytest.mark.parametrize(
    ("aim", "enough", "not_enough"),
    [(Aim(2, "peer"), 2.0, 1.999), (Aim(5), 4.999, 5.0)],
)
def test_a_ratio_meets_its_aim_from_the_bound_on_and_a_value_below_it(
    aim: Aim, enough: float, not_enough: float
) -> None:
    assert aim.met(enough)
    assert not aim.met(not_enough)


def test_the_table_has_an_aim_and_its_mark_behind_the_figure_that_it_is_about() -> None:
    met = samples(RATE, ours=[40, 50], peer=[10, 10]).markdown("ours", ["peer"], spread=True)
    assert met.splitlines() == [
        "|  | peer | ours | ours / peer |",
        "| --- | ---: | ---: | ---: |",
        "| requests (/s) | 10.0 (10.0 … 10.0) | 45.0 (40.0 … 50.0) | 4.50 (≥ 2 ✓) |",
    ]
    missed = samples(LATENCY, ours=[7], peer=[0.25]).markdown("ours", ["peer"])
    assert missed.splitlines()[-1] == "| latency (ms) | 0.25 | 7.00 (< 5 ✗) | 28.00 |"


def test_the_aims_have_a_line_each_and_are_counted() -> None:
    table = aims_table(
        [("plain", samples(LATENCY, ours=[1])), ("luks", samples(RATE, ours=[3], peer=[2]))], "ours"
    )
    assert table.splitlines()[0] == "1 of 2 aims are met."
    assert table.splitlines()[-2:] == [
        "| plain | latency | < 5 ms | 1.00 ms | ✓ |",
        "| luks | requests | ≥ 2 of peer | 1.50 of peer | ✗ |",
    ]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.1234, "0.12"), (12.34, "12.3"), (123.4, "123"), (65432.1, "65,432")]
)
def test_a_figure_shows_as_many_decimals_as_mean_something(value: float, shown: str) -> None:
    assert figure(value) == shown
