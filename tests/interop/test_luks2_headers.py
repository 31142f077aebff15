"""LUKS2 and LUKS1 headers: cryptsetup and qmpd open, change and repair what the other made.

After each change cryptsetup reads both copies of the metadata without finding anything to repair: it would
write at once what it repairs, so the header's bytes are looked at before and after.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from daemons import RunningDaemon
from keyslot_disks import run_amend
from luks2_volumes import CHEAP, KEY, PASSPHRASES, Volume, new_graph
from naive_sectors import decrypted

from qmpd.block.drivers.luks import create
from qmpd.block.graph import Graph
from qmpd.block.node import Node
from qmpd.crypto import kdf
from qmpd.crypto.steps import Steps
from qmpd.errors import Error

pytestmark = pytest.mark.peer("cryptsetup")

StartDaemon = Callable[..., RunningDaemon]

MEBI: Final = 1 << 20
WRONG: Final = "Invalid password, cannot unlock any keyslot"

#: Each cipher by cryptsetup's name and by the options of QAPI, and the bits of its key.
CIPHERS: Final = (
    ("aes-xts-plain64", 512, {"cipher-alg": "aes-256"}),
    ("aes-xts-plain64", 256, {"cipher-alg": "aes-128"}),
    ("aes-xts-plain", 512, {"cipher-alg": "aes-256", "ivgen-alg": "plain"}),
    (
        "aes-cbc-essiv:sha256",
        256,
        {"cipher-alg": "aes-256", "cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha256"},
    ),
)
HASHES: Final = ("sha256", "sha512", "sha1")
KDFS: Final = ("pbkdf2", "argon2i", "argon2id")
SECTOR_SIZES: Final = (512, 1024, 2048, 4096)

each_kind = pytest.mark.parametrize("detached", [False, True], ids=["inline", "detached"])
each_cipher = pytest.mark.parametrize("cipher", CIPHERS, ids=[f"{name}-{bits}" for name, bits, _ in CIPHERS])

#: Version, key derivation, sector size, and whether the header is detached.
FORMATS: Final = [
    *((1, "pbkdf2", 512, detached) for detached in (False, True)),
    *((2, kind, size, detached) for kind in KDFS for size in (512, 4096) for detached in (False, True)),
    *((2, kind, 1024, False) for kind in KDFS),
    *((2, kind, 2048, True) for kind in KDFS),
]


@pytest.fixture(autouse=True)
def cheap_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new header's digest takes an eighth of a second, for each passphrase that is tried."""

    def least(hash_name: str, milliseconds: int, key_bytes: int, share: int = 1) -> Steps[int]:
        yield
        return 1000

    monkeypatch.setattr(kdf, "calibrating", least)


def costs(kind: str) -> dict[str, Any]:
    """A new key's costs: as little as there can be."""
    argon2 = {} if kind == "pbkdf2" else {"pbkdf-memory": 32, "pbkdf-parallel": 1}
    return {"iter-time": 1, "pbkdf": kind, **argon2}


def cost(kind: str) -> dict[str, Any]:
    """The same for :func:`amend`."""
    return {name.replace("-", "_"): value for name, value in costs(kind).items()}


async def amend(node: Node, *, force: bool = False, **members: Any) -> None:
    """Change keyslots; a member is written with an underscore for each hyphen."""
    options = {name.replace("_", "-"): value for name, value in members.items()}
    await node.amend(
        {"driver": "luks", **options}, force=force, progress=lambda *_: None, commit=lambda: None
    )


async def make(
    graph: Graph, volume: Volume, size: int | None = MEBI, secret: str = "first", **options: Any
) -> None:
    """Have qmpd make a volume."""
    role = "header" if volume.detached else "file"
    volume.header.touch()
    reference = {"driver": "file", "filename": str(volume.header)}
    more = {} if size is None else {"size": size}
    await create(graph, {"driver": "luks", role: reference, "key-secret": secret, **more, **options})


async def info_of(graph: Graph, volume: Volume, secret: str = "first") -> dict[str, Any]:
    """What qmpd says of a volume, opened with this passphrase."""
    async with volume.open(graph, secret) as node:
        info = node.format_specific()
    assert info is not None
    data: dict[str, Any] = info["data"]
    return data


