from __future__ import annotations

import itertools
import random
import struct
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks1 import (
    HEADER_BYTES,
    SECTOR,
    SLOTS,
    Barrier,
    Header,
    Write,
    formatting,
    iterations_for,
    new_header,
    unlocking,
)
from qmpd.crypto.memory import KeyBuffer, KeyMemory
from qmpd.crypto.steps import Steps, run
from qmpd.errors import Error

AES_256 = CipherSpec("aes-256", "xts", "plain64")
PASSWORD = b"abc123"

#: Where the header's numbers are: payload offset, key bytes, digest iterations; then the slots'.
PAYLOAD, KEY_BYTES, DIGEST_ITERATIONS = 104, 108, 164
NAME, MODE, HASH = 8, 40, 72
STATE, ITERATIONS, OFFSET, STRIPES = 0, 4, 40, 44
ACTIVE = 0x00AC71F3


def slot_field(slot: int, field: int) -> int:
    return 208 + 48 * slot + field


def number(value: int) -> bytes:
    return struct.pack(">I", value)


def text(value: str) -> bytes:
    return value.encode().ljust(32, b"\0")


def changed(data: bytes | bytearray, *changes: tuple[int, bytes]) -> bytes:
    result = bytearray(data)
    for offset, replacement in changes:
        result[offset : offset + len(replacement)] = replacement
    return bytes(result)


def volume_of(plan: list[Write | Barrier]) -> bytearray:
    volume = bytearray(4 << 20)
    for step in plan:
        if isinstance(step, Write):
            volume[step.offset : step.offset + len(step.data)] = step.data
    return volume


@pytest.fixture(scope="module")
def made() -> tuple[Header, KeyBuffer, list[Write | Barrier], bytearray]:
    header, key, plan = run(formatting(AES_256, "sha256", PASSWORD, 1000, 1000))
    return header, key, plan, volume_of(plan)


@pytest.fixture(scope="module")
def packed() -> bytes:
    """A header with QEMU's geometry and slot 0 in use."""
    blank = new_header(AES_256, "sha256").pack()
    return changed(
        blank,
        (DIGEST_ITERATIONS, number(1000)),
        (slot_field(0, STATE), number(ACTIVE)),
        (slot_field(0, ITERATIONS), number(1000)),
    )


def refusal(data: bytes, *, detached: bool = False) -> str:
    with pytest.raises(Error) as caught:
        Header.parse(data, detached=detached)
    return caught.value.desc


@pytest.mark.parametrize(
    ("key_bytes", "spec", "second_slot", "payload"),
    [  # as QEMU 10.0 lays them out
        (64, AES_256, 262144, 2068480),
        (48, CipherSpec("aes-192", "xts", "plain64"), 196608, 1544192),
        (32, CipherSpec("aes-256", "cbc", "essiv", "sha256"), 135168, 1052672),
        (16, CipherSpec("aes-128", "cbc", "essiv", "sha256"), 69632, 528384),
    ],
)
def test_a_new_header_has_qemus_geometry(
    key_bytes: int, spec: CipherSpec, second_slot: int, payload: int
) -> None:
    header = new_header(spec, "sha256")
    assert header.key_bytes == key_bytes
    assert header.slots[0].key_offset * SECTOR == 4096
    assert header.slots[1].key_offset * SECTOR == second_slot
    assert header.payload_offset * SECTOR == payload == header.header_length()
    assert [slot.stripes for slot in header.slots] == [4000] * SLOTS
    detached = new_header(spec, "sha256", detached=True)
    assert detached.payload_offset == 0
    assert detached.header_length() == payload


