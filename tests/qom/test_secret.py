from __future__ import annotations

import asyncio
import base64
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from qmpd.crypto.memory import KeyBuffer, KeyMemory
from qmpd.errors import Error
from qmpd.qom import secret
from qmpd.qom.secret import Secret, check_utf8, decode_base64
from qmpd.qom.tree import ObjectTree

KEY = bytes(range(32))
IV = bytes(range(16))
PASSPHRASE = "correct horse battery staple"


async def add(tree: ObjectTree, name: str = "s", **options: Any) -> None:
    await tree.add({"qom-type": "secret", "id": name, **options})


def refused(error: pytest.ExceptionInfo[Error]) -> str:
    return error.value.desc


def encrypt(plain: bytes) -> str:
    encryptor = Cipher(algorithms.AES(KEY), modes.CBC(IV)).encryptor()
    return base64.b64encode(encryptor.update(plain) + encryptor.finalize()).decode()


def padded(plain: bytes) -> bytes:
    padding = 16 - len(plain) % 16
    return plain + bytes((padding,)) * padding


async def test_inline_data_are_the_passphrase(tree: ObjectTree) -> None:
    await add(tree, data="pässword")
    assert tree.secret_bytes("s").data == "pässword".encode()


async def test_a_file_is_the_passphrase_byte_for_byte(tree: ObjectTree, tmp_path: Path) -> None:
    (tmp_path / "pw").write_bytes(b" a\tb\n\n")
    await add(tree, file=str(tmp_path / "pw"))
    assert tree.secret_bytes("s").data == b" a\tb\n\n"


async def test_a_passed_descriptor_is_a_file(tree: ObjectTree) -> None:
    reader, writer = os.pipe()
    writing = threading.Timer(0.05, lambda: (os.write(writer, b"through a pipe"), os.close(writer)))
    writing.start()
    await add(tree, file=f"/dev/fd/{reader}")
    writing.join()
    os.close(reader)
    assert tree.secret_bytes("s").data == b"through a pipe"


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: None, "Failed to open file “{}”: No such file or directory"),
        (lambda path: path.mkdir(), "Error reading file “{}”: Is a directory"),
        (lambda path: os.mkfifo(path), "a FIFO is only taken as a passed descriptor (/dev/fd/N)"),
        (lambda path: path.write_bytes(bytes((8 << 20) + 1)), "file is larger than 8 MiB"),
    ],
    ids=["missing", "directory", "fifo", "large"],
)
async def test_a_file_that_is_none_is_refused(tree: ObjectTree, tmp_path: Path, make: Any, what: str) -> None:
    path = tmp_path / "pw"
    make(path)
    with pytest.raises(Error) as error:
        await add(tree, file=str(path))
    assert refused(error) == f"Unable to read {path}: {what.format(path)}"
    assert "s" not in tree.objects.children


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "Either 'file' or 'data' must be provided"),
        ({"data": "", "file": ""}, "'file' and 'data' are mutually exclusive"),
        ({"data": "not*base64", "format": "base64"}, "Base64 data contains invalid characters"),
        ({"data": "x", "keyid": "nobody"}, "No secret with id 'nobody'"),
        ({"data": "x", "keyid": "io"}, "Object with id 'io' is not a secret"),
        ({"data": "x", "keyid": "s"}, "Secret with id 's' has no data"),
        ({"data": "x", "keyid": "short"}, "Key should be 32 bytes in length"),
        ({"data": "x", "keyid": "key"}, "IV is required to decrypt secret"),
        ({"data": "x", "keyid": "key", "iv": "?"}, "Base64 data contains invalid characters"),
        ({"data": "x", "keyid": "key", "iv": "AAAA"}, "IV should be 16 bytes in length not 3"),
        (
            {"data": "x" * 25, "keyid": "key", "iv": base64.b64encode(IV).decode()},
            "Length 25 must be a multiple of block size 16",
        ),
        (
            {
                "data": encrypt(bytes(15) + b"\x7a"),
                "format": "base64",
                "keyid": "key",
                "iv": base64.b64encode(IV).decode(),
            },
            "Incorrect number of padding bytes (122) found on decrypted data",
        ),
    ],
)
async def test_refusals_are_worded_as_qemu_words_them(
    tree: ObjectTree, options: dict[str, Any], text: str
) -> None:
    await add(tree, "key", data=base64.b64encode(KEY).decode(), format="base64")
    await add(tree, "short", data="short")
    await tree.add({"qom-type": "iothread", "id": "io"})
    with pytest.raises(Error) as error:
        await add(tree, **options)
    assert refused(error) == text
    assert "s" not in tree.objects.children


async def test_a_secret_under_a_master_key_is_decrypted_when_it_is_added(tree: ObjectTree) -> None:
    await add(tree, "key", data=base64.b64encode(KEY).decode(), format="base64")
    await add(
        tree,
        data=encrypt(padded(PASSPHRASE.encode())),
        format="base64",
        keyid="key",
        iv=base64.b64encode(IV).decode(),
    )
    tree.delete("key")
    assert tree.secret_bytes("s").data == PASSPHRASE.encode()
    assert tree.get("s", "keyid") == "key"


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ("bGV0bWVpbg==", b"letmein"),
        ("bGV0bWVpbg", b"letmei"),
        ("bGV0bWVpbg=", b"letmei"),
        ("bG\nV0\nbGV=\n", b"letle"),
        ("bGV0bGV===bGV0", None),
        ("====", b"\0"),
        ("b", b""),
        ("", b""),
        ("\n", b""),
    ],
)
def test_base64_is_as_lenient_as_glib(text: str, decoded: bytes | None) -> None:
    result = decode_base64(text.encode())
    assert len(result) == 8 if decoded is None else result.data == decoded


