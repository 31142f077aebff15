"""Disk encryption as its definition says it, a sector at a time: slow, short, and apart from ours.

What dm-crypt does (its documentation in the kernel, "dm-crypt"; LUKS2 On-Disk Format Specification 1.1,
section 3.3): each sector is encrypted by itself, and its IV is made of its number, which counts 512 bytes
however large a sector is, and begins with the segment's `iv_tweak`.
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


def encrypted(name: str, key: bytes, plain: bytes, *, sector_size: int = 512, first: int = 0) -> bytes:
    """The ciphertext of whole sectors.

    :param name: the cipher, as in "aes-xts-plain64".
    :param first: the first sector's number, in units of 512 bytes.
    """
    return _worked_on(name, key, plain, sector_size, first, encrypting=True)


def decrypted(name: str, key: bytes, data: bytes, *, sector_size: int = 512, first: int = 0) -> bytes:
    """The plaintext of whole sectors; parameters as of :func:`encrypted`."""
    return _worked_on(name, key, data, sector_size, first, encrypting=False)


def _worked_on(
    name: str, key: bytes, data: bytes, sector_size: int, first: int, *, encrypting: bool
) -> bytes:
    algorithm, chaining, rule = name.split("-")
    assert algorithm == "aes"
    assert len(data) % sector_size == 0
    result = bytearray()
    for start in range(0, len(data), sector_size):
        iv = _iv(rule, key, first + start // 512)
        mode = modes.XTS(iv) if chaining == "xts" else modes.CBC(iv)
        cipher = Cipher(algorithms.AES(key), mode)
        context = cipher.encryptor() if encrypting else cipher.decryptor()
        result += context.update(data[start : start + sector_size]) + context.finalize()
    return bytes(result)


def _iv(rule: str, key: bytes, number: int) -> bytes:
    if rule == "plain":
        return (number % (1 << 32)).to_bytes(16, "little")
    iv = number.to_bytes(8, "little") + bytes(8)
    if rule == "plain64":
        return iv
    essiv, _, hash_name = rule.partition(":")
    assert essiv == "essiv"
    return Cipher(algorithms.AES(hashlib.new(hash_name, key).digest()), modes.ECB()).encryptor().update(iv)