@pytest.mark.parametrize("hash_name", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize(
    "spec",
    [
        AES_256,
        CipherSpec("aes-192", "xts", "plain"),
        CipherSpec("aes-192", "cbc", "plain64"),  # its key material is no whole number of sectors
        CipherSpec("aes-128", "cbc", "essiv", "sha256"),
    ],
    ids=lambda spec: f"{spec.algorithm}-{spec.mode}",
)
@pytest.mark.parametrize("detached", [False, True])
def test_what_was_formatted_is_unlocked_by_its_password_only(
    spec: CipherSpec, hash_name: str, detached: bool
) -> None:
    header, key, plan = run(formatting(spec, hash_name, PASSWORD, 1001, 1002, detached=detached))
    volume = volume_of(plan)
    parsed = Header.parse(volume, detached=detached)
    assert parsed == header
    assert parsed.spec == spec
    offset, length = parsed.material_extent(0)
    material = volume[offset : offset + length]
    found = run(unlocking(parsed, 0, PASSWORD, material))
    assert found is not None
    assert found.data == key.data
    assert run(unlocking(parsed, 0, b"abc124", material)) is None
    assert run(unlocking(parsed, 1, PASSWORD, material)) is None
    material[length // 2] ^= 1
    assert run(unlocking(parsed, 0, PASSWORD, material)) is None


def test_a_header_is_packed_as_it_was_parsed(packed: bytes) -> None:
    assert len(packed) == HEADER_BYTES
    assert Header.parse(packed).pack() == packed


def test_the_header_is_written_last_and_the_old_one_is_gone_first(
    made: tuple[Header, KeyBuffer, list[Write | Barrier], bytearray],
) -> None:
    header, _, plan, _ = made
    old = changed(bytes(4 << 20), (0, new_header(AES_256, "sha1").pack()))
    for steps in range(1, len(plan)):
        volume = bytearray(old)
        for step in plan[:steps]:
            if isinstance(step, Write):
                volume[step.offset : step.offset + len(step.data)] = step.data
        if Write(0, header.pack().ljust(4096, b"\0")) in plan[:steps]:
            assert Header.parse(volume) == header
        else:
            assert refusal(bytes(volume)) == "Volume is not in LUKS format"
    first, second = (step for step in plan if isinstance(step, Write) and step.offset == 0)
    between = plan[plan.index(first) + 1 : plan.index(second)]
    assert [type(step) for step in between] == [Barrier, Write, Barrier]
    assert plan[-1] == Barrier()


def test_nothing_that_is_written_holds_the_key_or_reaches_the_payload(
    made: tuple[Header, KeyBuffer, list[Write | Barrier], bytearray],
) -> None:
    header, key, plan, _ = made
    for step in plan:
        if isinstance(step, Write):
            assert bytes(key.data) not in step.data
            assert step.offset + len(step.data) <= header.header_length()


def test_the_same_random_bytes_make_the_same_volume() -> None:
    def made() -> tuple[Header, list[Write | Barrier]]:
        source = random.Random(7)
        header, _, plan = run(
            formatting(
                AES_256, "sha256", PASSWORD, 1000, 1000, uuid="00000000-1111-2222", random=source.randbytes
            )
        )
        return header, plan

    assert made() == made()
    assert made()[0].uuid == "00000000-1111-2222"


def test_a_uuid_of_its_own_is_a_random_one() -> None:
    first, second = new_header(AES_256, "sha256").uuid, new_header(AES_256, "sha256").uuid
    assert uuid.UUID(first).version == 4
    assert first != second


REFUSALS = [
    ("Volume is not in LUKS format", [(0, b"SKUL\xba\xbe")]),
    ("LUKS version 2 is not supported", [(6, b"\0\2")]),
    ("LUKS version 0 is not supported", [(6, b"\0\0")]),
    ("LUKS header cipher name is not NUL terminated", [(NAME, b"a" * 32)]),
    ("LUKS header cipher mode is not NUL terminated", [(MODE, b"a" * 32)]),
    ("LUKS header hash spec is not NUL terminated", [(HASH, b"a" * 32)]),
    ("LUKS payload is overlapping with the header", [(PAYLOAD, number(0))]),
    ("LUKS payload is overlapping with the header", [(PAYLOAD, number(7))]),
    ("LUKS key iteration count is zero", [(DIGEST_ITERATIONS, number(0))]),
    ("Keyslot 0 is corrupted (stripes 0 != 4000)", [(slot_field(0, STRIPES), number(0))]),
    ("Keyslot 1 is corrupted (stripes 3999 != 4000)", [(slot_field(1, STRIPES), number(3999))]),
    ("Keyslot 1 is corrupted (stripes -1 != 4000)", [(slot_field(1, STRIPES), number(0xFFFFFFFF))]),
    ("Keyslot 5 state (active/disable) is corrupted", [(slot_field(5, STATE), number(1))]),
    ("Keyslot 0 iteration count is zero", [(slot_field(0, ITERATIONS), number(0))]),
    ("Keyslot 7 iteration count is zero", [(slot_field(7, STATE), number(ACTIVE))]),
    ("Keyslot 0 is overlapping with the LUKS header", [(slot_field(0, OFFSET), number(7))]),
    ("Keyslots 0 and 1 are overlapping in the header", [(slot_field(1, OFFSET), number(0))]),
    ("Keyslots 0 and 1 are overlapping in the header", [(slot_field(0, OFFSET), number(13))]),
    ("Keyslots 3 and 4 are overlapping in the header", [(slot_field(3, OFFSET), number(8 + 504 * 4))]),
    ("Keyslot 7 is overlapping with the encrypted payload", [(PAYLOAD, number(8 + 7 * 504 + 499))]),
    ("Keyslot 3 is overlapping with the encrypted payload", [(slot_field(3, OFFSET), number(4000))]),
    ("Keyslots 0 and 1 are overlapping in the header", [(KEY_BYTES, number(65))]),
    ("Keyslot 0 is overlapping with the encrypted payload", [(KEY_BYTES, number(1 << 20))]),
    ("Algorithm 'aes' with key size 0 bytes not supported", [(KEY_BYTES, number(0))]),
    ("Algorithm 'aes' with key size 12 bytes not supported", [(KEY_BYTES, number(24))]),
    ("XTS cipher key length should be a multiple of 2", [(KEY_BYTES, number(33))]),
    ("Algorithm 'serpent' with key size 32 bytes not supported", [(NAME, text("serpent"))]),
    ("Algorithm '\ufffda' with key size 32 bytes not supported", [(NAME, b"\xffa\0")]),
    ("Unexpected cipher mode string format 'xts'", [(MODE, text("xts"))]),
    ("Cipher mode 'lrw' not supported", [(MODE, text("lrw-benbi"))]),
    ("IV generator 'benbi' not supported", [(MODE, text("xts-benbi"))]),
    ("Missing IV generator hash specification", [(MODE, text("xts-essiv"))]),
    ("No AES cipher with key size 64 available", [(MODE, text("xts-essiv:sha512"))]),
    ("Hash algorithm 'foo' not supported", [(MODE, text("xts-plain64:foo"))]),
    ("Hash algorithm 'whirlpool' not supported", [(HASH, text("whirlpool"))]),
]


@pytest.mark.parametrize(("wording", "changes"), REFUSALS)
def test_a_wrong_header_is_refused_in_qemus_words(
    packed: bytes, wording: str, changes: list[tuple[int, bytes]]
) -> None:
    assert refusal(changed(packed, *changes)) == wording


def test_of_two_faults_qemus_first_is_told(packed: bytes) -> None:
    # In QEMU's order: names' ends, the header's numbers, slot by slot, and then what the names mean.
    ordered = [
        ("Volume is not in LUKS format", [(0, b"X")]),
        ("LUKS version 3 is not supported", [(6, b"\0\3")]),
        ("LUKS header cipher name is not NUL terminated", [(NAME, b"a" * 32)]),
        ("LUKS header cipher mode is not NUL terminated", [(MODE, b"a" * 32)]),
        ("LUKS header hash spec is not NUL terminated", [(HASH, b"a" * 32)]),
        ("LUKS payload is overlapping with the header", [(PAYLOAD, number(7))]),
        ("LUKS key iteration count is zero", [(DIGEST_ITERATIONS, number(0))]),
        ("Keyslot 3 is corrupted (stripes 1 != 4000)", [(slot_field(3, STRIPES), number(1))]),
        ("Keyslot 3 state (active/disable) is corrupted", [(slot_field(3, STATE), number(1))]),
        ("Keyslot 3 iteration count is zero", [(slot_field(3, STATE), number(ACTIVE))]),
        ("Keyslot 3 is overlapping with the encrypted payload", [(slot_field(3, OFFSET), number(4036))]),
        ("Keyslots 3 and 4 are overlapping in the header", [(slot_field(3, OFFSET), number(2024))]),
        ("Keyslot 5 is corrupted (stripes 1 != 4000)", [(slot_field(5, STRIPES), number(1))]),
        ("Unexpected cipher mode string format 'xts'", [(MODE, text("xts"))]),
        ("Hash algorithm 'foo' not supported", [(MODE, text("lrw-benbi:foo"))]),
        ("Cipher mode 'lrw' not supported", [(MODE, text("lrw-benbi"))]),
        ("Algorithm 'aesx' with key size 32 bytes not supported", [(NAME, text("aesx"))]),
        ("Hash algorithm 'bar' not supported", [(HASH, text("bar"))]),
        ("IV generator 'benbi' not supported", [(MODE, text("xts-benbi"))]),
    ]
    for (wording, first), (_, second) in itertools.combinations(ordered, 2):
        if {offset for offset, _ in first} & {offset for offset, _ in second}:
            continue  # both in one field
        assert refusal(changed(packed, *first, *second)) == wording


@pytest.mark.parametrize(
    ("length", "wording"),
    [
        (0, "Volume is not in LUKS format"),
        (6, "LUKS version 0 is not supported"),
        (100, "LUKS payload is overlapping with the header"),
        (591, "Keyslot 7 is corrupted (stripes 3840 != 4000)"),
    ],
)
def test_a_header_cut_short_counts_as_zeros_from_there(packed: bytes, length: int, wording: str) -> None:
    assert refusal(packed[:length]) == wording


def test_a_header_on_its_own_volume_is_not_held_against_the_payload(packed: bytes) -> None:
    for payload in (0, 7, 512):
        data = changed(packed, (PAYLOAD, number(payload)))
        assert Header.parse(data, detached=True).payload_offset == payload
    overlapping = changed(packed, (slot_field(1, OFFSET), number(8)))
    assert refusal(overlapping, detached=True) == "Keyslots 0 and 1 are overlapping in the header"


def test_sums_of_offsets_do_not_wrap(packed: bytes) -> None:
    data = changed(packed, (slot_field(1, OFFSET), number(0xFFFFFFFF)))
    assert refusal(data) == "Keyslot 1 is overlapping with the encrypted payload"
    assert refusal(changed(packed, (KEY_BYTES, number(0x80000040)))).startswith("Keyslot 0 is overlapping")


def test_the_payload_ends_with_the_volume(packed: bytes) -> None:
    header = Header.parse(packed)
    assert header.payload_bytes(2068480 + 700) == 700
    assert header.payload_bytes(2068480) == 0
    with pytest.raises(Error, match="^Could not refresh total sector count: Input/output error$"):
        header.payload_bytes(2068479)


NUMBERS = st.one_of(
    st.sampled_from([0, 1, 7, 8, 504, 512, 4000, 4040, ACTIVE, 0xDEAD, 1 << 31, 0xFFFFFFFF]),
    st.integers(0, 0xFFFFFFFF),
).map(number)
FIELDS = [PAYLOAD, KEY_BYTES, DIGEST_ITERATIONS] + [
    slot_field(slot, field) for slot in range(SLOTS) for field in (STATE, ITERATIONS, OFFSET, STRIPES)
]
MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(FIELDS), NUMBERS),
        st.tuples(st.integers(0, HEADER_BYTES - 1), st.binary(min_size=1, max_size=1)),
        st.tuples(
            st.just(MODE),
            st.sampled_from(["cbc-plain", "xts-essiv:sha256", "xts-plain64:md5", "cbc-essiv:sha256"]).map(
                text
            ),
        ),
    ),
    max_size=4,
)


