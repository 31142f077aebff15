"""PBKDF2, and how many of its iterations fill a given time on this machine.

Every function here may take long and releases the interpreter lock while it
does: call it in a worker thread, or take the steps of one that has them there.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from qmpd.crypto import digests
from qmpd.crypto.memory import Buffer, overwrite
from qmpd.crypto.steps import Steps
from qmpd.errors import Error

#: No key is made with fewer iterations than this, however little time was asked for
#: (LUKS1 On-Disk Format Specification 1.2.3, section 3.3: at least 1000).
MIN_ITERATIONS: Final = 1000

#: More iterations than this are refused.  The format allows 2^32-1, with which one wrong
#: header would keep a thread busy for an hour; this is several minutes of a fast core, well
#: above what any ``iter-time`` that a person would wait for gives.  None is made with more either.
MAX_ITERATIONS: Final = 1_000_000_000

#: A measurement is no shorter than this (in seconds of processor time), or than what is to be filled.
_MEASURED_SECONDS: Final = 0.02
_MEASUREMENTS: Final = 8
#: For these QEMU's library needs up to a tenth less time, with the processor's instructions for them.  A key
#: is not to be weaker than one that QEMU makes for the same time, so it takes us so much longer.
_MARGIN: Final[Mapping[str, float]] = MappingProxyType({"sha1": 1.1, "sha224": 1.1, "sha256": 1.1})

_UINT32_MAX: Final = (1 << 32) - 1
_UINT64_MAX: Final = (1 << 64) - 1


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


def calibrating(hash_name: str, milliseconds: int, key_bytes: int, *, share: int = 1) -> Steps[int]:
    """Return how many iterations of deriving `key_bytes` take a part of `milliseconds` here.

    What is measured is this thread's processor time, as QEMU does it, so that
    a busy machine does not make keys weaker, and of several measurements the
    fastest counts, because whatever disturbs one only slows it.  The result is
    never below :data:`MIN_ITERATIONS`.  A step is one measurement; all take some tenths of a second, and less
    for a short time.

    :param share: divides the time.
    :raise Error: no such hash; or more than :data:`MAX_ITERATIONS`, which nobody could open.
    """

    def measured(iterations: int) -> float:
        start = time.thread_time()
        pbkdf2(hash_name, b"password", b"salt" * 8, iterations, key_bytes)
        return time.thread_time() - start

    # QEMU takes it for an unsigned number and says what it would be multiplied with.
    milliseconds &= _UINT64_MAX
    enough = min(_MEASURED_SECONDS, milliseconds / 1000)
    yield
    iterations = 1 << 13
    while (seconds := measured(iterations)) < enough:
        yield
        iterations *= 2
    for _ in range(_MEASUREMENTS - 1):
        yield
        seconds = min(seconds, measured(iterations))
    rate = int(iterations / seconds * _MARGIN.get(hash_name, 1))
    if rate * milliseconds > _UINT64_MAX:
        raise Error(f"PBKDF iterations {rate} too large to scale: {os.strerror(errno.ERANGE)}")
    wanted = rate * milliseconds // 1000 // share
    for most in (_UINT32_MAX, MAX_ITERATIONS):
        if wanted > most:
            raise Error(f"PBKDF iterations {wanted} larger than {most}: {os.strerror(errno.ERANGE)}")
    return max(MIN_ITERATIONS, wanted)
