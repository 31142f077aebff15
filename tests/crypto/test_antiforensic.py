from __future__ import annotations

import hashlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.crypto.antiforensic import merging, splitting
from qmpd.crypto.steps import run
from qmpd.errors import Error


def diffused(hash_name: str, block: bytes) -> bytes:
    """H1 of the specification, section 2.4, as it is written there."""
    size = hashlib.new(hash_name).digest_size
    parts = [block[start : start + size] for start in range(0, len(block), size)]
    return b"".join(
        hashlib.new(hash_name, number.to_bytes(4, "big") + part).digest()[: len(part)]
        for number, part in enumerate(parts)
    )


@given(
    hash_name=st.sampled_from(["sha1", "sha256", "sha512"]),
    key=st.binary(min_size=1, max_size=100),
    stripes=st.integers(1, 12),
)
@settings(deadline=None)
def test_merging_gives_back_what_was_split(hash_name: str, key: bytes, stripes: int) -> None:
    material = run(splitting(hash_name, key, stripes))
    assert len(material) == len(key) * stripes
    assert run(merging(hash_name, material.data, len(key), stripes)).data == key


@pytest.mark.parametrize("hash_name", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("width", [16, 24, 32, 64])
def test_merging_is_what_the_specification_says(hash_name: str, width: int) -> None:
    material = os.urandom(width * 5)
    state = bytes(width)
    for start in range(0, width * 4, width):
        stripe = material[start : start + width]
        state = diffused(hash_name, bytes(a ^ b for a, b in zip(state, stripe, strict=True)))
    expected = bytes(a ^ b for a, b in zip(state, material[-width:], strict=True))
    assert run(merging(hash_name, material + b"rest of the sector", width, 5)).data == expected


def test_one_changed_bit_in_any_stripe_changes_the_key() -> None:
    material = run(splitting("sha256", bytes(32), 8))
    for stripe in range(8):
        damaged = bytearray(material.data)
        damaged[stripe * 32 + 5] ^= 1
        assert run(merging("sha256", damaged, 32, 8)).data != bytes(32)


def test_material_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="4 stripes of 32 bytes do not fit into 127 bytes"):
        run(merging("sha256", bytes(127), 32, 4))


def test_an_unknown_hash_is_refused() -> None:
    with pytest.raises(Error, match="^Hash algorithm 'crc32' not supported$"):
        run(splitting("crc32", bytes(32), 4))
