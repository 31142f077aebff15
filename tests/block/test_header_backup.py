"""A backup is believed in nothing that is not known already."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.block import header_backup
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks import Luks1
from qmpd.crypto.luks1 import HEADER_BYTES, Header, formatting
from qmpd.crypto.luks1_keyslots import HEADER_SECTORS_BYTES
from qmpd.crypto.steps import run
from qmpd.errors import Error


def known_header() -> Header:
    header, _, _ = run(formatting(CipherSpec("aes-128", "xts", "plain64"), "sha256", b"pw", 1000, 1000))
    return header


KNOWN: Final = known_header()
PACKED: Final = KNOWN.pack().ljust(HEADER_SECTORS_BYTES, b"\0")


def parse(sectors: bytes, size: int = KNOWN.header_length()) -> Header:
    header = header_backup._parse_backup(sectors, Luks1(KNOWN, PACKED), size, detached=False)
    assert isinstance(header, Luks1)
    return header.header


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_whatever_is_changed_in_a_backup_its_keyslots_lie_where_they_are_known_to_be(
    changes: list[tuple[int, int]],
) -> None:
    sectors = bytearray(PACKED)
    for offset, value in changes:
        sectors[offset] = value
    try:
        header = parse(bytes(sectors))
    except Error:
        return
    assert header.digest == KNOWN.digest
    assert [header.material_extent(slot) for slot in range(8)] == [
        KNOWN.material_extent(slot) for slot in range(8)
    ]
    assert header.active_slots


@settings(max_examples=100)
@given(st.binary(max_size=2048))
def test_noise_is_no_backup(noise: bytes) -> None:
    with pytest.raises(Error, match="The backup holds no LUKS header that can be used"):
        parse(noise)


def test_a_file_that_ends_before_its_key_material_is_cut_short() -> None:
    end = sum(KNOWN.material_extent(0))
    assert parse(PACKED, end) == KNOWN
    with pytest.raises(Error, match=f"it has {end - 1} bytes, and its keyslots take {end}"):
        parse(PACKED, end - 1)
