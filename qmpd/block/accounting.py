"""Counting what goes through a backend: operations, bytes, time, by kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter_ns

KINDS = ("rd", "wr", "flush", "unmap", "zone_append")


@dataclass
class Counter:
    """One kind of request."""

    operations: int = 0
    bytes: int = 0
    failed: int = 0
    invalid: int = 0
    merged: int = 0
    #: Time spent, in nanoseconds.
    time: int = 0


@dataclass
class Accounting:
    """The counters of one backend, and which requests they take in.

    :param count_invalid: invalid requests are counted as operations as well.
    :param count_failed: so are failed ones.
    """

    count_invalid: bool = True
    count_failed: bool = True
    #: When the last request ended, on `perf_counter_ns`; 0 if there was none.
    last: int = 0
    counters: dict[str, Counter] = field(default_factory=lambda: {kind: Counter() for kind in KINDS})

    def done(self, kind: str, size: int, nanoseconds: int) -> None:
        """Count a request that went well.

        :param size: bytes that it moved, or that it was about.
        """
        counter = self.counters[kind]
        counter.operations += 1
        counter.bytes += size
        counter.time += nanoseconds
        self.last = perf_counter_ns()

    def failed(self, kind: str, nanoseconds: int) -> None:
        """Count a request that the storage refused."""
        counter = self.counters[kind]
        counter.failed += 1
        if self.count_failed:
            counter.time += nanoseconds
            self.last = perf_counter_ns()
