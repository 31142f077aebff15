"""Keys in the kernel, for tests: in the session's keyring, where the daemons of a test find them too.

A sandbox may refuse them all, or the kernel have none (:exc:`OSError`).
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

_SESSION_KEYRING: Final = -3

#: The operations of keyctl(2) that are used here, as <linux/keyctl.h> numbers them.
_REVOKE: Final = 3
_SET_PERMISSIONS: Final = 5
_UNLINK: Final = 9

#: Who has the key may see that it is there; nobody may read it.
UNREADABLE: Final = 0x01010000

#: The system calls add_key and keyctl.
_NUMBERS: Final = {"x86_64": (248, 250), "aarch64": (217, 219), "riscv64": (217, 219)}


def _call(index: int, *arguments: object) -> int:
    numbers = _NUMBERS[os.uname().machine]
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result: int = syscall(ctypes.c_long(numbers[index]), *words)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def add(name: str, payload: bytes, kind: str = "user") -> int:
    """Make a key and return its serial number.

    :raise OSError: there are no keys here.
    """
    room = payload or None
    return _call(0, kind.encode(), f"qmpd-test:{name}".encode(), room, len(payload), _SESSION_KEYRING)


def revoke(serial: int) -> None:
    _call(1, _REVOKE, serial)


def set_permissions(serial: int, permissions: int) -> None:
    _call(1, _SET_PERMISSIONS, serial, permissions)


def remove(serial: int) -> None:
    _call(1, _UNLINK, serial, _SESSION_KEYRING)


def refusal() -> OSError | None:
    """Return why there can be no keys here, or None if there can."""
    try:
        remove(add("probe", b"probe"))
    except OSError as error:
        return error
    return None
