"""Secrets: passphrases and keys under an id.

A secret's text comes inline, from a file or from the kernel (`secret_keyring`),
may be base64, and may be encrypted with AES-256-CBC under another secret (that
is how libvirt passes them: one master key in a file, everything else as
ciphertext under it).  The bytes are worked out once, when the object is made,
and live in one buffer of key memory that is wiped when the object goes.
Nothing here shows them: not `repr`, not an error, not `qom-get` of ``data``,
which is always empty (QEMU gives inline data back).  What a client sent as
``data`` is a Python string that went through the JSON reader before; it can't
be wiped, so a ``file`` is the better way.
"""

from __future__ import annotations

import asyncio
import binascii
import os
import re
import stat
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from qmpd.crypto.memory import Buffer, KeyBuffer, KeyMemory, overwrite
from qmpd.errors import Error
from qmpd.qom.user_creatable import UserCreatable

if TYPE_CHECKING:
    from qmpd.qom.tree import ObjectTree

#: A file with a secret may have at most this many bytes (cryptsetup's bound for a key
#: file).  QEMU has none; this one keeps a wrong file name from filling the memory.
FILE_MAX: Final = 8 << 20

_KEY_BYTES: Final = 32
_BLOCK_BYTES: Final = 16

#: Bytes of the buffer that a file is read into first.
_FIRST_READ: Final = 512
#: More characters than these are decoded by the standard library, all at once.
_LONG_BASE64: Final = 4096

#: RFC 3629, section 4, without NUL, which ends a text in QEMU and is none of its characters.
_UTF_8: Final = re.compile(
    rb"(?:[\x01-\x7f]++|[\xc2-\xdf][\x80-\xbf]"
    rb"|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}|\xed[\x80-\x9f][\x80-\xbf]"
    rb"|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2})*+"
)

_LINE: Final = re.compile(rb"[^\n]+")
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/=\n]*")
_ORDINARY: Final = re.compile(rb"[^=]*={0,2}")
_ALPHABET: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_DIGITS: Final[Mapping[int, int]] = {ord("="): 0} | {digit: rank for rank, digit in enumerate(_ALPHABET)}

#: An inherited or passed descriptor: the one kind of path where waiting for a writer is meant.
_DESCRIPTOR_PATH: Final = re.compile(r"/dev/fd/[0-9]+|/proc/self/fd/[0-9]+|/dev/stdin")


