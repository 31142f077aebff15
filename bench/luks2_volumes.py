"""LUKS2 volumes to measure with, made by our own formatter: cryptsetup would choose its own costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from qmpd.crypto import kdf, luks2_keyslots
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks2_kdf import Kdf
from qmpd.crypto.plan import Write
from qmpd.crypto.steps import run

SPEC: Final = CipherSpec("aes-256", "xts", "plain64")
_HASH: Final = "sha256"


def write_volume(
    path: Path, passphrase: bytes, costs: Kdf, payload_bytes: int, sector_size: int = 512
) -> None:
    """Make a volume with its header in front, and nothing in its payload yet.

    :param costs: of keyslot 0, the only one.
    """
    digest_iterations = run(kdf.calibrating(_HASH, luks2_keyslots.DIGEST_TIME, SPEC.key_bytes))
    header, key, plan = run(
        luks2_keyslots.formatting(SPEC, _HASH, passphrase, costs, digest_iterations, sector_size=sector_size)
    )
    key.wipe()
    with path.open("wb") as file:
        for step in plan:
            if isinstance(step, Write):
                os.pwrite(file.fileno(), step.data, step.offset)
        file.truncate(header.segments[0].offset + payload_bytes)
