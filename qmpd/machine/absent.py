"""What a machine without a processor and a guest has not.

Clients of an emulator ask about these things in any case, and many give up when
the question itself is not understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qmpd.errors import DeviceNotActive, Error

_NO_BALLOON: Final = DeviceNotActive, "No balloon device has been activated"

#: Commands about what there is none of, and their answers.
ANSWERS: Final[Mapping[str, Any]] = {
    "query-acpi-ospm-status": [],
    "query-cpus-fast": [],
    "query-display-options": {"type": "none"},
    "query-kvm": {"enabled": False, "present": False},
    "query-memory-devices": [],
    "query-migrate": {},
    "query-replay": {"mode": "none", "icount": 0},
    "query-tpm": [],
    "query-tpm-models": [],
    "query-tpm-types": [],
}

#: Commands about a thing that is not there: the class of the error, and its text in QEMU's words.
REFUSALS: Final[Mapping[str, tuple[type[Error], str]]] = {
    "balloon": _NO_BALLOON,
    "query-balloon": _NO_BALLOON,
    "migrate-pause": (
        Error,
        "migrate-pause is currently only supported during postcopy-active or postcopy-recover state",
    ),
    "migrate-recover": (Error, "Migrate recover can only be run when postcopy is paused."),
    "query-hotpluggable-cpus": (Error, "machine does not support hot-plugging CPUs"),
    "query-vm-generation-id": (Error, "VM Generation ID device not found"),
    "system_wakeup": (Error, "wake-up from suspend is not supported by this guest"),
}
