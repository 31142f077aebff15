from __future__ import annotations

import gc
import hashlib
import os
import random
import struct
import threading

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.memory import KeyBuffer
from qmpd.crypto.sectors import SectorCipher, _Contexts

KEYS = random.Random(1619)
DATA = KEYS.randbytes(512 * 600)

SPECS = [
    CipherSpec("aes-128", "xts", "plain64"),
    CipherSpec("aes-256", "xts", "plain"),
    CipherSpec("aes-256", "xts", "essiv", "sha256"),
    CipherSpec("aes-128", "cbc", "plain"),
    CipherSpec("aes-192", "cbc", "plain64"),
    CipherSpec("aes-256", "cbc", "essiv", "sha256"),
    CipherSpec("aes-128", "cbc", "essiv", "md5"),
]


def name(spec: CipherSpec) -> str:
    return f"{spec.algorithm}-{spec.header_names()[1]}"


def one_by_one(
    spec: CipherSpec, key: bytes, data: bytes, first: int, sector_size: int, iv_unit: int, encrypting: bool
) -> bytes:
    """The same, with an object of `cryptography` for each sector."""
    result = bytearray()
    for start in range(0, len(data), sector_size):
        number = (first * 512 + start) // iv_unit
        if spec.ivgen == "plain":
            number %= 1 << 32
        iv = struct.pack("<QQ", number, 0)
        if spec.ivgen == "essiv":
            salt = hashlib.new(str(spec.ivgen_hash), key).digest()
            iv = Cipher(algorithms.AES(salt), modes.ECB()).encryptor().update(iv)
        mode = modes.XTS(iv) if spec.mode == "xts" else modes.CBC(iv)
        cipher = Cipher(algorithms.AES(key), mode)
        context = cipher.encryptor() if encrypting else cipher.decryptor()
        result += context.update(data[start : start + sector_size])
    return bytes(result)


@pytest.mark.parametrize("spec", SPECS, ids=name)
@pytest.mark.parametrize("first", [0, (1 << 32) - 8, 1 << 45])
@pytest.mark.parametrize("sectors", [1, 2, 8, 47, 48, 128, 129, 513])
def test_many_sectors_are_what_one_at_a_time_are(spec: CipherSpec, first: int, sectors: int) -> None:
    key = KEYS.randbytes(spec.key_bytes)
    cipher = SectorCipher(spec, key)
    data = DATA[: sectors * 512]
    assert cipher.encrypt(data, first) == one_by_one(spec, key, data, first, 512, 512, True)
    assert cipher.decrypt(data, first) == one_by_one(spec, key, data, first, 512, 512, False)


@pytest.mark.parametrize("spec", SPECS, ids=name)
@pytest.mark.parametrize(("sector_size", "iv_unit"), [(4096, 512), (4096, 4096), (2048, 512), (1024, 512)])
@pytest.mark.parametrize("sectors", [1, 3, 17, 70, 150])
def test_larger_sectors_count_their_ivs_as_asked(
    spec: CipherSpec, sector_size: int, iv_unit: int, sectors: int
) -> None:
    key = KEYS.randbytes(spec.key_bytes)
    cipher = SectorCipher(spec, key, sector_size, iv_unit=iv_unit)
    data = DATA[: sectors * sector_size]
    first = 24
    assert cipher.encrypt(data, first) == one_by_one(spec, key, data, first, sector_size, iv_unit, True)
    assert cipher.decrypt(data, first) == one_by_one(spec, key, data, first, sector_size, iv_unit, False)


@pytest.mark.parametrize(
    ("algorithm", "key", "sector", "beginning"),
    [  # IEEE 1619-2018, appendix B, vectors 4 and 10
        (
            "aes-128",
            "2718281828459045235360287471352631415926535897932384626433832795",
            0,
            "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
        ),
        (
            "aes-256",
            "2718281828459045235360287471352662497757247093699959574966967627"
            "3141592653589793238462643383279502884197169399375105820974944592",
            0xFF,
            "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
        ),
    ],
)
def test_xts_gives_the_vectors_of_ieee_1619(algorithm: str, key: str, sector: int, beginning: str) -> None:
    cipher = SectorCipher(CipherSpec(algorithm, "xts", "plain64"), bytes.fromhex(key))
    assert bytes(cipher.encrypt(bytes(range(256)) * 2, sector)[:32]).hex() == beginning


