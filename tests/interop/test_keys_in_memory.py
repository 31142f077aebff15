"""Where keys are in the memory of a daemon and its cipher processes, and that they are nowhere afterwards.

The headers are cryptsetup's, which also says what the volume key is; what else has to be kept, the key
that a passphrase gives and the stripes, is worked out with Python's own PBKDF2.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from daemons import PATIENCE, RunningDaemon
from process_memory import Place, children, needs_root, search

from qmpd.crypto.luks1 import HEADER_BYTES, Header
from qmpd.crypto.sectors import SectorCipher

PASSPHRASE: Final = b"Tr0ub4dor & three, to be found nowhere afterwards"
ANOTHER: Final = b"an0ther 0ne that is to be found nowhere afterwards"

pytestmark = pytest.mark.peer("cryptsetup")

Wanted = Mapping[str, bytes]


@dataclass(frozen=True)
class Volume:
    """A volume with a LUKS header.

    :ivar key: the volume key.
    """

    path: Path
    key: bytes

    @property
    def header(self) -> Header:
        return Header.parse(self.path.read_bytes()[:HEADER_BYTES])

    def volume_key(self) -> Wanted:
        """What nobody may find of the volume key; the first bytes are those in OpenSSL's tables too."""
        wanted = {
            f"volume key at {start}": self.key[start : start + 16] for start in range(0, len(self.key), 16)
        }
        spec = self.header.spec
        if spec.ivgen == "essiv":
            wanted["ESSIV key"] = hashlib.new(spec.ivgen_hash or "", self.key).digest()
        return wanted

    def slot_key(self, slot: int, passphrase: bytes) -> Wanted:
        """What nobody may find of a keyslot's key and of its stripes."""
        header = self.header
        keyslot = header.slots[slot]
        key = hashlib.pbkdf2_hmac(
            header.hash_name, passphrase, keyslot.salt, keyslot.iterations, header.key_bytes
        )
        offset, length = header.material_extent(slot)
        material = self.path.read_bytes()[offset : offset + length]
        stripes = bytes(SectorCipher(header.spec, key).decrypt(material, 0))
        wanted = {
            f"slot {slot}'s key at {start}": key[start : start + 16] for start in range(0, len(key), 16)
        }
        for number in (0, 1, 999, 2500, 3998, 3999):
            start = number * header.key_bytes
            wanted[f"slot {slot}'s stripe {number}"] = stripes[start : start + 16]
        return wanted


def passphrase_pieces(passphrase: bytes = PASSPHRASE) -> Wanted:
    """All of it, and parts: an allocator writes into what it was given back."""
    return {
        f"passphrase from {start}": passphrase[start : start + 16]
        for start in range(0, len(passphrase) - 15, 16)
    }


def volume_key_of(path: Path, passphrase: Path, folder: Path) -> bytes:
    key = folder / "volume-key"
    key.unlink(missing_ok=True)
    dump = ["cryptsetup", "luksDump", "--batch-mode", "--dump-volume-key", "--volume-key-file", str(key)]
    subprocess.run([*dump, "--key-file", str(passphrase), str(path)], check=True, capture_output=True)
    return key.read_bytes()


@pytest.fixture
def passphrase_file(tmp_path: Path) -> Path:
    path = tmp_path / "passphrase"
    path.write_bytes(PASSPHRASE)
    return path


@pytest.fixture(
    params=[("aes-xts-plain64", 512, "sha256"), ("aes-cbc-essiv:sha256", 256, "sha1")], ids=lambda p: p[0]
)
def volume(request: pytest.FixtureRequest, tmp_path: Path, passphrase_file: Path) -> Volume:
    cipher, bits, hash_name = request.param
    path = tmp_path / "volume"
    with path.open("wb") as file:
        file.truncate(8 << 20)
    command = ["cryptsetup", "luksFormat", "--type", "luks1", "--batch-mode", "--cipher", cipher]
    command += ["--key-size", str(bits), "--hash", hash_name, "--pbkdf-force-iterations", "3000"]
    subprocess.run([*command, str(path), str(passphrase_file)], check=True, capture_output=True)
    return Volume(path, volume_key_of(path, passphrase_file, tmp_path))


