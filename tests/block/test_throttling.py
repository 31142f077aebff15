"""Limits are kept by arithmetic: when the next request may begin, for every kind of limit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.block.throttling import UNLIMITED, Direction, Throttle, are_limiting, check
from qmpd.errors import Error

READ, WRITE = Direction.READ, Direction.WRITE


def limits(**changes: int) -> dict[str, int]:
    result = {**UNLIMITED, **{name.replace("_", "-"): value for name, value in changes.items()}}
    check(result)
    return result


class Series:
    """Requests one after the other, each as soon as it may begin."""

    def __init__(self, **changes: int) -> None:
        self.now = 50.0
        self.throttle = Throttle(limits(**changes), self.now)

    def wait(self, size: int, direction: Direction = READ) -> float:
        """How long a request has to wait; it begins then."""
        delay = self.throttle.delay(direction, self.now)
        self.now += delay
        assert self.throttle.delay(direction, self.now) == pytest.approx(0, abs=1e-9)
        self.throttle.begin(direction, size, self.now)
        return round(delay, 6)


# What QEMU 10.0 was seen to do with the same requests is what stands in these tests.


def test_a_tenth_of_a_second_s_bytes_may_be_above_the_mean() -> None:
    series = Series(bps_total=1000)
    assert [series.wait(1000) for _ in range(4)] == [0, 0.9, 1, 1]
    series = Series(bps_total=10000)
    assert [series.wait(1000) for _ in range(4)] == [0, 0, 0.1, 0.1]


def test_a_request_that_is_longer_than_a_second_s_bytes_begins_and_the_next_one_pays() -> None:
    series = Series(bps_total=1000)
    assert [series.wait(5000), series.wait(1)] == [0, 4.9]


def test_requests_are_counted_whatever_their_length() -> None:
    series = Series(iops_total=10)
    assert [series.wait(size) for size in (1, 1 << 20, 512, 4096)] == [0, 0, 0.1, 0.1]


def test_a_long_request_counts_as_several_also_in_parts_and_a_short_one_as_one() -> None:
    series = Series(iops_total=5, iops_size=4096)
    assert [series.wait(size) for size in (6144, 4096, 8192, 512, 512)] == [0, 0.2, 0.2, 0.4, 0.2]


def test_what_is_taken_for_a_very_large_size_divides_nothing() -> None:
    series = Series(iops_total=10, iops_size=-5)
    assert [series.wait(1 << 30) for _ in range(3)] == [0, 0, 0.1]


def test_a_limit_on_reads_is_none_on_writes() -> None:
    series = Series(bps_read=1000)
    waits = [series.wait(1000, each) for each in (READ, WRITE, WRITE, READ)]
    assert waits == [0, 0, 0, 0.9]


def test_reads_and_writes_have_limits_of_their_own() -> None:
    series = Series(bps_read=1000, bps_write=500)
    assert [series.wait(1000, each) for each in (READ, WRITE)] == [0, 0]
    assert series.throttle.delay(READ, series.now) == pytest.approx(0.9)
    assert series.throttle.delay(WRITE, series.now) == pytest.approx(1.9)


def test_a_limit_on_the_total_is_one_on_both_together() -> None:
    series = Series(iops_total=10)
    assert [series.wait(1, each) for each in (READ, WRITE, READ, WRITE)] == [0, 0, 0.1, 0.1]


def test_the_tightest_limit_counts() -> None:
    series = Series(bps_total=1000, iops_total=2)
    assert [series.wait(10) for _ in range(3)] == [0, 0.4, 0.5]
    assert [series.wait(3000), series.wait(1)] == [0.5, 2.9]


def test_a_burst_is_done_at_once_if_it_may_last_a_second() -> None:
    series = Series(bps_total=100, bps_total_max=300)
    assert [series.wait(100) for _ in range(7)] == [0, 0, 0, 0, 1, 1, 1]


def test_a_longer_burst_goes_at_its_rate_and_then_at_the_mean() -> None:
    series = Series(bps_total=100, bps_total_max=200, bps_total_max_length=2)
    assert [series.wait(100) for _ in range(10)] == [0, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6, 1]


def test_who_has_been_quiet_may_have_a_burst_again() -> None:
    series = Series(bps_total=100, bps_total_max=300)
    for _ in range(5):
        series.wait(100)
    series.now += 100
    assert [series.wait(100) for _ in range(5)] == [0, 0, 0, 0, 1]


@given(
    mean=st.integers(1, 10**9),
    factor=st.integers(0, 20),
    length=st.integers(1, 60),
    sizes=st.lists(st.integers(1, 1 << 25), min_size=1, max_size=50),
)
def test_what_begins_is_never_more_than_the_burst_and_the_mean_allow(
    mean: int, factor: int, length: int, sizes: list[int]
) -> None:
    burst = mean * factor
    changes = {"bps_total_max": burst, "bps_total_max_length": length} if burst else {}
    series = Series(bps_total=mean, **changes)
    began = series.now
    brim = burst * length if burst else mean / 10
    done = 0
    for size in sizes:
        series.wait(size)
        # What had begun before this one.
        assert done <= brim + mean * (series.now - began) * (1 + 1e-9) + 1e-3
        done += size


@pytest.mark.parametrize(
    ("changes", "limiting"),
    [({}, False), ({"bps-write": 1}, True), ({"iops-total": 1}, True), ({"bps-total-max-length": 1}, False)],
)
def test_nothing_limits_but_a_mean(changes: dict[str, Any], limiting: bool) -> None:
    assert are_limiting({**UNLIMITED, **changes}) is limiting


def test_a_negative_burst_length_is_a_very_large_one() -> None:
    with pytest.raises(Error, match="^burst length set without burst rate$"):
        limits(bps_total=5, bps_total_max_length=-1)
    with pytest.raises(Error, match="^burst length too high for this burst rate$"):
        limits(bps_total=5, bps_total_max=10, bps_total_max_length=-1)
