"""What lies where a LUKS header was, compared with the header as it was known, for both versions."""

from __future__ import annotations

import enum

from qmpd.crypto.luks import LuksHeader
from qmpd.crypto.memory import Buffer


class HeaderState(enum.StrEnum):
    """What lies where a header was read; the values are QAPI's."""

    #: The header as it is known.
    UNCHANGED = "unchanged"
    #: A header of the same volume with other slots or another UUID.
    CHANGED = "changed"
    #: A header of another volume.
    OTHER = "other"
    #: No header, or one of this volume that can't be read.
    DAMAGED = "damaged"

    @property
    def is_ours(self) -> bool:
        """Whether there is a header of this volume that can be read."""
        return self in (HeaderState.UNCHANGED, HeaderState.CHANGED)


def state_of(known: LuksHeader, found: LuksHeader | None, beginning: Buffer) -> HeaderState:
    """Say what lies where `known` was.

    :param found: the header that is there now; None if none can be read.
    :param beginning: the first :attr:`~LuksHeader.beginning_bytes` bytes of its volume.
    """
    if found is None:
        return HeaderState.OTHER if known.is_foreign(beginning) else HeaderState.DAMAGED
    if known.difference(found) is not None:
        return HeaderState.OTHER
    return HeaderState.UNCHANGED if found.says_as(known) else HeaderState.CHANGED
