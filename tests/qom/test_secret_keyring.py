from __future__ import annotations

import asyncio
import base64
import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import kernel_keys
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qmpd.crypto.memory import KeyMemory
from qmpd.errors import Error
from qmpd.qom import secret_keyring
from qmpd.qom.secret_keyring import read_key
from qmpd.qom.tree import ObjectTree

KEY = bytes(range(32))
IV = bytes(range(16))
PASSPHRASE = b"correct horse battery staple"


class Kernel:
    """Keys by serial number, read as keyctl(2) reads them.

    :param before_read: called before each key is looked at.
    """

    def __init__(self) -> None:
        self.keys: dict[int, bytes | int] = {}
        self.before_read: Callable[[], object] = lambda: None
        self.asked: list[int | None] = []

    def read(self, serial: int, buffer: memoryview | None) -> int:
        self.before_read()
        self.asked.append(None if buffer is None else len(buffer))
        found = self.keys.get(serial, errno.ENOKEY)
        if isinstance(found, int):
            raise OSError(found, os.strerror(found))
        if buffer is not None and len(buffer) >= len(found):
            buffer[: len(found)] = found
        return len(found)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(secret_keyring, "keyctl_read", kernel.read)
    return kernel


async def add(tree: ObjectTree, name: str = "s", **options: Any) -> None:
    await tree.add({"qom-type": "secret_keyring", "id": name, **options})


def encrypted(plain: bytes) -> bytes:
    padding = 16 - len(plain) % 16
    encryptor = Cipher(algorithms.AES(KEY), modes.CBC(IV)).encryptor()
    return encryptor.update(plain + bytes((padding,)) * padding) + encryptor.finalize()


async def test_a_key_is_the_passphrase_byte_for_byte(tree: ObjectTree, kernel: Kernel) -> None:
    kernel.keys[7] = b"ab\x7fc\n"
    await add(tree, serial=7)
    assert bytes(tree.secret_bytes("s").data) == b"ab\x7fc\n"
    # Its length is asked first.
    assert kernel.asked == [None, 5]


async def test_a_key_may_be_base64(tree: ObjectTree, kernel: Kernel) -> None:
    kernel.keys[7] = base64.b64encode(PASSPHRASE)
    await add(tree, serial=7, format="base64")
    assert tree.secret_bytes("s").data == PASSPHRASE


@pytest.mark.parametrize("encoded", [False, True])
async def test_a_key_under_a_master_key_is_decrypted_when_it_is_added(
    tree: ObjectTree, kernel: Kernel, encoded: bool
) -> None:
    ciphertext = encrypted(PASSPHRASE)
    kernel.keys |= {1: KEY, 2: base64.b64encode(ciphertext) if encoded else ciphertext}
    await add(tree, "master", serial=1)
    options = {"format": "base64"} if encoded else {}
    await add(tree, serial=2, keyid="master", iv=base64.b64encode(IV).decode(), **options)
    tree.delete("master")
    assert tree.secret_bytes("s").data == PASSPHRASE


async def test_the_key_is_read_once_and_may_go_afterwards(tree: ObjectTree, kernel: Kernel) -> None:
    kernel.keys[7] = PASSPHRASE
    await add(tree, serial=7)
    kernel.keys[7] = errno.EKEYREVOKED
    tree.set("s", "serial", 8)
    assert tree.secret_bytes("s").data == PASSPHRASE


def test_a_key_that_changes_its_length_between_two_calls_is_read_whole(kernel: Kernel) -> None:
    lengths = iter((3, 5, 2, 2))

    def update() -> None:
        kernel.keys[7] = b"x" * next(lengths)

    kernel.before_read = update
    assert read_key(7, KeyMemory()).data == b"x" * 2
    assert kernel.asked == [None, 3, 5, 2]