@given(st.binary())
def test_proper_base64_comes_back(data: bytes) -> None:
    assert decode_base64(base64.encodebytes(data)).data == data


@given(st.text("ABab01+/=\n"))
def test_no_base64_characters_make_it_fail(text: str) -> None:
    characters = text.replace("\n", "")
    assert len(decode_base64(text.encode())) <= len(characters) // 4 * 3


async def test_a_passphrase_must_be_text_but_a_key_need_not(tree: ObjectTree) -> None:
    await add(tree, data="gICA", format="base64")
    with pytest.raises(Error) as error:
        tree.secret_bytes("s")
    assert refused(error) == "Data from secret s is not valid UTF-8"
    assert tree.raw_secret("s").data == b"\x80\x80\x80"


# -- the value stays inside


async def test_the_value_can_never_be_read_back(tree: ObjectTree) -> None:
    await add(tree, data=PASSPHRASE)
    assert tree.get("/objects/s", "data") == ""
    tree.set("/objects/s", "data", "another")
    assert tree.get("/objects/s", "data") == ""


async def test_setting_data_does_not_change_what_was_loaded(tree: ObjectTree) -> None:
    await add(tree, data=PASSPHRASE)
    tree.set("/objects/s", "data", "another")
    assert tree.secret_bytes("s").data == PASSPHRASE.encode()


async def test_no_repr_shows_the_value(tree: ObjectTree) -> None:
    await add(tree, data=PASSPHRASE)
    found = tree.objects.children["s"]
    assert PASSPHRASE not in repr(found) + repr(tree) + repr(found.own_properties())


@pytest.mark.parametrize(
    "options",
    [
        {"data": PASSPHRASE, "format": "base64"},
        {"data": PASSPHRASE, "keyid": "nobody"},
        {"data": PASSPHRASE, "file": "/nowhere"},
        {"data": PASSPHRASE + "\ud800"},
        {"data": PASSPHRASE, "qom-type": "secret", "id": "1"},
    ],
)
async def test_no_error_and_no_chained_exception_shows_the_value(
    tree: ObjectTree, options: dict[str, Any]
) -> None:
    with pytest.raises(Error) as error:
        await tree.add({"qom-type": "secret", "id": "s"} | options)
    shown = "".join(traceback.format_exception(error.value))
    assert PASSPHRASE not in shown
    assert PASSPHRASE not in repr(error.value)
    chained = error.value.__context__
    assert chained is None or PASSPHRASE not in repr(chained.args)


async def test_an_invalid_passphrase_is_in_no_chained_exception(tree: ObjectTree) -> None:
    await add(tree, data=base64.b64encode(b"\xff" + PASSPHRASE.encode()).decode(), format="base64")
    with pytest.raises(Error) as error:
        tree.secret_bytes("s")
    # A UnicodeDecodeError would hold the bytes.
    assert error.value.__context__ is None
    assert error.value.__cause__ is None


async def test_the_buffer_is_wiped_when_the_secret_goes(tree: ObjectTree) -> None:
    await add(tree, data=PASSPHRASE)
    found = tree.objects.children["s"]
    assert isinstance(found, Secret)
    value = found._value
    assert value is not None
    assert value.data == PASSPHRASE.encode()
    tree.delete("s")
    assert value.data == bytes(len(PASSPHRASE))


async def test_who_uses_a_secret_gets_a_copy_to_wipe(tree: ObjectTree) -> None:
    await add(tree, data=PASSPHRASE)
    with tree.secret_bytes("s") as copy:
        assert copy.data == PASSPHRASE.encode()
    assert copy.data == bytes(len(PASSPHRASE))
    assert tree.secret_bytes("s").data == PASSPHRASE.encode()


@given(st.binary(max_size=8) | st.text(max_size=8).map(lambda text: text.encode()))
def test_text_is_what_python_decodes_without_nul(data: bytes) -> None:
    try:
        is_text = "\0" not in data.decode()
    except UnicodeDecodeError:
        is_text = False
    try:
        check_utf8("s", KeyMemory().copy_of(data))
        taken = True
    except Error:
        taken = False
    assert taken == is_text


async def test_a_long_key_in_base64_is_decoded(tree: ObjectTree) -> None:
    key = os.urandom(100_001)
    await add(tree, data=base64.encodebytes(key).decode(), format="base64")
    assert tree.raw_secret("s").data == key


async def test_a_secret_deleted_while_it_loads_is_wiped(
    tree: ObjectTree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def read(path: str, memory: KeyMemory) -> KeyBuffer:
        loop.call_soon_threadsafe(tree.delete, "s")
        gone.wait()
        return memory.copy_of(PASSPHRASE.encode())

    loop = asyncio.get_running_loop()
    gone = threading.Event()
    monkeypatch.setattr(secret, "read_file", read)
    made: list[Secret] = []
    complete = Secret.complete

    async def spy(self: Secret, *arguments: Any) -> None:
        made.append(self)
        await complete(self, *arguments)

    monkeypatch.setattr(Secret, "complete", spy)
    loop.call_later(0.05, gone.set)
    await add(tree, file="x")
    assert "s" not in tree.objects.children
    with pytest.raises(Error, match="has no data"):
        made[0].value()


def test_the_cipher_is_imported_for_encrypted_secrets_only() -> None:
    script = "import sys, qmpd.qom.tree; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
