"""Where guests' data may not go: the clusters that hold the image's own tables.

Before anything is written to a cluster of the image file, `MetadataMap.find` is asked for
a table that is there.  In a sound image there never is one; in a damaged one this
keeps the damage from growing.

The tables' clusters are kept as one sorted array, because an image may have millions of them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: What is looked for: its name among the options, and its name in messages; in QEMU's order.
SECTIONS: Final[Mapping[str, str]] = {
    "main-header": "qcow2_header",
    "active-l1": "active L1 table",
    "active-l2": "active L2 table",
    "refcount-table": "refcount table",
    "refcount-block": "refcount block",
    "snapshot-table": "snapshot table",
    "inactive-l1": "inactive L1 table",
    "inactive-l2": "inactive L2 table",
    "bitmap-directory": "bitmap directory",
}

_CONSTANT: Final = frozenset(
    ("main-header", "active-l1", "refcount-table", "snapshot-table", "bitmap-directory")
)
_CACHED: Final = _CONSTANT | {"active-l2", "refcount-block", "inactive-l1"}
#: The sets of checks that have a name.
TEMPLATES: Final[Mapping[str, frozenset[str]]] = {
    "none": frozenset(),
    "constant": _CONSTANT,
    "cached": _CACHED,
    "all": _CACHED | {"inactive-l2"},
}
DEFAULT_TEMPLATE: Final = "cached"


def sections_checked(option: str | Mapping[str, Any] | None) -> frozenset[str]:
    """The sections that the option `overlap-check` wants to be looked for."""
    if option is None or isinstance(option, str):
        return TEMPLATES[option or DEFAULT_TEMPLATE]
    chosen = set(TEMPLATES[option.get("template", DEFAULT_TEMPLATE)])
    for section in SECTIONS:
        if section in option:
            (chosen.add if option[section] else chosen.discard)(section)
    return frozenset(chosen)


class MetadataMap:
    """The clusters that hold tables, by section.

    :param checked: the sections to be looked for; the others are not kept.
    """

    def __init__(self, checked: frozenset[str]) -> None:
        self._checked = checked
        self._clusters: dict[str, array[int]] = {}
        #: Those of all sections, so that most clusters are looked for once.
        self._all = array("Q")

    def wants(self, section: str) -> bool:
        """Whether this section is looked for."""
        return section in self._checked

    def set(self, section: str, clusters: Iterable[int] | NDArray[np.uint64]) -> None:
        """These clusters (numbers, not offsets), and no others, hold tables of this section."""
        if section in self._checked:
            if not isinstance(clusters, np.ndarray):
                clusters = np.fromiter(clusters, np.uint64)
            unique = np.unique(clusters)
            self._clusters[section] = array("Q", unique.tobytes())
            every = [np.frombuffer(known, np.uint64) for known in self._clusters.values()]
            self._all = array("Q", np.unique(np.concatenate(every)).tobytes())

    def add(self, section: str, cluster: int) -> None:
        """One more cluster of this section."""
        if section in self._checked:
            for known in (self._clusters.setdefault(section, array("Q")), self._all):
                if not known or cluster > known[-1]:
                    known.append(cluster)
                else:
                    insort(known, cluster)

    def remove(self, section: str, cluster: int) -> None:
        """There is no table of this section any more in that cluster."""
        known = self._clusters.get(section, array("Q"))
        position = bisect_left(known, cluster)
        if position < len(known) and known[position] == cluster:
            del known[position]

    def find(self, first: int, end: int, *, ignore: str | None = None) -> str | None:
        """The section of a table between the clusters `first` and `end`, or None."""
        position = bisect_left(self._all, first)
        if position == len(self._all) or self._all[position] >= end:
            return None
        for section, clusters in self._clusters.items():
            position = bisect_left(clusters, first)
            if position < len(clusters) and clusters[position] < end and section != ignore:
                return section
        return None
