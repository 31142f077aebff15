"""Secrets in the kernel's keyrings: qemu-storage-daemon and qmpd take the same keys, and refuse the same.

Where the kernel has no keys, or a sandbox lets nobody use them, both have to say so.
"""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kernel_keys
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from daemons import PATIENCE, CommandError, RunningDaemon

#: QEMU takes no BASE64 of 24, 40, 56... characters out of a key (the last test says why); this
#: has 28, and 44 when it is encrypted.
PASSPHRASE = b"correct horse staple"
MASTER = bytes(range(32))
VECTOR = bytes(range(16))
ENCRYPTED = {"keyid": "master", "iv": base64.b64encode(VECTOR).decode()}


def encrypted(plain: bytes) -> bytes:
    padding = 16 - len(plain) % 16
    encryptor = Cipher(algorithms.AES(MASTER), modes.CBC(VECTOR)).encryptor()
    return encryptor.update(plain + bytes((padding,)) * padding) + encryptor.finalize()


@pytest.fixture
def serials() -> Iterator[Mapping[str, int]]:
    """A key of each sort by its name, or the serial number of none."""
    if kernel_keys.refusal() is not None:
        yield dict.fromkeys(
            ("plain", "base64", "master", "ciphertext", "both", "revoked", "unreadable", "logon", "empty"), 1
        )
        return
    made = {
        "plain": kernel_keys.add("plain", PASSPHRASE),
        "base64": kernel_keys.add("base64", base64.b64encode(PASSPHRASE)),
        "master": kernel_keys.add("master", MASTER),
        "ciphertext": kernel_keys.add("ciphertext", encrypted(PASSPHRASE)),
        "both": kernel_keys.add("both", base64.b64encode(encrypted(PASSPHRASE))),
        "revoked": kernel_keys.add("revoked", PASSPHRASE),
        "unreadable": kernel_keys.add("unreadable", PASSPHRASE),
        # Only for the kernel's own use.
        "logon": kernel_keys.add("logon", PASSPHRASE, "logon"),
        "empty": kernel_keys.add("empty", b"", "keyring"),
    }
    kernel_keys.revoke(made["revoked"])
    kernel_keys.set_permissions(made["unreadable"], kernel_keys.UNREADABLE)
    yield made
    for serial in made.values():
        kernel_keys.remove(serial)


def answer(daemon: RunningDaemon, name: str, serial: Any, **options: Any) -> str | None:
    """What the daemon says to a secret with this key, None if nothing is wrong."""
    try:
        daemon.execute("object-add", {"qom-type": "secret_keyring", "id": name, "serial": serial, **options})
    except CommandError as error:
        return error.desc
    return None


@pytest.mark.peer("qemu-storage-daemon")
def test_the_same_keys_are_taken_and_the_same_refused(
    serials: Mapping[str, int], daemon: RunningDaemon, start_storage_daemon: Any
) -> None:
    peer = start_storage_daemon()
    differing = []
    for index, (key, options) in enumerate(
        (
            ("master", {}),
            ("plain", {}),
            ("plain", {"format": "base64"}),
            ("base64", {"format": "base64"}),
            ("ciphertext", ENCRYPTED),
            ("both", ENCRYPTED | {"format": "base64"}),
            ("both", {"keyid": "master"}),
            ("both", {"iv": ENCRYPTED["iv"]}),
            ("plain", ENCRYPTED),
            ("plain", {"keyid": "nobody"}),
            ("revoked", {"keyid": "nobody"}),
            ("unreadable", {}),
            ("logon", {}),
        )
    ):
        name = "master" if key == "master" else f"s{index}"
        theirs = answer(peer, name, serials[key], **options)
        ours = answer(daemon, name, serials[key], **options)
        # Where nobody may ask for keys, qmpd also says what that may come from.
        if ours != theirs and not (theirs and ours and serials[key] == 1 and ours.startswith(f"{theirs} (")):
            differing.append((key, options, theirs, ours))
    assert not differing
    # Nothing went wrong when QEMU read it, so what it tells is left over from an earlier error.
    theirs, ours = (answer(each, "empty", serials["empty"]) for each in (peer, daemon))
    assert theirs
    assert ours
    assert theirs.startswith(ours.partition(": ")[0])
    daemon.assert_alive()


@pytest.mark.peer("qemu-storage-daemon")
def test_what_is_no_serial_number_is_refused_alike(daemon: RunningDaemon, start_storage_daemon: Any) -> None:
    peer = start_storage_daemon()
    for serial in (0, -9, 1, (1 << 31) - 1, 1 << 31, -(1 << 31) - 1, 1 << 63, 1.5, "1", True, None):
        theirs = answer(peer, "s", serial)
        assert theirs
        ours = answer(daemon, "s", serial)
        assert ours is not None
        assert ours.partition(" (")[0] == theirs


@pytest.mark.peer("cryptsetup")
def test_a_passphrase_in_the_kernel_opens_a_disk(
    serials: Mapping[str, int], daemon: RunningDaemon, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.luks"
    disk.write_bytes(bytes(3 << 20))
    fast = ("--type", "luks1", "--pbkdf-force-iterations", "1000", "--batch-mode")
    subprocess.run(
        ["cryptsetup", "luksFormat", *fast, disk, "-"], input=PASSPHRASE, timeout=PATIENCE, check=True
    )
    answers = [
        answer(daemon, "master", serials["master"]),
        answer(daemon, "sec0", serials["both"], format="base64", **ENCRYPTED),
    ]
    if kernel_keys.refusal() is not None:
        assert all(said and said.startswith("Unable to read serial key 00000001: ") for said in answers)
        return
    assert answers == [None, None]
    file = {"driver": "file", "filename": str(disk)}
    daemon.execute(
        "blockdev-add", {"driver": "luks", "node-name": "disk", "file": file, "key-secret": "sec0"}
    )
    assert "disk" in daemon.node_names()
    daemon.assert_alive()


def test_qemus_mistake_about_some_lengths_of_base64_is_not_ours(
    serials: Mapping[str, int], daemon: RunningDaemon
) -> None:
    # QEMU looks at the byte after the key, which is no NUL where the buffer is as large as its place.
    if kernel_keys.refusal() is not None:
        assert serials["plain"] == 1
        return
    serial = kernel_keys.add("24 characters", base64.b64encode(b"sixteen letters!"))
    try:
        assert answer(daemon, "s", serial, format="base64") is None
    finally:
        kernel_keys.remove(serial)