@given(
    mutations=MUTATIONS,
    length=st.one_of(st.just(HEADER_BYTES), st.integers(0, HEADER_BYTES)),
    detached=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_whatever_parses_has_its_extents_inside_bounds(
    packed: bytes, mutations: list[tuple[int, bytes]], length: int, detached: bool
) -> None:
    data = changed(packed, *mutations)
    try:
        header = Header.parse(data[:length], detached=detached)
    except Error:
        return
    spec = header.spec
    assert header.key_bytes == spec.key_bytes
    extents = sorted(header.material_extent(slot) for slot in range(SLOTS))
    assert extents[0][0] >= 4096
    for (offset, size), (following, _) in itertools.pairwise(extents):
        assert offset + size <= following
    assert all(size <= 256_000 for _, size in extents)
    if not detached:
        assert sum(extents[-1]) <= header.payload_offset * SECTOR
    assert Header.parse(header.pack(), detached=detached) == header


@given(
    mutations=st.lists(
        st.one_of(
            st.tuples(st.integers(112, 167), st.binary(min_size=1, max_size=4)),
            st.tuples(st.integers(208, 247), st.binary(min_size=1, max_size=4)),
        ),
        max_size=3,
    ),
    missing=st.integers(0, 256_000),
)
@settings(max_examples=15, deadline=None)
def test_unlocking_a_mutated_header_gives_the_key_or_none_or_a_refusal(
    made: tuple[Header, KeyBuffer, list[Write | Barrier], bytearray],
    mutations: list[tuple[int, bytes]],
    missing: int,
) -> None:
    _, key, _, volume = made
    try:
        header = Header.parse(changed(volume[:HEADER_BYTES], *mutations))
        offset, length = header.material_extent(0)
        material = volume[offset : offset + length - missing]
        found = run(unlocking(header, 0, PASSWORD, material, max_iterations=1000))
    except Error:
        return
    assert found is None or found.data == key.data


def test_an_absurd_iteration_count_is_refused_when_unlocking(packed: bytes) -> None:
    slot = Header.parse(changed(packed, (slot_field(0, ITERATIONS), number(0xFFFFFFFF))))
    with pytest.raises(Error, match="^Keyslot 0 iteration count 4294967295 is more than the 1000000000"):
        run(unlocking(slot, 0, PASSWORD, b""))
    digest = Header.parse(changed(packed, (DIGEST_ITERATIONS, number(0xFFFFFFFF))))
    with pytest.raises(Error, match="^LUKS key iteration count 4294967295 is more than the 5000 allowed$"):
        run(unlocking(digest, 0, PASSWORD, b"", max_iterations=5000))


def test_the_digest_takes_an_eighth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int, int]] = []

    def calibrating(hash_name: str, milliseconds: int, key_bytes: int, *, share: int = 1) -> Steps[int]:
        asked.append((hash_name, milliseconds, key_bytes, share))
        yield
        return 1000 + len(asked)

    monkeypatch.setattr("qmpd.crypto.kdf.calibrating", calibrating)
    assert run(iterations_for("sha512", 64, 2000)) == (1002, 1001)
    assert asked == [("sha512", 2000, 20, 8), ("sha512", 2000, 64, 1)]


