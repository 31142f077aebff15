"""How much a disk may do: limits, and the leaky buckets that hold them.  Arithmetic only.

A limit has a bucket.  Every request pours into it what it has, bytes or one
request, and it leaks at the limit's rate.  A request may begin as long as the
bucket is not above its brim, however much it pours in itself; the next one
waits until that has leaked down to the brim again.  So requests longer than a
second's bytes are possible, and the mean is kept.

Without a burst the brim is what leaks in a tenth of a second.  With one it is
the burst's rate times its length in seconds, and a second bucket, which leaks
at the burst's rate, keeps a burst of several seconds from being done at once.

A limit is on reads, on writes, or on their total; a request has to wait for all that
it counts for.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from qmpd.errors import Error

_VALUE_MAX: Final = 10**15
_LENGTH_MAX: Final = (1 << 32) - 1

#: How a limit's name ends that is the seconds which a burst may last.
LENGTH: Final = "-max-length"

KINDS: Final = ("iops", "bps")
DIRECTIONS: Final = ("total", "read", "write")

#: The members of ThrottleLimits, with what they are if nobody says anything.
UNLIMITED: Final[Mapping[str, int]] = {
    f"{kind}-{direction}{suffix}": value
    for kind in KINDS
    for direction in DIRECTIONS
    for suffix, value in (("", 0), ("-max", 0), (LENGTH, 1))
} | {"iops-size": 0}

#: Of what a bucket without a burst holds below its brim, in seconds.
_SLACK: Final = 0.1


class Direction(Enum):
    """Which way the data of a request go."""

    READ = "read"
    WRITE = "write"


def merged(limits: Mapping[str, int], changes: Mapping[str, int]) -> dict[str, int]:
    """The limits with some changed.

    :raise Error: if they contradict each other then.
    """
    for name, value in changes.items():
        if name.endswith(LENGTH) and value > _LENGTH_MAX:
            raise Error(f"{name} value must be in the range [0, {_LENGTH_MAX}]")
    result = {**limits, **changes}
    check(result)
    return result


def check_made_with(name: str, value: int) -> None:
    """See that one limit is what a group may be made with by a property of that name.

    :raise Error: if not.
    """
    if value < 0:
        raise Error("Property values cannot be negative")
    if name.endswith(LENGTH) and value > _LENGTH_MAX:
        # Without the space: so QEMU writes it, here and not above.
        raise Error(f"{name} value must be in therange [0, {_LENGTH_MAX}]")


def check(limits: Mapping[str, int]) -> None:
    """See that the limits make sense together.

    :raise Error: if they don't.
    """
    for suffix in ("", "-max"):
        for kind in KINDS:
            if limits[f"{kind}-total{suffix}"] and (
                limits[f"{kind}-read{suffix}"] or limits[f"{kind}-write{suffix}"]
            ):
                raise Error("bps/iops/max total values and read/write values cannot be used at the same time")
    if limits["iops-size"] and not any(limits[f"iops-{direction}"] for direction in DIRECTIONS):
        raise Error("iops size requires an iops value to be set")
    for kind in KINDS:
        for direction in DIRECTIONS:
            name = f"{kind}-{direction}"
            _check_one(limits[name], limits[f"{name}-max"], limits[f"{name}{LENGTH}"])


def _check_one(average: int, burst: int, length: int) -> None:
    if not (0 <= average <= _VALUE_MAX and 0 <= burst <= _VALUE_MAX):
        raise Error(f"bps/iops/max values must be within [0, {_VALUE_MAX}]")
    if length == 0:
        raise Error("the burst length cannot be 0")
    # A negative one is a very large one.
    if length != 1 and not burst:
        raise Error("burst length set without burst rate")
    if burst and not 0 <= length <= _VALUE_MAX // burst:
        raise Error("burst length too high for this burst rate")
    if burst and not average:
        raise Error("bps_max/iops_max require corresponding bps/iops values")
    if burst and burst < average:
        raise Error("bps_max/iops_max cannot be lower than bps/iops")


def are_limiting(limits: Mapping[str, int]) -> bool:
    """Whether anything is limited at all."""
    return any(limits[f"{kind}-{direction}"] for kind in KINDS for direction in DIRECTIONS)


class _Bucket:
    """What keeps one limit; `average` and `burst` are by the second, `length` is in seconds."""

    __slots__ = ("_average", "_brim", "_burst", "_burst_level", "_level")

    def __init__(self, average: int, burst: int, length: int) -> None:
        self._average = average
        self._brim = burst * length if burst else average * _SLACK
        #: The rate of the second bucket; 0 if there is none.
        self._burst = burst if length > 1 else 0
        self._level = 0.0
        self._burst_level = 0.0

    def leak(self, seconds: float) -> None:
        """Let run out what does in this time."""
        self._level = max(self._level - self._average * seconds, 0.0)
        self._burst_level = max(self._burst_level - self._burst * seconds, 0.0)

    def fill(self, amount: float) -> None:
        """Pour something in."""
        self._level += amount
        if self._burst:
            self._burst_level += amount

    def delay(self) -> float:
        """In how many seconds it is down to the brim."""
        delay = max(self._level - self._brim, 0.0) / self._average
        if self._burst:
            delay = max(delay, self._burst_level / self._burst - _SLACK)
        return delay


class Throttle:
    """Says when requests may begin, so that limits are kept.

    :param limits: ThrottleLimits, checked.
    :param now: the time, in seconds; it never goes back.
    """

    def __init__(self, limits: Mapping[str, int], now: float) -> None:
        self._now = now
        self._request_size = limits["iops-size"]
        self._buckets: dict[tuple[str, Direction], list[_Bucket]] = {}
        for kind in KINDS:
            buckets = {
                direction: _Bucket(limits[name], limits[f"{name}-max"], limits[f"{name}{LENGTH}"])
                for direction in DIRECTIONS
                if limits[name := f"{kind}-{direction}"]
            }
            for direction in Direction:
                own = (buckets.get("total"), buckets.get(direction.value))
                self._buckets[kind, direction] = [bucket for bucket in own if bucket is not None]
        self._all = {id(each): each for buckets in self._buckets.values() for each in buckets}.values()

    def delay(self, direction: Direction, now: float) -> float:
        """In how many seconds the next request of this direction may begin; 0 for at once."""
        self._leak(now)
        return max(
            (bucket.delay() for kind in KINDS for bucket in self._buckets[kind, direction]), default=0.0
        )

    def begin(self, direction: Direction, size: int, now: float) -> None:
        """Count a request that begins.

        :param size: in bytes.
        """
        self._leak(now)
        for bucket in self._buckets["bps", direction]:
            bucket.fill(size)
        for bucket in self._buckets["iops", direction]:
            bucket.fill(self._requests(size))

    def _requests(self, size: int) -> float:
        """As how many requests one of this size counts; what a long one has more counts in parts too."""
        return size / self._request_size if 0 < self._request_size < size else 1

    def _leak(self, now: float) -> None:
        for bucket in self._all:
            bucket.leak(now - self._now)
        self._now = now
