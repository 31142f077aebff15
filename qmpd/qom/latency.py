"""How long a disk's requests take, as histograms.

A histogram counts requests in bins between boundaries, and lasts until it is
set anew.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from qmpd.block.accounting import Accounting
from qmpd.errors import Error

#: The kinds of requests, as messages call them.
_WORDS: Final[Mapping[str, str]] = {
    "rd": "read",
    "wr": "write",
    "zone_append": "append write",
    "flush": "flush",
}


class Histogram:
    """Counts of times in nanoseconds.

    :param boundaries: ascending; a time that is one of them counts above it.
    """

    def __init__(self, boundaries: Sequence[int]) -> None:
        self.boundaries = list(boundaries)
        self.bins = [0] * (len(self.boundaries) + 1)

    def count(self, nanoseconds: int) -> None:
        """Count one request."""
        self.bins[bisect_right(self.boundaries, nanoseconds)] += 1


@dataclass
class TimedAccounting(Accounting):
    """Counters with histograms of some kinds of requests."""

    #: By kind of request.
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def done(self, kind: str, size: int, nanoseconds: int) -> None:
        """Count a request that went well."""
        super().done(kind, size, nanoseconds)
        if kind in self.histograms:
            self.histograms[kind].count(nanoseconds)

    def failed(self, kind: str, nanoseconds: int) -> None:
        """Count a request that the storage refused; it took its time too."""
        super().failed(kind, nanoseconds)
        if kind in self.histograms:
            self.histograms[kind].count(nanoseconds)

    def set_histograms(
        self, device_id: str, common: Sequence[int] | None, own: Mapping[str, Sequence[int]]
    ) -> None:
        """Begin to count, as `block-latency-histogram-set` does.

        :param device_id: how messages name the disk.
        :param common: the boundaries of the kinds that have none in `own`; None to leave those alone.
        :param own: the boundaries by kind.  Nothing at all ends the counting.
        :raise Error: if boundaries are not ascending, or the first is 0; then nothing has changed.
        """
        if common is None and not own:
            self.histograms.clear()
            return
        wanted: dict[str, Histogram] = {}
        for kind, word in _WORDS.items():
            boundaries = own.get(kind, common)
            if boundaries is None:
                continue
            # QMP takes a negative number for an unsigned one, and so it is a very large one.
            unsigned = [boundary % (1 << 64) for boundary in boundaries]
            if any(before >= after for before, after in pairwise([0, *unsigned])):
                raise Error(f"Device '{device_id}' set {word} boundaries fail")
            wanted[kind] = Histogram(unsigned)
        self.histograms.update(wanted)