@pytest.mark.parametrize(
    ("found", "options", "text"),
    [
        (b"x", {"serial": 0}, "'serial' should not be equal to 0"),
        (b"x", {"serial": 8}, "Unable to read serial key 00000008: Required key not available"),
        (b"x", {"serial": -8}, "Unable to read serial key fffffff8: Required key not available"),
        (errno.EKEYREVOKED, {}, "Unable to read serial key 2d608b21: Key has been revoked"),
        (errno.EACCES, {}, "Unable to read serial key 2d608b21: Permission denied"),
        (b"", {}, "Unable to read serial key 2d608b21"),
        (
            errno.ENOSYS,
            {},
            "Unable to read serial key 2d608b21: Function not implemented "
            "(there is no key retention service in this kernel)",
        ),
        (
            errno.EPERM,
            {},
            "Unable to read serial key 2d608b21: Operation not permitted "
            "(this process may not ask for keys: is it in a sandbox?)",
        ),
        (b"let*mein", {"format": "base64"}, "Base64 data contains invalid characters"),
        (b"x", {"keyid": "nobody"}, "No secret with id 'nobody'"),
        (b"x", {"keyid": "s"}, "Secret with id 's' has no data"),
        # The key comes first.
        (
            b"x",
            {"serial": 8, "keyid": "nobody"},
            "Unable to read serial key 00000008: Required key not available",
        ),
    ],
)
async def test_refusals_are_worded_as_qemu_words_them(
    tree: ObjectTree, kernel: Kernel, found: bytes | int, options: dict[str, Any], text: str
) -> None:
    kernel.keys[0x2D608B21] = found
    with pytest.raises(Error) as error:
        await add(tree, **{"serial": 0x2D608B21} | options)
    assert error.value.desc == text
    assert "s" not in tree.objects.children


async def test_the_loop_goes_on_while_the_kernel_lets_a_reader_wait(tree: ObjectTree, kernel: Kernel) -> None:
    made = threading.Event()
    kernel.before_read = made.wait
    kernel.keys[7] = PASSPHRASE
    adding = asyncio.create_task(add(tree, serial=7))
    await asyncio.sleep(0.01)
    assert not adding.done()
    made.set()
    await adding
    assert tree.secret_bytes("s").data == PASSPHRASE


async def test_properties_are_read_and_set_but_the_value_stays_inside(
    tree: ObjectTree, kernel: Kernel
) -> None:
    kernel.keys[7] = PASSPHRASE
    await add(tree, serial=7)
    values = {each["name"]: tree.get("s", each["name"]) for each in tree.properties("s")}
    assert values == {"type": "secret_keyring", "serial": 7, "format": "raw", "keyid": "", "iv": ""}
    tree.set("s", "format", "base64")
    tree.set("s", "serial", -5)
    assert (tree.get("s", "format"), tree.get("s", "serial")) == ("base64", -5)
    for value, text in (
        (0, "'serial' should not be equal to 0"),
        ("5", "Invalid parameter type for 'serial', expected: integer"),
        (1 << 31, "Parameter 'serial' expects int32_t"),
    ):
        with pytest.raises(Error) as error:
            tree.set("s", "serial", value)
        assert error.value.desc == text
    assert tree.get("s", "serial") == -5


# -- the system call itself


@pytest.fixture
def serial() -> Iterator[int | None]:
    """A key that holds the passphrase, or None where there can be none."""
    if kernel_keys.refusal() is not None:
        yield None
        return
    serial = kernel_keys.add("passphrase", PASSPHRASE)
    yield serial
    kernel_keys.remove(serial)


def test_a_key_of_the_kernel_is_read_where_it_has_keys(serial: int | None) -> None:
    if serial is None:
        with pytest.raises(Error, match="Unable to read serial key 00000001: .*"):
            read_key(1, KeyMemory())
    else:
        assert read_key(serial, KeyMemory()).data == PASSPHRASE


def test_a_machine_whose_call_is_not_known_has_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange:
        machine = "pdp11"

    monkeypatch.setattr(os, "uname", Strange)
    with pytest.raises(Error, match=r"Function not implemented \(there is no key retention service"):
        read_key(1, KeyMemory())
