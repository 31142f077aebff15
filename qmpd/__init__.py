"""qmpd: a storage daemon that speaks QMP, QEMU's JSON protocol."""

from __future__ import annotations

__version__ = "0.1.0"
