"""The anti-forensic splitter: a key spread over so many stripes that losing one loses it.

LUKS1 On-Disk Format Specification 1.2.3, section 2.4 ("AF splitter").  All
stripes but the last are random; the last is the key XORed with what the others
amount to, each step diffused by a hash so that a change in any stripe changes
everything.  Only all of them together give the key back, so overwriting a part
of a keyslot destroys it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from cryptography.hazmat.primitives import hashes

from qmpd.crypto import digests


def split(
    hash_name: str,
    key: bytes | bytearray | memoryview,
    stripes: int,
    random: Callable[[int], bytes] = os.urandom,
) -> bytearray:
    """Return ``len(key) * stripes`` bytes that :func:`merge` turns back into `key`.

    :param random: gives as many random bytes as it is asked for.
    :raise Error: no such hash.
    """
    width = len(key)
    material = bytearray(random(width * (stripes - 1)))
    state = _fold(hash_name, _stripes(material, width, stripes - 1), width)
    last = int.from_bytes(state, "little") ^ int.from_bytes(key, "little")
    material += last.to_bytes(width, "little")
    return material


def merge(hash_name: str, data: bytes | bytearray | memoryview, key_bytes: int, stripes: int) -> bytearray:
    """Return the key of `key_bytes` bytes that :func:`split` spread over `data`.

    :param data: at least ``key_bytes * stripes`` bytes; what follows (the rest
        of a sector) is ignored.
    :raise Error: no such hash.
    :raise ValueError: `data` is too short.
    """
    if len(data) < key_bytes * stripes:
        raise ValueError(f"{stripes} stripes of {key_bytes} bytes do not fit into {len(data)} bytes")
    state = _fold(hash_name, _stripes(data, key_bytes, stripes - 1), key_bytes)
    end = key_bytes * stripes
    last = int.from_bytes(data[end - key_bytes : end], "little")
    return bytearray((int.from_bytes(state, "little") ^ last).to_bytes(key_bytes, "little"))


def _stripes(data: bytes | bytearray | memoryview, width: int, count: int) -> Iterator[int]:
    view = memoryview(data)
    for offset in range(0, width * count, width):
        yield int.from_bytes(view[offset : offset + width], "little")


def _fold(hash_name: str, stripes: Iterator[int], width: int) -> bytes:
    """XOR and diffuse the stripes one after another: d(k+1) = H(d(k) XOR s(k)), d(0) = 0."""
    fresh = hashes.Hash(digests.algorithm(hash_name))
    size = fresh.algorithm.digest_size
    # H1 of the specification: the block's number, big-endian, is hashed before each block of the
    # hash's size; of the last block only as many bytes of its hash are used as it has.
    blocks = [
        (number.to_bytes(4, "big"), offset, min(offset + size, width))
        for number, offset in enumerate(range(0, width, size))
    ]
    state = bytes(width)
    for stripe in stripes:
        mixed = (int.from_bytes(state, "little") ^ stripe).to_bytes(width, "little")
        parts = []
        for number, start, end in blocks:
            context = fresh.copy()  # cheaper than a new one
            context.update(number + mixed[start:end])
            parts.append(context.finalize()[: end - start])
        state = b"".join(parts)
    return state
