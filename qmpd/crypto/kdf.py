"""PBKDF2, and how many of its iterations fill a given time on this machine.

Every function here may take long and releases the interpreter lock while it
does: call it in a worker thread.
"""

from __future__ import annotations

import time
from typing import Final

from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from qmpd.crypto import digests
from qmpd.crypto.memory import Buffer, overwrite

#: No key is made with fewer iterations than this, however little time was asked for
#: (LUKS1 On-Disk Format Specification 1.2.3, section 3.3: at least 1000).
MIN_ITERATIONS: Final = 1000

#: More iterations than this are refused.  The format allows 2^32-1, with which one wrong
#: header would keep a thread busy for an hour; this is several minutes of a fast core, well
#: above what any ``iter-time`` that a person would wait for gives.
MAX_ITERATIONS: Final = 1_000_000_000

#: A measurement shorter than this (in seconds of processor time) says too little.
_MEASURED_SECONDS: Final = 0.05


def pbkdf2_into(hash_name: str, password: Buffer, salt: bytes, iterations: int, into: memoryview) -> None:
    """Derive as many bytes from `password` as `into` has (RFC 8018, section 5.2).

    :raise Error: no such hash.
    """
    # A derivation object serves once only.
    function = PBKDF2HMAC(digests.algorithm(hash_name), len(into), salt, iterations)
    # The package takes any buffer here, but says bytes in its types.
    secret: bytes = password  # type: ignore[assignment]
    if hasattr(function, "derive_into"):
        function.derive_into(secret, into)
    else:  # cryptography before 47
        derived = function.derive(secret)
        into[:] = derived
        overwrite(derived)


def pbkdf2(hash_name: str, password: Buffer, salt: bytes, iterations: int, length: int) -> bytearray:
    """Derive `length` bytes that are no secret; otherwise as :func:`pbkdf2_into`."""
    derived = bytearray(length)
    pbkdf2_into(hash_name, password, salt, iterations, memoryview(derived))
    return derived


def calibrate(hash_name: str, milliseconds: int | float, key_bytes: int) -> int:
    """Return how many iterations deriving `key_bytes` takes in `milliseconds` here.

    What is measured is this thread's processor time, as QEMU does it, so that
    a busy machine does not make keys weaker, and of several measurements the
    fastest counts, because whatever disturbs one only slows it.  The result is
    never below :data:`MIN_ITERATIONS` nor above :data:`MAX_ITERATIONS`.  Takes
    some tenths of a second.

    :raise Error: no such hash.
    """

    def measured(iterations: int) -> float:
        start = time.thread_time()
        pbkdf2(hash_name, b"password", b"salt" * 8, iterations, key_bytes)
        return time.thread_time() - start

    iterations = 1 << 13
    while (seconds := measured(iterations)) < _MEASURED_SECONDS:
        iterations *= 2
    seconds = min(seconds, measured(iterations), measured(iterations))
    wanted = int(iterations / seconds * milliseconds / 1000)
    return max(MIN_ITERATIONS, min(wanted, MAX_ITERATIONS))