def test_aes_192_xts_is_xts_with_two_keys_of_24_bytes() -> None:
    key = KEYS.randbytes(48)
    tweak_key = Cipher(algorithms.AES(key[24:]), modes.ECB()).encryptor()
    block = Cipher(algorithms.AES(key[:24]), modes.ECB()).encryptor()
    tweak = int.from_bytes(tweak_key.update(struct.pack("<QQ", 77, 0)), "little")
    expected = b""
    for start in range(0, 512, 16):
        mask = tweak.to_bytes(16, "little")
        mixed = bytes(a ^ b for a, b in zip(DATA[start : start + 16], mask, strict=True))
        expected += bytes(a ^ b for a, b in zip(block.update(mixed), mask, strict=True))
        tweak <<= 1
        if tweak >> 128:
            tweak = tweak & ((1 << 128) - 1) ^ 0x87
    cipher = SectorCipher(CipherSpec("aes-192", "xts", "plain64"), key)
    assert cipher.encrypt(DATA[:512], 77) == expected
    assert cipher.decrypt(expected, 77) == DATA[:512]


@given(
    spec=st.sampled_from([*SPECS, CipherSpec("aes-192", "xts", "plain64")]),
    first=st.integers(0, (1 << 55) - 1),
    sizes=st.lists(st.integers(0, 600), min_size=1, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_decrypting_gives_back_what_was_encrypted(spec: CipherSpec, first: int, sizes: list[int]) -> None:
    cipher = SectorCipher(spec, os.urandom(spec.key_bytes))
    for sectors in sizes:
        data = DATA[: sectors * 512]
        encrypted = cipher.encrypt(data, first)
        assert not sectors or encrypted != data
        assert cipher.decrypt(encrypted, first) == data


@pytest.mark.parametrize("spec", SPECS, ids=name)
@pytest.mark.parametrize("sectors", [3, 300])
def test_into_may_be_the_source_itself_and_any_offset_of_a_buffer(spec: CipherSpec, sectors: int) -> None:
    cipher = SectorCipher(spec, KEYS.randbytes(spec.key_bytes))
    data = DATA[: sectors * 512]
    encrypted = cipher.encrypt(data, 9)
    buffer = bytearray(b"before!" + data + b"after")
    window = memoryview(buffer)[7:-5]
    cipher.encrypt_into(window, 9, window)
    assert buffer == b"before!" + encrypted + b"after"
    cipher.decrypt_into(window, 9, window)
    assert buffer == b"before!" + data + b"after"


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[5]], ids=name)
def test_threads_may_share_a_cipher(spec: CipherSpec) -> None:
    cipher = SectorCipher(spec, KEYS.randbytes(spec.key_bytes))
    faults: list[int] = []

    def work(thread: int) -> None:
        for turn in range(15):
            data = os.urandom(512 * (1 + (37 * turn + 113 * thread) % 300))
            first = thread * 1000 + turn
            if cipher.decrypt(cipher.encrypt(data, first), first) != data:
                faults.append(thread)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_what_is_not_whole_sectors_is_refused() -> None:
    cipher = SectorCipher(SPECS[0], bytes(32))
    with pytest.raises(ValueError, match="511 bytes at sector 0 are not whole sectors"):
        cipher.encrypt(bytes(511), 0)
    with pytest.raises(ValueError, match="512 bytes of data for a buffer of 511"):
        cipher.decrypt_into(bytes(512), 0, bytearray(511))
    large = SectorCipher(SPECS[0], bytes(32), 4096)
    with pytest.raises(ValueError, match="at sector 1 are not whole sectors of 4096"):
        large.encrypt(bytes(4096), 1)


