"""Secrets that the kernel keeps: its key retention service, keyrings(7).

A key has a serial number and holds bytes, which who may read it gets with
keyctl(2).  Somebody else puts it there (`keyctl padd user ...`, a login, a TPM
by way of "trusted" keys), and it is not on a command line or in a file for it.
Python has no such call, and libkeyutils would be one more dependency, so this
is the system call itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import sys
from collections.abc import Mapping
from typing import Any, Final

from qmpd.crypto.memory import KeyBuffer, KeyMemory
from qmpd.errors import Error
from qmpd.qom.secret import AnySecret

#: The number of the system call keyctl, for a process of 64 bits on each machine.
_KEYCTL: Final[Mapping[str, int]] = {
    "x86_64": 250,
    "aarch64": 219,
    "riscv64": 219,
    "loongarch64": 219,
    "ppc64": 271,
    "ppc64le": 271,
    "s390x": 280,
}

#: Linux's <linux/keyctl.h>.
_KEYCTL_READ: Final = 11

#: What the kernel's shortest answers mean here, beside the words that QEMU has for them.
_HINTS: Final[Mapping[int, str]] = {
    errno.ENOSYS: " (there is no key retention service in this kernel)",
    errno.EPERM: " (this process may not ask for keys: is it in a sandbox?)",
}


class KeyringSecret(AnySecret):
    """The object type "secret_keyring"."""

    qom_type = "secret_keyring"
    struct = "SecretKeyringProperties"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._serial: int = options["serial"]
        _check_serial(self._serial)

    async def _load(self, options: Mapping[str, Any], memory: KeyMemory) -> KeyBuffer:
        # In a thread: the kernel lets a reader wait for a key that is being made.
        return await asyncio.to_thread(read_key, options["serial"], memory)

    def set(self, name: str, value: Any) -> None:
        """Set a property; no other key is read.

        :raise Error: if it is the serial number, and none.
        """
        if name == "serial":
            _check_serial(value)
        super().set(name, value)


def _check_serial(serial: int) -> None:
    if serial == 0:
        raise Error("'serial' should not be equal to 0")


def read_key(serial: int, memory: KeyMemory) -> KeyBuffer:
    """What is in the key with this serial number, for the caller to wipe.

    :param serial: or the negative number of one of this process's own keyrings, as in <linux/keyctl.h>.
    :raise Error: if it can't be read, or if there is nothing in it.
    """
    refused = f"Unable to read serial key {serial & 0xFFFFFFFF:08x}"
    try:
        value = memory.take(keyctl_read(serial, None))
        # Whoever updates the key meanwhile may change its length.
        while (length := keyctl_read(serial, value.data)) != len(value):
            value.wipe()
            value = memory.take(length)
    except OSError as error:
        number = error.errno or 0
    else:
        if len(value):
            return value
        raise Error(refused)
    raise Error(f"{refused}: {os.strerror(number)}{_HINTS.get(number, '')}")


def keyctl_read(serial: int, buffer: memoryview | None) -> int:
    """Read a key, keyctl_read(3).

    :param buffer: is filled as far as it reaches; None to only ask for the length.
    :returns: the length of the key, in bytes.
    :raise OSError: if it can't be read.
    """
    number = _KEYCTL.get(os.uname().machine) if sys.maxsize > 1 << 32 else None
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    room = None if buffer is None else (ctypes.c_char * len(buffer)).from_buffer(buffer)
    length: int = syscall(
        ctypes.c_long(number),
        ctypes.c_long(_KEYCTL_READ),
        ctypes.c_long(serial),
        room,
        ctypes.c_size_t(len(buffer or b"")),
    )
    if length < 0:
        found = ctypes.get_errno()
        raise OSError(found, os.strerror(found))
    return length