def is_whole(volume: Volume) -> None:
    """Cryptsetup accepts the header, and finds nothing in it to repair."""
    with volume.header.open("rb") as file:
        before = file.read(MEBI)
        shown = volume.cryptsetup("luksDump")
        file.seek(0)
        assert file.read(MEBI) == before
    if "Epoch" in shown:
        primary, secondary = volume.sequences()
        assert primary == secondary


def slots_of(volume: Volume) -> list[int]:
    """The keyslots in use, as cryptsetup sees them."""
    shown = volume.cryptsetup("luksDump")
    keyslots = shown.partition("Keyslots:")[2].partition("\nTokens:")[0]
    found = re.findall(r"^Key Slot (\d): ENABLED$|", shown, re.MULTILINE)
    return sorted(
        int(slot)
        for slot in [*found, *re.findall(r"^  (\d+): luks2(?: \(unbound\))?$", keyslots, re.MULTILINE)]
        if slot
    )


# -- what each makes is the other's


@each_cipher
@pytest.mark.parametrize(("version", "kind", "sector_size", "detached"), FORMATS)
async def test_each_opens_what_the_other_made(
    tmp_path: Path,
    version: int,
    kind: str,
    sector_size: int,
    cipher: tuple[str, int, dict[str, str]],
    detached: bool,
) -> None:
    name, bits, options = cipher
    hash_name = HASHES[(KDFS.index(kind) + CIPHERS.index(cipher)) % 3]
    volume = Volume(tmp_path, detached=detached)
    only_2 = ("--sector-size", str(sector_size), "--luks2-keyslots-size", "1m") if version == 2 else ()
    volume.format("--cipher", name, "--hash", hash_name, *only_2, kdf=kind, version=version, key_bits=bits)
    expected = {**options, "hash-alg": hash_name, "detached-header": detached}
    if version == 2:
        expected |= {"version": 2, "sector-size": sector_size}
    async with new_graph() as graph:
        info = await info_of(graph, volume)
        assert expected.items() <= info.items()
        assert [slot.get("pbkdf") for slot in info["slots"] if slot["active"]] == [
            kind if version == 2 else None
        ]

        volume.header.unlink()
        extension = {"version": 2, "sector-size": sector_size, "label": "disk", "subsystem": "test"}
        make_options = {
            **options,
            "hash-alg": hash_name,
            **costs(kind),
            **(extension if version == 2 else {}),
        }
        await make(graph, volume, **make_options)
    is_whole(volume)
    volume.cryptsetup("open", "--test-passphrase", "--type", f"luks{version}", "--key-file", "first")
    shown = volume.cryptsetup("luksDump")
    if version == 2:
        assert re.search(rf"cipher: {name}\n\tsector: {sector_size} \[bytes\]", shown)
        assert re.search(rf"PBKDF:\s+{kind}\n", shown)
        assert re.search(r"Label:\s+disk\nSubsystem:\s+test\n", shown)
        assert re.search(rf"Key:\s+{bits} bits\n", shown)


