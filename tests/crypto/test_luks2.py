"""LUKS2 headers: what is read of them, what is refused, and what a change writes in which order.

What is made here is opened by cryptsetup in tests/interop.
"""

from __future__ import annotations

import base64
import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.crypto import luks, luks2, luks2_binary, luks2_keyslots
from qmpd.crypto.ciphers import CipherSpec
from qmpd.crypto.luks2_binary import BinaryHeader
from qmpd.crypto.luks2_kdf import Kdf
from qmpd.crypto.plan import Barrier, Plan, Write
from qmpd.crypto.steps import run
from qmpd.errors import Error

COSTS = Kdf("pbkdf2", bytes(32), 1000)
SIZE = luks2_keyslots.NEW_SIZE
VOLUME_BYTES = 4 << 20


def apply(plan: Plan, volume: bytearray) -> None:
    for step in plan:
        if isinstance(step, Write):
            volume[step.offset : step.offset + len(step.data)] = step.data


def read(volume: bytes | bytearray) -> luks.Luks2:
    """Read the header as a block node does: what is behind the end is zeroes."""
    reader = luks.reading(detached=True)
    offset, length = next(reader)
    header: luks.LuksHeader | None = None
    while header is None:
        try:
            offset, length = reader.send(bytes(volume[offset : offset + length]).ljust(length, b"\0"))
        except StopIteration as end:
            header = end.value
    assert isinstance(header, luks.Luks2)
    return header


def opens(volume: bytes | bytearray, password: bytes) -> bytes | None:
    """The volume key that a passphrase gives."""
    header = read(volume)
    for slot in header.tried_slots:
        offset, length = header.material_extent(slot)
        key = run(header.unlocking(slot, password, bytes(volume[offset : offset + length])))
        if key is not None:
            return bytes(key.data)
    return None


@pytest.fixture(scope="module")
def made() -> tuple[bytes, bytes]:
    """A volume with "old" in slot 0, and its volume key."""
    _, key, plan = run(
        luks2_keyslots.formatting(CipherSpec.from_options(), "sha256", b"old", COSTS, 1000, detached=True)
    )
    volume = bytearray(VOLUME_BYTES)
    apply(plan, volume)
    return bytes(volume), bytes(key.data)


def test_a_new_volume_is_opened_by_its_passphrase_alone(made: tuple[bytes, bytes]) -> None:
    volume, key = made
    assert opens(volume, b"old") == key
    assert opens(volume, b"new") is None


# -- two copies


@pytest.mark.parametrize("damaged", ["primary", "secondary"])
@pytest.mark.parametrize("how", ["checksum", "magic", "zeroes"])
def test_one_whole_copy_is_enough_and_the_next_change_repairs_the_other(
    made: tuple[bytes, bytes], damaged: str, how: str
) -> None:
    volume = bytearray(made[0])
    start = 0 if damaged == "primary" else SIZE
    match how:
        case "checksum":
            volume[start + 5000] ^= 1
        case "magic":
            volume[start] ^= 1
        case "zeroes":
            volume[start : start + SIZE] = bytes(SIZE)
    assert opens(volume, b"old") == made[1]
    header = read(volume)
    assert damaged in " ".join(header.damaged)
    changed, plan = run(header.activating([1], made[1], b"new", COSTS))
    apply(plan, volume)
    again = read(volume)
    assert (again.damaged, again.active_slots) == ((), [0, 1])
    assert again.header == changed.header


def test_two_damaged_copies_are_refused(made: tuple[bytes, bytes]) -> None:
    volume = bytearray(made[0])
    volume[100] ^= 1
    volume[SIZE + 100] ^= 1
    with pytest.raises(Error, match="Both LUKS2 headers are damaged"):
        read(volume)


@pytest.mark.parametrize("newer", ["primary", "secondary"])
def test_of_two_whole_copies_the_newer_one_counts_however_far_ahead(
    made: tuple[bytes, bytes], newer: str
) -> None:
    volume = bytearray(made[0])
    header = read(volume).header
    binary = luks2_binary.parse_copy(volume[:SIZE], 0).header
    ahead = BinaryHeader(SIZE, (1 << 64) - 2, "ahead", binary.checksum_hash, binary.uuid, "")
    start = 0 if newer == "primary" else SIZE
    text = orjson.dumps(header.metadata)
    volume[start : start + SIZE] = ahead.pack(text, secondary=newer == "secondary")
    assert read(volume).header.binary.label == "ahead"
    assert "is of an earlier change" in read(volume).damaged[0]


