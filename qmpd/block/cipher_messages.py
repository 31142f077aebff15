"""What the daemon and its processes for ciphering say to each other; see :mod:`qmpd.block.cipher_pool`.

Each message is one packet.  Nothing is imported here that takes long: a daemon
without encrypted disks has this too.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qmpd.crypto.sectors import SectorCipher

#: Bytes of a slot.
SLOT: Final = 256 << 10

#: What to do, with which cipher, in which slot; the first sector in units of 512 bytes; length in bytes.
REQUEST: Final = struct.Struct("=BIIQI")
#: The slot that is done; NO_SLOT when the process is ready to begin.
REPLY: Final = struct.Struct("=I")
NO_SLOT: Final = 0xFFFFFFFF
#: Bytes of a cipher's description.
DESCRIPTION: Final = 64

ENCRYPT: Final = 0
DECRYPT: Final = 1
#: Followed by what `describe_cipher` returns, and the key.
ADD: Final = 2
FORGET: Final = 3


def describe_cipher(cipher: SectorCipher) -> bytes:
    """What goes between a request to add a cipher, and its key."""
    spec = cipher.spec
    names = (spec.algorithm, spec.mode, spec.ivgen, spec.ivgen_hash or "")
    numbers = (str(cipher.sector_size), str(cipher.iv_unit))
    return " ".join((*names, *numbers)).encode().ljust(DESCRIPTION)