class AnySecret(UserCreatable):
    """The abstract type "secret_common": a secret, wherever its text comes from."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._format: str = options.get("format", "raw")
        self._keyid: str = options.get("keyid", "")
        self._iv: str = options.get("iv", "")
        self._value: KeyBuffer | None = None
        self._memory = KeyMemory()

    async def complete(self, options: Mapping[str, Any], tree: ObjectTree) -> None:
        """Load the value.

        :raise Error: if it can't be read, decoded or decrypted.
        """
        # The tree is open to other clients while this waits: the id is taken already.
        loaded = await self._load(options, tree.key_memory)
        self._memory = tree.key_memory
        with loaded:
            if "keyid" in options:
                self._value = _decrypt(loaded.data, self._format, options, tree)
            elif self._format == "base64":
                self._value = decode_base64(loaded.data, self._memory)
            else:
                self._value = self._memory.copy_of(loaded.data)

    @abstractmethod
    async def _load(self, options: Mapping[str, Any], memory: KeyMemory) -> KeyBuffer:
        """The text, still encoded and encrypted, for the caller to wipe.

        :raise Error: if it can't be read.
        """

    def value(self) -> KeyBuffer:
        """A copy of the bytes, for the caller to use and to wipe.

        :raise Error: while they are still being loaded.
        """
        if self._value is None:
            raise Error(f"Secret with id '{self.name}' has no data")
        return self._memory.copy_of(self._value.data)

    def removed(self) -> None:
        """Wipe the bytes."""
        if self._value is not None:
            self._value.wipe()
            self._value = None

    def get(self, name: str) -> Any:
        """The value of a property."""
        return getattr(self, f"_{name}")

    def set(self, name: str, value: Any) -> None:
        """Set a property.  As in QEMU the bytes stay what they were when the object was made."""
        setattr(self, f"_{name}", value)


class Secret(AnySecret):
    """The object type "secret"."""

    qom_type = "secret"
    struct = "SecretProperties"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._file: str = options.get("file", "")

    async def _load(self, options: Mapping[str, Any], memory: KeyMemory) -> KeyBuffer:
        if "data" in options and "file" in options:
            raise Error("'file' and 'data' are mutually exclusive")
        if "file" in options:
            return await asyncio.to_thread(read_file, options["file"], memory)
        if "data" in options:
            return _bytes_of(options["data"], memory)
        raise Error("Either 'file' or 'data' must be provided")

    def get(self, name: str) -> Any:
        """The value of a property; ``data`` is empty for everybody."""
        return "" if name == "data" else super().get(name)

    def set(self, name: str, value: Any) -> None:
        """Set a property; ``data`` is not even kept."""
        if name != "data":
            super().set(name, value)


def _bytes_of(text: str, memory: KeyMemory) -> KeyBuffer:
    """The bytes that a client, or the shell, sent as `text`.

    :raise Error: if it is no text.
    """
    try:
        encoded = text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        encoded = None
    if encoded is None:
        # Raised outside the handler: the encoder's exception holds the text, and must not be chained to.
        raise Error("Parameter 'data' expects valid Unicode")
    value = memory.copy_of(encoded)
    overwrite(encoded)
    return value


def read_file(path: str, memory: KeyMemory) -> KeyBuffer:
    """What is in the file `path`.

    :raise Error: in GLib's words if it can't be opened or read.
    """
    if "\0" in path:
        # The rest would be cut off by the system call, and another file be read.
        raise Error(f"Unable to read {path}: a file name can't hold a NUL character")
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(mode):
            if not _DESCRIPTOR_PATH.fullmatch(path):
                # Nobody may ever write into it, and then the thread would never come back.
                raise Error(f"Unable to read {path}: a FIFO is only taken as a passed descriptor (/dev/fd/N)")
            os.set_blocking(descriptor, True)
        return _read_all(descriptor, path, memory)
    except OSError as error:
        what = "Failed to open file" if descriptor < 0 else "Error reading file"
        raise Error(f"Unable to read {path}: {what} “{path}”: {os.strerror(error.errno or 0)}") from None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _read_all(descriptor: int, path: str, memory: KeyMemory) -> KeyBuffer:
    value = memory.take(_FIRST_READ)
    length = 0
    # Into the buffer: os.read would leave a copy in freed memory.
    while count := os.readv(descriptor, [value.data[length:]]):
        length += count
        if length > FILE_MAX:
            raise Error(f"Unable to read {path}: file is larger than {FILE_MAX >> 20} MiB")
        if length == len(value):
            with value:
                larger = memory.take(4 * length)
                larger.data[:length] = value.data
            value = larger
    value.shorten(length)
    return value


def decode_base64(text: Buffer, memory: KeyMemory | None = None) -> KeyBuffer:
    """Decode base64 as leniently as QEMU (that is, GLib) does.

    Line feeds are skipped.  Four characters make three bytes, less one for
    each "=" among the last two of the four; "=" counts as a zero anywhere
    else, and up to three characters at the end that do not fill a group
    are dropped.

    :raise Error: on any other character.
    """
    if not _BASE64.fullmatch(text):
        raise Error("Base64 data contains invalid characters")
    memory = memory or KeyMemory()
    with memory.take(len(text)) as characters:
        length = 0
        for line in _LINE.finditer(text):
            start, end = line.span()
            characters.data[length : length + end - start] = memoryview(text)[start:end]
            length += end - start
        return _decode_groups(characters.data[: length // 4 * 4], memory)


def _decode_groups(characters: memoryview, memory: KeyMemory) -> KeyBuffer:
    decoded = memory.take(len(characters) // 4 * 3)
    into = decoded.data
    length = 0
    if len(characters) > _LONG_BASE64 and _ORDINARY.fullmatch(characters):
        # What is short it works out on the stack, and leaves it there.
        result = binascii.a2b_base64(characters)
        length = len(result)
        into[:length] = result
        overwrite(result)
        characters = characters[:0]
    for start in range(0, len(characters), 4):
        group = characters[start : start + 4]
        bits = 0
        for character in group:
            bits = bits << 6 | _DIGITS[character]
        into[length] = bits >> 16
        length += 1
        if group[2] != ord("="):
            into[length] = bits >> 8 & 0xFF
            length += 1
        if group[3] != ord("="):
            into[length] = bits & 0xFF
            length += 1
    decoded.shorten(length)
    return decoded


def _decrypt(value: memoryview, format_: str, options: Mapping[str, Any], tree: ObjectTree) -> KeyBuffer:
    """The plain text of an encrypted secret.

    :param value: the ciphertext, in base64 if `format_` says so.
    :param tree: has the master key.
    :raise Error: if any part is missing or of a wrong size.
    """
    # Imported here, because it takes long and most daemons have no encrypted secrets.
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    with tree.raw_secret(options["keyid"]) as key:
        if len(key) != _KEY_BYTES:
            raise Error(f"Key should be {_KEY_BYTES} bytes in length")
        if "iv" not in options:
            raise Error("IV is required to decrypt secret")
        initial = decode_base64(_bytes_of(options["iv"], tree.key_memory).data)
        if len(initial) != _BLOCK_BYTES:
            raise Error(f"IV should be {_BLOCK_BYTES} bytes in length not {len(initial)}")
        text = decode_base64(value).data if format_ == "base64" else value
        if len(text) % _BLOCK_BYTES:
            raise Error(f"Length {len(text)} must be a multiple of block size {_BLOCK_BYTES}")
        plain = tree.key_memory.take(len(text) + _BLOCK_BYTES - 1)
        decryptor = Cipher(algorithms.AES(key.data), modes.CBC(bytes(initial.data))).decryptor()
        plain.shorten(decryptor.update_into(text, plain.data))
    if not len(plain):
        return plain
    padding = plain.data[-1]
    # Without a look at the other padding bytes, as QEMU: what it can open, so can we.
    if padding > _BLOCK_BYTES or padding > len(plain):
        plain.wipe()
        raise Error(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    plain.shorten(len(plain) - padding)
    return plain


def check_utf8(secret_id: str, value: KeyBuffer) -> None:
    """See that a passphrase is text.

    :raise Error: if it isn't; the text does not show it.
    """
    # Decoding would make a copy that can't be wiped, or an exception that holds the bytes.
    if not _UTF_8.fullmatch(value.data):
        raise Error(f"Data from secret {secret_id} is not valid UTF-8")