def test_a_copy_that_was_moved_is_none(made: tuple[bytes, bytes]) -> None:
    volume = bytearray(made[0])
    volume[0:SIZE], volume[2 * SIZE : 3 * SIZE] = bytes(SIZE), volume[SIZE : 2 * SIZE]
    volume[SIZE : 2 * SIZE] = bytes(SIZE)
    with pytest.raises(Error, match="Volume is not in LUKS format"):
        read(volume)


def test_a_sequence_number_that_can_not_grow_is_refused_at_the_next_change(made: tuple[bytes, bytes]) -> None:
    volume = bytearray(made[0])
    header = read(volume).header
    last = BinaryHeader(SIZE, (1 << 64) - 1, "", "sha256", "u", "")
    volume[:SIZE] = last.pack(orjson.dumps(header.metadata), secondary=False)
    with pytest.raises(Error, match="sequence number"):
        run(read(volume).activating([1], made[1], b"new", COSTS))


# -- metadata that lies


def metadata_of(made: tuple[bytes, bytes]) -> dict[str, Any]:
    return copy.deepcopy(read(made[0]).header.metadata)


def parsed(metadata: object) -> luks2.Header:
    return luks2.parse_metadata(BinaryHeader(SIZE, 1, "", "sha256", "", ""), orjson.dumps(metadata))


def overlapping(metadata: dict[str, Any]) -> None:
    metadata["keyslots"]["1"] = copy.deepcopy(metadata["keyslots"]["0"])


def no_segments(metadata: dict[str, Any]) -> None:
    metadata["segments"] = {}
    metadata["digests"]["0"]["segments"] = []


def set_to(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(metadata: dict[str, Any]) -> None:
        *where, last = path
        for name in where:
            metadata = metadata[name]
        metadata[last] = value

    return change


def removed(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(metadata: dict[str, Any]) -> None:
        *where, last = path
        for name in where:
            metadata = metadata[name]
        del metadata[last]

    return change


AREA = ("keyslots", "0", "area")
KDF = ("keyslots", "0", "kdf")
SEGMENT = ("segments", "0")
CONFIG = ("config",)
DIGEST = ("digests", "0")


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (overlapping, "overlaps with that of keyslot 0"),
        (set_to(*AREA, "offset", value="0"), "is not inside the area of keyslots"),
        (set_to(*AREA, "offset", value="99999999999999"), "is not inside the area of keyslots"),
        (set_to(*AREA, "offset", value=32768), "is no string"),
        (set_to(*AREA, "offset", value="-1"), "is no number that can be"),
        (set_to(*AREA, "offset", value="1e3"), "is no number that can be"),
        (set_to(*AREA, "size", value="512"), "is too small for the key"),
        (set_to(*AREA, "key_size", value=1 << 40), "is no number from 1 to 512"),
        (set_to("keyslots", "0", "key_size", value=True), "is no number from 1 to 512"),
        (set_to("keyslots", "0", "key_size", value=64.0), "is no number from 1 to 512"),
        (set_to("keyslots", "0", "af", "stripes", value=4001), "is no number from 1 to 4000"),
        (set_to("keyslots", "99", value={}), "no number below 32"),
        (set_to("keyslots", "00", value={}), "no number below 32"),
        (set_to("keyslots", value=[]), "is no object"),
        (set_to(*KDF, "salt", value="%%%"), "is not base64"),
        (set_to(*KDF, "salt", value=""), "is no string, or an empty one"),
        (set_to(*KDF, "type", value="scrypt"), "is of a type that is not known"),
        (set_to(*KDF, "iterations", value=0), "is no number from 1"),
        (removed(*KDF, "salt"), "has no 'salt'"),
        (removed("tokens"), "has no 'tokens'"),
        (set_to("tokens", value=7), "is no object"),
        (set_to(*DIGEST, "keyslots", value=["7"]), "names a keyslot that is not there"),
        (set_to(*DIGEST, "segments", value=["7"]), "names a segment that is not there"),
        (set_to(*DIGEST, "segments", value=[]), "not one digest of a volume key"),
        (set_to(*DIGEST, "type", value="sha3"), "not one digest of a volume key"),
        (set_to(*SEGMENT, "sector_size", value=513), "is no power of two"),
        (set_to(*SEGMENT, "sector_size", value=8192), "is no number from 512 to 4096"),
        (set_to(*SEGMENT, "size", value="1000"), "does not consist of whole sectors"),
        (set_to(*SEGMENT, "offset", value="100"), "does not consist of whole sectors"),
        (set_to(*SEGMENT, "type", value="linear"), "of the type 'linear', which is not supported"),
        (set_to(*SEGMENT, "integrity", value={"type": "hmac(sha256)"}), "is authenticated"),
        (set_to(*SEGMENT, "flags", value=["in-reencryption"]), "reencryption that is not finished"),
        (set_to("segments", value={}), "names a segment that is not there"),
        (no_segments, "there is no segment"),
        (set_to("segments", "1", value={}), "has no 'type'"),
        (set_to(*CONFIG, "json_size", value="4096"), "another size of the JSON area"),
        (set_to(*CONFIG, "keyslots_size", value="1000"), "is no multiple of 4096"),
        (set_to(*CONFIG, "keyslots_size", value=str(1 << 40)), "is no number that can be"),
        (
            set_to(*CONFIG, "requirements", value={"mandatory": ["online-reencrypt-v2"]}),
            "'online-reencrypt-v2' is not supported: an online reencryption is not finished",
        ),
        (set_to(*CONFIG, "requirements", value={"mandatory": ["opal"]}), "'opal' is not supported"),
        (set_to(*CONFIG, "requirements", value={"mandatory": 3}), "is no list"),
    ],
)
def test_metadata_that_lies_is_refused_with_the_place(
    made: tuple[bytes, bytes], change: Callable[[dict[str, Any]], None], refusal: str
) -> None:
    metadata = metadata_of(made)
    change(metadata)
    with pytest.raises(Error, match=refusal):
        parsed(metadata)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"7", b"[" * (4 << 20), b'{"keyslots":' * (1 << 18)])