def found(daemon: RunningDaemon, wanted: Wanted) -> list[Place]:
    """Where it is in the daemon and in its processes."""
    pids = [daemon.process.pid, *children(daemon.process.pid)]
    return [place for pid in pids for place in search(pid, wanted)]


def outside(daemon: RunningDaemon, wanted: Wanted) -> list[Place]:
    return [place for place in found(daemon, wanted) if not place.in_key_memory]


def assert_nowhere(daemon: RunningDaemon, wanted: Wanted) -> None:
    assert found(daemon, wanted) == []


def add_luks(daemon: RunningDaemon, volume: Volume, secret: str = "s") -> None:
    file = {"driver": "file", "filename": str(volume.path)}
    daemon.execute(
        "blockdev-add", {"driver": "luks", "node-name": "disk", "key-secret": secret, "file": file}
    )


def add_secret(daemon: RunningDaemon, name: str, path: Path, **more: Any) -> None:
    daemon.execute("object-add", {"qom-type": "secret", "id": name, "file": str(path), **more})


def read_all_ways(daemon: RunningDaemon) -> None:
    """Small requests, which the daemon deciphers, and long ones, which another process does."""
    for command in ("read 0 512", "write 4k 512", "read 0 1M", "write 0 1M", "read 1k 70k"):
        daemon.qemu_io("disk", command)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_keys_are_in_key_memory_alone_and_nowhere_when_the_disk_is_closed(
    start_daemon: Callable[..., RunningDaemon], volume: Volume, passphrase_file: Path
) -> None:
    needs_root()
    daemon = start_daemon("--cipher-processes", "1")
    passphrase = passphrase_pieces()
    slot = volume.slot_key(0, PASSPHRASE)
    key = volume.volume_key()

    add_secret(daemon, "s", passphrase_file)
    assert {place.what for place in found(daemon, passphrase)} == set(passphrase)
    assert outside(daemon, passphrase) == []

    add_luks(daemon, volume)
    assert {place.what for place in found(daemon, key)} == set(key)
    assert outside(daemon, {**passphrase, **key}) == []
    assert_nowhere(daemon, slot)

    # From the first request on OpenSSL knows the volume key too, and where that is, is not ours to say.
    read_all_ways(daemon)
    until(lambda: children(daemon.process.pid))
    (process,) = children(daemon.process.pid)

    def other_process_knows() -> bool:
        read_all_ways(daemon)
        return {place.what for place in search(process, key) if place.in_key_memory} == set(key)

    until(other_process_knows)
    assert outside(daemon, passphrase) == []
    assert_nowhere(daemon, slot)

    daemon.execute("blockdev-del", {"node-name": "disk"})
    until(lambda: not search(process, key))
    assert_nowhere(daemon, {**key, **slot})
    assert outside(daemon, passphrase) == []

    daemon.execute("object-del", {"id": "s"})
    assert_nowhere(daemon, {**key, **slot, **passphrase})
    daemon.assert_alive()


def test_a_wrong_passphrase_leaves_nothing_but_itself(
    start_daemon: Callable[..., RunningDaemon], volume: Volume, tmp_path: Path
) -> None:
    needs_root()
    daemon = start_daemon()
    (tmp_path / "wrong").write_bytes(ANOTHER)
    add_secret(daemon, "s", tmp_path / "wrong")
    with pytest.raises(Exception, match="Invalid password, cannot unlock any keyslot"):
        add_luks(daemon, volume)
    assert_nowhere(daemon, {**volume.slot_key(0, ANOTHER), **volume.volume_key()})
    daemon.execute("object-del", {"id": "s"})
    assert_nowhere(daemon, passphrase_pieces(ANOTHER))


def test_who_goes_away_while_a_key_is_derived_leaves_nothing(
    start_daemon: Callable[..., RunningDaemon], volume: Volume, passphrase_file: Path
) -> None:
    needs_root()
    daemon = start_daemon()
    add_secret(daemon, "s", passphrase_file)
    for pause in (0.0, 0.002, 0.005, 0.01, 0.02, 0.04):
        file = {"driver": "file", "filename": str(volume.path)}
        disk = {"driver": "luks", "node-name": "disk", "key-secret": "s", "file": file}
        with daemon.connect() as client:
            client.send(json.dumps({"execute": "blockdev-add", "arguments": disk}).encode())
            time.sleep(pause)
        until(lambda: not daemon.execute("query-named-block-nodes") or "disk" in daemon.node_names())
        if "disk" in daemon.node_names():
            daemon.execute("blockdev-del", {"node-name": "disk"})
    daemon.execute("object-del", {"id": "s"})
    gone = {**volume.slot_key(0, PASSPHRASE), **volume.volume_key(), **passphrase_pieces()}
    until(lambda: not found(daemon, gone))
    daemon.assert_alive()