@each_cipher
@pytest.mark.parametrize(("version", "kind"), [(1, "pbkdf2"), *((2, kind) for kind in KDFS)])
async def test_the_two_amend_a_header_in_turn_ten_times(
    tmp_path: Path, version: int, kind: str, cipher: tuple[str, int, dict[str, str]]
) -> None:
    name, bits, options = cipher
    number = CIPHERS.index(cipher)
    place = number + KDFS.index(kind) + version
    sector_size = 512 if version == 1 else SECTOR_SIZES[number]
    volume = Volume(tmp_path, detached=place % 2 == 1)
    async with new_graph() as graph:
        if place % 4 < 2:
            extension = {"version": 2, "sector-size": sector_size} if version == 2 else {}
            await make(graph, volume, **options, **extension, **costs(kind))
        else:
            only_2 = ("--sector-size", str(sector_size)) if version == 2 else ()
            volume.format("--cipher", name, *only_2, kdf=kind, version=version, key_bits=bits)
        volume.cryptsetup("luksHeaderBackup", "--header-backup-file", "backup")
        slots = {0: "first"}
        async with volume.open(graph) as node:
            await node.pwrite(0, b"\x5a" * 8192)
            for turn in range(10):
                old, new = PASSPHRASES[turn // 2 % 3], PASSPHRASES[(turn // 2 + 1) % 3]
                sequence = volume.sequences()[0] if version == 2 else 0
                if turn % 2:
                    change_by_cryptsetup(volume, slots, old, new, kind)
                else:
                    await change_by_qmpd(node, slots, old, new, kind)
                assert slots_of(volume) == sorted(slots)
                is_whole(volume)
                if version == 2:
                    assert sequence < volume.sequences()[0] <= sequence + 2
            assert volume.opened_by() == {name: name in slots.values() for name in PASSPHRASES}
            assert bytes(await node.pread(0, 8192)) == b"\x5a" * 8192
        for passphrase in PASSPHRASES:
            if passphrase in slots.values():
                await info_of(graph, volume, passphrase)
            else:
                with pytest.raises(Error, match=WRONG):
                    await info_of(graph, volume, passphrase)
        volume.cryptsetup("luksHeaderRestore", "--header-backup-file", "backup")
        is_whole(volume)
        assert [slot["active"] for slot in (await info_of(graph, volume))["slots"]].count(True) == 1


async def change_by_qmpd(node: Node, slots: dict[int, str], old: str, new: str, kind: str) -> None:
    """Put the new passphrase into a free slot, and into one that has the old one."""
    free = next(slot for slot in range(8) if slot not in slots)
    await amend(node, state="active", secret=old, new_secret=new, **cost(kind))
    slots[free] = new


def change_by_cryptsetup(volume: Volume, slots: dict[int, str], old: str, new: str, kind: str) -> None:
    """Add the new passphrase far away, and take out one slot with the old one."""
    far = next(slot for slot in range(7, 0, -1) if slot not in slots)
    volume.add_key(new, new, "--key-slot", str(far), kdf=kind)
    slots[far] = new
    victim = next(slot for slot, passphrase in slots.items() if passphrase == old)
    volume.cryptsetup("luksKillSlot", str(victim), "--key-file", new)
    del slots[victim]


# -- layouts that only cryptsetup makes


@pytest.mark.parametrize(
    ("metadata_size", "detached"),
    list(
        zip(["16k", "32k", "64k", "128k", "256k", "512k", "1m", "2m", "4m"], itertools.cycle([False, True]))
    ),
)
async def test_metadata_areas_of_every_size_are_changed_in_place(
    tmp_path: Path, metadata_size: str, detached: bool
) -> None:
    volume = Volume(tmp_path, detached=detached, size=32 * MEBI)
    volume.format("--luks2-metadata-size", metadata_size, "--luks2-keyslots-size", "1m", key_bits=512)
    before = volume.metadata()["config"]
    async with new_graph() as graph, volume.open(graph) as node:
        await amend(node, state="active", new_secret="second", **cost("argon2id"))
        await amend(node, state="active", new_secret="third", **cost("pbkdf2"))
        await amend(node, state="inactive", keyslot=0)
    is_whole(volume)
    assert volume.metadata()["config"] == before
    assert volume.opened_by() == {"first": False, "second": True, "third": True}


async def test_a_keyslots_area_that_is_full_takes_another_key_only_when_one_has_gone(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    volume.format("--luks2-keyslots-size", "516096", key_bits=512)  # room for two
    async with new_graph() as graph, volume.open(graph) as node:
        await amend(node, state="active", new_secret="second", **cost("pbkdf2"))
        assert volume.tried("luksAddKey", *CHEAP["pbkdf2"], "--key-file", "first", "third").returncode != 0
        before = volume.header.read_bytes()
        with pytest.raises(Error, match="There is no room for another key"):
            await amend(node, state="active", new_secret="third", **cost("pbkdf2"))
        assert volume.header.read_bytes() == before
        # In its own place a slot gets another one.
        await amend(
            node, force=True, state="active", keyslot=0, new_secret="third", secret="second", **cost("pbkdf2")
        )
        is_whole(volume)
        assert volume.opened_by() == {"first": False, "second": True, "third": True}
        volume.cryptsetup("luksKillSlot", "1", "--key-file", "third")
        await amend(node, state="active", secret="third", new_secret="first", **cost("argon2i"))
    is_whole(volume)
    assert volume.opened_by() == {"first": True, "second": False, "third": True}


@pytest.mark.parametrize(("version", "offset"), [(1, 8192), (2, 65536)])
@each_kind
async def test_a_payload_begins_where_cryptsetup_was_told(
    tmp_path: Path, version: int, offset: int, detached: bool
) -> None:
    volume = Volume(tmp_path, detached=detached, size=offset * 512 + MEBI)
    size = 2048 if version == 2 else 512
    only_2 = ("--sector-size", str(size)) if version == 2 else ()
    volume.format("--offset", str(offset), *only_2, version=version, key_bits=512)
    async with new_graph() as graph:
        async with volume.open(graph) as node:
            assert node.size == MEBI
            await node.pwrite(MEBI - 512, b"\x5a" * 512)
        assert (await info_of(graph, volume))["payload-offset"] == offset * 512
    stored = volume.payload.read_bytes()[-size:]
    plain = decrypted("aes-xts-plain64", KEY, stored, sector_size=size, first=(MEBI - size) // 512)
    assert plain[-512:] == b"\x5a" * 512


async def test_labels_priorities_and_tokens_are_cryptsetups_and_stay(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    volume.format("--label", "größer", "--subsystem", "s" * 47, key_bits=512)
    volume.add_key("first", "second")
    volume.add_key("first", "third")
    (tmp_path / "token.json").write_text(
        '{"type": "ours", "keyslots": ["0", "1"], "what": {"ever": [1.5, null]}}'
    )
    volume.cryptsetup("token", volume.header.name, "--json-file", "token.json", on="import")
    async with new_graph() as graph:
        info = await info_of(graph, volume)
        assert (info["label"], info["subsystem"]) == ("größer", "s" * 47)
        volume.cryptsetup("config", "--key-slot", "0", "--priority", "ignore")
        volume.cryptsetup("config", "--key-slot", "2", "--priority", "prefer")
        # Neither of the two tries it unless it is asked for.
        assert volume.opened_by() == {"first": False, "second": True, "third": True}
        with pytest.raises(Error, match=WRONG):
            await info_of(graph, volume, "first")
        info = await info_of(graph, volume, "third")
        assert [slot["priority"] for slot in info["slots"]] == [0, 1, 2]
        token = volume.metadata()["tokens"]["0"]
        async with volume.open(graph, "second") as node:
            await amend(node, state="active", new_secret="first", **cost("pbkdf2"))
            assert volume.metadata()["tokens"]["0"] == token
            await amend(node, state="inactive", keyslot=0, old_secret="first")
    is_whole(volume)
    metadata = volume.metadata()
    assert metadata["tokens"]["0"] == {**token, "keyslots": ["1"]}
    assert {slot: one.get("priority") for slot, one in metadata["keyslots"].items()} == {
        "1": None,
        "2": 2,
        "3": None,
    }
    assert "größer" in volume.cryptsetup("luksDump")


@pytest.mark.parametrize("keyslots_size", ["516096", "1m"], ids=["in its place", "beside it"])
async def test_a_slot_that_gets_another_passphrase_keeps_its_priority_and_its_tokens(
    tmp_path: Path, keyslots_size: str
) -> None:
    volume = Volume(tmp_path)
    volume.format("--luks2-keyslots-size", keyslots_size, key_bits=512)
    volume.add_key("first", "second")
    (tmp_path / "token.json").write_text('{"type": "ours", "keyslots": ["0", "1"]}')
    volume.cryptsetup("token", volume.header.name, "--json-file", "token.json", on="import")
    volume.cryptsetup("config", "--key-slot", "0", "--priority", "prefer")
    kept = volume.metadata()["tokens"]
    async with new_graph() as graph, volume.open(graph) as node:
        await amend(node, force=True, state="active", keyslot=0, new_secret="third", **cost("pbkdf2"))
        is_whole(volume)
        assert (volume.metadata()["tokens"], volume.metadata()["keyslots"]["0"]["priority"]) == (kept, 2)
        # As cryptsetup does it itself.
        words = ("--key-slot", "0", "--key-file", "third", "first")
        volume.cryptsetup("luksChangeKey", *CHEAP["pbkdf2"], *words)
        assert (volume.metadata()["tokens"], volume.metadata()["keyslots"]["0"]["priority"]) == (kept, 2)
    assert volume.opened_by() == {"first": True, "second": True, "third": False}


async def test_what_cryptsetup_converts_is_opened_and_changed(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    async with new_graph() as graph:
        await make(graph, volume, version=2, **costs("pbkdf2"))
        volume.cryptsetup("convert", "--type", "luks1")
        assert "version" not in await info_of(graph, volume)
        async with volume.open(graph) as node:
            await amend(node, state="active", new_secret="second", **cost("pbkdf2"))
        volume.cryptsetup("convert", "--type", "luks2")
        assert (await info_of(graph, volume, "second"))["version"] == 2
        volume.cryptsetup("luksConvertKey", *CHEAP["argon2i"], "--key-slot", "1", "--key-file", "second")
        async with volume.open(graph, "second") as node:
            await amend(node, state="inactive", keyslot=0)
    is_whole(volume)
    assert volume.opened_by() == {"first": False, "second": True, "third": False}


async def test_a_slot_with_another_key_neither_opens_the_volume_nor_is_in_the_way(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    volume.format(key_bits=512)
    volume.cryptsetup(
        *("luksAddKey", *CHEAP["argon2id"], "--unbound", "--key-size", "256", "--key-file", "first", "second")
    )
    is_whole(volume)
    async with new_graph() as graph:
        with pytest.raises(Error, match=WRONG):
            await info_of(graph, volume, "second")
        async with volume.open(graph) as node:
            await amend(node, state="active", new_secret="third", **cost("pbkdf2"))
            assert slots_of(volume) == [0, 1, 2]
            # It is not the last one with the volume key that goes, but whoever writes over it has to say so.
            with pytest.raises(Error, match="Refusing to overwrite active keyslot 1"):
                await amend(node, state="active", keyslot=1, new_secret="second", **cost("pbkdf2"))
            await amend(node, force=True, state="active", keyslot=1, new_secret="second", **cost("pbkdf2"))
            is_whole(volume)
            assert volume.opened_by() == {"first": True, "second": True, "third": True}
            assert [sorted(one["keyslots"]) for one in volume.metadata()["digests"].values()] == [
                ["0", "1", "2"]
            ]
    volume.cryptsetup(
        "luksAddKey", *CHEAP["pbkdf2"], "--unbound", "--key-size", "128", "--key-file", "first", "second"
    )
    async with new_graph() as graph, volume.open(graph) as node:
        await amend(node, state="inactive", keyslot=3)
    is_whole(volume)
    assert list(volume.metadata()["digests"]) == ["0"]
    assert slots_of(volume) == [0, 1, 2]


@each_kind
async def test_a_keyslot_has_a_cipher_of_its_own(tmp_path: Path, detached: bool) -> None:
    volume = Volume(tmp_path, detached=detached)
    slot_cipher = ("--keyslot-cipher", "aes-cbc-essiv:sha256", "--keyslot-key-size", "128")
    volume.format(*slot_cipher, key_bits=512)
    volume.add_key("first", "second", "--keyslot-cipher", "aes-xts-plain64", "--keyslot-key-size", "256")
    async with new_graph() as graph:
        await info_of(graph, volume, "second")
        async with volume.open(graph) as node:
            await amend(node, state="active", new_secret="third", **cost("argon2i"))
    is_whole(volume)
    areas = [slot["area"] for slot in volume.metadata()["keyslots"].values()]
    assert [(one["encryption"], one["key_size"]) for one in areas] == [
        ("aes-cbc-essiv:sha256", 16),
        ("aes-xts-plain64", 32),
        ("aes-cbc-essiv:sha256", 16),
    ]
    assert volume.opened_by() == {"first": True, "second": True, "third": True}


async def test_the_last_key_goes_by_force_and_the_open_disk_gets_another(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    volume.format(key_bits=512)
    async with new_graph() as graph:
        async with volume.open(graph) as node:
            with pytest.raises(Error, match="Attempt to erase the only active keyslot 0"):
                await amend(node, state="inactive", keyslot=0)
            await amend(node, force=True, state="inactive", keyslot=0)
            is_whole(volume)
            assert volume.opened_by() == dict.fromkeys(PASSPHRASES, False)
            with pytest.raises(Error, match=WRONG):
                await amend(node, state="active", new_secret="second", **cost("pbkdf2"))
            await amend(node, force=True, state="active", new_secret="second", **cost("pbkdf2"))
        is_whole(volume)
        assert volume.opened_by() == {"first": False, "second": True, "third": False}
        await info_of(graph, volume, "second")
        volume.cryptsetup("erase")
        with pytest.raises(Error, match=WRONG):
            await info_of(graph, volume, "second")


# -- what is not supported


def authenticated(metadata: dict[str, Any]) -> None:
    integrity = {"type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none"}
    metadata["segments"]["0"]["integrity"] = integrity


async def test_an_authenticated_payload_is_refused(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    volume.format("--sector-size", "512", key_bits=512)
    volume.rewrite(authenticated)
    assert "hmac(sha256)" in volume.cryptsetup("luksDump")
    async with new_graph() as graph:
        with pytest.raises(Error, match="is authenticated, which is not supported"):
            await info_of(graph, volume)


@pytest.mark.parametrize("mode", ["again", "encrypt", "decrypt"])
async def test_a_reencryption_that_is_not_finished_is_refused(tmp_path: Path, mode: str) -> None:
    volume = Volume(tmp_path, size=40 * MEBI, detached=mode == "decrypt")
    if mode == "encrypt":
        options = ("--encrypt", "--type", "luks2", "--reduce-device-size", "32M")
    else:
        volume.format(key_bits=512)
        options = ("--decrypt", "--force-offline-reencrypt") if mode == "decrypt" else ()
    where = ("--header", volume.header.name) if mode == "decrypt" else ()
    words = (*options, *where, "--init-only", *CHEAP["argon2id"], "--key-file", "first")
    volume.cryptsetup("reencrypt", *words, on=volume.payload.name)
    before = volume.header.read_bytes()
    async with new_graph() as graph:
        with pytest.raises(Error, match="online-reencrypt.*an online reencryption is not finished"):
            await info_of(graph, volume)
    assert volume.header.read_bytes() == before


# -- copies that are damaged


@pytest.mark.parametrize(("copy", "metadata_size"), [("primary", 1 << 20), ("secondary", 16 << 10)])
@pytest.mark.parametrize("where", [0, 8, 4096 + 50], ids=["magic", "size", "json"])
async def test_of_a_header_with_one_good_copy_each_makes_two(
    tmp_path: Path, metadata_size: int, copy: str, where: int
) -> None:
    volume = Volume(tmp_path)
    volume.format("--luks2-metadata-size", str(metadata_size), key_bits=512)
    start = 0 if copy == "primary" else metadata_size
    volume.overwrite(start + where, b"\xff" * 4)
    async with new_graph() as graph, volume.open(graph) as node:
        info = node.format_specific()
        assert info is not None
        assert len(info["data"]["damaged"]) == 1
        assert copy in info["data"]["damaged"][0]
        await amend(node, state="active", new_secret="second", **cost("pbkdf2"))
        info = node.format_specific()
        assert info is not None
        assert "damaged" not in info["data"]
    is_whole(volume)
    assert volume.opened_by() == {"first": True, "second": True, "third": False}
    volume.overwrite(start + where, b"\xee" * 4)
    volume.tried("luksDump")  # which repairs
    is_whole(volume)
    async with new_graph() as graph:
        assert "damaged" not in await info_of(graph, volume, "second")


async def test_cryptsetup_finishes_a_change_that_was_cut_off_between_the_copies(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    volume.format(key_bits=512)
    size = 16 << 10
    before = volume.header.read_bytes()[:size]
    async with new_graph() as graph:
        async with volume.open(graph) as node:
            await amend(node, state="active", new_secret="second", **cost("argon2id"))
        after = volume.header.read_bytes()[:size]
        middle = 4096 + 512  # of the JSON text
        for first in (before, before[:middle] + after[middle:], after[:middle] + before[middle:]):
            volume.overwrite(0, first)
            info = await info_of(graph, volume, "second")
            assert len(info["damaged"]) == 1
            assert volume.opened_by() == {"first": True, "second": True, "third": False}
            is_whole(volume)


# -- what was on the disk before


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("metadata_size", ["16k", "128k", "4m"])
async def test_a_new_header_leaves_nothing_of_an_old_one_that_anybody_would_take_for_one(
    tmp_path: Path, version: int, metadata_size: str
) -> None:
    volume = Volume(tmp_path, size=32 * MEBI)
    volume.format("--luks2-metadata-size", metadata_size, key_bits=512)
    async with new_graph() as graph:
        spec = {"cipher-alg": "aes-128", "cipher-mode": "cbc"} | ({"version": 2} if version == 2 else {})
        await make(graph, volume, secret="second", **spec, **costs("pbkdf2"))
        is_whole(volume)
        assert volume.opened_by() == {"first": False, "second": True, "third": False}
        # Without the new header there is no old one either.
        volume.overwrite(0, bytes(4096))
        if version == 2:
            volume.overwrite(16 << 10, bytes(4096))
        with pytest.raises(Error, match="Volume is not in LUKS format"):
            await info_of(graph, volume, "first")
        assert volume.tried("luksDump").returncode == 1


@pytest.mark.parametrize("older", [1, 2])
async def test_the_header_that_cryptsetup_has_made_last_is_the_one(tmp_path: Path, older: int) -> None:
    volume = Volume(tmp_path)
    newer = 3 - older
    volume.format(version=older, key_bits=512)
    old = volume.header.read_bytes()
    volume.format(version=newer, key_bits=512)
    async with new_graph() as graph:
        assert (await info_of(graph, volume)).get("version", 1) == newer
        # Somebody writes a LUKS1 header over the first sectors of LUKS2, whose second copy is still there.
        if newer == 2:
            volume.overwrite(0, old[:4096])
            assert "Version:       \t1" in volume.tried("luksDump").stdout
            with pytest.raises(Error, match=WRONG):
                await info_of(graph, volume)


@pytest.mark.parametrize("size", [MEBI, MEBI + 512, 1])
async def test_a_disk_in_sectors_of_4096_bytes_has_at_least_the_size_asked_for(
    tmp_path: Path, size: int
) -> None:
    volume = Volume(tmp_path, size=0)
    async with new_graph() as graph:
        await make(graph, volume, size, **{"version": 2, "sector-size": 4096}, **costs("pbkdf2"))
        async with volume.open(graph) as node:
            assert node.size == -(-size // 4096) * 4096
            await node.pwrite(node.size - 1, b"x")
    is_whole(volume)


async def test_a_detached_header_is_no_disk(tmp_path: Path) -> None:
    volume = Volume(tmp_path, detached=True)
    async with new_graph() as graph:
        await make(graph, volume, 0, version=2, **costs("pbkdf2"))
        options = {"driver": "luks", "node-name": "disk", "key-secret": "first"}
        with pytest.raises(Error, match="LUKS payload is overlapping with the header"):
            await graph.add({**options, "file": {"driver": "file", "filename": str(volume.header)}})


# -- over QMP


def test_a_client_makes_opens_and_changes_a_volume(tmp_path: Path, start_daemon: StartDaemon) -> None:
    volume = Volume(tmp_path, detached=True, size=MEBI)
    volume.header.touch()
    secrets = [word for name in PASSPHRASES for word in ("--object", f"secret,id={name},data={name}")]
    daemon = start_daemon(*secrets)
    daemon.execute("blockdev-add", {"driver": "file", "node-name": "new", "filename": str(volume.header)})
    more = {"version": 2, "sector-size": 4096, "label": "made", "subsystem": "here", **costs("argon2id")}
    options = {"driver": "luks", "header": "new", "size": 0, "key-secret": "first", **more}
    assert daemon.monitor.run_job("blockdev-create", "make", options) is None
    daemon.execute("blockdev-del", {"node-name": "new"})
    is_whole(volume)
    daemon.execute("blockdev-add", volume.node_options(**{"node-name": "disk"}))
    volume.add_key("first", "second", kdf="argon2i")
    amended = {"driver": "luks", "state": "active", "new-secret": "third", **costs("argon2id")}
    assert run_amend(daemon, "disk", amended) is None
    assert run_amend(daemon, "disk", {"driver": "luks", "state": "inactive", "old-secret": "first"}) is None
    nodes = daemon.execute("query-named-block-nodes", {"flat": True})
    (node,) = [node for node in nodes if node["node-name"] == "disk"]
    info = node["image"]["format-specific"]["data"]
    assert (info["version"], info["label"], info["subsystem"], info["sector-size"]) == (
        2,
        "made",
        "here",
        4096,
    )
    assert [(slot["slot"], slot["pbkdf"]) for slot in info["slots"]] == [(1, "argon2i"), (2, "argon2id")]
    assert volume.opened_by() == {"first": False, "second": True, "third": True}
    is_whole(volume)
    daemon.assert_alive()