def test_text_that_is_no_such_object_is_refused(text: bytes) -> None:
    with pytest.raises(Error, match="LUKS2 metadata"):
        luks2.parse_metadata(BinaryHeader(4 << 20, 1, "", "sha256", "", ""), text)


def leaves(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for name, member in value.items():
            yield (*path, name)
            yield from leaves(member, (*path, name))


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 62), 1 << 62)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@given(data=st.data())
def test_whatever_stands_in_the_metadata_it_is_understood_or_refused(
    made: tuple[bytes, bytes], data: st.DataObject
) -> None:
    metadata = metadata_of(made)
    for _ in range(data.draw(st.integers(1, 3))):
        *where, last = data.draw(st.sampled_from(list(leaves(metadata))))
        target = metadata
        for name in where:
            target = target[name]
        if data.draw(st.booleans()):
            target[last] = data.draw(ANYTHING)
        else:
            del target[last]
    with suppress(Error):
        header = luks.Luks2(parsed(metadata))
        for slot in header.tried_slots:
            offset, length = header.material_extent(slot)
            assert offset + length <= SIZE * 2 + header.header.keyslots_bytes


@pytest.mark.parametrize(
    ("kdf", "refusal"),
    [
        (Kdf("argon2id", bytes(32), 1 << 31, memory=1 << 20, cpus=4), "takes too long"),
        (Kdf("argon2id", bytes(32), 4, memory=31, cpus=4), "needs more memory than 31 KiB"),
        (Kdf("pbkdf2", bytes(32), (1 << 32) - 1), "PBKDF2 iteration count 4294967295 is more than"),
        (Kdf("argon2i", b"short", 4, memory=64, cpus=1), "argon2 failed: Salt is too short"),
    ],
)
def test_costs_that_nobody_can_want_are_refused(kdf: Kdf, refusal: str) -> None:
    with pytest.raises(Error, match=refusal):
        kdf.derive_into(b"password", memoryview(bytearray(64)))


# -- what nobody here knows is kept


def test_tokens_and_unknown_members_are_written_back_as_they_were(made: tuple[bytes, bytes]) -> None:
    metadata = metadata_of(made)
    metadata["tokens"]["3"] = {"type": "systemd-tpm2", "keyslots": ["0"], "tpm2-blob": "x"}
    metadata["keyslots"]["0"]["colour"] = "blue"
    metadata["config"]["flags"] = ["allow-discards"]
    header = luks.Luks2(parsed(metadata))
    changed, _ = run(header.activating([1], made[1], b"new", COSTS))
    assert changed.header.metadata["tokens"] == metadata["tokens"]
    assert changed.header.metadata["keyslots"]["0"] == metadata["keyslots"]["0"]
    assert changed.header.metadata["config"] == metadata["config"]
    erased, _ = changed.erasing([0])
    assert erased.header.metadata["tokens"]["3"]["keyslots"] == []
    assert erased.header.metadata["digests"]["0"]["keyslots"] == ["1"]