def test_a_key_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="takes a key of 64 bytes, not 32"):
        SectorCipher(SPECS[1], bytes(32))


def test_a_closed_cipher_has_forgotten_its_key() -> None:
    key = b"\x5a" * 32
    cipher = SectorCipher(SPECS[0], key)
    cipher.encrypt(bytes(512), 0)
    cipher.close()
    cipher.close()
    with pytest.raises(ValueError, match="closed"):
        cipher.encrypt(bytes(512), 0)
    held = [value for value in vars(cipher).values() if isinstance(value, KeyBuffer)]
    assert held
    assert not any(b"\x5a" in bytes(value.data) for value in held)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.algorithm}-{spec.mode}-{spec.ivgen}")
def test_what_openssl_knows_of_the_key_goes_when_the_cipher_is_closed(spec: CipherSpec) -> None:
    gc.collect()
    gc.disable()  # which may come by much later, or never
    try:
        cipher = SectorCipher(spec, KEYS.randbytes(spec.key_bytes))
        cipher.encrypt(DATA, 0)
        cipher.decrypt(DATA[:512], 0)
        assert [found for found in gc.get_objects() if isinstance(found, _Contexts)]
        cipher.close()
        assert not [found for found in gc.get_objects() if isinstance(found, _Contexts)]
        del cipher
    finally:
        gc.enable()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.algorithm}-{spec.mode}-{spec.ivgen}")
def test_a_closed_cipher_has_nothing_left_in_scratch_memory(spec: CipherSpec) -> None:
    cipher = SectorCipher(spec, KEYS.randbytes(spec.key_bytes), secret_data=True)
    encrypted = bytes(cipher.encrypt(DATA, 0))
    (worker,) = cipher._idle
    tiles = list(worker.tiles.values())
    decrypted = bytearray(len(DATA))
    cipher.decrypt_into(encrypted, 0, decrypted)
    assert decrypted == DATA
    cipher.close()
    arrays = [getattr(tile, name) for tile in tiles for name in ("_masked", "_result") if hasattr(tile, name)]
    assert len(arrays) == (2 * len(tiles) if spec.mode == "xts" else 0)
    assert not any(array.any() for array in arrays)


def test_a_repr_shows_no_key() -> None:
    assert repr(SectorCipher(SPECS[0], b"\x5a" * 32)) == "<SectorCipher aes-128 xts-plain64>"


@pytest.mark.parametrize("name", ["xts", "cbc"])
@pytest.mark.parametrize("lengths", [[4096] * 5, [512, 4096, 1024], [65536, 512, 70144]])
def test_runs_of_sectors_are_ciphered_as_each_by_itself(name: str, lengths: list[int]) -> None:
    spec = CipherSpec("aes-256", name, *(("plain64",) if name == "xts" else ("essiv", "sha256")))
    key = bytes(range(spec.key_bytes))
    cipher = SectorCipher(spec, key)
    firsts = [900, 3, 1 << 40][: len(lengths)] + [77] * (len(lengths) - 3)
    data = bytes(number * 7 % 251 for number in range(sum(lengths)))
    expected = b""
    start = 0
    for first, length in zip(firsts, lengths, strict=True):
        expected += bytes(cipher.encrypt(data[start : start + length], first))
        start += length
    runs = list(zip(firsts, lengths, strict=True))
    into = bytearray(len(data))
    cipher.encrypt_runs(data, runs, into)
    assert into == expected
    cipher.decrypt_runs(into, runs, into)
    assert into == data


def test_runs_must_be_as_long_as_the_data() -> None:
    cipher = SectorCipher(CipherSpec("aes-256", "xts", "plain64"), bytes(range(64)))
    with pytest.raises(ValueError, match="2 sectors of 512 bytes for 1536 bytes of data"):
        cipher.encrypt_runs(bytes(1536), [(0, 512), (9, 512)], bytearray(1536))
