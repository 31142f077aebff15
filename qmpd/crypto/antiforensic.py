"""The anti-forensic splitter: a key spread over so many stripes that losing one loses it.

LUKS1 On-Disk Format Specification 1.2.3, section 2.4 ("AF splitter").  All
stripes but the last are random; the last is the key XORed with what the others
amount to, each step diffused by a hash so that a change in any stripe changes
everything.  Only all of them together give the key back, so overwriting a part
of a keyslot destroys it.

It is true in memory as well: what the other stripes amount to says nothing
without the last one, so the hashes' results need not be overwritten, but every
stripe is in a buffer that is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

import numpy as np
from cryptography.hazmat.primitives import hashes

from qmpd.crypto import digests
from qmpd.crypto.memory import Buffer, KeyBuffer, KeyMemory, overwrite, wiped_on_failure
from qmpd.crypto.steps import Steps

#: About a millisecond's.
_HASHES_IN_A_STEP: Final = 500


def splitting(
    hash_name: str,
    key: Buffer,
    stripes: int,
    random: Callable[[int], bytes] = os.urandom,
    *,
    length: int | None = None,
) -> Steps[KeyBuffer]:
    """Return ``len(key) * stripes`` bytes that :func:`merging` turns back into `key`, for the caller to wipe.

    A step takes about a millisecond.

    :param random: gives as many random bytes as it is asked for; they are overwritten.
    :param length: of the buffer, if there are to be zeroes behind the stripes.
    :raise Error: no such hash.
    """
    width = len(key)
    end = width * stripes
    memory = KeyMemory()
    material = memory.take(end if length is None else length)
    with wiped_on_failure(material):
        others = random(end - width)
        material.data[: end - width] = others
        overwrite(others)
        into = material.data[end - width : end]
        yield from _xor_folded(hash_name, material.data[: end - width], key, into, memory)
    return material


def merging(
    hash_name: str, data: Buffer, key_bytes: int, stripes: int, memory: KeyMemory | None = None
) -> Steps[KeyBuffer]:
    """Return the key of `key_bytes` bytes that :func:`splitting` spread over `data`, for the caller to wipe.

    A step takes about a millisecond.

    :param data: at least ``key_bytes * stripes`` bytes; what follows (the rest
        of a sector) is ignored.
    :param memory: where the key is to be; by default in a page of its own.
    :raise Error: no such hash.
    :raise ValueError: `data` is too short.
    """
    end = key_bytes * stripes
    if len(data) < end:
        raise ValueError(f"{stripes} stripes of {key_bytes} bytes do not fit into {len(data)} bytes")
    view = memoryview(data)
    memory = memory or KeyMemory()
    key = memory.take(key_bytes)
    with wiped_on_failure(key):
        others, last = view[: end - key_bytes], view[end - key_bytes : end]
        yield from _xor_folded(hash_name, others, last, key.data, memory)
    return key


def _xor_folded(
    hash_name: str, stripes: memoryview, last: Buffer, into: memoryview, memory: KeyMemory
) -> Steps[None]:
    """Write to `into` what `last` is when XORed with what the stripes amount to.

    They are XORed and diffused one after another: d(k+1) = H(d(k) XOR s(k)), d(0) = 0.
    """
    width = len(into)
    size = digests.algorithm(hash_name).digest_size
    with memory.take(2 * width) as space:
        state, mixed = space.data[:width], space.data[width:]
        # H1 of the specification: the block's number, big-endian, is hashed before each block of the
        # hash's size; of the last block only as many bytes of its hash are used as it has.
        blocks = []
        for number, start in enumerate(range(0, width, size)):
            context = hashes.Hash(digests.algorithm(hash_name))
            context.update(number.to_bytes(4, "big"))
            end = min(start + size, width)
            blocks.append((context.copy, mixed[start:end], state[start:end], end - start))
        amount, result = np.frombuffer(state, np.uint8), np.frombuffer(mixed, np.uint8)
        xor = np.bitwise_xor
        rows = np.frombuffer(stripes, np.uint8).reshape(-1, width)
        # These hashes are too short for the interpreter's lock to be let go of meanwhile.
        together = _HASHES_IN_A_STEP // len(blocks)
        for first in range(0, len(rows), together):
            yield
            for stripe in rows[first : first + together]:
                xor(amount, stripe, out=result)
                for fresh, block, diffused, used in blocks:
                    context = fresh()  # cheaper than a new one
                    context.update(block)
                    diffused[:] = context.finalize()[:used]
        xor(amount, np.frombuffer(last, np.uint8), out=np.frombuffer(into, np.uint8))