def test_a_slot_that_is_to_be_ignored_is_not_tried_and_a_preferred_one_comes_first(
    made: tuple[bytes, bytes],
) -> None:
    header, _ = run(read(made[0]).activating([1, 2, 3], made[1], b"new", COSTS))
    metadata = copy.deepcopy(header.header.metadata)
    metadata["keyslots"]["1"]["priority"] = 0
    metadata["keyslots"]["3"]["priority"] = 2
    assert luks.Luks2(parsed(metadata)).tried_slots == [3, 0, 2]


def test_a_slot_with_another_key_than_the_volumes_opens_nothing(made: tuple[bytes, bytes]) -> None:
    header, plan = run(read(made[0]).activating([1], made[1], b"new", COSTS))
    volume = bytearray(made[0])
    apply(plan, volume)
    metadata = copy.deepcopy(header.header.metadata)
    metadata["digests"]["0"]["keyslots"] = ["0"]
    metadata["digests"]["1"] = {**metadata["digests"]["0"], "keyslots": ["1"], "segments": []}
    unbound = luks.Luks2(parsed(metadata))
    assert unbound.tried_slots == [0]
    offset, length = unbound.material_extent(1)
    assert run(unbound.unlocking(1, b"new", bytes(volume[offset : offset + length]))) is None


# -- changes that are interrupted


def interrupted(plan: Plan, volume: bytes | bytearray) -> Iterator[bytearray]:
    """The volume after each prefix of a plan's writes, the last of them whole or torn in half."""
    writes = [step for step in plan if isinstance(step, Write)]
    for count, torn in itertools.product(range(len(writes) + 1), (False, True)):
        state = bytearray(volume)
        apply(list(writes[:count]), state)
        if torn and count < len(writes):
            half = writes[count].data[: len(writes[count].data) // 2]
            apply([Write(writes[count].offset, half)], state)
        yield state


def barriers_between(plan: Plan) -> bool:
    """Whether no two writes are without a barrier between, but overwritten key material of several slots."""
    return all(
        isinstance(second, Barrier)
        for first, second in itertools.pairwise(plan)
        if isinstance(first, Write) and len(first.data) == SIZE
    )


def test_wherever_a_new_key_is_interrupted_the_old_one_opens(made: tuple[bytes, bytes]) -> None:
    volume, key = made
    _, plan = run(read(volume).activating([1], key, b"new", COSTS))
    assert barriers_between(plan)
    states = list(interrupted(plan, volume))
    assert all(opens(state, b"old") == key for state in states)
    assert opens(states[-2], b"new") == key


def test_wherever_the_only_key_is_replaced_the_old_or_the_new_one_opens(made: tuple[bytes, bytes]) -> None:
    volume, key = made
    _, plan = run(read(volume).activating([0], key, b"new", COSTS))
    assert barriers_between(plan)
    for state in interrupted(plan, volume):
        assert (opens(state, b"old") or opens(state, b"new")) == key
    assert (opens(state, b"old"), opens(state, b"new")) == (None, key)


def test_wherever_an_erasure_is_interrupted_the_other_key_opens_and_at_the_end_nothing_is_left(
    made: tuple[bytes, bytes],
) -> None:
    volume, key = made
    header, plan = run(read(volume).activating([1], key, b"new", COSTS))
    both = bytearray(volume)
    apply(plan, both)
    offset, length = header.material_extent(0)
    material = both[offset : offset + length]
    _, plan = read(both).erasing([0])
    assert barriers_between(plan)
    for state in interrupted(plan, both):
        assert opens(state, b"new") == key
    assert opens(state, b"old") is None
    kept = sum(one == other for one, other in zip(material, state[offset : offset + length], strict=True))
    assert kept < length // 64
    salt = base64.b64encode(header.derivation(0).salt)
    assert salt not in bytes(state)


def test_a_header_without_room_for_another_key_says_so(made: tuple[bytes, bytes]) -> None:
    metadata = metadata_of(made)
    metadata["config"]["keyslots_size"] = metadata["keyslots"]["0"]["area"]["size"]
    header = luks.Luks2(parsed(metadata))
    with pytest.raises(Error, match="There is no room for another key"):
        run(header.activating([1], made[1], b"new", COSTS))
    # The slot itself can get another one, in its own place.
    volume = bytearray(made[0])
    changed, plan = run(header.activating([0], made[1], b"new", COSTS))
    apply(plan, volume)
    assert opens(volume, b"new") == made[1]
    assert changed.material_extent(0) == header.material_extent(0)
