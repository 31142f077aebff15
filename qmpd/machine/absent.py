"""What a machine without a processor and a guest has not.

Clients of an emulator ask about these things in any case, and many give up when
the question itself is not understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qmpd.errors import DeviceNotActive, Error

_NO_BALLOON: Final = DeviceNotActive, "No balloon device has been activated"

#: Commands that list what there is none of.
LISTS: Final = (
    "query-cpus-fast",
    "query-memdev",
    "query-tpm-models",
    "query-tpm-types",
)

#: Commands about a thing that is not there: the class of the error, and its text in QEMU's words.
REFUSALS: Final[Mapping[str, tuple[type[Error], str]]] = {
    "balloon": _NO_BALLOON,
    "query-balloon": _NO_BALLOON,
    "query-hotpluggable-cpus": (Error, "machine does not support hot-plugging CPUs"),
}