def _kept_key_memory(monkeypatch: pytest.MonkeyPatch) -> list[KeyBuffer]:
    """All the buffers that are taken for key material from now on."""
    kept: list[KeyBuffer] = []
    take = KeyMemory.take

    def taken(self: KeyMemory, length: int) -> KeyBuffer:
        kept.append(take(self, length))
        return kept[-1]

    monkeypatch.setattr(KeyMemory, "take", taken)
    return kept


def test_an_unlock_that_is_stopped_between_any_two_steps_leaves_no_key_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    header, _, plan = run(formatting(AES_256, "sha256", PASSWORD, 1000, 1000))
    material = next(step.data for step in plan if isinstance(step, Write) and step.offset)
    count = len(list(unlocking(header, 0, PASSWORD, material)))
    assert count > 10
    for stop in range(1, count + 1):
        kept = _kept_key_memory(monkeypatch)
        steps = unlocking(header, 0, PASSWORD, material)
        for _ in range(stop):
            next(steps)
        steps.close()
        assert stop == 1 or kept
        assert not any(any(buffer.data) for buffer in kept)
        monkeypatch.undo()


def test_a_creation_that_is_stopped_between_any_two_steps_leaves_no_key_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = len(list(formatting(AES_256, "sha256", PASSWORD, 1000, 1000)))
    assert count > 10
    for stop in range(1, count + 1):
        kept = _kept_key_memory(monkeypatch)
        steps = formatting(AES_256, "sha256", PASSWORD, 1000, 1000)
        for _ in range(stop):
            next(steps)
        steps.close()
        assert kept
        assert not any(any(buffer.data) for buffer in kept)
        monkeypatch.undo()


def test_reprs_show_no_secrets(made: tuple[Header, KeyBuffer, list[Write | Barrier], bytearray]) -> None:
    header, _, plan, _ = made
    shown = repr(header) + repr(plan)
    assert "digest=" not in shown
    assert "salt=" not in shown
    assert "data=" not in shown
