"""How fast the sector ciphers, the key derivation and the splitter are on this machine.

    python bench/ciphers.py [SECONDS PER FIGURE]

Prints, for each cipher and request size, microseconds a request and GB/s on
one core, and beside it what one `cryptography` object for each sector does.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Callable
from functools import partial

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qmpd.crypto import antiforensic, kdf
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.sectors import SectorCipher
from qmpd.crypto.steps import run

SIZES = (512, 4096, 65536, 262144, 1048576)
SPECS = (
    CipherSpec("aes-256", "xts", "plain64"),
    CipherSpec("aes-128", "xts", "plain64"),
    CipherSpec("aes-256", "cbc", "essiv", "sha256"),
)


def seconds_for_one(call: Callable[[], object], budget: float) -> float:
    """Return the best of several runs, each of a tenth of `budget`."""
    call()
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-7)
    turns = max(1, int(budget / 10 / once))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(turns):
            call()
        best = min(best, (time.perf_counter() - start) / turns)
    return best


def sector_by_sector(spec: CipherSpec, key: bytes, data: bytes) -> bytes:
    result = bytearray()
    aes = algorithms.AES(key)
    for number in range(len(data) // 512):
        iv = struct.pack("<QQ", number, 0)
        mode = modes.XTS(iv) if spec.mode == "xts" else modes.CBC(iv)
        result += Cipher(aes, mode).decryptor().update(data[number * 512 : (number + 1) * 512])
    return bytes(result)


def _split(hash_name: str) -> None:
    run(antiforensic.splitting(hash_name, bytes(64), 4000)).wipe()


def main() -> None:
    budget = float(sys.argv[1]) if len(sys.argv) > 1 else 0.2
    print(f"{'cipher':28}{'bytes':>9}{'decrypt':>25}{'encrypt':>25}{'decrypt one by one':>25}")
    for spec in SPECS:
        key = os.urandom(spec.key_bytes)
        cipher = SectorCipher(spec, key)
        for size in SIZES:
            data, into = os.urandom(size), bytearray(size)
            calls = (
                partial(cipher.decrypt_into, data, 0, into),
                partial(cipher.encrypt_into, data, 0, into),
                partial(sector_by_sector, spec, key, data),
            )
            cells = ""
            for call in calls:
                seconds = seconds_for_one(call, budget)
                cells += f"{seconds * 1e6:11.1f} us {size / seconds / 1e9:5.2f} GB/s"
            print(f"{spec.algorithm + '-' + spec.header_names()[1]:28}{size:9}{cells}")
    print()
    for name in ("sha1", "sha256", "sha512"):
        derive = seconds_for_one(partial(kdf.pbkdf2, name, b"abc123", b"s" * 32, 20000, 64), budget)
        split = seconds_for_one(partial(_split, name), budget)
        print(f"pbkdf2 {name}: {20000 / derive / 1e6:.2f} M iterations/s; split: {split * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