def test_what_is_worked_out_to_change_keyslots_is_nowhere_afterwards(
    start_daemon: Callable[..., RunningDaemon], tmp_path: Path, passphrase_file: Path
) -> None:
    needs_root()
    daemon = start_daemon("--cipher-processes", "0")
    path = tmp_path / "volume"
    (tmp_path / "another").write_bytes(ANOTHER)
    add_secret(daemon, "s", passphrase_file)
    add_secret(daemon, "t", tmp_path / "another")

    def run_job(command: str, options: dict[str, Any], **more: Any) -> None:
        daemon.execute(command, {"job-id": "job", "options": options, **more})
        until(lambda: daemon.execute("query-jobs")[0]["status"] == "concluded")
        (job,) = daemon.execute("query-jobs")
        assert "error" not in job, job
        daemon.execute("job-dismiss", {"id": "job"})

    run_job("blockdev-create", {"driver": "file", "filename": str(path), "size": 0})
    daemon.execute("blockdev-add", {"driver": "file", "node-name": "storage", "filename": str(path)})
    luks = {"driver": "luks", "file": "storage", "size": 1 << 20, "key-secret": "s", "iter-time": 10}
    run_job("blockdev-create", luks)
    volume = Volume(path, volume_key_of(path, passphrase_file, tmp_path))
    first = volume.slot_key(0, PASSPHRASE)
    assert_nowhere(daemon, {**volume.volume_key(), **first})

    daemon.execute(
        "blockdev-add", {"driver": "luks", "node-name": "disk", "key-secret": "s", "file": "storage"}
    )
    change = {"driver": "luks", "state": "active", "new-secret": "t", "iter-time": 10}
    run_job("x-blockdev-amend", change, **{"node-name": "disk"})
    both = {**first, **volume.slot_key(1, ANOTHER)}
    assert_nowhere(daemon, both)
    run_job(
        "x-blockdev-amend",
        {"driver": "luks", "state": "inactive", "old-secret": "t"},
        **{"node-name": "disk"},
    )
    passphrases = {**passphrase_pieces(), **{f"other {n}": p for n, p in passphrase_pieces(ANOTHER).items()}}
    assert outside(daemon, {**volume.volume_key(), **passphrases}) == []
    assert_nowhere(daemon, both)

    daemon.execute("blockdev-del", {"node-name": "disk"})
    daemon.execute("object-del", {"id": "s"})
    daemon.execute("object-del", {"id": "t"})
    assert_nowhere(daemon, {**volume.volume_key(), **both, **passphrases})


def test_a_secret_under_a_master_key_is_in_key_memory_alone(
    start_daemon: Callable[..., RunningDaemon], tmp_path: Path
) -> None:
    needs_root()
    daemon = start_daemon()
    key, initial = os.urandom(32), os.urandom(16)
    in_base64 = base64.b64encode(key)
    (tmp_path / "key").write_bytes(in_base64)
    padding = 16 - len(PASSPHRASE) % 16
    encryptor = Cipher(algorithms.AES(key), modes.CBC(initial)).encryptor()
    sealed = base64.b64encode(encryptor.update(PASSPHRASE + bytes((padding,)) * padding)).decode()
    add_secret(daemon, "master", tmp_path / "key", format="base64")
    iv = base64.b64encode(initial).decode()
    arguments = {"qom-type": "secret", "id": "s", "data": sealed, "format": "base64"}
    daemon.execute("object-add", {**arguments, "keyid": "master", "iv": iv})
    wanted = {**passphrase_pieces(), "master key": key[:16], "its end": key[16:]}
    assert {place.what for place in found(daemon, wanted)} == set(wanted)
    assert outside(daemon, wanted) == []
    assert_nowhere(daemon, {"in base64": in_base64[:20]})
    daemon.execute("object-del", {"id": "s"})
    daemon.execute("object-del", {"id": "master"})
    assert_nowhere(daemon, wanted)
