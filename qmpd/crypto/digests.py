"""The hash functions that a LUKS header may name, by QEMU's and cryptsetup's names.

One table serves every place where a header names a hash: the key derivation,
the anti-forensic splitter and ESSIV.  ripemd160, which both peers know, is
left out: ``cryptography`` does not offer it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from cryptography.hazmat.primitives import hashes

from qmpd.crypto.memory import Buffer, overwrite
from qmpd.errors import Error

HASHES: Final[Mapping[str, hashes.HashAlgorithm]] = MappingProxyType(
    {
        "md5": hashes.MD5(),
        "sha1": hashes.SHA1(),
        "sha224": hashes.SHA224(),
        "sha256": hashes.SHA256(),
        "sha384": hashes.SHA384(),
        "sha512": hashes.SHA512(),
        "sm3": hashes.SM3(),
    }
)


def algorithm(name: str) -> hashes.HashAlgorithm:
    """Return the hash function called `name`.

    :raise Error: no such hash, in QEMU's wording.
    """
    found = HASHES.get(name)
    if found is None:
        raise Error(f"Hash algorithm '{name}' not supported")
    return found


def digest_into(name: str, data: Buffer, into: memoryview) -> None:
    """Write the hash of `data` under the function called `name` to `into`, which has its length.

    :raise Error: no such hash.
    """
    context = hashes.Hash(algorithm(name))
    context.update(data)
    result = context.finalize()
    into[:] = result
    overwrite(result)
